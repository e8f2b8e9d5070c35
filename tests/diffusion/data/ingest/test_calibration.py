"""The threshold of near-duplicates that ``ingest.near_duplicates: auto`` chooses, and keeps."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import curate
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.calibration import SAMPLED, calibrate, calibrate_thresholds, estimate_shares
from diffusion.data.ingest.chunks import Chunk, perceptual_hash
from diffusion.data.ingest.config import UNCALIBRATED_BITS, IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.preview import preview
from diffusion.data.manifest import read_manifest, work_folder
from diffusion.data.versions.versions import show
from diffusion.evaluation.config import EvaluationConfig
from tests.builders.ingested import files_of, records
from tests.builders.real_images import digits
from tests.builders.shapes import blob


def config(source: Path, **fields: object) -> IngestConfig:
    fields_of_source = {"source": str(source), "size": 28, "held_out": 0.5, "near_duplicates": "auto", "workers": 1}
    return IngestConfig.model_validate(fields_of_source | fields)


def scans(count: int) -> list[Image.Image]:
    """Scans of digits."""
    return [Image.fromarray(image[0].numpy()) for image in digits(count)[0]]


def textures(count: int) -> list[Image.Image]:
    """Rough noise in colour, each unlike all others."""
    random = np.random.default_rng(0)
    rough = random.integers(0, 256, (count, 14, 14, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((28, 28), Image.Resampling.BICUBIC) for each in rough]


def blobs(count: int) -> list[Image.Image]:
    """Smooth noise, of which few bits of the hashes differ."""
    return [blob(number, 28) for number in range(count)]


def save(images: Iterable[Image.Image], root: Path, start: int = 0) -> Path:
    root.mkdir(exist_ok=True)
    for number, image in enumerate(images, start):
        image.save(root / f"{number:04d}.png")
    return root


def save_copies(images: Iterable[Image.Image], root: Path) -> None:
    """Write a copy of each image, compressed or of twice its size; it is read after the originals."""
    for number, image in enumerate(images):
        if number % 2:
            image.save(root / f"{number:04d}x.jpg", quality=80)
        else:
            image.resize((2 * image.width, 2 * image.height)).save(root / f"{number:04d}x.png")


def nearest(images: Iterable[Image.Image]) -> list[int]:
    """Distance in bits from each image to the nearest other one."""
    hashes = [int(perceptual_hash(image), 16) for image in images]
    return [min((one ^ two).bit_count() for j, two in enumerate(hashes) if i != j) for i, one in enumerate(hashes)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [scans, textures])
def test_copies_share_a_split_and_distinct_images_rarely(
    make: Callable[[int], list[Image.Image]], tmp_path: Path
) -> None:
    distinct = make(400)
    root = save(distinct, tmp_path / "images")
    save_copies(distinct[:100], root)
    result = ingest(tmp_path / "set", config(root))
    rows = {row["source"]: row for row in records(tmp_path / "set") if row["outcome"] == "kept"}
    copies = {name: row for name, row in rows.items() if "x" in str(name)}
    joined = [row for name, row in copies.items() if row["near"] == [rows[f"{str(name)[:4]}.png"]["key"]]]
    assert len(copies) >= 90
    assert len(joined) >= 0.9 * len(copies)
    assert all(row["split"] == rows[f"{str(name)[:4]}.png"]["split"] for name, row in copies.items() if row in joined)
    assert sum(row["near"] is not None for name, row in rows.items() if "x" not in str(name)) <= 0.02 * len(distinct)
    assert result.near_duplicates is not None
    assert result.near_duplicates.bits == read_manifest(tmp_path / "set").near_duplicate_bits
    assert result.near_duplicates.copies is not None
    assert result.near_duplicates.copies >= 0.99
    assert result.near_duplicates.warning is None


def test_missed_copies_of_near_images_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = blobs(300)
    distances = nearest(images)
    limit = max(bits for bits in range(49) if sum(each <= bits for each in distances) <= 3)
    with caplog.at_level(logging.WARNING):
        result = ingest(tmp_path / "set", config(save(images, tmp_path / "images")))
    near_duplicates = result.near_duplicates
    assert near_duplicates is not None
    assert near_duplicates.bits == limit < 10
    assert near_duplicates.others == sum(each <= limit for each in distances) / len(images)
    assert near_duplicates.copies is not None
    assert near_duplicates.copies < 0.9
    assert f"{limit} bits, and so misses about {1 - near_duplicates.copies:.0%} of copies" in caplog.text
    assert f"group {near_duplicates.copies:.1%} of copies" in near_duplicates.line
    assert sum(row["near"] is not None for row in records(tmp_path / "set")) <= 3


@pytest.mark.slow
def test_workers_and_runners_change_nothing(tmp_path: Path) -> None:
    root = save(scans(600), tmp_path / "images")
    save_copies(scans(50), root)
    manifests = []
    for name, runner, workers in (("a", "threads", 1), ("b", "threads", 4), ("c", "processes", 2)):
        ingest(tmp_path / name / "set", config(root, runner=runner, workers=workers))
        manifests.append(files_of(tmp_path / name / "set"))
    assert manifests[0] == manifests[1] == manifests[2]


@pytest.mark.slow
def test_the_first_choice_stays_until_a_rebuild(tmp_path: Path) -> None:
    root, folder = save(scans(200), tmp_path / "images"), tmp_path / "set"
    first = ingest(folder, config(root)).near_duplicates
    assert first is not None
    # Of these alone, or of both, it would be another one.
    save(blobs(200), root, start=1000)
    assert preview(folder, config(root)).new == 200
    assert ingest(folder, config(root)).near_duplicates is None
    assert read_manifest(folder).near_duplicate_bits == first.bits
    assert not ingest(folder, config(root)).changed
    near = [row for row in records(folder) if str(row["source"]) >= "1000" and row["near"] is not None]
    assert near
    assert show(folder, read_manifest(folder)).near_duplicate_bits == first.bits
    curate(folder, CurationConfig(min_entropy=0.1), config(root), EvaluationConfig())
    assert read_manifest(folder).near_duplicate_bits == first.bits
    again = ingest(folder, config(root), rebuild="always").near_duplicates
    assert again is not None
    assert again.bits == read_manifest(folder).near_duplicate_bits != first.bits


def test_auto_comes_back_to_the_first_choice_after_a_number(tmp_path: Path) -> None:
    root, folder = save(scans(100), tmp_path / "images"), tmp_path / "set"
    ingest(folder, config(root))
    bits = read_manifest(folder).near_duplicate_bits
    save_copies(scans(40), root)
    ingest(folder, config(root, near_duplicates=0))
    few = sum(row["near"] is not None for row in records(folder))
    assert few < 20
    assert read_manifest(folder).near_duplicate_bits == bits
    again = scans(100)[40:80]
    for number, image in enumerate(again, 40):
        image.resize((56, 56)).save(root / f"{number:04d}x.png")
    ingest(folder, config(root))
    assert read_manifest(folder).near_duplicate_bits == bits
    assert sum(row["near"] is not None for row in records(folder)) >= few + 36


def test_later_calibration_uses_old_and_new_images(tmp_path: Path) -> None:
    root, folder = save(scans(100), tmp_path / "images"), tmp_path / "set"
    ingest(folder, config(root, near_duplicates=None))
    save(scans(140)[100:], root, start=100)
    result = ingest(folder, config(root))
    assert result.near_duplicates is not None
    assert result.near_duplicates.images == 140
    assert read_manifest(folder).near_duplicate_bits == result.near_duplicates.bits
    whole = ingest(tmp_path / "other", config(root)).near_duplicates
    assert whole == result.near_duplicates


def test_few_images_are_calibrated_once_there_are_more(tmp_path: Path) -> None:
    root, folder = save(scans(30), tmp_path / "images"), tmp_path / "set"
    first = ingest(folder, config(root))
    assert first.near_duplicates is not None
    assert first.near_duplicates.bits == UNCALIBRATED_BITS
    assert "30 distinct images are too few" in first.near_duplicates.line
    assert read_manifest(folder).near_duplicate_bits is None
    assert not ingest(folder, config(root)).changed
    save(scans(80)[30:], root, start=30)
    assert ingest(folder, config(root)).near_duplicates == ingest(tmp_path / "all", config(root)).near_duplicates
    assert read_manifest(folder).near_duplicate_bits is not None


@pytest.mark.slow
@pytest.mark.long
def test_ingests_cut_off_end_as_undisturbed_ones(tmp_path: Path) -> None:
    root = save(scans(1100), tmp_path / "images")
    save_copies(scans(100), root)
    run = make_fan_out(IngestConfig(workers=1))
    contents: list[tuple[str, int]] = []

    def written(chunk: str) -> int:
        return (work_folder(tmp_path / "a" / "set") / "chunks" / f"{chunk}.parquet").stat().st_mtime_ns

    def cut_off(prepare: Callable[[Chunk], str], chunks: Iterable[Chunk]) -> Iterator[str]:
        for prepared in run(prepare, chunks):
            if contents:
                raise ConnectionError("cut off")
            contents.append((prepared, written(prepared)))
            yield prepared

    def watched(prepare: Callable[[Chunk], str], chunks: Iterable[Chunk]) -> Iterator[str]:
        for number, prepared in enumerate(run(prepare, chunks)):
            if number == 0:
                assert (prepared, written(prepared)) == contents[0]
            yield prepared

    with pytest.raises(ConnectionError):
        ingest(tmp_path / "a" / "set", config(root), fan_out=cut_off)
    assert files_of(tmp_path / "a" / "set") == {}
    ingest(tmp_path / "a" / "set", config(root), fan_out=watched)
    ingest(tmp_path / "b" / "set", config(root))
    assert files_of(tmp_path / "a" / "set") == files_of(tmp_path / "b" / "set")


@pytest.mark.slow
def test_a_large_source_is_sampled(tmp_path: Path) -> None:
    root = save(textures(SAMPLED + 300), tmp_path / "images")
    counts = []

    def note(what: str, done: int, total: int | None, note: str = "") -> None:
        if what == "images sampled":
            counts.append((done, total))

    result = ingest(tmp_path / "set", config(root), note)
    assert counts == [(number, SAMPLED) for number in range(SAMPLED)]
    assert result.near_duplicates is not None
    assert result.near_duplicates.images == SAMPLED
    assert result.kept == SAMPLED + 300


def test_unusable_and_equal_images_of_the_sample_do_not_count(tmp_path: Path) -> None:
    root = save(scans(100), tmp_path / "images")
    for number in range(40):
        (root / f"broken{number}.png").write_bytes(b"no image")
        shutil.copy(root / f"{number:04d}.png", root / f"again{number}.png")
    expected = ingest(tmp_path / "alone", config(save(scans(100), tmp_path / "good"))).near_duplicates
    assert ingest(tmp_path / "set", config(root)).near_duplicates == expected


def test_samples_estimate_limits_of_ten_times_as_many_images() -> None:
    images = scans(4000)
    distances = np.array(nearest_of_all(images))
    limit = max(bits for bits in range(49) if (distances <= bits).mean() <= 0.01)
    few = np.array(nearest_of_all(images[:400]))
    # Of the sample alone, 1 % have another one within more bits.
    unscaled = np.flatnonzero(estimate_shares(few, 1) <= 0.01)[-1]
    scaled = np.flatnonzero(estimate_shares(few, 10) <= 0.01)[-1]
    assert abs(scaled - limit) <= 8 < unscaled - limit
    # Of more images the sample tells nothing.
    np.testing.assert_array_equal(estimate_shares(few, 1e6), estimate_shares(few, 10))


def nearest_of_all(images: Iterable[Image.Image]) -> list[int]:
    """As ``nearest``, fast."""
    hashes = np.array([np.frombuffer(bytes.fromhex(perceptual_hash(image)), np.uint64) for image in images])
    return [int(np.partition(np.bitwise_count(hashes ^ own).sum(1), 1)[1]) for own in hashes]


def test_copies_among_the_images_do_not_lower_the_threshold() -> None:
    images = scans(300)
    alone = calibrate(images, 1)
    doubled = calibrate([*images, *(each.resize((56, 56)).resize((28, 28)) for each in images)], 1)
    assert abs(alone.bits - doubled.bits) <= 2
    assert doubled.others is not None
    assert doubled.others <= 0.01


def test_thresholds_of_reports_are_calibrated_by_own_copies() -> None:
    images = scans(200)
    hashes = [perceptual_hash(each) for each in images]
    thresholds, enough = calibrate_thresholds(images[:50], hashes, 11)
    assert enough is not None
    assert [each.bits for each in thresholds] == sorted({8, 11, 16, 24, 32, 40, 48, enough})
    assert min(each.copies for each in thresholds if each.bits >= enough) >= 0.99 > thresholds[0].copies
    for name in ("copies", "others"):
        shares = [getattr(each, name) for each in thresholds]
        assert shares == sorted(shares)
    # Other digits are further away than copies; every image beside itself is a near-duplicate at any threshold.
    assert thresholds[0].others == 0
    assert {each.others for each in calibrate_thresholds(images[:50], hashes * 2)[0]} == {1.0}


@pytest.mark.parametrize("value", [-1, 49, "most", 1.5, True])
def test_other_thresholds_are_rejected_with_one_error(value: object) -> None:
    with pytest.raises(ValidationError, match=r"1 validation error(?s:.)*from 0 to 48, auto or null"):
        config(Path("images"), near_duplicates=value)
