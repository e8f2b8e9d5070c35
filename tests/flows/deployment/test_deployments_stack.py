"""Retraining by itself on a real stack: deployments, events, limits, dead runs, a form in a browser.

Screenshots go to where DARKROOM_SCREENSHOTS says, if it says so.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from playwright.sync_api import Page, expect

from flows.datasets.sync import CREATED
from flows.promote import WAITING
from tests.builders.browser import chromium
from tests.builders.champion_settings import QUICK
from tests.builders.prefect_api import Prefect
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

HEARTBEAT = 30
"""Seconds; Prefect allows no less."""
PATIENCE = 60_000
"""Milliseconds that a page may take on a busy machine."""
NEVER = "0 0 1 1 *"
"""A schedule that starts nothing while tests run."""
DEPLOY = (
    "deploy",
    "--set",
    "ingest.source=images",
    "--cron",
    NEVER,
    "--monitor-cron",
    NEVER,
)
T = TypeVar("T")
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
HOLDER = """
import time
from prefect import flow
from flows.deployment.tasks import concurrency_slot

@flow(name="holder")
def holder():
    with concurrency_slot("retrain-blobs"):
        print("holds", flush=True)
        time.sleep(900)

holder()
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack on which everything is deployed."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.variables |= {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT)}
        space.fork()
        space.json(*DEPLOY)
        yield space


@pytest.fixture(scope="module")
def prefect(workspace: Workspace) -> Prefect:
    return Prefect(workspace)


@pytest.fixture(scope="module")
def killed_run(workspace: Workspace, prefect: Prefect) -> str:
    """The id of a run that held the turn of retraining when its process was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=workspace.folder, env=workspace.variables, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    while "holds" not in process.stdout.readline():
        assert process.poll() is None
    [run] = prefect.runs("holder")
    heartbeat = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{run['id']}"]},
    }
    wait_for(lambda: prefect.filter("events", filter=heartbeat))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert prefect.run(run["id"])["state_type"] == "RUNNING"
    assert prefect.limit("retrain-blobs")["active_slots"] == 1
    return str(run["id"])


def test_deploying_twice_changes_nothing(workspace: Workspace, prefect: Prefect, killed_run: str) -> None:
    def there() -> dict[str, list[str]]:
        items = {kind: prefect.filter(kind) for kind in ("deployments", "automations", "work_pools")}
        return {kind: sorted(each["name"] for each in some) for kind, some in items.items()}

    before = there()
    result = workspace.json(*DEPLOY, "--cron", "5 0 1 1 *")
    assert there() == before
    assert result["deployments"] == ["retrain/blobs", "sample-on-demand/blobs", "monitor/blobs"]
    assert before["deployments"] == ["blobs"] * 3
    triggers = ["darkroom: retrain blobs on a new version", "darkroom: retrain blobs on drift"]
    assert before["automations"] == sorted([*result["automations"], *triggers])
    assert before["work_pools"] == ["darkroom"]
    [schedule] = prefect.deployment("retrain/blobs")["schedules"]
    assert schedule["schedule"]["cron"] == "5 0 1 1 *"
    assert {name: prefect.limit(name)["limit"] for name in result["concurrency_limits"]} == result["concurrency_limits"]


def test_a_new_version_starts_one_retraining(workspace: Workspace, prefect: Prefect, killed_run: str) -> None:
    version = workspace.json("ingest", "images")["digest"]
    [event] = wait_for(lambda: prefect.filter("events", filter={"event": {"name": [CREATED]}}))
    assert event["payload"]["digest"] == version
    [run] = wait_for(lambda: prefect.runs("retrain"))
    assert run["parameters"]["version"] == version
    # Its turn comes when the one that was killed gives its slot back.
    flow_run = prefect.ended(run["id"])
    assert flow_run["state_type"] == "COMPLETED", flow_run["state"]["message"]
    assert flow_run["state"]["message"].startswith("models:/blobs/1 is champion")
    assert not [each for each in prefect.runs("ingest") if each["parent_task_run_id"]]

    workspace.json("ingest", "images")
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = workspace.json("retrain", "images")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert again["skipped"].startswith(f"version {version[:12]} of blobs was trained on with this configuration before")
    assert again["verdict"]["version"]["number"] == 1
    assert used.ru_utime + used.ru_stime - start.ru_utime - start.ru_stime < 15
    newest = prefect.runs("retrain")[0]
    assert (newest["state_type"], newest["state_name"]) == ("COMPLETED", "Skipped")
    assert newest["state"]["message"].startswith("nothing to do: version")
    assert len(prefect.filter("events", filter={"event": {"name": [CREATED]}})) == 1
    assert len(prefect.runs("retrain")) == 2
    assert len(prefect.runs("train")) == 1


def test_a_fresh_machine_gets_the_data_and_does_nothing_again(workspace: Workspace, killed_run: str) -> None:
    version = workspace.json("data", "log")["versions"][0]["digest"]
    for name in (".dvc", "data", "runs", "reports"):
        (workspace.folder / name).rename(workspace.folder / f"{name}-elsewhere")
    output = workspace.json("retrain", "--version", version)
    assert output["data"]["digest"] == version
    assert output["skipped"]
    assert (workspace.folder / "data" / "blobs" / "manifest.json").is_file()
    for name in (".dvc", "data", "runs", "reports"):
        shutil.rmtree(workspace.folder / name, ignore_errors=True)
        (workspace.folder / f"{name}-elsewhere").rename(workspace.folder / name)


def test_champion_is_monitored_once_per_data_set_version(workspace: Workspace, prefect: Prefect) -> None:
    first = prefect.ended(prefect.start("monitor/blobs"))
    assert first["state_type"] == "COMPLETED", first["state"]["message"]
    assert "kid_efflite0" in first["state"]["message"]
    again = workspace.json("monitor")
    assert again["skipped"] is True
    assert again["model"] == "models:/blobs/1"


@pytest.mark.drill
def test_a_killed_run_is_crashed_and_frees_its_slot(prefect: Prefect, killed_run: str) -> None:
    flow_run = prefect.ended(killed_run)
    assert flow_run["state_type"] == "CRASHED"
    assert f"for {4 * HEARTBEAT} s" in flow_run["state"]["message"]
    wait_for(lambda: prefect.limit("retrain-blobs")["active_slots"] == 0)


class Preempted:
    """A deployed retraining of a name of its own, long enough to be struck."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace, self.name = workspace, name
        self.options = ["--dataset", name, "--set", "training.images=12800", "--set", "training.checkpoints=2"]
        self.output = workspace.folder / "runs" / name
        workspace.json(*DEPLOY, *self.options)

    def engine(self, run: str) -> psutil.Process | None:
        """The process of the flow run ``run``, once it has logged something of training in this attempt."""
        history, processes = self.output / "history.csv", []
        for each in psutil.process_iter():
            with suppress(psutil.Error):
                if "prefect.engine" in each.cmdline() and each.environ().get("PREFECT__FLOW_RUN_ID") == run:
                    processes.append((each.create_time(), each))
        # Programs that it starts have its command line for a moment.
        start, engine = min(processes, default=(0.0, None), key=lambda each: each[0])
        logged = history.is_file() and len(history.read_text().splitlines()) > 1
        return engine if logged and history.stat().st_mtime > start else None

    def require_checkpoint(self) -> None:
        """Require a checkpoint of what was last logged, or later: written at a signal unless a regular one was due."""
        logged = int(float((self.output / "history.csv").read_text().splitlines()[-1].split(",")[0]))
        checkpoints = [int(each.name.split(".")[0]) for each in self.output.glob("*/*.safetensors.sha256")]
        assert max(checkpoints) >= logged > 0

    def require_same(self) -> None:
        self.workspace.run("train", "--local", *self.options, "--set", f"training.output=runs/whole-{self.name}")
        whole = self.workspace.folder / "runs" / f"whole-{self.name}" / "final.safetensors"
        assert (self.output / "final.safetensors").read_bytes() == whole.read_bytes()


def completed(prefect: Prefect, run: str) -> dict[str, Any]:
    """The run, however often it was to be started again."""
    return wait_for(lambda: flow_run if (flow_run := prefect.run(run))["state_type"] == "COMPLETED" else None)


@pytest.mark.drill
def test_a_preempted_run_is_started_again_and_completes_the_same(
    workspace: Workspace, prefect: Prefect, kills: int
) -> None:
    training, moments = Preempted(workspace, "preempted"), random.Random(0)
    kills = min(kills, 19)  # which is how often the automation starts a run again
    run = prefect.start("retrain/preempted")
    for number in range(kills):
        engine = wait_for(lambda: training.engine(run))
        time.sleep(moments.uniform(0, 1))
        engine.terminate()
        engine.wait(60)
        training.require_checkpoint()
        wait_for(lambda number=number: prefect.run(run)["run_count"] == number + 2)
    assert completed(prefect, run)["run_count"] == kills + 1
    training.require_same()


@pytest.mark.drill
def test_an_evicted_run_is_scheduled_again_and_completes_the_same(workspace: Workspace, prefect: Prefect) -> None:
    training = Preempted(workspace, "evicted")
    deployment = prefect.deployment("retrain/evicted")["id"]
    # As a worker leaves it to its job; no other one takes it.
    response = prefect.client.post(f"/deployments/{deployment}/create_flow_run", json={"state": {"type": "PENDING"}})
    run = response.json()["id"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "flow-run", "execute", run],
        cwd=workspace.folder,
        # What Prefect's worker sets on a job that Kubernetes does not start again.
        env=workspace.variables | {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"},
    )
    engine = wait_for(lambda: training.engine(run))
    process.terminate()
    assert process.wait(90) == 0
    engine.wait(30)
    training.require_checkpoint()
    assert completed(prefect, run)["run_count"] == 2
    training.require_same()


def test_deployed_run_without_its_concurrency_limit_fails(workspace: Workspace, prefect: Prefect) -> None:
    assert prefect.client.delete("/v2/concurrency_limits/retrain-blobs").is_success
    try:
        flow_run = prefect.ended(prefect.start("retrain/blobs"))
    finally:
        workspace.json(*DEPLOY)
    assert flow_run["state_type"] == "FAILED"
    assert "no concurrency limit retrain-blobs" in flow_run["state"]["message"]
    assert "run `darkroom deploy`" in flow_run["state"]["message"]


SLOT = """
import logging, sys, time
from prefect import flow
from flows.deployment.tasks import concurrency_slot

@flow(name="in-slot", flow_run_name="retrain-held")
def in_slot():
    logging.getLogger("flows").addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("flows").setLevel(logging.INFO)
    with concurrency_slot("retrain-held"):
        print("holds", flush=True)
        time.sleep(900)

in_slot()
"""


def test_who_waits_for_a_slot_is_told_who_holds_it(workspace: Workspace, prefect: Prefect) -> None:
    body = {"name": "retrain-held", "limit": 1}
    assert prefect.client.post("/v2/concurrency_limits/", json=body).is_success
    with ExitStack() as stack:

        def read_until(word: str) -> str:
            process = subprocess.Popen(
                [sys.executable, "-c", SLOT],
                cwd=workspace.folder,
                env=workspace.variables,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout
            return next(line for line in process.stdout if word in line)

        read_until("holds")
        [holder] = prefect.runs("in-slot")
        assert holder["id"] in read_until("waiting for a slot")


def shot(page: Page, name: str) -> None:
    if folder := os.environ.get("DARKROOM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_images_are_generated_by_the_form_in_prefects_ui(workspace: Workspace, prefect: Prefect) -> None:
    deployment = prefect.deployment("sample-on-demand/blobs")["id"]
    ui = workspace.variables["PREFECT_API_URL"].removesuffix("/api")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(ui)
        page.locator("input[type=password]").fill(workspace.variables["PREFECT_API_AUTH_STRING"])
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Deployments").first.click()
        expect(page.get_by_text("sample-on-demand").first).to_be_visible()
        page.goto(f"{ui}/deployments/deployment/{deployment}/run")
        expect(page.get_by_text("Model version, models:/NAME@champion").first).to_be_visible()
        count = page.locator(".schema-form-property", has_text="Number of images.").locator("input")
        expect(count).to_have_value("64")
        count.fill("3")
        shot(page, "prefect_form")
        page.get_by_role("button", name="Submit").click()
        [run] = wait_for(lambda: prefect.runs("sample-on-demand"))
        assert run["parameters"]["count"] == 3
        assert prefect.ended(run["id"])["state_type"] == "COMPLETED"
        page.goto(f"{ui}/runs/flow-run/{run['id']}")
        expect(page.get_by_text("Completed", exact=True).first).to_be_visible()
        inner = next(each for each in prefect.runs("sample") if each["parent_task_run_id"])
        page.goto(f"{ui}/runs/flow-run/{inner['id']}")
        expect(page.get_by_text("Completed", exact=True).first).to_be_visible()
        shot(page, "prefect_run")
        page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).last.click()
        expect(page.get_by_text("samples-blobs", exact=True).first).to_be_visible()


def test_a_person_approves_a_promotion_in_prefects_ui(workspace: Workspace, prefect: Prefect) -> None:
    # As docs/how-to/approve-promotions.md says.
    workspace.json(*DEPLOY, "--dataset", "approved", "--set", "registry.approval=true")
    root = prefect.start("retrain/approved")
    # Its event has the address of the page.
    query = {"event": {"name": [WAITING]}}
    [event] = wait_for(lambda: prefect.filter("events", filter=query))
    text = event["payload"]["text"]
    run = wait_for(lambda: next((each for each in prefect.runs("promote") if each["state_type"] == "PAUSED"), None))
    address = text.partition("approval: ")[2]
    assert address.endswith(f"/flow-run/{run['id']}")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE)
        # Before a login, Prefect's page of a run stays empty.
        page.goto(workspace.variables["PREFECT_API_URL"].removesuffix("/api"))
        page.locator("input[type=password]").fill(workspace.variables["PREFECT_API_AUTH_STRING"])
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="Deployments").first).to_be_visible()
        page.goto(address)
        page.get_by_role("button", name="Resume").click()
        fields = page.locator(".schema-form-property")
        fields.nth(1).locator("textarea").fill("Ada")
        fields.nth(0).get_by_role("switch").click()
        shot(page, "prefect_approval")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("Completed", exact=True).first).to_be_visible()
    flow_run = prefect.ended(root)
    assert flow_run["state"]["message"].startswith("models:/approved/1 is champion: approved by Ada")
    [entry] = workspace.json("model", "history", "--dataset", "approved")["entries"]
    assert entry["approval"] == {"approved": True, "by": "Ada", "note": ""}


def test_parameters_of_a_deployment_start_no_program(workspace: Workspace, prefect: Prefect, tmp_path: Path) -> None:
    params = prefect.deployment("retrain/blobs")["parameters"]["params"]
    params["ingest"]["captioner"] = {"command": ["touch", str(tmp_path / "done")], "version": "one"}
    run = prefect.ended(prefect.start("retrain/blobs", params=params))
    assert run["state_type"] == "FAILED"
    assert "DARKROOM_CAPTIONERS" in run["state"]["message"]
    assert not (tmp_path / "done").exists()
