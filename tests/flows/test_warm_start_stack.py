"""Nights of retraining against real servers: a chain of warm starts, and the takedown that ends it."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.client import MlflowClient

from diffusion.checkpoints import read_model_header
from tests.builders.shapes import disc
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUICK = {
    "training": PARAMS["training"] | {"images": 160, "checkpoints": 1, "keep": 1},
    "evaluation": PARAMS["evaluation"] | {"samples": 16},
}


def add_images(folder: Path, numbers: range) -> None:
    for number in numbers:
        disc(number).save(folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png")


def test_nights_go_on_from_the_champion_until_images_are_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, PARAMS | QUICK, 120) as space:
        space.join(monkeypatch)
        server = MlflowClient(space.variables["MLFLOW_TRACKING_URI"])
        first = retrain(space)
        assert first["start"].startswith("from nothing")
        champion = f"models:/blobs/{first['verdict']['champion']}"
        add_images(tmp_path / "images", range(200, 220))
        space.run("ingest", "images")
        assert space.json("retrain", "images", "--dry-run")["start"].startswith(champion)
        second = retrain(space)
        assert second["start"].startswith(champion)
        version = server.get_model_version("blobs", str(second["verdict"]["version"]["number"]))
        assert (version.tags["darkroom.start"], version.tags["darkroom.warm_start"]) == (champion, "1")
        assert version.tags["darkroom.state_sha256"]
        assert read_model_header(tmp_path / "runs" / "blobs" / "final.safetensors").images == 48
        assert retrain(space)["skipped"]

        derived = space.json("data", "remove", "odd/00*.png", "--reason", "consent withdrawn", "--yes")["derived"]
        assert [run["run_id"] for run in derived["runs"]] == sorted([first["run_id"], second["run_id"]])
        assert len(derived["models"]) == 2
        third = retrain(space)
        assert third["start"].startswith("from nothing")
        assert "darkroom.start" not in server.get_run(third["run_id"]).data.tags


def retrain(space: Workspace) -> Any:
    return space.json("retrain", "images", "--count", "2", code=(0, 3))
