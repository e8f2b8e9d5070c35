"""Ingest: images in, exact shards and a manifest out; again, and only what is new is read."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.chunks import Chunk, chunk_size
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import split_of
from diffusion.data.ingest.preview import preview
from diffusion.data.manifest import read_manifest, versions, work_folder
from diffusion.data.tables import content_digest
from tests.builders.ingested import files_of, records
from tests.builders.real_images import digits
from tests.builders.shapes import blob


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 8, "held_out": 0.33} | fields)


def add_images(root: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        blob(number).save(root / "odd" / f"{number}.png")


@pytest.mark.slow
def test_same_images_give_the_same_bytes_on_threads_and_processes(images: Path, tmp_path: Path) -> None:
    add_images(images, range(100, 700))
    contents = []
    for name, runner, workers in (("a", "threads", 1), ("b", "threads", 4), ("c", "processes", 2)):
        ingest(tmp_path / name / "set", config(images, runner=runner, workers=workers))
        contents.append(files_of(tmp_path / name / "set"))
    assert contents[0] == contents[1] == contents[2]
    assert len([name for name in contents[0] if name.endswith(".tar")]) == 2


def test_content_digest_depends_on_pixels_and_storage_alone(images: Path, tmp_path: Path) -> None:
    digest = ingest(tmp_path / "a", config(images)).content_digest
    (images / "odd" / "01.png").rename(images / "odd" / "zz.png")
    assert ingest(tmp_path / "b", config(images)).content_digest == digest
    shutil.move(images / "odd" / "zz.png", tmp_path / "zz.png")
    assert ingest(tmp_path / "c", config(images)).content_digest != digest
    shutil.move(tmp_path / "zz.png", images / "odd" / "zz.png")
    assert ingest(tmp_path / "c", config(images)).content_digest == digest
    assert ingest(tmp_path / "d", config(images, size=9)).content_digest != digest
    blob(999).save(images / "odd" / "zz.png")
    assert ingest(tmp_path / "e", config(images)).content_digest != digest


def test_content_digest_is_that_of_the_tables(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert manifest.content_digest == content_digest(dataset, manifest.parts, manifest.storage)


def test_standard_webdataset_reads_the_shards(dataset: Path) -> None:
    urls = [str(dataset / shard.name) for shard in read_manifest(dataset).shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 48
    rows = {row["key"]: row for row in records(dataset)}
    for sample in samples:
        about = json.loads(sample["json"])
        row = rows[sample["__key__"]]
        assert about == {
            "label": row["label"],
            "caption": None,
            "source": row["source"],
            "sha256": row["source_sha256"],
        }


def test_table_offsets_point_at_the_pngs(dataset: Path, tmp_path: Path) -> None:
    for part in read_manifest(dataset).parts:
        assert part.shard is not None
        shard = dataset / part.shard.name
        with tarfile.open(shard) as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
        for row in pq.read_table(dataset / part.records.name).to_pylist():
            assert places[f"{row['key']}.png"] == (row["offset"], row["size"])


def test_second_ingest_reads_only_new_images_and_keeps_old_files(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    first = ingest(folder, config(images))
    before = files_of(folder)
    add_images(images, range(100, 107))
    blob(3).save(images / "odd" / "copy.png")
    second = ingest(folder, config(images))
    assert (second.listed, second.read, second.added, second.kept) == (56, 8, 7, 55)
    assert second.duplicates == 1
    after = files_of(folder)
    assert {name: data for name, data in before.items() if name != "manifest.json"}.items() <= after.items()
    manifest = read_manifest(folder)
    assert manifest.parent == first.digest
    assert [version.digest for version in versions(folder)] == [second.digest, first.digest]


def test_the_same_again_changes_nothing_and_reads_nothing(images: Path, dataset: Path) -> None:
    before = files_of(dataset)
    again = ingest(dataset, config(images))
    assert (again.changed, again.read, again.added) == (False, 0, 0)
    assert files_of(dataset) == before


def test_touched_files_are_read_and_recognised_by_their_bytes(images: Path, dataset: Path) -> None:
    before = files_of(dataset)
    for path in (images / "odd").iterdir():
        os.utime(path, ns=(1, 1))
    again = ingest(dataset, config(images))
    assert (again.changed, again.read) == (False, 24)
    assert files_of(dataset) == before
    assert ingest(dataset, config(images)).read == 0


def test_the_same_names_from_another_folder_are_other_images(images: Path, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "tomorrow"
    for number in range(24):
        path = other / "odd" / f"{2 * number + 1:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(500 + number).save(path)
    assert ingest(dataset, config(other)).added == 24
    assert [ingest(dataset, config(each)).changed for each in (images, other)] == [False, False]
    assert [ingest(dataset, config(each)).read for each in (images, other)] == [0, 0]


def test_lost_index_is_rebuilt_without_changing_the_data_set(images: Path, dataset: Path) -> None:
    add_images(images, range(100, 110))
    ingest(dataset, config(images))
    before = files_of(dataset)
    shutil.rmtree(work_folder(dataset))
    again = ingest(dataset, config(images))
    assert (again.changed, again.read) == (False, 58)
    assert files_of(dataset) == before


def test_damaged_index_is_rebuilt(images: Path, dataset: Path) -> None:
    before = files_of(dataset)
    (work_folder(dataset) / "index.sqlite").write_bytes(b"junk" * 4096)
    assert not ingest(dataset, config(images)).changed
    assert files_of(dataset) == before


def test_an_older_version_put_back_gets_the_missing_images_again(images: Path, dataset: Path) -> None:
    old = files_of(dataset)
    add_images(images, range(100, 110))
    newest = ingest(dataset, config(images))
    shutil.rmtree(dataset)
    for name, data in old.items():
        path = dataset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    again = ingest(dataset, config(images))
    assert (again.added, again.content_digest) == (10, newest.content_digest)


def test_bad_images_are_quarantined_and_retried_on_request(images: Path, tmp_path: Path) -> None:
    bad = [images / "odd" / f"bad{number}.png" for number in range(3)]
    for path in bad:
        path.write_text(f"not an image: {path.name}")
    folder = tmp_path / "set"
    first = ingest(folder, config(images))
    assert {each.source for each in first.quarantined} == {f"odd/bad{number}.png" for number in range(3)}
    assert all("not an image" in each.reason and len(each.sha256) == 64 for each in first.quarantined)
    quarantined_rows = [row for row in records(folder) if row["outcome"] == "quarantined"]
    assert [row["source"] for row in quarantined_rows] == [each.source for each in first.quarantined]

    assert ingest(folder, config(images)).read == 0
    again = ingest(folder, config(images), requeue=True)
    assert (again.read, again.changed) == (3, False)

    small = images / "odd" / "small.png"
    blob(800, 4).save(small)
    assert "enlarge" in ingest(folder, config(images, max_quarantined=1)).quarantined[-1].reason
    mended = ingest(folder, config(images, enlarge=True), requeue=True)
    assert (mended.added, mended.quarantined_count) == (1, 3)
    blob(801).save(bad[0])
    assert ingest(folder, config(images)).quarantined_count == 2


def test_too_many_bad_images_name_reasons_and_change_nothing(images: Path, dataset: Path) -> None:
    before = files_of(dataset)
    for number in range(60):
        (images / "odd" / f"bad{number}.png").write_text("x")
    add_images(images, range(100, 110))
    with pytest.raises(UserError, match=r"60 of 70.*60 × not an image"):
        ingest(dataset, config(images))
    assert files_of(dataset) == before
    assert ingest(dataset, config(images, max_quarantined=0.9)).added == 10


def test_quarantined_images_of_a_failed_ingest_are_read_again(images: Path, dataset: Path) -> None:
    add_images(images, [100])
    path = next(iter(images.rglob("*100*.png")))
    good, stat = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(good)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="1 of 1"):
        ingest(dataset, config(images, max_quarantined=0.5))
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ingest(dataset, config(images, max_quarantined=0.5)).added == 1


def test_a_source_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(UserError, match="no images"):
        ingest(tmp_path / "set", config(root))
    (root / "a.png").write_text("x")
    with pytest.raises(UserError, match="no usable image"):
        ingest(tmp_path / "set", config(root))
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_changed_storage_settings_require_rebuild(images: Path, dataset: Path) -> None:
    first = read_manifest(dataset)
    with pytest.raises(UserError, match=r"ingest.size=8 and this is 9.*--rebuild"):
        ingest(dataset, config(images, size=9))
    shutil.rmtree(images / "odd")
    result = ingest(dataset, config(images, size=9), rebuild="if_different")
    manifest = read_manifest(dataset)
    assert (result.kept, manifest.size, manifest.parent, manifest.change) == (24, 9, first.digest, "rebuild")
    assert len(list(dataset.glob("shards/*.tar"))) == 1
    before = files_of(dataset)
    assert not ingest(dataset, config(images, size=9), rebuild="if_different").changed
    assert not ingest(dataset, config(images, size=9), rebuild="always").changed
    assert files_of(dataset) == before


def test_equal_pixels_with_another_caption_are_noted_duplicates(images: Path, dataset: Path) -> None:
    shutil.copy(images / "odd" / "01.png", images / "even" / "x.png")
    shutil.copy(images / "odd" / "01.png", images / "odd" / "x.png")
    ingest(dataset, config(images))
    notes = {row["source"]: row["reason"] for row in records(dataset) if row["outcome"] == "duplicate"}
    assert notes == {"even/x.png": "came again with another label or caption", "odd/x.png": None}


def test_corrected_labels_are_noted_until_a_rebuild(tmp_path: Path) -> None:
    root, folder = tmp_path / "images", tmp_path / "set"
    root.mkdir()
    for number in range(10):
        blob(number).save(root / f"{number}.png")

    def tell(labels: list[str]) -> None:
        lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
        (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))

    tell(["cat"] * 10)
    ingest(folder, config(root))
    tell(["cat"] * 8 + ["dog"] * 2)
    noted = ingest(folder, config(root))
    assert (noted.changed, noted.read, noted.added) == (True, 2, 0)
    sources = [row["source"] for row in records(folder) if row["reason"] == "came again with another label or caption"]
    assert sources == ["8.png", "9.png"]
    assert not ingest(folder, config(root)).changed
    ingest(folder, config(root), rebuild="always")
    assert read_manifest(folder).labels == ["cat", "dog"]


def test_duplicates_across_shards_leave_the_first_alone(images: Path, tmp_path: Path) -> None:
    add_images(images, range(100, 700))
    for number in range(0, 48, 2):
        shutil.copy(images / "even" / f"{number:02d}.png", images / "odd" / f"zz{number}.png")
    folder = tmp_path / "set"
    result = ingest(folder, config(images))
    assert (result.kept, result.duplicates) == (648, 24)
    names = []
    for part in read_manifest(folder).parts:
        assert part.shard is not None
        with tarfile.open(folder / part.shard.name) as tar:
            names += tar.getnames()
    assert len(names) == len(set(names)) == 2 * 648
    assert len(Dataset.open(folder).images(range(648))) == 648


def noisy(number: int, strength: float) -> Image.Image:
    """A near-copy of blob ``number``: a little brighter."""
    return blob(number, 24).point(lambda value: min(255, round(value + strength)))


def test_near_duplicates_share_a_split(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    folder = tmp_path / "set"
    for number in range(20):
        noisy(number, 0).save(root / f"{number:02d}.png")
    first = config(root, size=24, near_duplicates=8, held_out=0.5)
    ingest(folder, first)
    splits = {row["source"]: row["split"] for row in records(folder)}
    for number in range(20):
        noisy(number, 6).save(root / f"{number:02d}-brighter.png")
    second = ingest(folder, first)
    assert second.added == 20
    rows = {row["source"]: row for row in records(folder)}
    for number in range(20):
        newcomer = rows[f"{number:02d}-brighter.png"]
        assert newcomer["split"] == splits[f"{number:02d}.png"]
        assert newcomer["near"] == [rows[f"{number:02d}.png"]["key"]]
    assert set(splits.values()) == {"train", "held_out"}
    # By chance alone, half of the near-copies would lie in the other split.
    assert any(split_of(str(rows[f"{n:02d}-brighter.png"]["key"]), 0.5) != splits[f"{n:02d}.png"] for n in range(20))


def test_near_duplicate_of_both_splits_is_quarantined(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    folder = tmp_path / "set"
    # Asked for only later, near-copies lie in both splits.
    for step in range(12):
        noisy(5, step).save(root / f"{step:02d}.png")
    ingest(folder, config(root, size=24, held_out=0.5))
    assert {row["split"] for row in records(folder)} == {"train", "held_out"}
    noisy(5, 13).save(root / "bridge.png")
    result = ingest(folder, config(root, size=24, held_out=0.5, near_duplicates=8, max_quarantined=1))
    assert [each.reason for each in result.quarantined] == ["a near-copy of images in both splits"]


def test_previews_use_the_index_of_shards_elsewhere(tmp_path: Path) -> None:
    root, folder = tmp_path / "images", tmp_path / "set"
    root.mkdir()
    for number in range(3):
        blob(number, 24).save(root / f"{number}.png")
    settings = config(root, size=24, near_duplicates=8)
    ingest(folder, settings)
    shutil.rmtree(folder / "shards")
    # Without them the index cannot be built again.
    for path in folder.rglob("*.parquet"):
        path.unlink()
    blob(3, 24).save(root / "3.png")
    forecast = preview(folder, settings).forecast
    assert forecast is not None
    assert forecast.kept == 1


def row_of(key: str, phash: int, near: list[str] | None = None) -> dict[str, Any]:
    names = {"source": key, "source_sha256": "00", "key": key, "phash": f"{phash:064x}", "near": near}
    return names | {"outcome": "kept", "split": "train", "label": None, "caption": None}


def test_groups_go_on_without_their_first_image(tmp_path: Path) -> None:
    first, second = ("aa" * 32, "bb" * 32)
    with closing(Index(tmp_path / "whole", tmp_path, None, 8)) as index:
        index.record(row_of(first, 0))
        index.record(row_of(second, 0xFF, [first]))
        # Within 8 bits of a member, and of no first image.
        assert index.groups_near(f"{0xFFFF:064x}") == []
    with closing(Index(tmp_path / "taken down", tmp_path, None, 8)) as index:
        index.record(row_of(second, 0xFF, [first]))
        assert index.groups_near(f"{0xFFFF:064x}") == [(b"\xbb" * 32, "train")]


def test_aborted_transaction_leaves_no_groups(tmp_path: Path) -> None:
    key, phash = "aa" * 32, f"{0xFF:064x}"
    with closing(Index(tmp_path / "index", tmp_path, None, 8)) as index:
        with suppress(ConnectionError), index.transaction():
            index.record(row_of(key, 0))
            index.flush()
            assert index.groups_near(phash) == [(bytes.fromhex(key), "train")]
            raise ConnectionError
        assert index.groups_near(phash) == []
        assert index.sample(key) is None


@pytest.mark.slow
def test_near_duplicates_are_copies_and_few_distinct_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    distinct, _ = digits(800)
    for number, image in enumerate(distinct):
        Image.fromarray(image[0].numpy()).save(root / f"{number:04d}.png")
    folder = tmp_path / "set"
    ingest(folder, config(root, size=28, near_duplicates=24))
    assert sum(row["near"] is not None for row in records(folder)) <= 4
    for number in range(100):
        original = Image.fromarray(distinct[number, 0].numpy())
        original.resize((56, 56), Image.Resampling.BICUBIC).save(root / f"{number:04d}-twice.png")
        original.save(root / f"{number:04d}-packed.jpg", quality=80)
    ingest(folder, config(root, size=28, near_duplicates=24))
    rows = {row["source"]: row for row in records(folder)}
    copies = {name: row for name, row in rows.items() if "-" in name and row["outcome"] == "kept"}
    near_rows = [row for name, row in copies.items() if row["near"] == [rows[f"{name[:4]}.png"]["key"]]]
    assert len(copies) > 150
    assert len(near_rows) >= 0.97 * len(copies)


def failing_after(count: int, seen: dict[str, int], folder: Path) -> Callable[..., Iterator[str]]:
    """A fan-out that is cut off after some chunks; notes when each table was written."""
    run = make_fan_out(IngestConfig(workers=1))

    def fan_out(prepare: Callable[[Chunk], str], chunks: Iterable[Chunk]) -> Iterator[str]:
        for number, prepared in enumerate(run(prepare, chunks)):
            seen[prepared] = (work_folder(folder) / "chunks" / f"{prepared}.parquet").stat().st_mtime_ns
            if number == count:
                raise ConnectionError("cut off")
            yield prepared

    return fan_out


def test_finished_chunks_are_taken_up_after_a_failure(images: Path, tmp_path: Path) -> None:
    add_images(images, range(100, 1800))
    undisturbed, folder = tmp_path / "a" / "set", tmp_path / "b" / "set"
    ingest(undisturbed, config(images))
    before: dict[str, int] = {}
    with pytest.raises(ConnectionError):
        ingest(folder, config(images), fan_out=failing_after(2, before, folder))
    assert files_of(folder) == {}
    after: dict[str, int] = {}
    ingest(folder, config(images), fan_out=failing_after(99, after, folder))
    assert len(before) == 3 < len(after)
    assert before.items() <= after.items()
    assert files_of(folder) == files_of(undisturbed)


def test_damaged_shard_is_named_and_rewritten_on_request(images: Path, dataset: Path) -> None:
    before = files_of(dataset)
    shard = next(dataset.glob("shards/*.tar"))
    shard.write_bytes(before[f"shards/{shard.name}"][:1000])
    with pytest.raises(UserError, match=rf"{shard.name} is 1000 bytes long.*data checkout.*--rebuild"):
        ingest(dataset, config(images))
    assert not ingest(dataset, config(images), rebuild="always").changed
    assert files_of(dataset) == before


def test_one_colour_image_gives_a_set_three_channels(images: Path, dataset: Path) -> None:
    assert Dataset.open(dataset).shape == (1, 8, 8)
    blob(77, 12, "RGB").save(images / "odd" / "colour.png")
    ingest(dataset, config(images))
    data = Dataset.open(dataset)
    assert data.shape == (3, 8, 8)
    assert data.images([0]).shape == (1, 3, 8, 8)


def test_manifest_statistics_cover_training_images_of_all_parts(images: Path, dataset: Path) -> None:
    add_images(images, range(100, 130))
    ingest(dataset, config(images))
    data = Dataset.open(dataset)
    assert len(data.manifest.parts) == 2
    x = data.images(data.rows("train")).double() / 127.5 - 1
    assert data.manifest.mean[0] == pytest.approx(x.mean().item())
    assert data.manifest.std[0] == pytest.approx(x.std(correction=0).item())
    assert data.manifest.sigma_data == pytest.approx(data.manifest.std[0])


@given(st.binary(min_size=32, max_size=32), st.floats(0.05, 0.95), st.floats(0, 0.5))
def test_images_stay_held_out_when_the_split_grows(digest: bytes, share: float, more: float) -> None:
    key = digest.hex()
    if split_of(key, share) == "held_out":
        assert split_of(key, share + more) == "held_out"


@given(st.integers(1, 3_000_000), st.sampled_from([8, 28, 32, 64, 256, 1024]), st.integers(2**16, 2**30))
def test_chunks_fit_shards_and_small_sets_get_several(images: int, size: int, most: int) -> None:
    count = chunk_size(images, IngestConfig(size=size, shard_bytes=most))
    assert 1 <= count <= 8192
    assert count == 1 or count * size**2 <= most
    if images > 8 * 512 and most >= 2**26 and size <= 64:
        assert -(-images // count) >= 8


def test_a_first_ingest_that_fails_leaves_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(4):
        (tmp_path / "set" / f"{number}.heic").write_bytes(b"ftypheic")
    with pytest.raises(UserError, match=r"no usable image .*4 × not an image in a known format"):
        ingest(tmp_path / "data" / "photos", config(tmp_path / "set"))
    assert not (tmp_path / "data" / "photos").exists()


def test_skipped_files_and_changed_labels_are_reported(images: Path, tmp_path: Path) -> None:
    (images / "odd" / "notes.txt").write_text("of a walk")
    shutil.copy(images / "even" / "00.png", images / "odd" / "00.png")
    result = ingest(tmp_path / "data", config(images))
    assert (result.passed_over, result.relabelled, result.duplicates) == ({".txt": 1}, 1, 1)
    assert ingest(tmp_path / "data", config(images)).relabelled == 0
