"""The pipeline on an S3 server elsewhere that ignores If-None-Match where uploads in parts are completed.

Run by ``make drill-ceph``: ``TEST_AWS_ENDPOINT_URL_S3`` and its like name the server.
"""

import json
import os
from collections.abc import Iterator

import pytest
import yaml

from flows.storage.s3 import Store, client
from tests.builders.shapes import disc
from tests.builders.workspace import PARAMS, Workspace, objects

pytestmark = pytest.mark.timeout(1800)

BUCKET = "darkroom-drill"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """MLflow and Prefect here, S3 elsewhere."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"training": PARAMS["training"] | {"images": 640}}))
    for number in range(120):
        path = folder / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        disc(number).save(path)
    space = Workspace(folder)
    variables = {
        name.removeprefix("TEST_"): value for name, value in os.environ.items() if name.startswith("TEST_AWS_")
    }
    space.variables |= variables | {"DARKROOM_BUCKET": BUCKET}
    Store(client(variables=variables)).ensure_bucket(BUCKET)
    try:
        space.run("up")
        for line in space.run("env").splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            space.variables[name] = value.strip("'\"")
        yield space
    finally:
        space.run("down")


def test_a_retraining_its_ledger_and_batches_in_files_and_large_tars(workspace: Workspace) -> None:
    assert workspace.run("server", "health", "s3").split() == ["s3", "works"]
    assert "elsewhere" in workspace.run("status")
    result = workspace.json("retrain", "images", "--dataset", "blobs", "--count", "8")
    assert result["verdict"]["version"]["number"] == 1
    assert workspace.json("retrain", "images", "--dataset", "blobs", "--count", "8")["skipped"]
    contents = objects(workspace, result["samples"]["uri"])
    assert {"_SUCCESS", "00000000.png", "00000007.png"} <= set(contents)
    trace = workspace.run("trace", result["samples"]["uri"] + "00000003.png")
    assert "models:/blobs/1" in trace

    tars = ("sample", "--model", "models:/blobs@champion", "--count", "4096", "--set", "sampling_batch.format=tar")
    tars += ("--set", "sampling_batch.chunk=4096", "--set", "sampling.compute_batch=64", "--set", "sampling.steps=2")
    first = workspace.json(*tars)
    names = set(objects(workspace, first["uri"]))
    assert {"samples-00000.tar", "_SUCCESS"} <= names
    again = workspace.json(*tars)
    assert (again["uri"], again["took"]["images"]) == (first["uri"], 0)

    history = workspace.json("model", "history", "--dataset", "blobs")
    assert json.dumps(history)
    retention = ("--set", "retention.batch_days=0", "--set", "retention.grace_hours=0")
    assert workspace.json("gc", *retention)["items"]
    assert not objects(workspace, first["uri"])
    second = workspace.json(*tars)
    assert second["uri"] == first["uri"].rstrip("/") + ".2/"
    assert set(objects(workspace, second["uri"])) == names
