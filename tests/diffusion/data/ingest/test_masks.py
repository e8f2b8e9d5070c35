"""Masks of images: read from files, columns or opacity, cut as their images are, stored and replaced."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset, open_webdataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import Union, merge_versions, rewrite_part
from diffusion.data.ingest.preview import preview
from diffusion.data.loader import Loader, make_order
from diffusion.data.manifest import read_manifest, write_manifest
from diffusion.data.tables import content_digest
from diffusion.data.versions.difference import diff
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from tests.builders.ingested import records
from tests.builders.masked import read_masked, two_tone, write_masked
from tests.builders.reading_sources import Objects
from tests.hub import Hub


def masks_by_source(folder: Path) -> dict[str, np.ndarray]:
    dataset = Dataset.open(folder)
    rows = np.arange(len(dataset))
    masks: dict[str, np.ndarray] = {}
    for bucket in dataset.split_by_bucket(rows):
        masks |= dict(zip(dataset.sources(bucket), dataset.masks(bucket), strict=True))
    dataset.close()
    return masks


def own_masks(folder: Path) -> None:
    """Assert that each mask is its image, or white."""
    dataset = Dataset.open(folder)
    for bucket in dataset.split_by_bucket(np.arange(len(dataset))):
        pixels, masks = dataset.pixels(bucket)[..., 0], dataset.masks(bucket)
        numbers = [int(Path(name).name[:2]) for name in dataset.sources(bucket)]
        for image, mask, number in zip(pixels, masks, numbers, strict=True):
            assert np.array_equal(mask, image if number % 3 else np.full_like(image, 255))
    dataset.close()


@pytest.mark.parametrize(
    ("fields", "width", "height"),
    [
        ({}, 24, 24),
        ({"fit": "crop"}, 52, 24),
        ({"fit": "crop", "size": 12}, 24, 52),
        ({"fit": "pad", "size": 16}, 24, 52),
        ({"fit": "squash", "size": 16}, 52, 24),
        ({"fit": "bucket", "buckets": ["32x16", "24x24", "16x32"]}, 48, 24),
        ({"fit": "bucket", "buckets": ["32x16", "24x24", "16x32"]}, 24, 36),
    ],
)
def test_masks_are_cut_and_resized_as_their_images(
    tmp_path: Path, fields: dict[str, object], width: int, height: int
) -> None:
    source = write_masked(tmp_path / "images", width=width, height=height)
    result = read_masked(tmp_path / "data", source, enlarge=True, **fields)
    assert (result.kept, result.masks, result.quarantined_count) == (12, 8, 0)
    if fields.get("fit") != "pad":
        own_masks(tmp_path / "data")
        return
    for name, mask in masks_by_source(tmp_path / "data").items():
        # Black outside, as the image is; without a mask padding counts, too.
        assert (mask.min() == 255) == (int(name[:2]) % 3 == 0)
        assert not mask[:, 0].any() or mask.min() == 255


def test_rotated_photographs_have_upright_masks(tmp_path: Path) -> None:
    image = two_tone(0, 48, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    for name in ("00.png", "00.mask.png"):
        image.save(tmp_path / "images" / name, exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "images" / "01.png")
    result = read_masked(tmp_path / "data", tmp_path / "images")
    assert (result.kept, result.duplicates) == (1, 1)
    (mask,) = masks_by_source(tmp_path / "data").values()
    assert np.array_equal(mask, Dataset.open(tmp_path / "data").pixels([0])[0, ..., 0])


def archives(images: Path, root: Path) -> dict[str, str]:
    """The same images in each kind of source, with their masks."""
    files = sorted(images.iterdir())
    with tarfile.open(root / "a.tar", "w") as tar, zipfile.ZipFile(root / "a.zip", "w") as packed:
        for file in files:
            tar.add(file, file.name)
            packed.write(file, file.name)
    rows = [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "mask": {"bytes": mask.read_bytes(), "path": mask.name} if mask.exists() else None,
        }
        for path in files
        if ".mask" not in path.name
        for mask in [path.with_suffix(".mask.png")]
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    renamed = shutil.copytree(images, root / "renamed")
    for file in renamed.glob("*.mask.png"):
        file.rename(file.with_name(file.name.replace(".mask", "-masklabel")))
    table = shutil.copytree(images, root / "table")
    names = [{"file_name": path.name} for path in files if ".mask" not in path.name]
    (table / "metadata.jsonl").write_text("".join(f"{json.dumps(name)}\n" for name in names))
    return {
        "folder": str(images),
        "OneTrainer": str(renamed),
        "metadata": str(table),
        "tar": str(root / "a.tar"),
        "zip": str(root / "a.zip"),
        "webdataset": f"wds:{root / 'a.tar'}",
        "parquet": str(root / "a.parquet"),
    }


def test_all_sources_give_the_same_masks(tmp_path: Path) -> None:
    digests, without = set(), set()
    for kind, source in archives(write_masked(tmp_path / "images"), tmp_path).items():
        result = read_masked(tmp_path / kind, source)
        assert (result.kept, result.masks, result.captions_found.ignored) == (12, 8, {})
        own_masks(tmp_path / kind) if kind != "parquet" else None
        digests.add(result.content_digest)
        again = read_masked(tmp_path / kind, source)
        assert (again.changed, again.relabelled) == (False, 0)
        plain = read_masked(tmp_path / f"{kind} without", source, masks=None)
        assert (plain.kept, plain.masks) == (12, None)
        assert plain.captions_found.ignored or kind == "parquet"
        without.add(plain.content_digest)
    assert len(digests) == len(without) == 1
    assert digests != without


def test_remote_sources_give_the_same_masks(hub: Hub, tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images")
    local = archives(images, tmp_path)
    expected = read_masked(tmp_path / "local", images).content_digest
    files = {file.name: file.read_bytes() for file in images.iterdir()}
    hub.dataset("me/folder", files)
    hub.dataset("me/parquet", {"train.parquet": Path(local["parquet"]).read_bytes()})
    hub.dataset("me/wds", {"train.tar": Path(local["tar"]).read_bytes()})
    for name in ("folder", "parquet", "wds"):
        for attempt in ("first", "again"):  # with the listing that the first one left
            result = read_masked(tmp_path / name, f"hf://datasets/me/{name}")
            assert (result.content_digest, result.masks, result.changed) == (expected, 8, attempt == "first")
        plain = read_masked(tmp_path / name, f"hf://datasets/me/{name}", masks=None)
        assert (plain.changed, plain.masks) == (False, 8)
    bucket = Objects({f"s3://bucket/set/{name}": data for name, data in files.items()})
    config = IngestConfig.model_validate({"source": "s3://bucket/set", "size": 24, "masks": "files", "held_out": 0.3})
    assert ingest(tmp_path / "s3", config, objects=bucket).content_digest == expected


def test_a_name_like_a_mask_alone_is_an_image(tmp_path: Path) -> None:
    write_masked(tmp_path / "images", 2)
    two_tone(7).save(tmp_path / "images" / "phantom.mask.png")
    assert read_masked(tmp_path / "plain", tmp_path / "images", masks=None).kept == 3
    two_tone(8).save(tmp_path / "images" / "01-masklabel.png")
    result = read_masked(tmp_path / "masked", tmp_path / "images")
    ignored = {"mask without an image": 1, "second mask of an image": 1}
    assert (result.kept, result.masks, result.captions_found.ignored) == (2, 1, ignored)


def test_opacity_as_mask_leaves_the_colours_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        image = two_tone(number).convert("RGBA")
        image.putalpha(two_tone(number + 10))
        image.save(tmp_path / "images" / f"{number}.png")
    two_tone(5).save(tmp_path / "images" / "5.png")
    plain, masked = tmp_path / "plain", tmp_path / "masked"
    read_masked(plain, tmp_path / "images", masks=None, background="#808080")
    assert read_masked(masked, tmp_path / "images", masks="alpha", background="#808080").masks == 3
    assert {row["key"] for row in records(plain)} == {row["key"] for row in records(masked)}
    masks = masks_by_source(masked)
    assert masks.pop("5.png").min() == 255
    assert all(np.array_equal(mask, np.asarray(two_tone(int(name[0]) + 10))) for name, mask in masks.items())
    # A data set gets masks, and loses none, whatever the setting was.
    assert read_masked(plain, tmp_path / "images", masks="alpha", background="#808080").remasked == 3
    assert read_manifest(plain).content_digest == read_manifest(masked).content_digest
    again = read_masked(plain, tmp_path / "images", masks=None, background="#808080")
    assert (again.changed, again.masks, again.relabelled) == (False, 3, 0)


def test_unusable_masks_quarantine_their_images(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images", 6)
    (images / "01.mask.png").write_bytes(b"not an image")
    (images / "02.mask.png").write_bytes((images / "02.mask.png").read_bytes()[:-20])
    two_tone(4, 48, 24).save(images / "04.mask.png")
    two_tone(5, 12, 12).save(images / "05.mask.png")
    result = read_masked(tmp_path / "data", images)
    assert [entry.source for entry in result.quarantined] == ["01.png", "02.png", "04.png"]
    assert all(entry.reason.startswith("its mask") for entry in result.quarantined)
    assert result.masks == 1  # half as large is a mask as well
    shutil.copy(images / "04.png", images / "04.mask.png")
    fixed = read_masked(tmp_path / "data", images)
    assert (fixed.added, fixed.masks, fixed.quarantined_count) == (1, 2, 2)


def test_corrected_masks_replace_those_of_their_images(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images")
    shutil.copy(images / "05.png", images / "zz.png")
    first = read_masked(tmp_path / "data", images)
    for number in (0, 1, 5):
        two_tone(90 + number).save(images / f"{number:02d}.mask.png")
    Image.new("L", (24, 24), 255).save(images / "02.mask.png")
    two_tone(80).save(images / "zz.mask.png")  # of a copy
    second = read_masked(tmp_path / "data", images)
    assert (second.remasked, second.kept, second.masks, second.relabelled) == (4, 12, 8, 1)
    masks = masks_by_source(tmp_path / "data")
    for number in (0, 1, 5):
        assert np.array_equal(masks[f"{number:02d}.png"], np.asarray(two_tone(90 + number)))
    assert masks["02.png"].min() == 255
    (images / "zz.mask.png").unlink()
    fresh = read_masked(tmp_path / "fresh", images)
    assert fresh.content_digest == second.content_digest != first.content_digest
    versions = read_manifest(tmp_path / "data"), read_manifest(tmp_path / "fresh")
    assert content_digest(tmp_path / "data", versions[0].parts, versions[0].storage) == second.content_digest
    assert sorted(version.shards[0].bytes for version in versions)[0] > 0
    # An index that is built again, as on another machine, changes nothing.
    shutil.rmtree(tmp_path / ".data")
    again = read_masked(tmp_path / "data", images)
    assert (again.content_digest, again.remasked, again.masks) == (second.content_digest, None, 8)


def test_versions_differ_in_masks(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images")
    read_masked(tmp_path / "data", images)
    before = read_manifest(tmp_path / "data")
    remote = shutil.copytree(tmp_path / "data", tmp_path / "remote")
    two_tone(99).save(images / "04.mask.png")
    read_masked(tmp_path / "data", images)
    after = read_manifest(tmp_path / "data")
    changed = diff(tmp_path / "data", before, after, elsewhere=lambda entry: remote / entry.name).changed
    assert changed is not None
    assert changed.count == 1
    assert changed.samples[0].before.mask != changed.samples[0].after.mask


def test_masks_outlive_takedown(tmp_path: Path) -> None:
    data, images = tmp_path / "data", tmp_path / "images"
    for batch in range(3):
        read_masked(data, write_masked(images, 6, 6 * batch))
    key = next(str(row["key"]) for row in records(data) if row["source"] == "07.png")
    mask = next(str(row["mask"]) for row in records(data) if row["source"] == "07.png")
    remove(data, Selection(prefixes=[key]), "asked to")
    own_masks(data)
    assert all(row.get("mask") != mask for row in records(data))
    manifest = read_manifest(data)
    assert (manifest.kept, manifest.masks) == (17, 11)
    assert content_digest(data, manifest.parts, manifest.storage) == manifest.content_digest
    count = 0
    for shard in manifest.shards:
        with tarfile.open(data / shard.name) as tar:
            count += sum(name.endswith(".mask.png") for name in tar.getnames())
    assert count == 11


def test_batches_have_masks_mirrored_with_their_images(tmp_path: Path) -> None:
    read_masked(tmp_path / "data", write_masked(tmp_path / "images", 16))
    dataset = Dataset.open(tmp_path / "data")
    rows = dataset.rows("train")
    with Loader(dataset, rows, make_order(dataset, 0, 8), 8, flip_seed=3, masks=True) as loader:
        batch = loader.batch(0)
    assert batch.masks is not None
    for row, image, mask in zip(batch.rows, batch.images[:, 0], batch.masks, strict=True):
        number = int(dataset.sources([row])[0][:2])
        assert torch.equal(mask, image if number % 3 else torch.full_like(image, 255))


def test_other_training_scripts_get_masks(tmp_path: Path) -> None:
    read_masked(tmp_path / "data", write_masked(tmp_path / "images"))
    expected = masks_by_source(tmp_path / "data")
    names = {str(row["key"]): str(row["source"]) for row in records(tmp_path / "data")}
    samples = list(open_webdataset(tmp_path / "data"))
    assert len(samples) > 6
    assert all(np.array_equal(sample["mask"], expected[names[sample["key"]]]) for sample in samples)


def test_a_mask_of_another_shape_is_damage(tmp_path: Path) -> None:
    read_masked(tmp_path / "data", write_masked(tmp_path / "images", 2))
    manifest = read_manifest(tmp_path / "data")
    (part,) = manifest.parts
    rows = [row | {"mask_size": row["mask_size"] and 100} for row in records(tmp_path / "data")]
    changed = rewrite_part(tmp_path / "data", part, rows, 24, part.shard)
    write_manifest(tmp_path / "data", manifest.make_child("damage", [changed]))
    with pytest.raises(UserError):
        Dataset.open(tmp_path / "data").masks(np.arange(2))


def unite_lines(root: Path, change: Callable[[Path], object]) -> tuple[Path, Union]:
    """Two machines go on from one version: one reads a new mask of 05.png, another publishes ``change`` first."""
    images, local, remote = write_masked(root / "images"), root / "local" / "data", root / "remote" / "data"
    read_masked(local, images)
    base = read_manifest(local)
    shutil.copytree(root / "local", root / "remote")
    change(remote)
    two_tone(95).save(images / "05.mask.png")
    two_tone(96).save(images / "06.mask.png")
    assert read_masked(local, images).remasked == 2
    version = read_manifest(remote)
    for machine, manifest in (("remote", version), ("remote", base)):
        for entry in manifest.files:
            if (path := root / machine / "data" / entry.name).exists():
                shutil.copy(path, local / entry.name)
    for path in (remote / "versions").iterdir():
        shutil.copy(path, local / "versions")
    config = IngestConfig.model_validate({"source": str(images), "size": 24, "masks": "files", "held_out": 0.3})
    return local, merge_versions(local, config, version, base)


def test_new_masks_outlive_a_faster_machine(tmp_path: Path) -> None:
    local, union = unite_lines(tmp_path, lambda remote: read_masked(remote, write_masked(tmp_path / "more", 4, 20)))
    masks = masks_by_source(local)
    assert np.array_equal(masks["05.png"], np.asarray(two_tone(95)))
    assert np.array_equal(masks["06.png"], np.asarray(two_tone(96)))
    version = union.version
    assert (version.kept, version.masks) == (16, 12)
    assert content_digest(local, version.parts, version.storage) == version.content_digest
    again = read_masked(local, tmp_path / "images")
    assert (again.changed, again.relabelled) == (False, 0)


def test_masks_of_a_faster_machine_stay(tmp_path: Path) -> None:
    def change(remote: Path) -> None:
        images = write_masked(tmp_path / "other")
        two_tone(97).save(images / "07.mask.png")
        (before,) = read_manifest(remote).parts
        table = (remote / before.records.name).read_bytes()
        assert read_masked(remote, images).remasked == 1
        # As the flow brings it from where versions are stored.
        (remote / before.records.name).write_bytes(table)

    masks = masks_by_source(unite_lines(tmp_path, change)[0])
    assert np.array_equal(masks["05.png"], np.asarray(two_tone(95)))
    assert np.array_equal(masks["07.png"], np.asarray(two_tone(97)))


def test_copies_with_equal_masks_are_no_correction(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images", 3)
    for name in ("01.png", "01.mask.png"):
        shutil.copy(images / name, images / name.replace("01", "zz"))
    result = read_masked(tmp_path / "data", images)
    assert (result.kept, result.duplicates, result.relabelled) == (3, 1, 0)
    (row,) = (row for row in records(tmp_path / "data") if row["source"] == "zz.png")
    assert (row["reason"], row["offset"]) == (None, None)
    two_tone(90).save(images / "zz.mask.png")
    copied = read_masked(tmp_path / "copied", images)
    assert (copied.kept, copied.relabelled, copied.content_digest) == (3, 1, result.content_digest)
    # The copy's sample is not in the shard.
    (shard,) = read_manifest(tmp_path / "copied").shards
    with tarfile.open(tmp_path / "copied" / shard.name) as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 8


@pytest.mark.parametrize("copied_mask", [False, True])
def test_a_new_copy_does_not_hide_a_corrected_mask(tmp_path: Path, copied_mask: bool) -> None:
    images = write_masked(tmp_path / "images", 3)
    read_masked(tmp_path / "data", images)
    shutil.copy(images / "01.png", images / "00a.png")
    two_tone(90).save(images / "01.mask.png")
    if copied_mask:
        shutil.copy(images / "01.mask.png", images / "00a.mask.png")
    result = read_masked(tmp_path / "data", images)
    assert (result.kept, result.remasked) == (3, 1)
    assert np.array_equal(masks_by_source(tmp_path / "data")["01.png"], np.asarray(two_tone(90)))


def test_an_unusable_new_mask_leaves_the_old_one(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images")
    read_masked(tmp_path / "data", images)
    for number in range(1, 12):
        two_tone(60 + number).save(images / f"{number:02d}.mask.png")
    (images / "04.mask.png").write_bytes(b"not an image")
    for remasked in (10, None):  # named until it is mended
        result = read_masked(tmp_path / "data", images)
        assert (result.kept, result.remasked, result.quarantined_count) == (12, remasked, 0)
        assert list(result.mask_problems or ()) == ["04.png"]
    assert np.array_equal(masks_by_source(tmp_path / "data")["04.png"], np.asarray(two_tone(4)))
    two_tone(64).save(images / "04.mask.png")
    mended = read_masked(tmp_path / "data", images)
    assert (mended.remasked, mended.mask_problems) == (1, None)


def test_images_with_new_masks_count_beside_quarantined_ones(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images")
    read_masked(tmp_path / "data", images)
    two_tone(90).save(images / "01.mask.png")
    two_tone(91).save(images / "02.mask.png")
    (images / "bad.png").write_bytes(b"not an image")
    result = read_masked(tmp_path / "data", images)
    assert (result.remasked, result.quarantined_count) == (2, 1)


def test_a_mask_that_vanished_stays(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images", 3)
    first = read_masked(tmp_path / "data", images)
    (images / "01.mask.png").unlink()
    second = read_masked(tmp_path / "data", images)
    assert (second.changed, second.relabelled, second.duplicates) == (False, 0, 0)
    assert second.digest == first.digest


def test_previews_look_at_masks(tmp_path: Path) -> None:
    images = write_masked(tmp_path / "images", 6)
    (images / "01.mask.png").write_bytes(b"not an image")
    two_tone(4, 48, 24).save(images / "04.mask.png")
    config = IngestConfig.model_validate({"source": str(images), "size": 24, "masks": "files"})
    forecast = preview(tmp_path / "data", config).forecast
    result = ingest(tmp_path / "data", config)
    assert forecast is not None
    assert (forecast.kept, sum(forecast.quarantined.values())) == (result.kept, result.quarantined_count) == (4, 2)
    (images / "02.mask.png").write_bytes(b"not an image")
    again = preview(tmp_path / "data", config).forecast
    assert again is not None
    assert again.quarantined == {}
