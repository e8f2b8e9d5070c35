"""A small registry for the tabs of a registered model."""

from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from flows.registry import champion
from flows.registry.model_versions import Version
from tests.builders.model_versions import add_version
from tests.builders.small_models import write_model


@pytest.fixture
def versions(mlflow_client: MlflowClient, bucket: str, tmp_path: Path) -> list[Version]:
    """Versions 1 and 2 of a model named as the bucket, which were champion one after the other."""
    experiment = mlflow_client.create_experiment(bucket, artifact_location=(tmp_path / "artifacts").as_uri())
    version_list = []
    for seed in (1, 2):
        weights = write_model(tmp_path / f"{seed}.safetensors", seed, seed, classes={"even": 3, "odd": 1})
        run = mlflow_client.create_run(experiment)
        data = weights.read_bytes()
        version_list.append(
            add_version(mlflow_client, tmp_path / "registry", bucket, data=data, run_id=run.info.run_id)
        )
        champion.promote(bucket, seed)
    return version_list
