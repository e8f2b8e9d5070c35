"""Who is champion, on a real stack: the command line, kills at random moments, approval in Prefect, and MLflow."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from mlflow.client import MlflowClient

from flows.registry.ledger import Ledger
from tests.builders.champion_settings import QUICK
from tests.builders.forked import Forks
from tests.builders.prefect_api import Prefect
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack with two versions of blobs, of which the first or both were champion."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.two_versions()
        yield space


def aliases(server: MlflowClient, model: str = "blobs") -> dict[str, int]:
    return {alias: int(number) for alias, number in server.get_registered_model(model).aliases.items()}


def test_history_and_versions_show_rollbacks_and_manual_promotions(workspace: Workspace, server: MlflowClient) -> None:
    before = workspace.json("model", "history")
    assert [entry["version"] for entry in before["entries"]] == [1, 2]
    assert (before["entries"][0]["what"], before["entries"][0]["to_version"]) == ("promote", 1)
    result = workspace.json("promote", "--to", "2", "--reason", "rounder")
    assert result["version"]["number"] == 2
    workspace.json("promote", "--to", "1", "--reason", "rounder still")
    assert aliases(server) == {"champion": 1, "previous": 2}
    assert workspace.json("model", "rollback", "--reason", "three eyes")["version"]["number"] == 2
    assert aliases(server) == {"champion": 2, "previous": 1}
    assert workspace.json("sample", "--count", "1")["model"] == "models:/blobs/2"

    after = workspace.json("model", "history")
    assert after["entries"][: len(before["entries"])] == before["entries"]
    assert after["verified"] == len(after["entries"])
    assert after["entries"][-1]["reason"] == "three eyes"
    table = workspace.run("model", "history")
    assert "by hand, three eyes" in table
    version = server.get_model_version("blobs", "1")
    assert any("three eyes" in text for name, text in version.tags.items() if name.startswith("darkroom.ledger."))
    for words in ("## Data", version.tags["darkroom.content_digest"], version.run_id, "first version"):
        assert words in (version.description or "")
    grid = (version.description or "").partition("![samples](get-artifact?path=")[2].partition("&")[0]
    paths = {item.path for item in server.list_artifacts(version.run_id, "evaluation/grids")}
    assert grid.replace("%2F", "/") in paths


def test_gate_does_not_promote_a_version_that_was_rolled_back(workspace: Workspace, server: MlflowClient) -> None:
    workspace.json("promote", "--to", "1")
    workspace.json("promote", "--to", "2")
    workspace.json("model", "rollback", "--reason", "three eyes")
    result = workspace.json("promote", "--set", "training.seed=1", "--set", "training.output=runs/second", code=3)
    assert (result["version"]["number"], result["verdict"]) == (2, "hold")
    assert "three eyes" in result["reason"]
    assert aliases(server)["champion"] == 1


@pytest.mark.parametrize("words", [("--reason", "x"), ("--taken-down",), ("--to", "9"), ("--to", "0")])
def test_invalid_promotions_are_an_error(workspace: Workspace, words: tuple[str, ...]) -> None:
    workspace.run("promote", *words, code=2)


@pytest.mark.drill
@pytest.mark.parametrize("number", [SIGKILL, SIGTERM], ids=lambda number: number.name)
def test_interrupted_commands_leave_one_champion_and_can_be_repeated(
    workspace: Workspace, server: MlflowClient, number: Signals, kills: int
) -> None:
    moments = random.Random(number)
    with closing(Forks(workspace.variables)) as forks:

        def answer(*arguments: str) -> Any:
            return json.loads(forks.finish(workspace.folder, *arguments, "--json"))

        answer("promote", "--to", "2")
        start = time.monotonic()
        answer("promote", "--to", "1")
        duration, champion, entries = time.monotonic() - start, 1, answer("model", "history")["verified"]
        for _ in range(kills):
            target = 3 - champion
            command = ("promote", "--to", str(target))
            forks.strike(number, moments.uniform(0, duration), workspace.folder, *command)
            assert aliases(server)["champion"] in (1, 2)
            history = answer("model", "history")
            assert history["verified"] - entries in (0, 1)
            assert aliases(server)["champion"] == history["champion"] == history["entries"][-1]["to_version"]
            assert answer(*command)["version"]["number"] == target
            assert answer("model", "history")["verified"] == entries + 1
            champion, entries = target, entries + 1


def test_ledger_tampering_is_reported_and_blocks_writes(
    workspace: Workspace, server: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.folder)
    monkeypatch.setenv("DARKROOM_BUCKET", workspace.variables["DARKROOM_BUCKET"])
    ledger = Ledger.of("blobs")
    keys = sorted(ledger.store.list_keys(ledger.place.bucket, ledger.place.key("")))
    whole = {key: ledger.store.get(ledger.place.bucket, key) for key in keys}
    aliased = aliases(server)
    other = str(3 - aliased["champion"])
    edited = whole[keys[0]].replace(b'"by_hand":false', b'"by_hand":true')
    assert edited != whole[keys[0]]
    for changes in (
        dict.fromkeys(keys),
        {keys[-1]: None},
        {keys[0]: None},
        {keys[0]: edited},
        {keys[-1]: whole[keys[-1]].replace(b'"reason":', b'"reason": ')},
    ):
        ledger.store.delete_many(ledger.place.bucket, changes)
        for key, data in changes.items():
            if data is not None:
                ledger.store.put_once(ledger.place.bucket, key, data)
        there = objects(workspace, f"{ledger.place}/")
        # That nobody writes is shown for each in test_aliases.py.
        for verb in (("model", "history"), *([("promote", "--to", other)] if None not in changes.values() else [])):
            assert "the ledger of blobs is broken" in workspace.run(*verb, code=2)
        assert objects(workspace, f"{ledger.place}/") == there
        ledger.store.delete_many(ledger.place.bucket, [key for key, data in changes.items() if data is not None])
        if changes.keys() == whole.keys():
            restored = workspace.json("model", "history", "--restore")["restored"]
            assert restored == [int(key[-13:-5]) for key in keys]
        else:
            for key in changes:
                ledger.store.put_once(ledger.place.bucket, key, whole[key])
        assert {key: ledger.store.get(ledger.place.bucket, key) for key in keys} == whole
    assert aliases(server) == aliased

    junk = ledger.place.key(f"{len(keys) + 1:08d}.json")
    ledger.store.put_once(ledger.place.bucket, junk, b"{}")
    assert workspace.json("model", "history")["foreign"] == [
        {"name": junk[-13:], "reason": "is not an entry of this ledger"}
    ]
    assert workspace.json("promote", "--to", other)["entry"]["number"] == len(keys) + 2
    ledger.store.delete_many(ledger.place.bucket, [junk])


def test_a_deleted_champion_stops_work_early_and_can_be_replaced(workspace: Workspace, server: MlflowClient) -> None:
    """One of a model of its own, which has two."""
    options = ("--set", "registry.model=deleted")
    second = (*options, "--set", "training.seed=1", "--set", "training.output=runs/second")
    for sets in (options, second):
        workspace.json("train", *sets)
        workspace.json("evaluate", *sets)
        workspace.begin("promote", *sets).communicate(timeout=300)
    workspace.json("promote", "--to", "2", *options)
    assert workspace.json("model", "history", *options)["problem"] is None
    server.delete_model_version("deleted", "2")
    runs = len(server.search_runs([server.get_experiment_by_name("deleted").experiment_id]))
    other = (*options, "--set", "training.seed=2", "--set", "training.output=runs/third")
    for words in (
        ("train", *other),
        ("retrain", "images", "--count", "1", *other),
        ("evaluate", *second),
        ("promote", *second),
    ):
        output = workspace.run(*words, code=2)
        assert "version 2 of deleted is champion by the ledger" in output
        assert "`darkroom model rollback` makes version 1 champion" in output
    assert len(server.search_runs([server.get_experiment_by_name("deleted").experiment_id])) == runs
    assert not (workspace.folder / "runs" / "third").exists()
    assert "`darkroom model rollback`" in workspace.json("model", "history", *options)["problem"]
    assert workspace.json("model", "rollback", *options)["version"]["number"] == 1
    workspace.json("train", *other)


def test_a_person_approves_before_anything_becomes_champion(workspace: Workspace, server: MlflowClient) -> None:
    prefect = Prefect(workspace)
    for model, approved in (("approved", True), ("denied", False)):
        options = ("--set", f"registry.model={model}")
        workspace.json("train", *options)
        workspace.json("evaluate", *options)
        process = workspace.begin("promote", *options, "--set", "registry.approval=true", "--json")
        run = prefect.paused(process)
        assert run["name"].startswith("promote-")
        assert aliases(server, model) == {}
        assert "Not yet" in (server.get_model_version(model, "1").description or "")
        error = prefect.resume(run, approved=approved, by="")
        assert error.json()["status"] == "REJECT"
        assert prefect.resume(run, approved=approved, by="Ada", note="looked at it").is_success
        out, err = process.communicate(timeout=300)
        assert process.returncode == (0 if approved else 3), err[-3000:]
        assert "waits for approval: http" in err
        assert "by Ada (looked at it): first version" in out
        [entry] = workspace.json("model", "history", *options)["entries"]
        assert entry["approval"] == {"approved": approved, "by": "Ada", "note": "looked at it"}
        assert aliases(server, model) == ({"champion": 1} if approved else {"candidate": 1})
    result = workspace.json("promote", *options, "--set", "registry.approval=true", code=3)
    assert "a person decided against it" in result["reason"]
    assert workspace.json("promote", "--to", "1", *options)["version"]["number"] == 1


def test_a_retraining_without_approval_leaves_the_champion(workspace: Workspace, server: MlflowClient) -> None:
    prefect = Prefect(workspace)
    always = ("registry.approval=true", "registry.model=retrained", "gate.recall_loss=null", "gate.memorized=null")
    # One that has learned next to nothing, and one that is surely better.
    for version, images, approved in ((1, 16, True), (2, 1600, False)):
        sets = (*always, f"training.images={images}", f"training.output=runs/retrained-{version}")
        options = [word for each in sets for word in ("--set", each)]
        process = workspace.begin("retrain", "images", "--count", "1", *options, "--json")
        run = prefect.paused(process)
        assert run["name"].startswith("promote-")
        assert aliases(server, "retrained") == ({} if version == 1 else {"champion": 1})
        assert prefect.resume(run, approved=approved, by="Ada", note="looked at it").is_success
        out, err = process.communicate(timeout=300)
        assert process.returncode == (0 if approved else 3), err[-3000:]
        result = json.loads(out)
        assert result["verdict"]["version"]["number"] == version
        assert result["verdict"]["promoted"] is approved
        assert result["samples"]["model"] == "models:/retrained/1"
    assert aliases(server, "retrained") == {"champion": 1, "candidate": 2}
    entries = workspace.json("model", "history", "--set", "registry.model=retrained")["entries"]
    assert [(each["what"], each["approval"]["approved"]) for each in entries] == [("promote", True), ("hold", False)]
