"""The table of a change's figures beside the champion's, as a team's CI posts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.data.manifest import read_manifest
from flows.datasets.catalog import Catalog
from flows.registry.model_versions import WEIGHTS
from flows.storage.s3 import Location, Store
from flows.tracking.runs import version_artifact
from tests.builders import ROOT

FIGURES = {"images": 640, "kid_efflite0": 0.25, "real_baseline_kid_efflite0": 0.01, "precision_efflite0": 0.5}


def compare(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infra" / "ci" / "compare.py"), *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def model(mlflow_client: MlflowClient, bucket: str) -> str:
    """A registered model with a champion, from before there was a ledger."""
    name = f"model-{bucket[-8:]}"
    run = mlflow_client.create_run(mlflow_client.create_experiment(name))
    mlflow_client.create_registered_model(name)
    tags = {"darkroom.eval_key": "a" * 64, "darkroom.dataset": "blobs", WEIGHTS: "b" * 64}
    scores = {"metrics": {"kid_efflite0": 0.2, "images": 64000.0}}
    mlflow_client.log_dict(run.info.run_id, scores, version_artifact("b" * 64))
    mlflow_client.create_model_version(name, "s3://nowhere/model", run.info.run_id, tags=tags)
    mlflow_client.set_registered_model_alias(name, "champion", "1")
    return name


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The folder of an evaluation as far as the comparison reads it."""
    folder = tmp_path / "reports" / "blobs"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(FIGURES))
    return folder


def set_eval_key(report: Path, eval_key: str) -> None:
    """Let ``report`` be of an evaluation under the conditions called ``eval_key``."""
    (report / "evaluation.json").write_text(json.dumps({"eval_key": eval_key}))


@pytest.mark.slow
def test_metrics_are_shown_beside_the_champion_with_their_difference(model: str, report: Path, tmp_path: Path) -> None:
    set_eval_key(report, "a" * 64)
    result = compare("figures", model, str(report), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "| kid_efflite0 | 0.2 | 0.25 | +0.05 |" in lines
    assert "| images | 6.4e+04 | 640 | -6.336e+04 |" in lines
    assert "| precision_efflite0 |  | 0.5 |  |" in lines
    assert not any("real_baseline_" in line for line in lines)
    assert f"Beside `models:/{model}/1`." in lines
    assert lines[-1] == "Evaluated under the same conditions: the figures compare."


@pytest.mark.slow
def test_incomparable_metrics_are_labelled_as_such(model: str, report: Path, tmp_path: Path) -> None:
    set_eval_key(report, "b" * 64)
    assert "the figures do not compare" in compare("figures", model, str(report), folder=tmp_path).stdout


@pytest.mark.slow
def test_first_model_has_no_comparison_and_needs_an_evaluation(model: str, report: Path, tmp_path: Path) -> None:
    missing = compare("figures", model, str(report), folder=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "run `darkroom evaluate --local` first" in missing.stderr
    set_eval_key(report, "a" * 64)
    first = compare("figures", "another-model", str(report), folder=tmp_path)
    assert first.returncode == 0
    assert "| kid_efflite0 |  | 0.25 |  |" in first.stdout
    assert "Nothing to compare with" in first.stdout


@pytest.mark.slow
@pytest.mark.long
def test_comparison_uses_the_training_data_of_the_champion(
    model: str, dataset: Path, bucket: str, store: Store, mlflow_client: MlflowClient, tmp_path: Path
) -> None:
    manifest = read_manifest(dataset)
    comparison = compare("data", model, folder=tmp_path)
    assert comparison.returncode == 2
    place = Location(bucket) / "datasets" / "blobs"
    store.put_once(bucket, place.key(f"{manifest.digest}/manifest.json"), (dataset / "manifest.json").read_bytes())
    assert Catalog.of("blobs", f"s3://{bucket}/dvc").versions().keys() == {manifest.digest}
    mlflow_client.set_model_version_tag(model, "1", "darkroom.content_digest", manifest.content_digest)
    assert compare("data", model, folder=tmp_path).stdout.strip() == manifest.digest
