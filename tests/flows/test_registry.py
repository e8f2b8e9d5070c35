"""Whoever registers the same weights at the same time, here or on another machine, goes on with one version."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import uuid4

import mlflow
import pytest
from mlflow.client import MlflowClient
from mlflow.entities import LoggedModelStatus

from diffusion.config_sampling import SamplingConfig
from diffusion.files import sha256_file
from flows import registry
from flows.registry import WEIGHTS, Version


@pytest.fixture
def name(mlflow_client: MlflowClient) -> Iterator[str]:
    yield f"m{uuid4().hex}"
    mlflow.set_tracking_uri(None)


def logged(client: MlflowClient, name: str, weights: Path) -> str:
    """A run that has logged a model with these weights: to log a real one takes ten seconds."""
    mlflow.set_tracking_uri(client.tracking_uri)
    experiment = client.create_experiment(name)
    run_id = str(client.create_run(experiment).info.run_id)
    model = client.create_logged_model(experiment, "m", run_id, {WEIGHTS: sha256_file(weights)})
    client.log_model_artifacts(model.model_id, str(weights.parent))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return run_id


def weights_in(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "weights.safetensors"
    path.write_bytes(b"weights")
    return path


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch, wait: Any) -> Iterator[ThreadPoolExecutor]:
    """Two who call ``wait`` when they have looked whether the version is there: else they seldom meet."""
    original = mlflow.register_model

    def waiting(*args: Any, **kwargs: Any) -> Any:
        wait()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(mlflow, "register_model", waiting)
        yield pool


def test_two_who_register_what_lies_in_one_folder_make_one_version(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_in(tmp_path / "run")
    run_id = logged(mlflow_client, name, weights)

    def register(_: int) -> Version:
        return registry.register(name, run_id, weights, SamplingConfig(), {}, 8)

    with at_once(monkeypatch, lambda: time.sleep(0.5)) as pool:
        assert [each.number for each in pool.map(register, range(2))] == [1, 1]
    assert len(mlflow_client.search_model_versions(f"name = '{name}'")) == 1
    assert register(2).number == 1


def test_two_machines_that_register_the_same_go_on_with_the_same_version(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [weights_in(tmp_path / machine) for machine in ("here", "there")]
    run_id = logged(mlflow_client, name, copies[0])
    mlflow_client.create_registered_model(name)

    def register(weights: Path) -> Version:
        return registry.register(name, run_id, weights, SamplingConfig(), {}, 8)

    with at_once(monkeypatch, Barrier(2, timeout=60).wait) as pool:
        assert [each.number for each in pool.map(register, copies)] == [1, 1]
    assert len(mlflow_client.search_model_versions(f"name = '{name}'")) == 2
    assert register(copies[1]).number == 1
