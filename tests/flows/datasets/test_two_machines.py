"""Machines that add to one data set: in whatever order and whoever is killed, the newest version has all they added."""

from contextlib import chdir

import pytest

from diffusion.api import engine
from diffusion.common.errors import ConflictError
from diffusion.curation.lists import ListChange
from flows.environment import settings
from flows.storage.s3 import Store
from tests.builders.machines import BASE, NAME, Machine, Machines, before, first_version, machine, two
from tests.builders.model_versions import Killed, killed

__all__ = ["first_version", "machine", "two"]

STEPS = (
    "flows.datasets.dvc:record_data",  # ingested, and not pushed
    "flows.datasets.catalog:Catalog.publish",  # pushed, and not in the catalog
    "flows.datasets.catalog:Heads.advance",  # in the catalog, and not the newest
)


def test_the_second_adds_to_what_the_first_published(two: tuple[Machine, Machine], machine: Machines) -> None:
    one, other = two
    first = one.ingest(100, 101)
    second = other.ingest(200)
    assert (second.added, second.kept, second.changed) == (1, 11, True)
    assert other.images == {*BASE, 100, 101, 200}
    assert other.version.parent == first.digest
    assert one.newest == other.version.digest
    again = one.ingest()
    assert (again.added, again.digest) == (0, second.digest)


def test_conflicting_list_withdrawn_locally_lets_the_next_publication_through(two: tuple[Machine, Machine]) -> None:
    one, other = two
    for each, number in ((one, 1), (other, 2)):
        with chdir(each.folder):
            (table := each.folder / "t.csv").write_text(f"source\n{number}.png\n")
            engine.curate(each.params(), change=ListChange(name="bad", table=table))
    one.ingest()
    with pytest.raises(ConflictError):
        other.ingest()
    with chdir(other.folder):
        engine.curate(other.params(), change=ListChange(name="bad", table=None))
    other.ingest(200)
    assert other.images == {*BASE, 200} - {1}
    assert other.newest == other.version.digest


@pytest.mark.parametrize(
    "step", [pytest.param(each, marks=() if "publish" in each else pytest.mark.slow) for each in STEPS]
)
def test_slower_ingest_adds_to_the_version_of_the_faster_one(step: str, two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before(step, lambda: other.ingest(200, 201)):
        result = one.ingest(100, 200)
    assert one.images == {*BASE, 100, 200, 201}
    assert (result.digest, result.kept, result.changed) == (one.version.digest, 11, True)
    assert one.newest == result.digest
    other.ingest()
    assert other.version == one.version


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_ingest_blocks_no_other_and_resumes(step: str, two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before(step, killed), pytest.raises(Killed):
        one.ingest(100)
    other.ingest(200)
    one.ingest()
    assert one.images == {*BASE, 100, 200}
    assert one.newest == one.version.digest


@pytest.mark.slow
def test_two_simultaneous_first_ingests_make_one_data_set(machine: Machines) -> None:
    one, other = machine("one"), machine("other")
    with before("flows.datasets.catalog:Heads.advance", lambda: other.ingest(1, 2, 200)):
        one.ingest(1, 2, 100)
    assert one.images == {1, 2, 100, 200}
    assert one.newest == one.version.digest


@pytest.mark.slow
def test_catalogs_without_heads_are_mended(two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before("flows.datasets.catalog:Heads.advance", killed), pytest.raises(Killed):
        one.ingest(100)
    with before("flows.datasets.catalog:Heads.advance", killed), pytest.raises(Killed):
        other.ingest(200)
    store = Store()
    bucket = settings().bucket
    store.delete_many(bucket, list(store.list_keys(bucket, f"datasets/{NAME}/heads/")))
    one.ingest()
    other.ingest()
    assert other.images == {*BASE, 100, 200}
    assert one.newest == other.version.digest


@pytest.mark.slow
def test_invalid_head_objects_do_not_block_ingest(two: tuple[Machine, Machine]) -> None:
    one, other = two
    for name in ("00000002.json", "99999999.json", "x"):
        Store().put_once(settings().bucket, f"datasets/{NAME}/heads/{name}", b"junk")
    one.ingest(100)
    other.ingest(200)
    assert other.images == {*BASE, 100, 200}
    assert one.newest == other.version.digest


@pytest.mark.slow
def test_deleted_newest_version_does_not_block_ingest(two: tuple[Machine, Machine]) -> None:
    one, other = two
    lost = one.ingest(100).digest
    Store().delete_many(settings().bucket, [f"datasets/{NAME}/{lost}/manifest.json"])
    other.ingest(200)
    assert other.images == {*BASE, 200}
    assert one.newest == other.version.digest


# A person decides otherwise


def test_ingest_on_an_older_checkout_reports_omitted_versions(
    two: tuple[Machine, Machine], caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = two
    first = one.version.digest
    left_out = one.ingest(100)
    (one.folder / "images" / "100.png").unlink()
    one.check_out(first)
    result = one.ingest(101)
    assert one.images == {*BASE, 101}
    assert one.newest == result.digest != left_out.digest
    assert any(first[:12] in line and "checked out" in line for line in caplog.messages)
    one.ingest(102)
    assert one.images == {*BASE, 101, 102}


@pytest.mark.slow
def test_retraining_uses_the_newest_version_after_any_checkout(two: tuple[Machine, Machine]) -> None:
    one, _ = two
    first = one.version.digest
    one.ingest(100)
    one.check_out(first)
    one.ingest(101, to_retrain=True)
    assert one.images == {*BASE, 100, 101}


@pytest.mark.slow
def test_unknown_versions_after_a_checkout_block_ingest(two: tuple[Machine, Machine]) -> None:
    one, other = two
    first = one.version.digest
    one.ingest(100)
    one.check_out(first)
    other.ingest(200)
    for _ in range(2):
        with pytest.raises(ConflictError, match=f"data checkout {other.version.digest[:12]}"):
            one.ingest(101)
    assert one.newest == other.version.digest
    one.check_out(first)
    one.ingest()
    assert one.images == {*BASE, 100, 101}, "its source still has number 100"


@pytest.mark.slow
def test_rebuild_is_held_when_another_machine_added_images(two: tuple[Machine, Machine]) -> None:
    one, other = two
    with (
        before("flows.datasets.catalog:Catalog.publish", lambda: other.ingest(200)),
        pytest.raises(ConflictError, match="--rebuild"),
    ):
        one.ingest(100, rebuild="always")
    assert one.newest == other.version.digest
    one.ingest(rebuild="always")
    assert one.images == {*BASE, 100}
    assert one.newest == one.version.digest
    other.ingest()
    assert other.images == {*BASE, 100, 200}, "its source has number 200"


@pytest.mark.slow
def test_ingest_during_a_rebuild_is_added_to_the_rebuilt_version(two: tuple[Machine, Machine]) -> None:
    one, other = two
    for each in two:
        (each.folder / "images" / "0.png").unlink()
    with before("flows.datasets.catalog:Catalog.publish", lambda: other.ingest(rebuild="always")):
        one.ingest(100)
    assert one.images == {*BASE, 100} - {0}
