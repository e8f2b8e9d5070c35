"""Families in the registry, side by side, and diffusion in the latents of an autoencoder, against real servers."""

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
import yaml
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.common.model_files import read_header
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

SHORT = PARAMS["training"] | {"images": 1600, "checkpoints": 2}
AUTOENCODER = {
    "ingest": PARAMS["ingest"],
    "model": {"family": "vae", "width": 16, "channel_mult": [1], "latent_channels": 2},
    "training": SHORT,
    "sampling": {"compute_batch": 8},
    "evaluation": PARAMS["evaluation"],
}
URI = "models:/blobs-vae@champion"
PIXELS = {
    "ingest": PARAMS["ingest"],
    "model": {"family": "autoregressive"},
    "training": {"dataset": "blobs", "images": 480, "checkpoints": 2, "keep": 2, "cpu_threads": 1},
    "sampling": {"compute_batch": 8},
    "evaluation": PARAMS["evaluation"],
    "gate": PARAMS["gate"],
}
"""As a comparison trains it beside the workspace's own configuration."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | {"training": SHORT}, 240) as space:
        (space.folder / "vae.yaml").write_text(yaml.safe_dump(AUTOENCODER))
        (space.folder / "pixels.yaml").write_text(yaml.safe_dump(PIXELS))
        yield space


@pytest.mark.long
def test_autoencoder_is_promoted_and_diffusion_trains_on_its_champion(
    workspace: Workspace, server: MlflowClient, tmp_path: Path
) -> None:
    first = workspace.json("retrain", "images", "--count", "8", "--seed", "5", "--params", "vae.yaml")
    version = server.get_model_version_by_alias("blobs-vae", "champion")
    assert first["samples"]["model"] == f"models:/blobs-vae/{version.version}"
    metrics = server.get_run(first["run_id"]).data.metrics
    assert {"train/held_out_psnr_ema", "eval/reconstruction_psnr", "eval/kid_efflite0"} <= metrics.keys()
    assert metrics["eval/reconstruction_psnr"] > 10
    assert Path(first["explained"]["files"][0]).name == "reconstruction.png"

    served = mlflow.pyfunc.load_model(URI).predict(pd.DataFrame({"seed": [5], "index": [3]}))
    sample = objects(workspace, first["samples"]["uri"])["00000003.png"][1]
    pixels = [Image.open(io.BytesIO(png)).tobytes() for png in (served["png"][0], sample)]
    assert pixels[0] == pixels[1]

    options = ["--set", f"model.autoencoder={URI}"]
    assert "million parameters" in workspace.run("train", "--dataset", "blobs", "--dry-run", *options)
    result = workspace.json("retrain", "images", "--count", "8", *options)
    run = server.get_run(result["run_id"]).data
    assert run.tags["darkroom.autoencoder"] == f"models:/blobs-vae/{version.version}"
    champion = server.get_model_version_by_alias("blobs", "champion")
    assert champion.tags["darkroom.autoencoder"] == f"models:/blobs-vae/{version.version}"
    header = read_header(workspace.folder / "runs" / "blobs" / "final.safetensors")["model_header"]
    assert run.params["model.autoencoder"] == header["model"]["autoencoder"]
    assert (
        json.loads(mlflow.artifacts.load_text(f"runs:/{result['run_id']}/params.json"))["model"]["autoencoder"] == URI
    )
    again = workspace.json("retrain", "images", "--count", "8", *options)
    assert again["run_id"] == result["run_id"]
    assert again["verdict"]["version"]["number"] == result["verdict"]["version"]["number"]


def test_unregistered_autoencoder_is_a_one_line_error(workspace: Workspace) -> None:
    workspace.json("ingest", "images")
    error = workspace.run("train", "--set", "model.autoencoder=models:/nothing@champion", code=2)
    assert "models:/nothing@champion" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.long
@pytest.mark.drill
def test_killed_comparison_of_families_resumes_and_registers_each(workspace: Workspace, server: MlflowClient) -> None:
    workspace.json("ingest", "images")
    command = ["compare", "--family", "gan", "--family", "autoregressive", "--set", "training.images=480"]
    killed_process = workspace.start(*command)
    first = workspace.folder / "runs" / "blobs-gan" / "final.safetensors"
    while not first.exists():
        assert killed_process.poll() is None, killed_process.communicate()[1][-3000:]
        time.sleep(0.2)
    os.killpg(killed_process.pid, signal.SIGKILL)
    killed_process.communicate()
    weights = first.read_bytes()
    result = workspace.json(*command)
    assert first.read_bytes() == weights
    entrants = {each["name"]: each for each in result["ranking"]["models"]}
    assert entrants["autoregressive"]["held_out_loss"]["bits_per_dim"] > 0
    assert entrants["gan"]["held_out_loss"]["bits_per_dim"] is None
    assert (workspace.folder / result["report"]).is_file()
    run_ids = {name: each["run_id"] for name, each in entrants.items()}
    for family, run_id in run_ids.items():
        experiment = server.get_experiment(server.get_run(run_id).info.experiment_id)
        assert experiment.name == f"blobs-{family}"
        assert len(server.search_runs([experiment.experiment_id])) == 1
        paths = {item.path for item in server.list_artifacts(run_id, "evaluation")}
        assert {"evaluation/comparison.html", "evaluation/comparison.json"} <= paths

    # What was compared is a run like any other: evaluated, registered and sampled by the same commands.
    trained = workspace.json("train", "--params", "pixels.yaml")
    assert trained["run_id"] == run_ids["autoregressive"]
    workspace.json("evaluate", "--params", "pixels.yaml")
    verdict = workspace.json("promote", "--params", "pixels.yaml", "--set", "gate.memorized=null")
    assert verdict["version"]["model"] == "blobs-autoregressive"
    assert verdict["promoted"]
    samples = workspace.json("sample", "--params", "pixels.yaml", "--count", "8")
    assert samples["model"] == "models:/blobs-autoregressive/1"
