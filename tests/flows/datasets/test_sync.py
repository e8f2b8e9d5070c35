"""A machine gets the newest version of a data set; what was retrained once is not again, on whatever machine."""

import time

import pytest

from diffusion.common.config import Config
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions
from flows.config import Params
from flows.datasets.sync import CREATED, find_newer_version, make_version_event, sync
from flows.retrain import RetrainRequest
from tests.builders.catalogs import FOLDER, Place

PARAMS = Params.model_validate({"training": {"dataset": "blobs", "images": 320}})
SHEET_OF_64: tuple[int, int, None, Conditions] = (64, 0, None, UNCONDITIONAL)


@pytest.fixture
def versions(place: Place) -> list[Manifest]:
    """Two versions, published a second apart, which is how exactly S3 tells the time."""
    version_list = [place.version()]
    time.sleep(1.1)
    return [*version_list, place.version(100)]


def bring(version: str | None = None) -> str:
    sync.fn(PARAMS, version)
    return read_manifest(FOLDER).digest


def test_sync_fetches_the_newest_or_the_named_version(place: Place, versions: list[Manifest]) -> None:
    older, newest = (version.digest for version in versions)
    assert find_newer_version(PARAMS, place.catalog) is None
    place.forget()
    assert bring() == newest
    assert bring(older) == older
    assert bring(older[:8]) == older
    assert bring() == newest


def test_sync_keeps_an_unpublished_data_set(place: Place, versions: list[Manifest]) -> None:
    place.publish = lambda: None  # type: ignore[method-assign]  # as if killed before
    here = place.version(101).digest
    assert here not in {version.digest for version in versions}
    assert bring() == here


def test_unpublished_data_set_has_nothing_to_sync(place: Place) -> None:
    assert find_newer_version(PARAMS, place.catalog) is None


def test_event_names_its_version_and_is_idempotent(place: Place, versions: list[Manifest]) -> None:
    first, second = (make_version_event(version, place.catalog) for version in versions)
    assert first.id == make_version_event(versions[0], place.catalog).id != second.id
    assert (second.event, second.resource.id) == (CREATED, "darkroom.dataset.blobs")
    assert second.payload["digest"] == versions[1].digest
    assert second.payload["parent"] == versions[0].digest
    for version in versions:
        assert not place.catalog.is_announced(version.digest)
        place.catalog.mark_announced(version.digest)
        assert place.catalog.is_announced(version.digest)
    assert place.catalog.versions().keys() == {version.digest for version in versions}


class Result(Config):
    """What a retraining ends in, as far as its note is read."""

    verdict: dict[str, object]


def result(reason: str) -> Result:
    return Result(verdict={"version": {"model": "blobs", "number": 1}, "reason": reason})


def changed(section: str, **fields: object) -> Params:
    tree = PARAMS.model_dump(mode="json")
    return Params.model_validate(tree | {section: tree[section] | fields})


def test_completed_requests_are_keyed_by_content_and_configuration(place: Place, versions: list[Manifest]) -> None:
    request = RetrainRequest.of(PARAMS, versions[0], *SHEET_OF_64)
    # What gc keeps is no matter.
    assert request == RetrainRequest.of(changed("retention", grace_hours=1), versions[0], *SHEET_OF_64), (
        "what gc keeps is no matter"
    )
    assert request.find_earlier_result() is None
    request.write_note(result("first"))
    RetrainRequest.of(changed("ingest", source="elsewhere"), versions[0], *SHEET_OF_64).write_note(result("second"))
    assert request.find_earlier_result() == result("first").model_dump()
    others = [
        RetrainRequest.of(PARAMS, versions[1], *SHEET_OF_64),
        RetrainRequest.of(changed("training", seed=1), versions[0], *SHEET_OF_64),
        RetrainRequest.of(changed("gate", delta=0.2), versions[0], *SHEET_OF_64),
        RetrainRequest.of(changed("registry", model="other"), versions[0], *SHEET_OF_64),
        RetrainRequest.of(PARAMS, versions[0], 65, *SHEET_OF_64[1:]),
    ]
    assert len({each.key for each in others} | {request.key}) == 6
    assert [each.find_earlier_result() for each in others] == [None] * 5
