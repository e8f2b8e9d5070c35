"""Compaction and merging as a whole: the new version is recorded, pushed and the newest one."""

import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from prefect.testing.utilities import prefect_test_harness

import flows.ingest
from diffusion.curation.config import CurationConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.key_resolution import content_digest
from diffusion.data.manifest import read_manifest, versions
from diffusion.data.versions.merge_datasets import MergeResult
from diffusion.data.versions.takedown_records import Selection
from flows import compact_merge, takedown
from flows.compact_merge import compact, merge
from flows.config import Params
from flows.datasets.catalog import Heads
from flows.datasets.checkout import checkout
from tests.builders.catalogs import FOLDER, Place
from tests.builders.ingested import records
from tests.builders.machines import BASE, Machine, Plain, before, first_version, machine, two
from tests.builders.shapes import blob

__all__ = ["first_version", "machine", "two"]
MORE = range(100, 106)


@pytest.mark.slow
@pytest.mark.long
def test_compacted_and_merged_versions_come_back_from_the_remote(bucket: str, images: Path) -> None:
    Repo.init(no_scm=True).close()
    place = Place(bucket, images)
    for numbers in ((), (100, 101), (102,)):
        first = place.version(*numbers)
    Heads(place.catalog).advance(first.digest, {version.digest for version in versions(FOLDER)})
    params = Params.model_validate(
        {"ingest": {"source": "nowhere", "size": 8, "held_out": 0.33}, "training": {"dataset": FOLDER.name}}
    )
    place.forget()
    with prefect_test_harness(server_startup_timeout=120):
        result = compact(params)
        again = compact(params)
        for number in range(200, 210):
            (more := Path("more/even")).mkdir(parents=True, exist_ok=True)
            blob(number).save(more / f"{number}.png")
        ingest(FOLDER.with_name("more"), params.ingest.model_copy(update={"source": "more"}))
        joined = merge(params, ["more"])
        assert (joined.added, joined.digest) == (10, Heads(place.catalog).newest())
        assert place.catalog.is_announced(joined.digest)
        for result_of_step in (result, joined):
            assert place.catalog.store.exists(bucket, place.catalog.place.key(f"{result_of_step.digest}/report.html"))
        checkout(FOLDER, result.digest, place.reach)
    after = read_manifest(FOLDER)
    assert (result.changed, result.shards, again.changed) == (True, (3, 1), False)
    assert result.digest == again.digest == after.digest
    assert (after.parent, after.content_digest) == (first.digest, first.content_digest)
    assert place.catalog.is_announced(after.digest)
    place.forget()
    for version in (first, after):
        checkout(FOLDER, version.digest, place.reach)
        assert content_digest(FOLDER, version.parts, version.storage) == first.content_digest


@pytest.fixture
def with_more(two: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Machine]:
    """Two machines, of which both have a second data set, ``more``, and run the flows without Prefect."""
    for name in ("repair", "merge_parts"):
        monkeypatch.setattr(compact_merge, name, Plain(getattr(compact_merge, name)))
    for name in ("describe", "announce"):
        monkeypatch.setattr(compact_merge, name, lambda *_, **__: None)
    for each in two:
        with chdir(each.folder):
            for number in MORE:
                (path := Path("more", f"{number}.png")).parent.mkdir(exist_ok=True)
                blob(number).save(path)
            flows.ingest.ingest.fn(of_more(each))
    return two


def of_more(on: Machine) -> Params:
    params = on.params(source="more")
    return params.model_copy(update={"training": params.training.model_copy(update={"dataset": "more"})})


def merged(on: Machine, params: Params | None = None) -> MergeResult:
    with chdir(on.folder):
        state: Any = merge.fn(params or on.params(), ["more"])
        result: MergeResult = state.data
        return result


def test_images_taken_down_elsewhere_are_not_merged(with_more: tuple[Machine, Machine]) -> None:
    one, other = with_more
    with chdir(other.folder):
        removal = takedown.remove.fn(of_more(other), Selection(sources=["103.png"]), "consent withdrawn")
        takedown.record.fn(of_more(other), removal)
    assert merged(one).added == len(MORE) - 1
    assert one.images == {*BASE, *MORE} - {103}


def test_merge_applies_curation_before_it_is_published(with_more: tuple[Machine, Machine]) -> None:
    one, _ = with_more
    params = one.params().model_copy(update={"curation": CurationConfig(near_duplicates="largest", max_dropped=0.9)})
    with chdir(one.folder):
        path = Path("more", "resized.png")
        blob(104).resize((40, 40)).save(path)
        flows.ingest.ingest.fn(of_more(one))
    result = merged(one, params)
    assert (result.dropped or 0) > 0
    assert (one.version.change, one.version.digest, one.newest) == ("curation", result.digest, result.digest)
    assert "dropped" in {row["outcome"] for row in records(one.folder / "data" / "blobs")}


def test_counts_cover_the_whole_merge_beside_a_faster_process(with_more: tuple[Machine, Machine]) -> None:
    one, other = with_more
    with before("flows.ingest:publish", lambda: other.ingest(200)):
        result = merged(one)
    assert (result.changed, result.added, result.kept) == (True, len(MORE), len(BASE) + 1 + len(MORE))
    assert one.newest == result.digest


def test_takedown_names_data_sets_merged_from_this_one(with_more: tuple[Machine, Machine]) -> None:
    one, other = with_more
    merged(one)
    with chdir(other.folder):
        shutil.rmtree("data/blobs")
        removal = takedown.remove.fn(of_more(other), Selection(sources=["103.png"]), "consent withdrawn")
        assert takedown.find_elsewhere.fn(of_more(other), removal) == ({"blobs": removal.image_keys}, [])
    with chdir(one.folder):
        assert takedown.find_elsewhere.fn(of_more(one), removal) == ({"blobs": removal.image_keys}, [])
        (record, *_) = Path("data/blobs/records").iterdir()
        record.write_bytes(b"")
        assert takedown.find_elsewhere.fn(of_more(one), removal)[1] == ["blobs"]
