"""Who is champion, on a real stack: the command line, kills at random moments, approval in Prefect, and MLflow."""

import base64
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.client import MlflowClient

from tests.chaos.forked import Forks
from tests.flows.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUICK = {
    "training": {**PARAMS["training"], "images": 320, "checkpoints": 1, "warmup_images": 16},
    "evaluation": {"samples": 16, "extractor_size": 32},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack with two versions of blobs, of which the first or both were champion."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.two_versions()
        yield space


def aliases(server: MlflowClient, model: str = "blobs") -> dict[str, int]:
    return {alias: int(number) for alias, number in server.get_registered_model(model).aliases.items()}


def test_history_tells_what_rollback_and_promotion_by_hand_do_and_versions_show_it(
    workspace: Workspace, server: MlflowClient
) -> None:
    before = workspace.json("history")
    assert [entry["version"] for entry in before["entries"]] == [1, 2]
    assert (before["entries"][0]["what"], before["entries"][0]["to_version"]) == ("promote", 1)
    done = workspace.json("promote", "--to", "2", "--reason", "rounder")
    assert done["version"]["number"] == 2
    workspace.json("promote", "--to", "1", "--reason", "rounder still")
    assert aliases(server) == {"champion": 1, "previous": 2}
    assert workspace.json("rollback", "--reason", "three eyes")["version"]["number"] == 2
    assert aliases(server) == {"champion": 2, "previous": 1}
    assert workspace.json("sample", "--count", "1")["model"] == "models:/blobs/2"

    after = workspace.json("history")
    assert after["entries"][: len(before["entries"])] == before["entries"]
    assert after["verified"] == len(after["entries"])
    assert after["entries"][-1]["reason"] == "three eyes"
    table = workspace.run("history")
    assert "by hand, three eyes" in table
    version = server.get_model_version("blobs", "1")
    assert any("three eyes" in text for name, text in version.tags.items() if name.startswith("darkroom.ledger."))
    for words in ("## Data", version.tags["darkroom.content_digest"], version.run_id, "first version"):
        assert words in (version.description or "")
    grid = (version.description or "").partition("![samples](get-artifact?path=")[2].partition("&")[0]
    shown = {item.path for item in server.list_artifacts(version.run_id, "evaluation/grids")}
    assert grid.replace("%2F", "/") in shown


def test_the_gate_does_not_bring_back_what_a_person_took_the_title_from(
    workspace: Workspace, server: MlflowClient
) -> None:
    workspace.json("promote", "--to", "1")
    workspace.json("promote", "--to", "2")
    workspace.json("rollback", "--reason", "three eyes")
    held = workspace.json("promote", "--set", "training.seed=1", "--set", "training.output=runs/second", code=3)
    assert (held["version"]["number"], held["verdict"]) == (2, "hold")
    assert "three eyes" in held["reason"]
    assert aliases(server)["champion"] == 1


@pytest.mark.parametrize("words", [("--reason", "x"), ("--taken-down",), ("--to", "9"), ("--to", "0")])
def test_promotions_that_make_no_sense_are_refused(workspace: Workspace, words: tuple[str, ...]) -> None:
    workspace.run("promote", *words, code=2)


@pytest.mark.drill(
    "a promotion by hand is killed",
    "SIGKILL at random moments",
    "one champion at each moment; the same command: one entry in the ledger",
)
def test_killed_at_random_moments_there_is_one_champion_and_the_same_command_ends_the_same(
    workspace: Workspace, server: MlflowClient, tmp_path: Path, kills: int
) -> None:
    moments = random.Random(6)
    with closing(Forks(tmp_path, workspace.variables)) as forks:

        def answer(*arguments: str) -> Any:
            return json.loads(forks.finish(workspace.folder, *arguments, "--json"))

        answer("promote", "--to", "2")
        began = time.monotonic()
        answer("promote", "--to", "1")
        duration, champion, entries = time.monotonic() - began, 1, answer("history")["verified"]
        for _ in range(kills):
            wanted = 3 - champion
            command = ("promote", "--to", str(wanted))
            forks.strike(signal.SIGKILL, moments.uniform(0, duration), workspace.folder, *command)
            assert aliases(server)["champion"] in (1, 2)
            found = answer("history")
            assert found["verified"] - entries in (0, 1)
            assert aliases(server)["champion"] == found["champion"] == found["entries"][-1]["to_version"]
            assert answer(*command)["version"]["number"] == wanted
            assert answer("history")["verified"] == entries + 1
            champion, entries = wanted, entries + 1


class Prefect:
    """The workspace's Prefect server, as its UI speaks to it."""

    def __init__(self, workspace: Workspace) -> None:
        secret = base64.b64encode(workspace.variables["PREFECT_API_AUTH_STRING"].encode()).decode()
        self.client = httpx.Client(
            base_url=workspace.variables["PREFECT_API_URL"], headers={"Authorization": f"Basic {secret}"}, timeout=60
        )

    def paused(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """The flow run that waits for input, once there is one."""
        asked = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        deadline = time.monotonic() + 300
        while not (found := self.client.post("/flow_runs/filter", json=asked).json()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        [run] = found
        return dict(run)

    def answer(self, run: dict[str, Any], **fields: object) -> httpx.Response:
        return self.client.post(f"/flow_runs/{run['id']}/resume", json={"run_input": fields})


def test_a_person_approves_or_does_not_before_anything_becomes_champion(
    workspace: Workspace, server: MlflowClient
) -> None:
    prefect = Prefect(workspace)
    for model, approved in (("approved", True), ("denied", False)):
        named = ("--set", f"registry.model={model}")
        workspace.json("train", *named)
        workspace.json("evaluate", *named)
        process = workspace.start("promote", *named, "--set", "registry.approval=true", "--json")
        run = prefect.paused(process)
        assert run["name"].startswith("promote-")
        assert aliases(server, model) == {}
        assert "Not yet" in (server.get_model_version(model, "1").description or "")
        refused = prefect.answer(run, approved=approved, by="")
        assert refused.json()["status"] == "REJECT"
        assert prefect.answer(run, approved=approved, by="Ada", note="looked at it").is_success
        out, err = process.communicate(timeout=300)
        assert process.returncode == (0 if approved else 3), err[-3000:]
        assert "waits for approval: http" in err
        assert "by Ada (looked at it): first version" in out
        [entry] = workspace.json("history", *named)["entries"]
        assert entry["approval"] == {"approved": approved, "by": "Ada", "note": "looked at it"}
        assert aliases(server, model) == ({"champion": 1} if approved else {"challenger": 1})
    held = workspace.json("promote", *named, "--set", "registry.approval=true", code=3)
    assert "a person decided against it" in held["reason"]
    assert workspace.json("promote", "--to", "1", *named)["version"]["number"] == 1


def test_a_retraining_waits_for_approval_and_without_it_leaves_the_champion(
    workspace: Workspace, server: MlflowClient
) -> None:
    prefect = Prefect(workspace)
    always = ("registry.approval=true", "registry.model=asked", "gate.recall_loss=null", "gate.memorised=null")
    # One that has learned next to nothing, and one that is surely better.
    for version, images, approved in ((1, 16, True), (2, 4800, False)):
        sets = (*always, f"training.images={images}", f"training.output=runs/asked-{version}")
        named = [word for each in sets for word in ("--set", each)]
        process = workspace.start("retrain", "pictures", "--count", "1", *named, "--json")
        run = prefect.paused(process)
        assert run["name"].startswith("promote-")
        assert aliases(server, "asked") == ({} if version == 1 else {"champion": 1})
        assert prefect.answer(run, approved=approved, by="Ada", note="looked at it").is_success
        out, err = process.communicate(timeout=300)
        assert process.returncode == (0 if approved else 3), err[-3000:]
        done = json.loads(out)
        assert done["verdict"]["version"]["number"] == version
        assert done["verdict"]["promoted"] is approved
        assert done["prints"]["model"] == "models:/asked/1"
    assert aliases(server, "asked") == {"champion": 1, "challenger": 2}
    entries = workspace.json("history", "--set", "registry.model=asked")["entries"]
    assert [(each["what"], each["approval"]["approved"]) for each in entries] == [("promote", True), ("hold", False)]
