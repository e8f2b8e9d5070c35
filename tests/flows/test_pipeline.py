"""The main job against real servers: a folder of pictures in, a judged model in the registry, prints on S3."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.files import sha256_bytes
from tests.conftest import disc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = int(os.environ.get("KILLS", "3"))
PARAMS = {
    "ingest": {"size": 8, "held_out": 0.33},
    "model": {"width": 16, "multipliers": [1], "blocks": 1, "attention": [], "patch": 1},
    "training": {
        "dataset": "blobs",
        "images": 4800,
        "learning_rate": 0.01,
        "batch_size": 16,
        "warmup_images": 64,
        "checkpoints": 8,
        "keep": 2,
    },
    "sampling": {"sampler": "dpmpp_2m", "steps": 8, "compute_batch": 8},
    "evaluation": {"samples": 64, "extractor_size": 32},
}


class Workspace:
    """A folder of its own with pictures, a configuration and a running local stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DARKROOM_", "MLFLOW_", "PREFECT_", "AWS_"))
        } | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, err[-3000:]
        if code == 2:
            assert "Traceback" not in err
            return err
        return out

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    for number in range(240):
        path = folder / "pictures" / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        disc(number).save(path)
    space = Workspace(folder)
    space.run("up")
    for line in space.run("env").splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        space.variables[name] = value.strip("'\"")
    yield space
    space.run("down")


@pytest.fixture
def mlflow(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    for name, value in workspace.variables.items():
        if name.startswith(("MLFLOW_", "AWS_")):
            monkeypatch.setenv(name, value)
    return MlflowClient(workspace.variables["MLFLOW_TRACKING_URI"])


def objects(workspace: Workspace, uri: str) -> dict[str, tuple[Any, bytes]]:
    """Stock boto3: every object below ``uri`` with its time of writing."""
    client = boto3.client(
        "s3",
        endpoint_url=workspace.variables["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=workspace.variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=workspace.variables["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {
        entry["Key"].removeprefix(prefix): (
            entry["LastModified"],
            client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read(),
        )
        for page in pages
        for entry in page.get("Contents", [])
    }


def test_retrain_ends_in_a_champion_with_its_lineage_and_prints(workspace: Workspace, mlflow: MlflowClient) -> None:
    done = workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")

    version = mlflow.get_model_version_by_alias("blobs", "champion")
    run = mlflow.get_run(done["run_id"])
    assert version.run_id == done["run_id"]
    assert version.tags["darkroom.content_digest"] == done["data"]["result"]["content_digest"]
    assert version.tags["darkroom.dvc_digest"] == done["data"]["version"]["digest"]
    assert run.inputs.dataset_inputs[0].dataset.digest == version.tags["darkroom.content_digest"][:36]
    assert run.info.status == "FINISHED"
    for metric in ("loss", "held_out_loss_ema", "train_loss", "images_per_second", "kid_efflite0"):
        points = mlflow.get_metric_history(run.info.run_id, metric)
        assert len({point.step for point in points}) == len(points) > 0
    artifacts = {item.path for item in mlflow.list_artifacts(run.info.run_id, "evaluation")}
    assert "evaluation/report.html" in artifacts
    assert {item.path for item in mlflow.list_artifacts(run.info.run_id, "explain")} >= {"explain/forward.png"}

    found = objects(workspace, done["prints"]["uri"])
    assert "_SUCCESS" in found
    table = pq.read_table(io.BytesIO(found["manifest.parquet"][1])).to_pylist()
    assert [row["index"] for row in table] == list(range(40))
    for row in table:
        png = found[row["key"]][1]
        assert sha256_bytes(png) == row["sha256"]
        picture = Image.open(io.BytesIO(png))
        assert sha256_bytes(picture.tobytes()) == row["pixels_sha256"]
        assert picture.text["darkroom:seed"] == "5"
        assert (row["version"], row["run_id"]) == (int(version.version), done["run_id"])
        assert row["content_digest"] == version.tags["darkroom.content_digest"]
    assert len(found) == 40 + 5


def test_retrain_again_does_nothing_twice(workspace: Workspace, mlflow: MlflowClient) -> None:
    first = workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")
    before = objects(workspace, first["prints"]["uri"])
    again = workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")
    assert again["verdict"]["version"] == first["verdict"]["version"]
    assert again["run_id"] == first["run_id"]
    assert objects(workspace, first["prints"]["uri"]) == before
    assert len(mlflow.search_model_versions("name='blobs'")) == 1


def test_the_registered_model_loads_elsewhere_without_pickle_and_draws_the_printed_pictures(
    workspace: Workspace, tmp_path: Path
) -> None:
    done = workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")
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
    printed = objects(workspace, done["prints"]["uri"])
    for png, index in zip(pngs, (39, 2), strict=True):
        ours = Image.open(io.BytesIO(printed[f"{index:08d}.png"][1]))
        assert Image.open(io.BytesIO(png)).tobytes() == ours.tobytes()


def test_a_worse_model_stays_challenger_with_its_reason(workspace: Workspace, mlflow: MlflowClient) -> None:
    workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")
    champion = mlflow.get_model_version_by_alias("blobs", "champion").version
    worse = ["--set", "training.images=16", "--set", "training.checkpoints=1"]
    workspace.run("train", "--restart", *worse)
    workspace.run("evaluate", *worse)
    verdict = workspace.json("promote", *worse, code=3)
    assert verdict["promoted"] is False
    challenger = mlflow.get_model_version_by_alias("blobs", "challenger")
    assert challenger.version != champion
    assert "not lower" in challenger.description
    assert mlflow.get_model_version_by_alias("blobs", "champion").version == champion


def test_retrain_killed_at_random_moments_ends_the_same(workspace: Workspace, mlflow: MlflowClient) -> None:
    settings = ["--set", "training.seed=1", "--set", "registry.model=killed", "--set", "training.output=runs/killed"]
    command = ["retrain", "pictures", "--count", "40", *settings]
    moments = random.Random(1)
    for _ in range(KILLS):
        process = workspace.start(*command)
        time.sleep(moments.uniform(3, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = workspace.json(*command)

    versions = mlflow.search_model_versions("name='killed'")
    assert [version.version for version in versions] == ["1"]
    assert mlflow.get_model_version_by_alias("killed", "champion").version == "1"
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("killed").experiment_id])
    assert [run.info.run_id for run in runs] == [done["run_id"]]
    losses = mlflow.get_metric_history(done["run_id"], "loss")
    assert len({point.step for point in losses}) == len(losses)
    assert max(point.step for point in losses) == 4800
    found = objects(workspace, done["prints"]["uri"])
    assert len([key for key in found if key.endswith(".png")]) == 40
    undisturbed = ["--set", "training.seed=1", "--set", "training.output=runs/undisturbed"]
    workspace.run("stage", "train", *undisturbed)
    final = [workspace.folder / "runs" / name / "final.safetensors" for name in ("killed", "undisturbed")]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_a_shard_cut_in_half_is_named_and_retrain_mends_it(workspace: Workspace) -> None:
    shard = next((workspace.folder / "data" / "blobs" / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert shard.name in workspace.run("train", code=2)
    workspace.json("retrain", "pictures", "--count", "40", "--seed", "5")


def test_threads_processes_and_ray_make_the_same_shards(workspace: Workspace) -> None:
    made = {}
    for runner in ("threads", "processes", "ray"):
        done = workspace.json("ingest", "pictures", "--dataset", f"by-{runner}", "--set", f"ingest.runner={runner}")
        folder = workspace.folder / "data" / f"by-{runner}"
        shards = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
        made[runner] = (done["content_digest"], shards)
    assert made["threads"] == made["processes"] == made["ray"]


def test_another_batch_at_the_same_place_is_refused(workspace: Workspace) -> None:
    workspace.run("sample", "--count", "8", "--to", "s3://darkroom/mine/here")
    before = objects(workspace, "s3://darkroom/mine/here")
    workspace.run("sample", "--count", "9", "--to", "s3://darkroom/mine/here", code=3)
    workspace.run("sample", "--count", "8", "--to", "s3://darkroom/mine/here")
    assert objects(workspace, "s3://darkroom/mine/here") == before


def test_user_mistakes_are_one_line_and_exit_2(workspace: Workspace) -> None:
    for arguments, words in (
        (["train", "--set", "training.batchsize=2"], "did you mean batch_size"),
        (["train", "--set", "training.minutes=1"], "either training.images or training.minutes"),
        (["ingest", "nowhere"], "nowhere is not a folder"),
        (["sample", "--model", "models:/nothing@champion"], "not in the registry"),
        (["sample", "--model", "digits"], "names no model version"),
        (["sample", "--to", "http://x"], "not an S3 URI"),
        (["evaluate", "--dataset", "nothing"], "no checkpoint to evaluate"),
    ):
        error = workspace.run(*arguments, code=2)
        assert words in error
        assert len(error.strip().splitlines()) == 1
