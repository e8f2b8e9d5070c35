"""Flow ``explain``: plots of the forward process, one training step and the reverse process."""

from pathlib import Path

from mlflow.client import MlflowClient
from prefect import flow

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.data.dataset import Dataset
from diffusion.generation.explain import explain as explain_model
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.environment import settings
from flows.registry import model_versions
from flows.tracking.runs import RunTracker


class Explanation(Config):
    """Plots of a model version."""

    model: str
    files: list[Path]


@flow(name="explain", flow_run_name="explain-{model}")
def explain(params: Params, model: str, output: Path, seed: int = 0) -> Explanation:
    """Plot the diffusion process of the version ``model`` for a held-out image; also log the plots to its run."""
    return explain_version(params, model, output, seed)


@retryable_task
def explain_version(params: Params, model: str, output: Path, seed: int) -> Explanation:
    """Write the plots to ``output`` and log them to the version's MLflow run."""
    client = MlflowClient()
    version = model_versions.resolve(client, model)
    weights = model_versions.fetch_weights(version, settings().folder / "models")
    dataset = Dataset.open(params.dataset_folder)
    held_out = dataset.rows("held_out")
    rows = held_out if len(held_out) else dataset.rows("train")
    files = explain_model(load_model(weights), dataset.images([rows[seed % len(rows)]])[0], output, seed)
    for file in files:
        RunTracker(client, version.run_id).log_file(file, "explain")
    return Explanation(model=version.uri, files=files)
