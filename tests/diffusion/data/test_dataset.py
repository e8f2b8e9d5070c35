"""A data set as training sees it: rows free of history, images that are bit by bit those that were stored."""

from contextlib import closing
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import webdataset

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset, open_table
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from tests.builders.built_datasets import BuiltDataset, image_record, key_of
from tests.builders.small_datasets import as_stored, random_images, write_dataset

LABELS = ["cat", None, "dog", "cat", "ant"]


def by_key(images: np.ndarray) -> list[int]:
    """The numbers of ``images`` in the order of their keys."""
    keys = [key_of(as_stored(each)) for each in images]
    return sorted(range(len(keys)), key=keys.__getitem__)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_rows_are_sorted_by_key_and_hold_the_stored_pixels(tmp_path: Path, channels: int, cache_bytes: int) -> None:
    images = random_images(50, channels)
    write_dataset(tmp_path / "set", images, per_shard=7)
    order = by_key(images)
    with closing(Dataset.open(tmp_path / "set", cache_bytes=cache_bytes)) as data:
        assert data.shape == (channels, 8, 8)
        assert data.keys(range(50)) == [key_of(as_stored(images[number])) for number in order]
        assert data.images([]).shape == (0, channels, 8, 8)
        rows = [49, 3, 3, 17, 0]
        for _ in range(2):  # decoded first, then perhaps remembered
            pixels = data.images(rows)
            assert pixels.dtype == torch.uint8
            np.testing.assert_array_equal(pixels.numpy(), images[[order[row] for row in rows]])


def test_modifying_a_batch_does_not_change_the_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", random_images(4), per_shard=4)
    with closing(Dataset.open(tmp_path / "set")) as data:
        first = data.images([0, 1])
        before = first.clone()
        first.zero_()
        assert torch.equal(data.images([0, 1]), before)


def test_images_over_the_cache_budget_are_read_every_time(tmp_path: Path) -> None:
    images = random_images(16)
    manifest = write_dataset(tmp_path / "set", images, per_shard=16)
    shard = tmp_path / "set" / manifest.shards[0].name
    remembering, frugal = (
        Dataset.open(tmp_path / "set", cache_bytes=budget) for budget in (images.nbytes, images.nbytes - 1)
    )
    with closing(remembering), closing(frugal):
        whole = remembering.images(range(16))
        assert torch.equal(frugal.images(range(16)), whole)
        shard.write_bytes(bytes(shard.stat().st_size))
        assert torch.equal(remembering.images(range(16)), whole)
        with pytest.raises(UserError, match=r"an image in .*set is not what its record says"):
            frugal.images([0])


def test_labels_captions_splits_and_shards_are_those_of_the_records(tmp_path: Path) -> None:
    images = random_images(20)
    labels = [LABELS[number % 5] for number in range(20)]
    captions = [f"number {number}" if number % 3 else None for number in range(20)]
    write_dataset(tmp_path / "set", images, 6, labels, captions)
    order = by_key(images)
    with closing(Dataset.open(tmp_path / "set")) as data:
        assert data.labels(range(20)) == [labels[number] for number in order]
        assert data.captions(range(20)) == [captions[number] for number in order]
        different, numbers_of = data.different_captions()
        assert different == sorted(caption for caption in captions if caption)
        assert [None if number < 0 else different[number] for number in numbers_of] == data.captions(range(20))
        assert data.shards(range(20)).tolist() == [number // 6 for number in order]
        assert data.rows("held_out").tolist() == [row for row, number in enumerate(order) if number % 4 == 0]
        assert data.rows("train").tolist() == [row for row, number in enumerate(order) if number % 4]
        numbers = {"dog": 0, "cat": 1}
        expected = [numbers.get(labels[number] or "", 2) for number in order]
        assert data.classes(range(20), ["dog", "cat"]).tolist() == expected


def test_grey_images_among_coloured_ones_stay_grey(tmp_path: Path) -> None:
    grey, colours = as_stored(random_images(1)[0]), as_stored(random_images(1, 3)[0])
    BuiltDataset(tmp_path / "set", 8).version([image_record(grey, "grey.png"), image_record(colours, "colours.png")])
    with closing(Dataset.open(tmp_path / "set")) as data:
        row = data.keys([0, 1]).index(key_of(grey))
        np.testing.assert_array_equal(data.images([row])[0].numpy(), np.stack([grey] * 3))


def test_rows_do_not_depend_on_the_ingest_history(images: Path, tmp_path: Path) -> None:
    """Ingested at once or bit by bit, in other shards: the same rows."""
    later = tmp_path / "later"
    for path in sorted(images.glob("*/*.png"))[::3]:
        (later / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(later / path.parent.name / path.name)
    config = IngestConfig(source=str(images), size=8, held_out=0.33)
    ingest(tmp_path / "twice", config)
    for path in later.glob("*/*.png"):
        path.rename(images / path.parent.name / path.name)
    ingest(tmp_path / "twice", config)
    ingest(tmp_path / "once", config)
    with closing(Dataset.open(tmp_path / "once")) as once, closing(Dataset.open(tmp_path / "twice")) as twice:
        assert once.manifest.layout_digest != twice.manifest.layout_digest
        assert once.keys(range(48)) == twice.keys(range(48))
        assert once.labels(range(48)) == twice.labels(range(48))
        assert once.rows("train").tolist() == twice.rows("train").tolist()
        assert torch.equal(once.images(range(48)), twice.images(range(48)))


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damaged_shards_are_named_before_use(tmp_path: Path, damage: str) -> None:
    manifest = write_dataset(tmp_path / "set", random_images(12), per_shard=6)
    shard = tmp_path / "set" / manifest.shards[1].name
    shard_bytes = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        shard_bytes[600] ^= 1  # a bit of an image
        shard.write_bytes(shard_bytes if damage == "changed" else shard_bytes[:-512])
    words = {"changed": "is changed", "cut": "bytes long instead of", "missing": "is missing"}
    with pytest.raises(UserError, match=rf"{shard.name}.*{words[damage]}.*data checkout"):  # noqa: PT012 (either raises)
        data = Dataset.open(tmp_path / "set")
        assert len(data.images(np.flatnonzero(data.shards(range(12)) == 0))) == 6
        data.images(range(12))


def test_a_shard_that_changes_length_after_opening_is_named(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "set", random_images(12), per_shard=6)
    with closing(Dataset.open(tmp_path / "set")) as data:
        (tmp_path / "set" / manifest.shards[0].name).write_bytes(b"short")
        with pytest.raises(UserError, match=rf"{manifest.shards[0].name} is 5 bytes long"):
            data.images(range(12))


def test_threads_reading_at_the_same_time_get_what_one_gets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", random_images(200), per_shard=40)
    with closing(Dataset.open(tmp_path / "set")) as data, closing(Dataset.open(tmp_path / "set")) as alone:
        whole = alone.images(range(200))
        images: dict[int, bool] = {}

        def read(seed: int) -> None:
            rows = np.random.default_rng(seed).permutation(200)
            images[seed] = torch.equal(data.images(rows), whole[rows])

        threads = [Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert images == dict.fromkeys(range(8), True)


def test_standard_webdataset_readers_read_the_shards_unchanged(dataset: Path) -> None:
    """What they are used with: decode, to_tuple, batched; and the pairs of images and JSON that they find."""
    shards = [str(dataset / shard.name) for shard in read_manifest(dataset).shards]
    with closing(Dataset.open(dataset)) as data:
        rows = {key: row for row, key in enumerate(data.keys(range(len(data))))}
        pairs = webdataset.WebDataset(shards, shardshuffle=False).decode("l8").to_tuple("__key__", "png", "json")
        row_numbers = []
        for key, pixels, about in pairs:
            row_numbers.append(rows[key])
            np.testing.assert_array_equal(pixels, data.images([rows[key]])[0, 0].numpy())
            assert about["label"] == data.labels([rows[key]])[0]
            assert len(about["sha256"]) == 64
            assert about["source"].endswith(".png")
        assert sorted(row_numbers) == list(range(len(data)))
        batches = list(webdataset.WebDataset(shards, shardshuffle=False).decode("torchl8").to_tuple("png").batched(16))
    assert sum(len(batch) for (batch,) in batches) == len(rows)


def test_the_table_takes_some_60_bytes_for_each_image(tmp_path: Path) -> None:
    few = write_dataset(tmp_path / "set", random_images(100), per_shard=50)
    with closing(Dataset.open(tmp_path / "set", cache_bytes=0)) as data:
        assert data._table.nbytes <= 60 * few.kept


def test_tables_on_disk_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    manifest = write_dataset(folder, random_images(500), 9, LABELS * 100, [*LABELS, None] * 83 + ["x"] * 2)
    whole = open_table(folder, manifest)
    monkeypatch.setattr("diffusion.data.dataset.IN_MEMORY", 0)
    monkeypatch.setattr("diffusion.data.tables.FILES", 4)
    monkeypatch.setattr("diffusion.data.tables.BATCH", 40)
    for _ in range(2):
        table = open_table(folder, manifest)
        np.testing.assert_array_equal(table.images, whole.images)
        for split in ("train", "held_out"):
            np.testing.assert_array_equal(table.rows[split], whole.rows[split])
        np.testing.assert_array_equal(table.by_shard.samples, whole.by_shard.samples)
        np.testing.assert_array_equal(table.by_shard.counts, whole.by_shard.counts)
        assert [path.name for path in sorted((tmp_path / ".set" / "tables").iterdir())] == [
            f"{manifest.digest}.bin",
            "lock",
        ]
        # Read no more.
        monkeypatch.setattr("diffusion.data.dataset.find_intact_records", None)


def test_a_table_on_disk_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    manifest = write_dataset(folder, random_images(50), 9)
    whole = open_table(folder, manifest)
    monkeypatch.setattr("diffusion.data.dataset.IN_MEMORY", 0)
    with monkeypatch.context() as broken:
        broken.setattr("diffusion.data.dataset.read_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_table(folder, manifest)
    assert not list((tmp_path / ".set" / "tables").glob("*.bin"))
    np.testing.assert_array_equal(open_table(folder, manifest).images, whole.images)
