"""Flow ``explain``: plots of what a registered model does."""

from pathlib import Path

from mlflow.client import MlflowClient
from prefect import flow

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.data.dataset import Dataset
from diffusion.generation.explain import explain as explain_model
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.ingest import require_shards
from flows.registry.model_versions import Version
from flows.sample import fetch
from flows.tracking.runs import RunTracker


class Explanation(Config):
    """Plots of a model version."""

    model: str
    files: list[Path]


@flow(name="explain", flow_run_name="explain-{model}")
def explain(params: Params, model: str, output: Path, seed: int = 0) -> Explanation:
    """Plot forward process, training step and reverse process of a version; also log the plots to its MLflow run."""
    version, weights = fetch(model)
    return plot(params, version, weights, output, seed)


@retryable_task
def plot(params: Params, version: Version, weights: Path, output: Path, seed: int) -> Explanation:
    """Write the plots for a held-out image to ``output`` and log them to the version's MLflow run."""
    require_shards(params)
    dataset = Dataset.open(params.dataset_folder)
    held_out_rows = dataset.rows("held_out")
    rows = held_out_rows if len(held_out_rows) else dataset.rows("train")
    files = explain_model(load_model(weights), dataset.images([rows[seed % len(rows)]])[0], output, seed)
    for file in files:
        RunTracker(MlflowClient(), version.run_id).log_file(file, "explain")
    return Explanation(model=version.uri, files=files)
