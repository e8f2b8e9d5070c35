"""Releases: a version of one registry becomes champion in another, once, whole, and on record there."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
from mlflow.client import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, Metric, Param

from diffusion.checkpoints import export, load_model
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import sha256_file
from diffusion.process.samplers import sampling_config
from flows.environment import read_staging_servers
from flows.registry import champion, model_versions
from flows.registry.import_model import import_model
from flows.registry.ledger import Evidence, Ledger
from flows.registry.release import MODEL, fetch, register, release, unpack
from flows.registry.takedown_marks import ANCESTORS
from flows.storage.s3 import Store
from flows.tracking.runs import RELEASED_FROM, START, TRAIN_KEY
from tests.builders import ROOT
from tests.builders.model_versions import Killed, add_version, killed
from tests.builders.small_models import write_lora, write_model
from tests.builders.training_runs import run as train
from tests.flows.conftest import copied_store

EVIDENCE = Evidence(verdict="promote", reason="better by 3 deltas", figures={"kid": 0.25}, eval_key="e" * 64)


@dataclass
class Stages:
    """A staging and a production registry: of each its MLflow and its bucket."""

    staging: tuple[str, str]
    production: tuple[str, str]
    patch: pytest.MonkeyPatch

    def at(self, stage: tuple[str, str]) -> MlflowClient:
        """This process uses that stage's servers."""
        self.patch.setenv("MLFLOW_TRACKING_URI", stage[0])
        self.patch.setenv("DARKROOM_BUCKET", stage[1])
        mlflow.set_tracking_uri(stage[0])
        return MlflowClient()

    def version(self, seed: int, folder: Path) -> int:
        """A version in staging, of random weights, evaluated there and made champion, with a run that tells all."""
        client = self.at(self.staging)
        mlflow_experiment = client.get_experiment_by_name("blobs")
        experiment = mlflow_experiment.experiment_id if mlflow_experiment else client.create_experiment("blobs")
        run_id = client.create_run(experiment, tags={TRAIN_KEY: "key", "darkroom.dataset": "blobs"}).info.run_id
        points = [Metric("loss", 1 / (step + 1), 1000 + step, step) for step in range(3)]
        client.log_batch(run_id, points, [Param("model.width", "16")])
        source = resolve_dataset_source("s3://staging/dvc")
        dataset = MetaDataset(source, "blobs", "d" * 36)._to_mlflow_entity()  # type: ignore[abstract]
        client.log_inputs(run_id, [DatasetInput(dataset, [])])
        for path in ("evaluation/evaluation.json", "evaluation/grids/a.png", "dataset/manifest.json", "dataset/x.html"):
            client.log_text(run_id, path, path)
        client.set_terminated(run_id)
        weights = write_model(folder / f"{seed}.safetensors", seed, images=480).read_bytes()
        version = add_version(client, folder, "blobs", data=weights, run_id=run_id, **{"darkroom.images": "480"})
        client.update_model_version("blobs", str(version.number), description="# blobs\n\nA card.")
        return version.number


@pytest.fixture
def stages(
    s3_environment: dict[str, str], mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stages]:
    servers = []
    for name in ("staging", "production"):
        (tmp_path / name).mkdir()
        servers.append((copied_store(mlflow_template, tmp_path / name), f"{name}-{uuid4().hex}"))
        Store().ensure_bucket(servers[-1][1])
    for name, value in (s3_environment | dict(zip(("MLFLOW_TRACKING_URI", "BUCKET"), servers[0], strict=True))).items():
        monkeypatch.setenv(f"DARKROOM_STAGING_{name}", value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield Stages(*servers, monkeypatch)
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_staging_champion_is_released_with_its_lineage(stages: Stages, tmp_path: Path) -> None:
    there = stages.at(stages.staging)
    number = stages.version(1, tmp_path)
    champion.promote("blobs", number, "rounder", evidence=EVIDENCE)
    content = {"darkroom.dataset": "blobs", "darkroom.content_digest": "c" * 64}
    parent = add_version(there, tmp_path / "parent", "blobs", **content)
    there.set_model_version_tag("blobs", str(number), START, parent.uri)
    there.set_tag(there.get_model_version("blobs", str(number)).run_id, START, parent.uri)
    staged = there.get_run(there.get_model_version("blobs", str(number)).run_id)

    here = stages.at(stages.production)
    result = release("models:/blobs@champion")
    assert (result.version.uri, result.already) == ("models:/blobs/1", False)
    version = here.get_model_version_by_alias("blobs", "champion")
    assert version.tags[model_versions.WEIGHTS] == result.version.weights_sha256
    assert version.tags["darkroom.images"] == "480"
    # Staging's version 2 is another one here, or none; what it learned from is known.
    assert START not in {**version.tags, **here.get_run(version.run_id).data.tags}
    assert json.loads(version.tags[ANCESTORS]) == [["c" * 64, "blobs"]]
    assert version.tags[RELEASED_FROM] == f"models:/blobs/{number} in {stages.staging[0]}"
    assert (version.description or "").startswith("# blobs\n\nA card.")
    assert (
        model_versions.cached_weights(result.version, tmp_path / "cache").read_bytes()
        == (tmp_path / "1.safetensors").read_bytes()
    )

    run = here.get_run(version.run_id)
    assert run.info.run_id != staged.info.run_id
    assert (run.data.params, run.data.metrics) == (staged.data.params, staged.data.metrics)
    assert run.data.tags[TRAIN_KEY] == "key"
    history = here.get_metric_history(version.run_id, "loss")
    assert [(point.value, point.timestamp, point.step) for point in history] == [
        (1 / (step + 1), 1000 + step, step) for step in range(3)
    ]
    assert [each.dataset.digest for each in run.inputs.dataset_inputs] == ["d" * 36]
    assert {item.path for item in here.list_artifacts(version.run_id, "evaluation")} >= {"evaluation/evaluation.json"}
    assert [item.path for item in here.list_artifacts(version.run_id, "dataset")] == ["dataset/manifest.json"]

    [entry] = Ledger.of("blobs").read().entries
    assert (entry.what, entry.by_hand, entry.evidence) == ("promote", True, EVIDENCE)
    assert "overrides" not in entry.why
    assert stages.staging[0] in (entry.reason or "")

    again = release("models:/blobs@champion")
    assert (again.already, again.version.uri) == (True, result.version.uri)
    assert len(here.search_model_versions("name='blobs'")) == 1
    assert len(here.search_runs([run.info.experiment_id])) == 1


@pytest.mark.long
@pytest.mark.slow
def test_releasing_a_version_that_is_not_champion_needs_a_reason(stages: Stages, tmp_path: Path) -> None:
    stages.version(1, tmp_path)
    champion.promote("blobs", 1)
    stages.version(2, tmp_path)
    stages.at(stages.production)
    with pytest.raises(UserError, match="is not champion there"):
        release("models:/blobs/2")
    assert Ledger.of("blobs").read().entries == ()
    release("models:/blobs/1")
    release("models:/blobs/2", "the customer wants it")
    champion.roll_back("blobs", "three eyes")
    stages.at(stages.staging)
    champion.promote("blobs", 2)
    stages.at(stages.production)
    with pytest.raises(ConflictError, match="three eyes"):
        release("models:/blobs@champion")


@pytest.mark.long
@pytest.mark.slow
def test_release_killed_before_registration_resumes(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.version(1, tmp_path)
    champion.promote("blobs", 1)
    here = stages.at(stages.production)
    for victim in ("set_terminated", "finalize_logged_model", "update_model_version"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, victim, killed)
            with pytest.raises(Killed):
                release("models:/blobs@champion")
    result = release("models:/blobs@champion")
    [run] = here.search_runs([experiment_of(here)])
    assert run.info.status == "FINISHED"
    [model] = here.search_logged_models([experiment_of(here)])
    assert (model.source_run_id, str(model.status)) == (run.info.run_id, "READY")
    assert here.get_model_version("blobs", "1").description
    assert result.version.number == len(here.search_model_versions("name='blobs'")) == 1


@pytest.mark.slow
def test_two_releases_at_once_make_one_version_and_one_run(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.version(1, tmp_path)
    (folder := tmp_path / "parcel").mkdir()
    fetch("models:/blobs/1", folder)
    bundle, here = unpack(folder), stages.at(stages.production)
    original = MlflowClient.create_model_version

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)  # else they seldom meet
        return original(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", slowly)
    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(lambda where: register(bundle, folder, where), ("one", "two")))
    assert [each.number for each in versions] == [1, 1]
    assert len(here.search_model_versions("name='blobs'")) == len(here.search_runs([experiment_of(here)])) == 1


def experiment_of(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("blobs")
    return str(experiment.experiment_id)


@pytest.mark.slow
def test_released_model_generates_the_same_images(stages: Stages, tmp_path: Path, dataset: Path) -> None:
    there = stages.at(stages.staging)
    run = train(dataset, tmp_path / "run")
    run_id = there.create_run(there.create_experiment("blobs"), tags={TRAIN_KEY: "key"}).info.run_id
    export(run.final, weights := tmp_path / "weights.safetensors")
    sampling = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=4)
    model_versions.register("blobs", run_id, weights, sampling, {}, run.images)
    requests = pd.DataFrame({"seed": [7], "count": [2]})
    images = mlflow.pyfunc.load_model("models:/blobs/1").predict(requests)
    stages.at(stages.production)
    released = release("models:/blobs/1", "first")
    assert released.version.weights_sha256 == sha256_file(weights)
    assert (
        mlflow.pyfunc.load_model("models:/blobs@champion").predict(requests)["png"].tolist() == images["png"].tolist()
    )


@pytest.mark.slow
def test_altered_model_bundle_is_an_error(stages: Stages, tmp_path: Path) -> None:
    stages.version(1, tmp_path)
    stages.at(stages.production)
    fetch("models:/blobs/1", tmp_path / "parcel")
    unpack(tmp_path / "parcel")
    (tmp_path / "parcel" / MODEL / "artifacts" / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"weights of .* do not match their digest"):
        unpack(tmp_path / "parcel")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "set DARKROOM_STAGING_MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_URI": "http://a"}, "DARKROOM_STAGING_BUCKET"),
        ({"HOME": "x", "BUCKET": "y"}, "unset DARKROOM_STAGING_BUCKET"),
    ],
)
def test_invalid_staging_settings_are_an_error(no_servers: None, variables: dict[str, str], words: str) -> None:
    os.environ.update({f"DARKROOM_STAGING_{name}": value for name, value in variables.items()})
    with pytest.raises(UserError, match=words):
        read_staging_servers()


def test_bundling_process_gets_staging_credentials_only(no_servers: None) -> None:
    os.environ.update(
        {
            "AWS_SECRET_ACCESS_KEY": "local",
            "MLFLOW_TRACKING_PASSWORD": "local",
            "DARKROOM_STAGING_MLFLOW_TRACKING_URI": "https://user:staged@staging:5000/x",
            "DARKROOM_STAGING_BUCKET": "staged",
            "DARKROOM_STAGING_AWS_SECRET_ACCESS_KEY": "staged",
        }
    )
    called, variables = read_staging_servers()
    assert "local" not in variables.values()
    assert (variables["AWS_SECRET_ACCESS_KEY"], variables["DARKROOM_BUCKET"]) == ("staged", "staged")
    assert called == "https://staging:5000/x"


@pytest.mark.slow
@pytest.mark.long
def test_a_version_is_released_with_its_base(stages: Stages, tmp_path: Path) -> None:
    stages.at(stages.staging)
    base = write_model(tmp_path / "base.safetensors", 1, 7)
    adapter = write_lora(tmp_path / "tuned" / "lora.safetensors", base, 1)
    sampling = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=4)
    first = import_model(str(base), "bases", "CC0-1.0", sampling).version
    import_model(str(adapter), "tuned", "CC0-1.0", sampling)
    here = stages.at(stages.production)
    result = release("models:/tuned/1", "first")
    assert here.get_model_version("bases", "1").tags[model_versions.WEIGHTS] == first.weights_sha256
    assert [entry.version for entry in Ledger.of("bases").read().entries] == []
    load_model(model_versions.cached_weights(result.version, tmp_path / "cache"))
    assert release("models:/tuned/1", "first").already
    assert len(here.search_model_versions("name='bases'")) == 1
