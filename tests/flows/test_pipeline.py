"""The main job against real servers: a folder of images in, an evaluated model in the registry, samples on S3."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from mlflow.artifacts import download_artifacts
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.checkpoints import read_model_header
from diffusion.common.files import sha256_bytes
from diffusion.evaluation.results import Evaluation
from flows.local_stack.server_process import choose_ports
from tests.builders.waiting import wait_until_served
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RETRAIN = ("retrain", "images", "--count", "40", "--seed", "5")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with running(tmp_path_factory.mktemp("workspace"), PARAMS, 240) as space:
        yield space


@pytest.fixture(scope="module")
def retrain_result(workspace: Workspace) -> Any:
    """What the first retraining of the workspace says: its model is champion."""
    return workspace.json(*RETRAIN)


def test_retrain_ends_in_a_champion_with_lineage_and_samples(
    workspace: Workspace, server: MlflowClient, retrain_result: Any
) -> None:
    result = retrain_result

    version = server.get_model_version_by_alias("blobs", "champion")
    run = server.get_run(result["run_id"])
    assert version.run_id == result["run_id"]
    assert version.tags["darkroom.content_digest"] == result["data"]["result"]["content_digest"]
    assert version.tags["darkroom.dvc_digest"] == result["data"]["version"]["digest"]
    assert run.inputs.dataset_inputs[0].dataset.digest == version.tags["darkroom.content_digest"][:36]
    assert run.info.status == "FINISHED"
    training = ("loss", "held_out_loss_ema", "train_loss", "images_per_second")
    for metric in (*(f"train/{name}" for name in training), "noise_level/1", "eval/kid_efflite0"):
        points = server.get_metric_history(run.info.run_id, metric)
        assert len({point.step for point in points}) == len(points) > 0
    evaluation = Evaluation.read(workspace.folder / "reports" / "blobs" / "evaluation.json")
    header = read_model_header(workspace.folder / "runs" / "blobs" / "weights.safetensors")
    # None, four kinds of classifier-free guidance, and three scales of autoguidance.
    assert evaluation.guidance is not None
    assert len(evaluation.guidance.scores) == 8
    assert header.sampling(evaluation.conditions.sampling) == evaluation.sampling
    assert version.tags.get("darkroom.guidance", "none") == evaluation.sampling.guidance_text
    artifacts = {item.path for item in server.list_artifacts(run.info.run_id, "evaluation")}
    assert "evaluation/report.html" in artifacts
    history = {item.path for item in server.list_artifacts(run.info.run_id, "history")}
    assert history == {f"history/{name}" for name in ("history.csv", "losses.csv", "preflight.json")}
    assert {item.path for item in server.list_artifacts(run.info.run_id, "explain")} >= {"explain/forward.png"}

    contents = objects(workspace, result["samples"]["uri"])
    assert "_SUCCESS" in contents
    table = pq.read_table(io.BytesIO(contents["manifest.parquet"][1])).to_pylist()
    assert [row["index"] for row in table] == list(range(40))
    for row in table:
        png = contents[row["key"]][1]
        assert sha256_bytes(png) == row["sha256"]
        image = Image.open(io.BytesIO(png))
        assert sha256_bytes(image.tobytes()) == row["pixels_sha256"]
        assert image.text["darkroom:seed"] == "5"
        assert (row["version"], row["run_id"]) == (int(version.version), result["run_id"])
        assert row["guidance"] == evaluation.sampling.guidance
        assert row["content_digest"] == version.tags["darkroom.content_digest"]
    assert len(contents) == 40 + 5


def test_the_report_begins_with_the_verdict(workspace: Workspace, server: MlflowClient) -> None:
    version = server.get_model_version_by_alias("blobs", "champion")
    path = download_artifacts(run_id=version.run_id, artifact_path="evaluation/report.html")
    page = Path(path).read_text()
    assert page.index("is champion") < page.index("the checkpoint that has seen")


def test_model_card_of_the_champion_is_shown(workspace: Workspace, server: MlflowClient) -> None:
    version = server.get_model_version_by_alias("blobs", "champion")
    card = workspace.json("model", "card")
    assert card == {"model": f"models:/blobs/{version.version}", "card": version.description}
    assert workspace.run("model", "card", "--model", card["model"]).splitlines() == version.description.splitlines()


def test_the_champion_is_exported_with_its_names(workspace: Workspace, server: MlflowClient) -> None:
    version = server.get_model_version_by_alias("blobs", "champion")
    result = workspace.json("model", "export", "--to", "diffusers", "--out", "exports/blobs")
    assert (result["version"], result["run_id"]) == (f"models:/blobs/{version.version}", version.run_id)
    assert result["weights_sha256"] == version.tags["darkroom.weights_sha256"]
    card = (workspace.folder / "exports" / "blobs" / "README.md").read_text()
    assert version.run_id in card
    assert version.tags["darkroom.content_digest"] in card


def test_repeated_retrain_does_nothing(workspace: Workspace, server: MlflowClient, retrain_result: Any) -> None:
    before = objects(workspace, retrain_result["samples"]["uri"])
    again = workspace.json(*RETRAIN)
    assert again["verdict"]["version"] == retrain_result["verdict"]["version"]
    assert again["run_id"] == retrain_result["run_id"]
    assert objects(workspace, retrain_result["samples"]["uri"]) == before
    assert len(server.search_model_versions("name='blobs'")) == 1


def test_equal_retrainings_leave_one_run_and_one_version(
    workspace: Workspace, server: MlflowClient, tmp_path: Path, retrain_result: Any
) -> None:
    others = [Workspace(tmp_path / name) for name in ("a", "b")]
    for each in others:
        shutil.copytree(workspace.folder / "images", each.folder / "images")
        shutil.copy(workspace.folder / "params.yaml", each.folder)
        each.variables = workspace.variables | {"DARKROOM_HOME": str(workspace.folder / ".darkroom")}
    started = [each.start(*RETRAIN, "--json") for each in others]
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        result = json.loads(out)
        assert (result["run_id"], result["verdict"]["version"]) == (
            retrain_result["run_id"],
            retrain_result["verdict"]["version"],
        )
    assert len(server.search_model_versions("name='blobs'")) == 1
    runs = server.search_runs([server.get_run(retrain_result["run_id"]).info.experiment_id])
    assert [run.info.run_id for run in runs if "darkroom.train_key" in run.data.tags] == [retrain_result["run_id"]]
    points = server.get_metric_history(retrain_result["run_id"], "train/loss")
    assert len({point.step for point in points}) == len(points)


def test_registered_model_loads_without_pickle_and_regenerates_samples(
    workspace: Workspace, tmp_path: Path, retrain_result: Any
) -> None:
    script = (
        "import mlflow, pandas as pd, sys\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "out = model.predict(pd.DataFrame({'seed': [5, 5], 'index': [39, 2]}))\n"
        "import diffusion; print(diffusion.__file__, file=sys.stderr)\n"
        "sys.stdout.buffer.write(b''.join(len(p).to_bytes(4, 'big') + p for p in out['png']))\n"
    )
    # Without this checkout on the path: the code that travels with the version has to do.
    variables = {**workspace.variables, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", script, "models:/blobs@champion"]
    finished = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    pngs, data = [], finished.stdout
    while data:
        size = int.from_bytes(data[:4], "big")
        pngs.append(data[4 : 4 + size])
        data = data[4 + size :]
    samples = objects(workspace, retrain_result["samples"]["uri"])
    for png, index in zip(pngs, (39, 2), strict=True):
        sampled_image = Image.open(io.BytesIO(samples[f"{index:08d}.png"][1]))
        assert Image.open(io.BytesIO(png)).tobytes() == sampled_image.tobytes()


def test_the_registered_model_answers_over_http(workspace: Workspace, tmp_path: Path, retrain_result: Any) -> None:
    sample = objects(workspace, retrain_result["samples"]["uri"])["00000002.png"][1]
    [port] = choose_ports(1)
    page = (Path(__file__).parents[2] / "docs/how-to/serve.md").read_text()
    [command] = [line for line in page.splitlines() if line.startswith("mlflow models serve")]
    command = command.replace("models:/faces@", "models:/blobs@").replace("5001", str(port))
    serve = [sys.executable, "-m", *command.split()]
    # MLflow starts uvicorn by its name, as in a shell where the environment is activated.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = workspace.variables | {"PATH": path}
    server = subprocess.Popen(serve, cwd=tmp_path, env=variables, process_group=0)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        wait_until_served(f"http://127.0.0.1:{port}/ping", server, 120)
        rows = [
            {"seed": 5, "index": 2},
            {"seed": 5, "task": "img2img", "image": base64.b64encode(sample).decode(), "strength": 0.3, "count": 2},
        ]
        answer = client.post("/invocations", json={"dataframe_records": rows})
        assert answer.status_code == 200, answer.text
        images = [
            Image.open(io.BytesIO(base64.b64decode(row["png"]))).tobytes() for row in answer.json()["predictions"]
        ]
        sampled_image = Image.open(io.BytesIO(sample)).tobytes()
        assert images[0] == sampled_image
        assert len({sampled_image, *images}) == 3
        response = client.post("/invocations", json={"dataframe_records": [{"seed": 5, "prompt": "a cat"}]})
        assert response.status_code == 400
        assert "the model was trained without captions" in response.json()["message"]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_champion_edits_images_over_the_cli(workspace: Workspace, retrain_result: Any) -> None:
    source = str(next((workspace.folder / "images").rglob("*.png")))
    varied = workspace.json("edit", "img2img", source, "--count", "2", "--strength", "0.4")
    assert varied["model"] == "models:/blobs/1"
    assert Image.open(workspace.folder / varied["grid"]).width > 64
    image = Image.open(workspace.folder / varied["folder"] / "00000001.png")
    assert image.text["darkroom:model"] == "models:/blobs/1"
    assert "there is no" not in workspace.run("edit", "interpolate", "0", code=2)


def test_a_worse_model_is_rejected_with_its_reason(
    workspace: Workspace, server: MlflowClient, retrain_result: Any
) -> None:
    champion = server.get_model_version_by_alias("blobs", "champion").version
    short = ["--set", "training.images=16", "--set", "training.checkpoints=1"]
    workspace.run("train", "--restart", *short)
    workspace.run("evaluate", *short)
    verdict = workspace.json("promote", *short, code=3)
    assert (verdict["promoted"], verdict["verdict"]) == (False, "reject")
    rejected_version = server.get_model_version("blobs", str(verdict["version"]["number"]))
    assert rejected_version.version != champion
    # Either may be guided, and so cost more.
    assert re.match(
        r"worse (than the champion|by more than δ at .* of the champion's cost): kid_efflite0", verdict["reason"]
    )
    assert verdict["reason"].split(";")[0] in (rejected_version.description or "")
    artifacts = {item.path for item in server.list_artifacts(rejected_version.run_id, "evaluation")}
    assert "evaluation/champion_comparison.json" in artifacts
    assert server.get_model_version_by_alias("blobs", "champion").version == champion


@pytest.mark.long
def test_retraining_keeps_a_finished_training_that_was_never_promoted(
    workspace: Workspace, retrain_result: Any
) -> None:
    short = ("--set", "training.images=32", "--set", "training.checkpoints=1", "--set", "training.seed=77")
    workspace.run("train", "--restart", *short)
    weights = (workspace.folder / "runs/blobs/final.safetensors").read_bytes()
    # Another seed of the samples, so that there is something to do.
    code = 0 if retrain_result["verdict"]["promoted"] else 3
    [aside] = workspace.json("retrain", "images", "--count", "2", "--seed", "6", code=code)["set_aside"]
    assert (workspace.folder / aside / "final.safetensors").read_bytes() == weights


@pytest.mark.long
def test_best_of_the_post_hoc_ema_models_is_promoted(workspace: Workspace, server: MlflowClient) -> None:
    settings = {
        "training.ema_stds": [0.05, 0.1],
        "training.keep": 1,
        "training.output": "runs/averages",
        "evaluation.ema_stds": [0.03, 0.12, 0.18, 0.24],
        "evaluation.finalists": 5,
        "registry.model": "averages",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    result = workspace.json("retrain", "images", "--count", "8", *words)
    version = server.get_model_version_by_alias("averages", "champion")
    assert version.run_id == result["run_id"]
    evaluation = json.loads(
        (workspace.folder / "reports" / "blobs" / "runs" / "averages" / "evaluation.json").read_text()
    )
    names = {Path(each["file"]).name for each in evaluation["checkpoints"]}
    assert names == {"0000001600.safetensors", *(f"std-{each:g}.safetensors" for each in (0.03, 0.12, 0.18, 0.24))}
    assert not list((workspace.folder / "runs" / "averages" / "averages").glob("std*"))


@pytest.mark.drill
def test_shard_cut_in_half_is_named_and_mended(workspace: Workspace) -> None:
    workspace.json(*RETRAIN)
    shard = next((workspace.folder / "data" / "blobs" / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert shard.name in workspace.run("train", code=2)
    workspace.json(*RETRAIN)


def test_threads_processes_and_ray_make_the_same_shards(workspace: Workspace) -> None:
    shards_by_runner = {}
    for runner in ("threads", "processes", "ray"):
        result = workspace.json("ingest", "images", "--dataset", f"by-{runner}", "--set", f"ingest.runner={runner}")
        folder = workspace.folder / "data" / f"by-{runner}"
        if runner == "ray":
            assert not (folder / "shards").exists()
            workspace.json("data", "checkout", result["digest"], "--dataset", folder.name)
        shards = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
        shards_by_runner[runner] = (result["content_digest"], shards)
    assert shards_by_runner["threads"] == shards_by_runner["processes"] == shards_by_runner["ray"]


@pytest.mark.long
def test_champion_is_distilled_once_and_names_its_teacher(
    workspace: Workspace, server: MlflowClient, retrain_result: Any
) -> None:
    teacher = retrain_result["verdict"]["champion"]
    words = ("distill", "--set", "distillation.images=960")
    versions = [workspace.json(*words, code=(0, 3))["version"] for _ in range(2)]
    assert versions[0]["number"] == versions[1]["number"] > teacher
    version = server.get_model_version("blobs", str(versions[0]["number"]))
    assert version.tags["darkroom.start"] == f"models:/blobs/{teacher}"
    header = read_model_header(workspace.folder / "runs" / "blobs-student" / "weights.safetensors")
    assert header.student_steps == 2
    result = workspace.json("sample", "--model", f"models:/blobs/{version.version}", "--count", "4")
    batch = json.loads(objects(workspace, result["uri"])["batch.json"][1])
    assert (batch["sampling"]["sampler"], batch["sampling"]["steps"]) == ("consistency", 2)


def test_different_batch_at_the_same_location_is_an_error(workspace: Workspace) -> None:
    workspace.run("sample", "--count", "8", "--to", "s3://darkroom/mine/here")
    before = objects(workspace, "s3://darkroom/mine/here")
    workspace.run("sample", "--count", "9", "--to", "s3://darkroom/mine/here", code=3)
    workspace.run("sample", "--count", "8", "--to", "s3://darkroom/mine/here")
    assert objects(workspace, "s3://darkroom/mine/here") == before


@pytest.mark.long
def test_evaluation_finds_a_training_with_the_default_batch(
    workspace: Workspace, server: MlflowClient, retrain_result: Any
) -> None:
    default = ["--set", "training.batch_size=null", "--set", "training.output=runs/default", "--set"]
    settings = [*default, "training.images=320", "--set", "registry.model=default"]
    result = workspace.json("train", *settings)
    assert server.get_run(result["run_id"]).data.params["training.batch_size"] == "64"
    workspace.run("evaluate", *settings)
    assert "eval/kid_efflite0" in server.get_run(result["run_id"]).data.metrics


def test_sweep_of_a_default_and_its_value_fails(workspace: Workspace, retrain_result: Any) -> None:
    settings = ("--set", "training.images=320", "--set", "registry.model=twice")
    assert "batch_size" in workspace.run("sweep", "--over", "training.batch_size=null,64", *settings, code=2)
