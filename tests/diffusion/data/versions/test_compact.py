"""Compaction: fewer shards, and nothing else changes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
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
from diffusion.data.manifest import read_manifest, read_records, versions, write_manifest
from diffusion.data.versions.compact import compact
from diffusion.data.versions.difference import diff
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.data.versions.versions import history
from tests.builders import ROOT
from tests.builders.ingested import files_of, records
from tests.builders.shapes import blob

COUNT = 700


def config(source: Path) -> IngestConfig:
    return IngestConfig(source=str(source), size=8, held_out=0.33, workers=1)


@pytest.fixture(scope="module")
def history_of_seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of seven ingests: one of 512 images, which is full, and small ones before and after it."""
    root = tmp_path_factory.mktemp("compact")
    number = 0
    for count in (20, 20, 20, 512, 40, 40, 48):
        for _ in range(count):
            path = root / "images" / ("a" if number % 2 else "b") / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            blob(number).save(path)
            number += 1
        ingest(root / "data" / "set", config(root / "images"))
    return root


@pytest.fixture
def data(history_of_seven: Path, tmp_path: Path) -> Path:
    shutil.copytree(history_of_seven / "data", tmp_path / "data")
    return tmp_path / "data" / "set"


def test_only_small_neighbours_are_joined_and_every_image_stays(data: Path) -> None:
    before, rows = read_manifest(data), records(data)
    with closing(Dataset.open(data)) as old:
        images, labels = old.images(range(len(old))), old.labels(range(len(old)))
    result = compact(data, config(data))
    after = read_manifest(data)
    assert result.changed
    assert result.shards == (7, 3)
    assert [sum(part.splits.values()) for part in after.parts] == [60, 512, 128]
    assert after.parts[1] == before.parts[3]
    assert (after.parent, after.change, after.content_digest) == (before.digest, "compact", before.content_digest)
    assert content_digest(data, after.parts, after.storage) == before.content_digest
    for name in ("counts", "class_histogram", "mean", "std", "sigma_data"):
        assert getattr(after, name) == getattr(before, name)
    without = [{name: value for name, value in row.items() if name != "offset"} for row in rows]
    assert [{name: value for name, value in row.items() if name != "offset"} for row in records(data)] == without
    with closing(Dataset.open(data)) as new:
        assert torch.equal(new.images(range(len(new))), images)
        assert new.labels(range(len(new))) == labels
    file_names = {entry.name for entry in after.files}
    assert {name for name in files_of(data) if name.startswith(("shards/", "records/"))} == file_names


def test_shards_are_tars_that_others_read(data: Path) -> None:
    compact(data, config(data))
    shards = [str(data / shard.name) for shard in read_manifest(data).shards]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert keys == [row["key"] for row in records(data) if row["outcome"] == "kept"]


def test_a_second_compaction_makes_no_version(data: Path) -> None:
    compact(data, config(data))
    before = files_of(data)
    assert not compact(data, config(data)).changed
    assert files_of(data) == before


def test_parts_of_other_sources_stay_apart(data: Path) -> None:
    manifest = read_manifest(data)
    parts = [part.model_copy(update={"source": f"hf://datasets/o/n@{part.number // 2}"}) for part in manifest.parts]
    (data / "manifest.json").write_text(manifest.model_copy(update={"parts": parts}).model_dump_json())
    compact(data, config(data))
    assert [part.source for part in read_manifest(data).parts] == [f"hf://datasets/o/n@{n}" for n in (0, 1, 1, 2, 3)]


def test_other_shapes_stay_apart_and_dropped_images_stay(data: Path) -> None:
    manifest = read_manifest(data)
    shapes = [(8, 8 + part.number % 2) for part in manifest.parts]
    tables = [read_records(data, part).to_pylist() for part in manifest.parts]
    tables[5][0] |= {"outcome": "dropped", "reason": "quality"}
    shapes[6] = (8, 9)
    parts = [
        write_part(data, part.number, part.shard, rows, 8, None, shape)
        for part, rows, shape in zip(manifest.parts, tables, shapes, strict=True)
    ]
    storage = manifest.storage.model_copy(update={"fit": "bucket", "buckets": ("8x8", "9x8")})
    write_manifest(data, manifest.model_copy(update={"parts": parts, "storage": storage}))
    compact(data, config(data))
    after = read_manifest(data)
    assert [part.shape for part in after.parts] == [(8, 8), (8, 9), (8, 8), (8, 9), (8, 8), (8, 9)]
    joined = after.parts[-1]
    assert joined.shard is not None
    assert joined.outcomes == {"dropped": 1, "kept": 87}
    keys = [sample["__key__"] for sample in webdataset.WebDataset([str(data / joined.shard.name)], shardshuffle=False)]
    assert keys == [row["key"] for row in read_records(data, joined).to_pylist()]


def test_later_ingests_takedowns_and_histories_go_on(data: Path, history_of_seven: Path, tmp_path: Path) -> None:
    compact(data, config(data))
    source = tmp_path / "images"
    shutil.copytree(history_of_seven / "images", source)
    for number in range(COUNT, COUNT + 5):
        blob(number).save(source / "a" / f"{number:04d}.png")
    result = ingest(data, config(source))
    assert (result.added, result.kept) == (5, COUNT + 5)
    numbers = [part.number for part in read_manifest(data).parts]
    assert numbers == sorted(set(numbers))
    removed = remove(data, Selection(sources=["*/0001.png", "*0650.png"]), "consent withdrawn")
    assert read_manifest(data).kept == COUNT + 5 - removed.images
    counts_by_change = {step.change.split(":")[0]: (step.added, step.removed) for step in history(data)}
    assert counts_by_change["compact"] == (0, 0)
    assert counts_by_change["removal"] == (0, removed.images)
    compacted = next(each for each in versions(data) if each.change == "compact")
    parent = next(each for each in versions(data) if each.digest == compacted.parent)
    assert diff(data, parent, compacted).same_content


def test_a_damaged_shard_is_named_and_nothing_changes(data: Path) -> None:
    path = data / read_manifest(data).shards[1].name
    whole = bytearray(path.read_bytes())
    whole[600] ^= 1
    path.write_bytes(whole)
    before = files_of(data)
    with pytest.raises(UserError, match=path.name):
        compact(data, config(data))
    assert {name: data for name, data in files_of(data).items() if name in before} == before


COMPACT = """
import sys
from pathlib import Path
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.versions.compact import compact
print("begun", flush=True)
compact(Path(sys.argv[1]), IngestConfig(size=8, held_out=0.33, workers=1))
"""


@pytest.mark.slow
@pytest.mark.long
def test_killed_compactions_end_in_the_same_bytes(history_of_seven: Path, tmp_path: Path) -> None:
    shutil.copytree(history_of_seven / "data", tmp_path / "whole")
    start = time.monotonic()
    compact(tmp_path / "whole" / "set", config(tmp_path))
    seconds = time.monotonic() - start
    expected = files_of(tmp_path / "whole" / "set")
    dice = random.Random(0)
    for number in range(5):
        data = tmp_path / f"{number}" / "set"
        shutil.copytree(history_of_seven / "data", data.parent)
        process = subprocess.Popen([sys.executable, "-c", COMPACT, str(data)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(dice.uniform(0, 1.5 * seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        compact(data, config(tmp_path))
        assert files_of(data) == expected
