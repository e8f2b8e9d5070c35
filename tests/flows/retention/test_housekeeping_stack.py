"""Housekeeping on a real stack: a sweep, what gc takes of it, and a backup of which a destroyed stack comes back."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.common.files import sha256_file
from flows.local_stack.backup import STAMP
from tests.builders.champion_settings import QUICK
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack with a champion and three samples of it."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 60) as space:
        space.json("retrain", "images", "--count", "3")
        yield space


def registry_state(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the servers of a workspace say of champion, ledger and samples."""
    space.join(monkeypatch)
    client = MlflowClient(space.variables["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("blobs", "champion")
    run = client.get_run(version.run_id)
    return {
        "version": (version.version, version.tags, version.description, version.source),
        "run": (run.data.params, run.data.metrics, run.data.tags),
        "artifacts": sorted(item.path for item in client.list_artifacts(version.run_id)),
        "history": space.json("model", "history"),
        "samples": {name: data for name, (_, data) in objects(space, "s3://darkroom/samples/").items()},
        "ledger": {name: data for name, (_, data) in objects(space, "s3://darkroom/ledger/").items()},
    }


@pytest.mark.long
def test_gc_deletes_sweep_runs_without_a_registered_version(workspace: Workspace, server: MlflowClient) -> None:
    command = ("sweep", "--over", "training.seed=1,2", "--over", "model.width=16")
    swept = workspace.json(*command)
    runs = [server.get_run(point["run_id"]) for point in swept["ranking"]["models"]]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {swept["run_id"]}
    assert {run.data.params["training.seed"] for run in runs} == {"1", "2"}
    assert swept["ranking"]["models"][0]["value"] <= swept["ranking"]["models"][1]["value"]
    page = (workspace.folder / swept["report"]).read_text()
    assert all(run.info.run_id in page for run in runs)
    assert [item.path for item in server.list_artifacts(swept["run_id"])] == ["sweep.html"]
    # By which a takedown finds the page.
    assert (
        server.get_run(swept["run_id"]).data.tags["darkroom.evaluated_on"]
        == swept["ranking"]["conditions"]["content_digest"]
    )
    finals = {path: path.stat().st_mtime_ns for path in workspace.folder.glob("runs/sweeps/blobs/*/final.safetensors")}
    assert len(finals) == 2
    assert workspace.json(*command) == swept
    assert {path: path.stat().st_mtime_ns for path in finals} == finals

    dry_run = workspace.json("gc", "--dry-run")
    assert {item["action"] for item in dry_run["items"]} == {"keep"}
    strict = ("--set", "retention.run_days=0", "--set", "retention.grace_hours=0", "--set", "retention.data_days=0")
    experiment = runs[0].info.experiment_id
    champion_run = server.get_model_version_by_alias("blobs", "champion").run_id
    result = workspace.json("gc", *strict)
    deleted_names = {item["name"] for item in result["items"] if item["action"] != "keep" and item["kind"] == "runs"}
    assert deleted_names == {f"runs:/{run_id}" for run_id in (swept["run_id"], *(run.info.run_id for run in runs))}
    contents = objects(workspace, f"s3://darkroom/mlflow/{experiment}/")
    assert not any(run.info.run_id in name for name in contents for run in runs)
    assert any(champion_run in name for name in contents)
    assert not any(path.exists() for path in finals)
    assert workspace.json("gc", *strict)["items"] != result["items"]
    [image] = [name for name in objects(workspace, "s3://darkroom/samples/") if name.endswith("00000002.png")]
    assert workspace.json("trace", f"s3://darkroom/samples/{image}")["broken"] == []
    assert workspace.json("promote")["promoted"]


@pytest.mark.long
@pytest.mark.drill
def test_a_destroyed_stack_comes_back_from_a_live_backup(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry_state(workspace, monkeypatch)
    target = workspace.folder / "backups"
    # Somebody samples meanwhile: what is half there is left out, or finished by the same command.
    printing = workspace.start("sample", "--count", "8", "--seed", "9")
    killed_backup = workspace.start("server", "backup", str(target))
    time.sleep(6)
    os.killpg(killed_backup.pid, signal.SIGKILL)
    killed_backup.communicate()
    result = workspace.json("server", "backup", str(target))
    printing.communicate(timeout=300)
    again = workspace.json("server", "backup", str(target))
    assert again["objects"] >= result["objects"]
    secrets = [workspace.variables[name] for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")]
    files = [path for path in target.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in files for secret in secrets)
    assert all(sha256_file(path) == path.name for path in (target / "objects").glob("??/*"))

    # Somebody asks for an image to be taken down; only the next backup knows of it.
    [removed] = workspace.json("data", "remove", "*000.png", "--reason", "asked to", "--yes")["removal"]["image_keys"]
    last = workspace.json("server", "backup", str(target))

    workspace.run("down")
    shutil.rmtree(workspace.folder / ".darkroom")
    elsewhere = Workspace(workspace.folder)
    elsewhere.variables["DARKROOM_HOME"] = str(workspace.folder / ".restored")
    try:
        restored = elsewhere.json("server", "restore", str(target), "--backup", result["stamp"])
        assert restored["stamp"] == result["stamp"]
        assert [removal["image_keys"] for removal in restored["later_removals"]] == [[removed]]
        assert datetime.fromisoformat(restored["removals_known_until"]).strftime(STAMP) == last["stamp"]
        assert "there is a stack" in elsewhere.run("server", "restore", str(target), code=2)
        for line in elsewhere.run("env").splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            elsewhere.variables[name] = value.strip("'\"")
        assert elsewhere.variables["MLFLOW_TRACKING_PASSWORD"] not in secrets
        after = registry_state(elsewhere, monkeypatch)
        samples = {name: data for name, data in after.pop("samples").items() if "/seed9-" not in f"/{name}"}  # type: ignore[attr-defined]
        assert samples == before.pop("samples")
        assert after == before
        [image] = [name for name in samples if name.endswith("00000002.png")]
        assert elsewhere.json("trace", f"s3://darkroom/samples/{image}")["broken"] == []
        assert elsewhere.json("sample", "--count", "8", "--seed", "9")["count"] == 8
    finally:
        elsewhere.run("down")


def test_backup_without_a_stack_and_restore_without_a_backup_fail(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert "run `darkroom up`" in space.run("server", "backup", "backups", code=2)
    assert "backups" in space.run("server", "restore", "backups", code=2)
    space.variables["MLFLOW_TRACKING_URI"] = "http://elsewhere:5000"
    assert "docs/operations/backup.md" in space.run("server", "backup", "backups", code=2)
    (tmp_path / "backups").mkdir()
    assert "unset" in space.run("server", "restore", "backups", code=2)
