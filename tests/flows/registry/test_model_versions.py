"""Whoever registers the same weights at the same time, here or on another machine, goes on with one version."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import mlflow
import pytest
from mlflow.client import MlflowClient
from mlflow.entities import LoggedModelStatus

import diffusion
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.image_grids import png_bytes
from diffusion.process.samplers import sampling_config
from flows.registry import champion, model_versions
from flows.registry.model_versions import WEIGHTS, Version
from tests.builders.command_line import output_of
from tests.builders.model_versions import Killed, add_version, killed, numbers
from tests.builders.small_models import write_model
from tests.builders.virtual_environments import environment


def logged(client: MlflowClient, name: str, weights: Path) -> str:
    """A run that has logged a model with these weights: to log a real one takes ten seconds."""
    experiment = client.create_experiment(name)
    run_id = str(client.create_run(experiment).info.run_id)
    model = client.create_logged_model(experiment, "m", run_id, {WEIGHTS: sha256_file(weights)})
    client.log_model_artifacts(model.model_id, str(weights.parents[1]))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return run_id


def new_run(client: MlflowClient, name: str, folder: Path) -> tuple[Path, str, str]:
    """Weights, and an experiment with a run that has logged nothing yet."""
    weights = write_model(folder / "run" / "weights.safetensors", seed=0, images=8)
    experiment = client.create_experiment(name, artifact_location=(folder / "artifacts").as_uri())
    return weights, experiment, client.create_run(experiment).info.run_id


def weights_in(folder: Path) -> Path:
    (folder / "artifacts").mkdir(parents=True)
    return write_model(folder / "artifacts" / "weights.safetensors", seed=1, images=1)


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch, wait: Any) -> Iterator[ThreadPoolExecutor]:
    """Two who call ``wait`` when they have looked whether the version is there: else they seldom meet."""
    original = MlflowClient.create_model_version

    def waiting(*args: Any, **kwargs: Any) -> Any:
        wait()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(MlflowClient, "create_model_version", waiting)
        yield pool


def test_concurrent_registrations_from_one_folder_make_one_version(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_in(tmp_path / "run")
    run_id = logged(mlflow_client, name, weights)

    def register(_: int) -> Version:
        return model_versions.register(name, run_id, weights, sampling_config(), {}, 8)

    with at_once(monkeypatch, lambda: time.sleep(0.5)) as pool:
        assert [each.number for each in pool.map(register, range(2))] == [1, 1]
    assert len(mlflow_client.search_model_versions(f"name = '{name}'")) == 1
    assert register(2).number == 1


def test_two_machines_that_register_the_same_leave_one_version(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [weights_in(tmp_path / machine) for machine in ("here", "there")]
    run_id = logged(mlflow_client, name, copies[0])
    mlflow_client.create_registered_model(name)

    def register(weights: Path) -> Version:
        return model_versions.register(name, run_id, weights, sampling_config(), {}, 8)

    with at_once(monkeypatch, Barrier(2, timeout=60).wait) as pool:
        assert [each.number for each in pool.map(register, copies)] == [1, 1]
    assert numbers(mlflow_client, name) == [1]
    assert register(copies[1]).number == 1
    # A slower machine had logged a model of its own.
    where = mlflow_client.get_run(run_id).info.experiment_id
    for status in (LoggedModelStatus.READY, LoggedModelStatus.FAILED):
        slower = mlflow_client.create_logged_model(where, "m", run_id, {WEIGHTS: sha256_file(copies[0])})
        mlflow_client.finalize_logged_model(slower.model_id, status)
    version = register(copies[1])
    [logged_model] = mlflow_client.search_logged_models([where])
    assert mlflow_client.get_model_version(name, "1").source == logged_model.model_uri
    assert model_versions.cached_weights(version, tmp_path / "cache").read_bytes() == copies[0].read_bytes()


def test_duplicate_versions_are_deleted_unless_aliased(mlflow_client: MlflowClient, name: str, tmp_path: Path) -> None:
    weights = weights_in(tmp_path / "run")
    run_id = logged(mlflow_client, name, weights)
    tags = {WEIGHTS: sha256_file(weights)}
    source = mlflow_client.search_logged_models([mlflow_client.get_run(run_id).info.experiment_id])[0].model_uri
    for _ in range(4):
        mlflow.register_model(source, name, tags=tags)
    mlflow_client.set_registered_model_alias(name, "favourite", "2")
    champion.promote(name, 3)
    for _ in range(2):
        assert model_versions.register(name, run_id, weights, sampling_config(), {}, 8).number == 1
        assert numbers(mlflow_client, name) == [1, 2, 3]


def test_a_registered_version_is_loaded_by_its_name(mlflow_client: MlflowClient, name: str, tmp_path: Path) -> None:
    version = add_version(mlflow_client, tmp_path / "registry", name)
    mlflow_client.set_registered_model_alias(name, "champion", "1")
    for uri in (version.uri, f"models:/{name}@champion"):
        images = diffusion.load(uri, compute_batch=4, steps=3).generate(count=2, seed=7)
        [weights] = (tmp_path / "registry").rglob("weights.safetensors")
        expected = diffusion.load(weights, compute_batch=4, steps=3).generate(count=2, seed=7)
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    with pytest.raises(UserError):
        diffusion.load(f"models:/{name}/2")


@pytest.mark.slow
def test_a_version_is_served_with_its_requirements_and_code(
    mlflow_client: MlflowClient, name: str, tmp_path: Path
) -> None:
    weights, _, run_id = new_run(mlflow_client, name, tmp_path)
    version = model_versions.register(name, run_id, weights, sampling_config(steps=3, compute_batch=4), {}, 8)
    model = Path(mlflow.artifacts.download_artifacts(version.uri, dst_path=str(tmp_path / "model")))
    assert len([path for path in model.rglob("*") if path.is_file()]) < 130
    requirements = (model / "requirements.txt").read_text().splitlines()
    assert not {"mlflow", "prefect", "dvc", "boto3"} & {line.partition("==")[0] for line in requirements}
    python = environment(tmp_path / "venv", requirements) / "python"
    script = (
        "import hashlib, importlib.util, mlflow, pandas as pd\n"
        "assert all(importlib.util.find_spec(name) is None for name in ('flows', 'prefect', 'dvc', 'sqlalchemy'))\n"
        "model = mlflow.pyfunc.load_model('model')\n"
        "for each in model.metadata.signature.params: print(each.name, each.dtype.name, each.default)\n"
        "table = pd.DataFrame({'task': ['sample', 'interpolate'], 'to_seed': [None, 4], 'count': [None, 3]})\n"
        "out = model.predict(table, params={'seed': 3, 'count': 2, 'steps': 4})\n"
        "print(out['request'].tolist(), *(hashlib.sha256(png).hexdigest() for png in out['png']))"
    )
    *lines, last = output_of([python, "-c", script], cwd=tmp_path, env={}).splitlines()
    assert {"seed long 0", "count long 1", "steps long None", "guidance double None", "prompt string None"} <= {*lines}
    local = diffusion.load(weights, compute_batch=4)
    images = local.generate(count=2, seed=3, steps=4) + local.interpolate(3, 4, 3, steps=4)
    assert last.split(" ", 5)[5].split() == [hashlib.sha256(png_bytes(image)).hexdigest() for image in images]


@pytest.mark.slow
def test_half_logged_model_of_a_killed_process_is_deleted(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, experiment, run_id = new_run(mlflow_client, name, tmp_path)

    def register() -> Version:
        return model_versions.register(name, run_id, weights, sampling_config(), {}, 8)

    def statuses() -> list[str]:
        return [str(each.status) for each in mlflow_client.search_logged_models([experiment])]

    for point in ("log_model_artifacts", "finalize_logged_model"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, point, killed)
            with pytest.raises(Killed):
                register()
    assert statuses() == [LoggedModelStatus.PENDING] * 2
    version = register()
    assert statuses() == [LoggedModelStatus.READY]
    assert model_versions.cached_weights(version, tmp_path / "cache").read_bytes() == weights.read_bytes()
    assert mlflow.pyfunc.load_model(version.uri).metadata.model_id is not None
    assert numbers(mlflow_client, name) == [1]
