"""Sampling batches on a real stack: killed, doubled and spread in every way, they end in the same bytes.

Many more kills, without the orchestration, are in test_sampling_faults.py.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from mlflow.client import MlflowClient

from diffusion.process.samplers import sampling_config
from flows.registry import model_versions
from tests.builders.left_behind import MARK, descendants, left_behind, new_process_tag
from tests.builders.ray_cluster import at_work, two_nodes
from tests.builders.small_models import write_model
from tests.builders.waiting import wait_for
from tests.builders.workspace import Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

SAMPLING = {"sampler": "dpmpp_2m", "steps": 2, "compute_batch": 64}
COUNT = 8192
"""In tars of which two are too large for one part."""
ARGUMENTS = ["sample", "--model", "models:/blobs/1", "--count", str(COUNT), "--seed", "5"]
ARGUMENTS += ["--set", "sampling_batch.format=tar", "--set", "sampling_batch.chunk=3584"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A stack with a version of blobs that was never trained, as its images need not be good."""
    folder = tmp_path_factory.mktemp("workspace")
    weights = write_model(folder / "weights.safetensors", 1, 0, classes={"even": 2, "odd": 1})
    with running(folder, {"sampling": SAMPLING}, 0) as space, pytest.MonkeyPatch.context() as patch:
        space.join(patch)
        client = MlflowClient()
        run = client.create_run(client.create_experiment("blobs"))
        model_versions.register("blobs", run.info.run_id, weights, sampling_config(**SAMPLING), {}, 0)
        yield space


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace) -> tuple[dict[str, bytes], float]:
    """The objects of the batch, by name, as two threads make them, and how many seconds that takes."""
    start = time.monotonic()
    result = workspace.json(*ARGUMENTS, "--to", "s3://darkroom/undisturbed", "--set", "sampling_batch.workers=2")
    seconds = time.monotonic() - start
    assert (result["took"]["images"], result["count"]) == (COUNT, COUNT)
    assert result["took"]["images_per_cpu_hour"] > 1000
    batch_files = files(workspace, "undisturbed")
    names = [name for n in range(3) for name in (f"samples-0000{n}.tar", f"manifest/part-0000{n}.jsonl")]
    assert sorted(batch_files) == sorted([*names, "batch.json", "manifest.parquet", "_SUCCESS"])
    return batch_files, seconds


def files(workspace: Workspace, name: str) -> dict[str, bytes]:
    return {key.strip("/"): data for key, (_, data) in objects(workspace, f"s3://darkroom/{name}/").items()}


@pytest.mark.drill
def test_a_killed_batch_ends_the_same_with_other_runners(
    workspace: Workspace, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    expected, seconds = undisturbed
    command = [*ARGUMENTS, "--to", "s3://darkroom/killed"]
    mark = new_process_tag()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(workspace.variables, MARK, mark[MARK])
        process = workspace.start(*command, "--set", "sampling_batch.runner=processes")
    time.sleep(0.8 * seconds)
    assert len(descendants(mark)) > 1
    # Alone: its processes are to notice by themselves.
    process.kill()
    process.communicate()
    assert left_behind(mark) == []
    jobs = [workspace.start(*command, "--set", f"sampling_batch.runner={runner}") for runner in ("ray", "processes")]
    for job in jobs:
        _, errors = job.communicate(timeout=900)
        assert job.returncode == 0, errors[-3000:]
    assert files(workspace, "killed") == expected


@pytest.mark.drill
def test_a_batch_ends_the_same_when_a_ray_node_dies(
    workspace: Workspace, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a node's tasks keep the weights that they fetch.
    monkeypatch.chdir(tmp_path)
    with two_nodes(workspace.variables) as (cluster, second), pytest.MonkeyPatch.context() as patch:
        patch.setitem(workspace.variables, "RAY_ADDRESS", cluster.address)
        spread = ("--set", "sampling_batch.runner=ray", "--set", "sampling_batch.workers=2")
        job = workspace.start(*ARGUMENTS, "--to", "s3://darkroom/nodes", *spread)
        wait_for(lambda: at_work(second) or job.poll() is not None, why=lambda: "no task came to the second node")
        assert job.poll() is None, job.communicate()[1][-3000:]
        cluster.remove_node(second, allow_graceful=False)
        _, errors = job.communicate(timeout=900)
        assert job.returncode == 0, errors[-3000:]
    expected, _ = undisturbed
    assert files(workspace, "nodes") == expected


def test_finished_batch_is_skipped_and_its_run_reports_progress(
    workspace: Workspace, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    before = objects(workspace, "s3://darkroom/undisturbed/")
    again = workspace.json(*ARGUMENTS, "--to", "s3://darkroom/undisturbed")
    assert (again["took"]["images"], again["took"]["images_per_cpu_hour"]) == (0, None)
    assert objects(workspace, "s3://darkroom/undisturbed/") == before
    api, secret = (workspace.variables[f"PREFECT_API_{name}"] for name in ("URL", "AUTH_STRING"))
    user, _, password = secret.partition(":")
    conditions = {"artifacts": {"key": {"any_": ["sampling-blobs", "samples-blobs"]}}, "sort": "CREATED_DESC"}
    artifacts = httpx.post(f"{api}/artifacts/filter", json=conditions, auth=(user, password)).raise_for_status().json()
    progress = [each for each in artifacts if each["key"] == "sampling-blobs"]
    # Of the run just now; that of one that was killed stands still.
    assert progress[0]["data"] == 100.0
    assert any(f"{COUNT:,} of {COUNT:,} images generated" in (each["description"] or "") for each in progress)
    assert any("images per CPU-hour" in each["data"] for each in artifacts if each["key"] == "samples-blobs")


def test_another_chunk_size_is_held_and_table_errors_named(
    workspace: Workspace, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    workspace.run(*ARGUMENTS[:-1], "sampling_batch.chunk=1024", "--to", "s3://darkroom/undisturbed", code=3)
    (workspace.folder / "wanted.csv").write_text("label\nodd\nodder\n")
    error = workspace.run("sample", "--model", "models:/blobs/1", "--requests", "wanted.csv", code=2)
    assert "record 2: the model knows no class 'odder'" in error
    assert len(error.strip().splitlines()) == 1
