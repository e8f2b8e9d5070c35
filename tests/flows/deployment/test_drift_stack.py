"""Drift on a real stack: shifted images, monitor, event, automation, one retraining."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.deployment.deploy import PACKAGED
from flows.monitor import DRIFTED
from tests.builders.prefect_api import Prefect
from tests.builders.shapes import disc
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, running
from tests.flows.deployment.test_deployments_stack import NEVER, QUICK

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack with a champion, on which new versions of the data set start no retraining by themselves."""
    quick = {
        "evaluation": QUICK["evaluation"],
        "training": QUICK["training"],
        "ingest": PARAMS["ingest"] | {"source": "images"},
    }
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | quick, 120) as space:
        declared = yaml.safe_load(PACKAGED.read_text())
        declared["deployments"][0]["triggers"] = declared["deployments"][0]["triggers"][1:]
        (space.folder / "prefect.yaml").write_text(yaml.safe_dump(declared))
        space.json("deploy", "--cron", NEVER, "--monitor-cron", NEVER)
        assert space.json("retrain")["verdict"]["version"]["number"] == 1
        yield space


def add(workspace: Workspace, first: int, count: int, shift: int) -> None:
    for number in range(first, first + count):
        pixels = np.clip(np.asarray(disc(number)).astype(int) + shift, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(workspace.folder / "images" / ("even", "odd")[number % 2] / f"{number:03d}.png")
    workspace.json("ingest")


@pytest.mark.drill
def test_shifted_images_start_one_retraining(workspace: Workspace) -> None:
    prefect = Prefect(workspace)

    def events() -> list[dict[str, Any]]:
        return prefect.filter("events", filter={"event": {"name": [DRIFTED]}})

    def retrainings() -> list[dict[str, Any]]:
        return [run for run in prefect.runs("retrain") if run["deployment_id"]]

    first = workspace.json("monitor")
    assert (first["drift"], first["drifted"]) == (None, False)
    add(workspace, 120, 80, 0)
    unshifted = workspace.json("monitor")
    assert unshifted["drift"]["p_value"] > unshifted["drift"]["level"]
    assert not unshifted["drifted"]

    add(workspace, 200, 300, 90)
    assert workspace.json("monitor")["drifted"]
    assert prefect.runs("monitor")[0]["state_name"] == "Drifted"
    [run] = wait_for(retrainings)
    assert workspace.json("monitor")["skipped"] is True
    assert len(events()) == len(retrainings()) == 1
    flow_run = prefect.ended(run["id"])
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    # The same event again, as after a restore of Prefect's database.
    assert prefect.ended(prefect.start("retrain/blobs"))["state_name"] == "Skipped"
