"""Curation by flows: recorded in DVC and the catalog, applied after ingests, and followed by a retraining."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from diffusion.data.manifest import read_manifest
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    quick = {"training": PARAMS["training"] | {"images": 320, "checkpoints": 1}}  # type: ignore[operator]
    with running(tmp_path_factory.mktemp("curated"), PARAMS | quick, 120) as space:
        for number in range(3):
            Image.new("L", (8, 8), 60 * number).save(space.folder / "images" / "odd" / f"flat-{number}.png")
        yield space


@pytest.mark.long
def test_rules_apply_to_ingest_retrain_and_other_machines(space: Workspace) -> None:
    first = space.json("ingest", "images")
    assert "dropped" not in first
    rule = ("--set", "curation.min_contrast=1")
    result = space.json("data", "curate", *rule)
    assert (result["dropped"], result["kept"]) == (3, first["kept"] - 3)
    assert space.json("data", "curate", *rule)["changed"] is False
    again = space.json("ingest", "images", *rule)
    assert (again["changed"], again["digest"], again["dropped"]) == (False, result["digest"], 3)

    Image.new("L", (8, 8), 240).save(space.folder / "images" / "odd" / "flat-3.png")
    grown = space.json("ingest", "images", *rule)
    assert (grown["changed"], grown["kept"], grown["dropped"]) == (True, result["kept"], 4)
    assert grown["content_digest"] == result["content_digest"]
    trained = space.json("retrain", "images", "--count", "1", *rule)
    assert trained["data"]["result"]["dropped"] == 4
    # Another bound that drops the same images is no reason to train again, one that brings some back is.
    same = space.json("retrain", "images", "--count", "1", "--set", "curation.min_contrast=2")
    assert same["skipped"] is not None
    traced = space.json("trace", trained["samples"]["uri"])
    assert traced["data"]["images"] == result["kept"]

    shutil.rmtree(space.folder / "data")
    restored = space.json("ingest", "images", *rule)
    assert (restored["kept"], restored["dropped"]) == (result["kept"], 4)
    back = space.json("data", "curate")
    assert (back["kept"], back["dropped"], back["restored"]) == (first["kept"] + 1, 0, 4)
    listed = space.json("data", "log")["versions"]
    assert [each["change"] for each in listed[:2]] == ["curation", "curation"]
    assert read_manifest(Path(space.folder) / "data" / "blobs").digest == back["digest"]


@pytest.mark.long
def test_lists_are_published_and_withdrawn(space: Workspace) -> None:
    before = space.json("ingest", "images")
    Path(space.folder, "dark.csv").write_text("filepath,tags\n/mnt/images/odd/001.png,dark\n")
    dark = space.json("data", "curate", "--drop", "dark.csv")
    assert (dark["kept"], dark["rules"]) == (before["kept"] - 1, {"list dark": 1})
    shutil.rmtree(space.folder / "data")
    restored = space.json("ingest", "images")
    assert (restored["digest"], restored["dropped"]) == (dark["digest"], 1)
    assert [each["name"] for each in space.json("data", "show")["lists"]] == ["dark"]
    assert space.json("data", "curate", "--withdraw", "dark")["content_digest"] == before["content_digest"]
