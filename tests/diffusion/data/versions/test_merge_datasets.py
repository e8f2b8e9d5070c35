"""Merging of data sets by parts: what one ingest after the other would have made."""

import hashlib
import json
import shutil
from collections import Counter
from contextlib import closing
from operator import itemgetter
from pathlib import Path

import pytest
import torch
import webdataset

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.key_resolution import content_digest
from diffusion.data.ingest.merge import write_part
from diffusion.data.manifest import read_manifest, read_records, write_manifest
from diffusion.data.versions.merge_datasets import merge_datasets
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from tests.builders.ingested import files_of, records
from tests.builders.shapes import blob

SHARES = {"a": range(30), "b": range(20, 70), "c": range(65, 80), "d": range(200, 210)}
"""Images of each source; some are in two of them."""


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 8, "held_out": 0.33, "workers": 1} | fields)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for name, numbers in SHARES.items():
        for number in numbers:
            # Those of c have other labels than the same images have in b.
            label = ("odd" if number % 2 else "even") + ("x" if name == "c" else "")
            path = root / name / label / f"{name}{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            blob(number).save(path)
    return root


@pytest.fixture
def data(sources: Path, tmp_path: Path) -> Path:
    """A data set for each source."""
    for name in SHARES:
        ingest(tmp_path / "data" / name, config(sources / name))
    return tmp_path / "data"


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries and batches of few images each."""
    monkeypatch.setattr("diffusion.data.tables.FILES", 1)
    monkeypatch.setattr("diffusion.data.tables.BATCH", 7)


def digest_of(folder: Path) -> str:
    """The content digest of a data set, from its definition."""
    rows = sorted((row for row in records(folder) if row["outcome"] == "kept"), key=itemgetter("key"))
    samples = ([row[name] for name in ("key", "split", "label", "caption")] for row in rows)
    texts = [json.dumps(each, separators=(",", ":"), ensure_ascii=False).encode() for each in samples]
    storage = read_manifest(folder).storage.model_dump(mode="json")
    head = json.dumps(storage, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(head + b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()


@pytest.mark.usefixtures("small_batches")
def test_the_result_is_that_of_one_ingest_after_the_other(data: Path, sources: Path, tmp_path: Path) -> None:
    for name in SHARES:
        ingest(tmp_path / "one" / "set", config(sources / name))
    result = merge_datasets(data / "a", [data / name for name in "bcd"], config(tmp_path))
    one, merged = read_manifest(tmp_path / "one" / "set"), read_manifest(data / "a")
    assert result.content_digest == merged.content_digest == one.content_digest
    assert merged.content_digest == content_digest(data / "a", merged.parts, merged.storage) == digest_of(data / "a")
    assert (result.added, result.duplicates, result.kept) == (90 - 30, 15, 90)
    for name in ("counts", "class_histogram", "mean", "std"):
        assert getattr(merged, name) == getattr(one, name)
    for name in ("key", "outcome", "reason", "label", "split"):
        both = ([row[name] for row in records(folder)] for folder in (data / "a", tmp_path / "one" / "set"))
        assert Counter(next(both)) == Counter(next(both))
    with closing(Dataset.open(data / "a")) as dataset, closing(Dataset.open(tmp_path / "one" / "set")) as expected:
        assert torch.equal(dataset.images(range(90)), expected.images(range(90)))
    shards = [str(data / "a" / shard.name) for shard in merged.shards]
    keys = sorted(sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False))
    assert keys == sorted(str(row["key"]) for row in records(data / "a") if row["outcome"] == "kept")


def test_parts_without_duplicates_are_the_same_files_under_other_names(data: Path) -> None:
    merge_datasets(data / "a", [data / "d"], config(data))
    (ours, theirs), (before,) = read_manifest(data / "a").parts, read_manifest(data / "d").parts
    assert ours.shard is not None
    assert theirs.shard is not None
    assert before.shard is not None
    assert (theirs.shard.sha256, theirs.records.sha256) == (before.shard.sha256, before.records.sha256)
    assert (data / "a" / theirs.shard.name).samefile(data / "d" / before.shard.name)


def test_repeated_merges_make_no_version(data: Path, sources: Path) -> None:
    merge_datasets(data / "a", [data / "b", data / "c"], config(data))
    before = files_of(data / "a")
    again = merge_datasets(data / "a", [data / "b", data / "c"], config(data))
    assert (again.changed, again.added) == (False, 0)
    assert files_of(data / "a") == before
    assert ingest(data / "a", config(sources / "d")).added == 10
    assert ingest(data / "a", config(sources / "b")).added == 0


@pytest.mark.usefixtures("small_batches")
def test_images_dropped_by_curation_do_not_return_by_merging(data: Path) -> None:
    manifest = read_manifest(data / "a")
    (part,) = manifest.parts
    rows = read_records(data / "a", part).to_pylist()
    row = next(row for row in rows if str(row["source"]).endswith("025.png"))
    row |= {"outcome": "dropped", "reason": "quality"}
    parts = [write_part(data / "a", 0, part.shard, rows, manifest.size)]
    content = content_digest(data / "a", parts, manifest.storage)
    write_manifest(data / "a", manifest.model_copy(update={"parts": parts, "content_digest": content}))
    merge_datasets(data / "a", [data / "b"], config(data))
    outcomes = [each["outcome"] for each in records(data / "a") if each["key"] == row["key"]]
    assert outcomes == ["dropped", "duplicate"]
    assert read_manifest(data / "a").content_digest == digest_of(data / "a")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_images_taken_down_do_not_return_by_merging(data: Path, sources: Path, order: tuple[str, str]) -> None:
    into, other = order
    remove(data / "a", Selection(sources=["*a025.png"]), "consent withdrawn")
    with pytest.raises(UserError, match=r"1 images were taken down"):
        merge_datasets(data / into, [data / other], config(data))
    remove(data / "b", Selection(sources=["*b025.png"]), "consent withdrawn")
    merge_datasets(data / into, [data / other], config(data))
    key = next(str(row["key"]) for row in records(data / into) if row["outcome"] == "removed")
    assert key not in {row["key"] for row in records(data / into) if row["outcome"] == "kept"}
    assert ingest(data / into, config(sources / "a")).added == 0


def test_data_sets_that_are_stored_otherwise_are_rejected(data: Path, sources: Path) -> None:
    ingest(data / "e", config(sources / "d", fit="pad"))
    ingest(data / "f", config(sources / "d", licence="CC0-1.0"))
    for name, settings in (("e", {}), ("f", {}), ("b", {"near_duplicates": 8})):
        before = files_of(data / "a")
        with pytest.raises(UserError):
            merge_datasets(data / "a", [data / name], config(data, **settings))
        assert files_of(data / "a") == before


def test_failed_merges_change_nothing_and_can_be_repeated(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "other")
    merge_datasets(tmp_path / "other" / "a", [tmp_path / "other" / name for name in "bcd"], config(data))
    before = read_manifest(data / "a")
    with monkeypatch.context() as broken:
        broken.setattr("diffusion.data.versions.merge_datasets.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_datasets(data / "a", [data / name for name in "bcd"], config(data))
    assert read_manifest(data / "a") == before
    merge_datasets(data / "a", [data / name for name in "bcd"], config(data))
    assert files_of(data / "a") == files_of(tmp_path / "other" / "a")
