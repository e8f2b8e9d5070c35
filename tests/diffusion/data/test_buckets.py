"""Images that are not square: stored in buckets of one shape each, and read back with the same pixels."""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset, open_webdataset
from diffusion.data.ingest.buckets import choose_shapes, nearest_shape
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import merge_versions
from diffusion.data.ingest.preview import preview
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.data.versions.versions import show
from tests.builders.bucketed import BUCKETS, SIZES, config, rectangle, write_rectangles
from tests.builders.ingested import files_of, records


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rectangles(tmp_path / "source")


def test_images_go_to_the_bucket_of_nearest_aspect(source: Path, tmp_path: Path) -> None:
    result = ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    assert (result.kept, result.quarantined_count) == (len(SIZES), 0)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.shapes == [(48, 24), (32, 32), (24, 48)]
    assert [sum(pair) for pair in zip(*manifest.shape_counts.values(), strict=True)] == [9, 6, 26]
    with closing(Dataset.open(tmp_path / "set")) as data:
        rows = np.arange(len(data))
        assert [manifest.shapes[bucket] for bucket in np.unique(data.buckets(rows))] == manifest.shapes
        pixels_by_image = {}
        for part in data.split_by_bucket(rows):
            for pixels in data.pixels(part):
                pixels_by_image[int(pixels[0, 0, 2]) // 3] = pixels
        for number, size in enumerate(SIZES):
            image = rectangle(number, *size)
            if size == (82, 50):  # of 82 columns, 41 rows have the aspect ratio of the bucket
                image = image.resize((48, 24), Image.Resampling.BICUBIC, (0, 4, 82, 45))
            np.testing.assert_array_equal(pixels_by_image[number], np.asarray(image))
        with pytest.raises(ValueError, match="shapes"):
            data.images(rows)


def test_the_same_images_without_a_cache_and_as_a_webdataset(source: Path, tmp_path: Path) -> None:
    ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    with (
        closing(Dataset.open(tmp_path / "set")) as data,
        closing(Dataset.open(tmp_path / "set", cache_bytes=0)) as bare,
    ):
        for rows in data.split_by_bucket(np.arange(len(data))):
            for _ in range(2):
                np.testing.assert_array_equal(data.pixels(rows), bare.pixels(rows))
        wide = data.split_by_bucket(data.rows("train"))[-1]
        expected = dict(zip(data.keys(wide), data.images(wide), strict=True))
    samples = list(open_webdataset(tmp_path / "set", shape=(24, 48)))
    assert {sample["key"] for sample in samples} == set(expected)
    assert all(np.array_equal(sample["image"], expected[sample["key"]]) for sample in samples)
    counts = read_manifest(tmp_path / "set").counts
    assert len(list(open_webdataset(tmp_path / "set"))) == counts["train"]
    with pytest.raises(UserError):
        open_webdataset(tmp_path / "set", shape=(8, 8))


def test_statistics_are_those_of_the_pixels(source: Path, tmp_path: Path) -> None:
    ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    manifest = read_manifest(tmp_path / "set")
    with closing(Dataset.open(tmp_path / "set")) as data:
        pieces = [data.pixels(rows).reshape(-1, 3) for rows in data.split_by_bucket(data.rows("train"))]
    values = np.concatenate(pieces) / 127.5 - 1
    np.testing.assert_allclose(manifest.mean, values.mean(0), atol=1e-9)
    np.testing.assert_allclose(manifest.std, values.std(0), atol=1e-9)


def test_buckets_chosen_from_the_data_stay_those_of_the_set(source: Path, tmp_path: Path) -> None:
    first, again = (ingest(tmp_path / name / "set", config(source)) for name in ("a", "b"))
    assert first.content_digest == again.content_digest
    assert files_of(tmp_path / "a" / "set") == files_of(tmp_path / "b" / "set")
    shapes = read_manifest(tmp_path / "a" / "set").shapes
    assert len(shapes) >= 3
    for number in range(60, 80):
        rectangle(number, 64, 16).save(source / f"{number}.png")
    assert ingest(tmp_path / "a" / "set", config(source, enlarge=True)).added == 20
    assert read_manifest(tmp_path / "a" / "set").shapes == shapes
    assert ingest(tmp_path / "a" / "set", config(source, enlarge=True), rebuild="always").changed
    assert read_manifest(tmp_path / "a" / "set").shapes != shapes


def test_preview_names_the_buckets_and_their_shares(source: Path, tmp_path: Path) -> None:
    lines = preview(tmp_path / "set", config(source, buckets=BUCKETS)).lines()
    (line,) = (line for line in lines if line.startswith("buckets"))
    assert "24x48 22%, 32x32 15%, 48x24 63%" in line


def test_the_order_of_buckets_in_the_configuration_changes_nothing(source: Path, tmp_path: Path) -> None:
    result = [ingest(tmp_path / each[0], config(source, buckets=each)) for each in (BUCKETS, BUCKETS[::-1])]
    assert result[0].content_digest == result[1].content_digest


def test_other_buckets_are_another_data_set(source: Path, tmp_path: Path) -> None:
    ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    with pytest.raises(UserError):
        ingest(tmp_path / "set", config(source, buckets=BUCKETS[:2]))
    with pytest.raises(UserError):
        ingest(tmp_path / "set", config(source, fit="crop"))


@pytest.mark.parametrize(
    "fields",
    [
        {"fit": "crop", "buckets": ["48x24"]},
        {"buckets": ["48x48"]},
        {"buckets": ["128x8", "32x32", "128x8"]},
        {"buckets": ["34x34", "48x24", "32x32"]},
        {"buckets": ["48by24"]},
        {"buckets": []},
    ],
)
def test_buckets_that_contradict_the_rest_are_rejected(source: Path, fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(source, **fields)


def test_images_smaller_than_their_bucket_are_quarantined_or_enlarged(source: Path, tmp_path: Path) -> None:
    rectangle(80, 40, 20).save(source / "small.png")
    assert ingest(tmp_path / "set", config(source, buckets=BUCKETS)).quarantined_count == 1
    assert ingest(tmp_path / "other", config(source, buckets=BUCKETS, enlarge=True)).kept == len(SIZES) + 1


def test_an_upright_photograph_goes_where_it_is_seen_to_go(source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        path.unlink()
    exif = Image.Exif()
    exif[0x112] = 6
    rectangle(1, 480, 240).save(source / "turned.jpg", exif=exif, quality=95)
    ingest(tmp_path / "set", config(source, buckets=BUCKETS, held_out=0.01))
    assert read_manifest(tmp_path / "set").shape_counts["train"] == [1, 0, 0]


def test_takedown_leaves_the_shapes_of_the_parts(source: Path, tmp_path: Path) -> None:
    ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    before = read_manifest(tmp_path / "set")
    names = [str(row["source"]) for row in records(tmp_path / "set") if row["source"] in ("00.png", "20.png")]
    assert len(names) == 2
    remove(tmp_path / "set", Selection(sources=tuple(names)), "asked for")
    after = read_manifest(tmp_path / "set")
    assert [part.shape for part in after.parts] == [part.shape for part in before.parts]
    with closing(Dataset.open(tmp_path / "set")) as data:
        for rows in data.split_by_bucket(np.arange(len(data))):
            assert len(data.images(rows)) == len(rows)
    without = tmp_path / "without"
    shutil.copytree(source, without)
    for name in names:
        (without / name).unlink()
    assert ingest(tmp_path / "fresh", config(without, buckets=BUCKETS)).content_digest == after.content_digest


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(8, 400), st.integers(8, 400)), min_size=1, max_size=40),
    st.sampled_from([28, 32, 64, 96, 512]),
)
def test_chosen_shapes_are_few_equal_in_area_and_order_free(sizes: list[tuple[int, int]], size: int) -> None:
    shapes = choose_shapes(sizes, size)
    assert 1 <= len(shapes) <= 8
    assert shapes == choose_shapes(sizes[::-1], size)
    assert all(abs(height * width / size**2 - 1) <= 0.125 for height, width in shapes)
    assert all(side % 4 == 0 for shape in shapes for side in shape)
    IngestConfig(fit="bucket", size=size, buckets=tuple(f"{width}x{height}" for height, width in shapes))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_nearest_shape_is_that_of_the_nearest_logarithm(width: int, height: int) -> None:
    shapes = choose_shapes([(300, 100), (100, 300), (100, 100), (150, 100)] * 10, 64)
    ratio, own = np.log(width / height), np.log([wide / high for high, wide in shapes])
    index = shapes.index(nearest_shape(width, height, shapes))
    assert abs(own[index] - ratio) <= np.abs(own - ratio).min() + 1e-9


def test_a_version_tells_how_many_images_each_bucket_has(source: Path, tmp_path: Path) -> None:
    ingest(tmp_path / "set", config(source, buckets=BUCKETS))
    manifest = read_manifest(tmp_path / "set")
    assert show(tmp_path / "set", manifest).buckets == {"24x48": 9, "32x32": 6, "48x24": 26}


def test_two_lines_of_versions_are_united_bucket_by_bucket(source: Path, tmp_path: Path) -> None:
    ingest_config = config(source, buckets=BUCKETS)
    base = tmp_path / "ours" / "set"
    ingest(base, ingest_config)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    first = read_manifest(base)
    for folder, number, size in ((base, 81, (48, 24)), (tmp_path / "theirs" / "set", 82, (24, 48))):
        rectangle(number, *size).save(source / f"{number}.png")
        ingest(folder, ingest_config)
        (source / f"{number}.png").unlink()
    theirs = read_manifest(tmp_path / "theirs" / "set")
    for entry in theirs.files:
        if not (base / entry.name).exists():
            shutil.copyfile(tmp_path / "theirs" / "set" / entry.name, base / entry.name)
    assert merge_versions(base, ingest_config, theirs, first).added == 1
    assert show(base, read_manifest(base)).buckets == {"24x48": 10, "32x32": 6, "48x24": 27}
