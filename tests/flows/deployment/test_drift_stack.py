"""Drift on a real stack: shifted images, monitor, event, automation, one retraining whose reason stays visible."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.deployment.deploy import PACKAGED
from flows.monitor import DRIFTED
from tests.builders.command_line import output_of
from tests.builders.prefect_api import Prefect
from tests.builders.shapes import disc
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, running
from tests.flows.deployment.test_deployments_stack import NEVER, QUICK

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

METRICS = """
from flows.monitoring.prometheus import Servers
for family in Servers().collect():
    for sample in family.samples:
        print(sample.name, *sample.labels.values(), float(sample.value))
"""


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


@pytest.mark.drill(
    "new images differ from those trained on",
    "shifted images are ingested, monitors run again and again",
    "one retraining starts; further ones are held by cooldown and weekly limit",
)
def test_shifted_images_start_one_retraining_and_its_version_says_why(workspace: Workspace) -> None:
    prefect = Prefect(workspace)

    def events() -> list[dict[str, Any]]:
        return prefect.filter("events", filter={"event": {"name": [DRIFTED]}})

    def retrainings() -> list[dict[str, Any]]:
        return [run for run in prefect.runs("retrain") if run["deployment_id"]]

    assert workspace.json("monitor")["causes"] == []
    add(workspace, 120, 80, 0)
    unshifted = workspace.json("monitor")
    assert unshifted["causes"] == []
    assert {test["name"] for test in unshifted["data"]["tests"]} == {"images", "class_shares", "images_by_class"}
    assert all(test["p_value"] > test["level"] for test in unshifted["data"]["tests"])
    assert prefect.client.patch("/work_pools/darkroom", json={"is_paused": True}).is_success

    add(workspace, 200, 150, 90)
    output = workspace.json("monitor")
    assert {"images", "images_by_class"} <= {*output["causes"]}
    assert output["alarm"]["number"] == 1
    [run] = wait_for(retrainings)
    assert run["parameters"]["alarm"] == 1
    assert run["state_type"] == "SCHEDULED"
    assert workspace.json("monitor")["skipped"] is True

    add(workspace, 400, 20, 90)
    cooling = workspace.json("monitor")
    assert (cooling["alarm"], cooling["held"]["limit"]) == (None, "cooldown")
    limits = ("--set", "monitor.cooldown_hours=0", "--set", "monitor.retrainings_per_week=1")
    assert workspace.json("monitor", *limits, code=3)["held"]["limit"] == "week"
    newest = prefect.runs("monitor")[0]
    assert (newest["state_type"], newest["state_name"]) == ("FAILED", "Held")
    assert "monitor.retrainings_per_week = 1" in newest["state"]["message"]
    assert len(events()) == 1
    assert len(retrainings()) == 1

    assert prefect.client.patch("/work_pools/darkroom", json={"is_paused": False}).is_success
    flow_run = prefect.ended(run["id"])
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert "trained for drift alarm 1" in flow_run["state"]["message"]
    reason = output["summary"].partition("; ")[2]
    [artifact] = [each for each in prefect.filter("artifacts") if each["key"] == "drift-blobs"]
    assert artifact["flow_run_id"] == run["id"]
    assert reason.partition(" (")[0] in artifact["description"]
    history = workspace.json("model", "history")
    [entry] = [each for each in history["entries"] if each["version"] == 2]
    assert entry["drift"].startswith("alarm 1 of ")
    if history["entries"][-1]["to_version"] == 2:
        place = workspace.json("sample", "--count", "1", "--seed", "5")["place"]
        assert workspace.json("trace", place)["drift"] == entry["drift"]

    command = [sys.executable, "-c", METRICS]
    shown_output = output_of(command, cwd=workspace.folder, env=workspace.variables).splitlines()
    assert "darkroom_drift_alarms blobs images_by_class 1.0" in shown_output
    assert "darkroom_flow_runs_held_last_day monitor 1.0" in shown_output
    assert any(line.startswith("darkroom_drift_last_alarm_timestamp_seconds blobs ") for line in shown_output)
    # The same event again, as after a restore of Prefect's database: another run does not answer the alarm.
    again = prefect.ended(prefect.start("retrain/blobs", alarm=1))
    assert again["state_type"] == "FAILED"
    assert run["id"] in again["state"]["message"]
