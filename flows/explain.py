"""The flow ``explain``: the forward process, one training step and the reverse process, as images."""

from pathlib import Path

from mlflow.client import MlflowClient
from prefect import flow

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.data.dataset import Dataset
from diffusion.generation.explain import explain as explain_model
from flows.config import Params
from flows.deployment.tasks import step
from flows.environment import settings
from flows.registry import model_versions
from flows.tracking.runs import RunTracker


class Explained(Config):
    """The images drawn."""

    model: str
    files: list[Path]


@flow(name="explain", flow_run_name="explain-{model}")
def explain(params: Params, model: str, output: Path, seed: int = 0) -> Explained:
    """Draw how the version that ``model`` names works, with a held-out image; also on its run."""
    return draw(params, model, output, seed)


@step
def draw(params: Params, model: str, output: Path, seed: int) -> Explained:
    """Draw into folder ``output`` and put the images on the version's MLflow run."""
    client = MlflowClient()
    version = model_versions.resolve(client, model)
    weights = model_versions.fetch_weights(version, settings().folder / "models")
    dataset = Dataset.open(params.dataset_folder)
    held_out = dataset.rows("held_out")
    rows = held_out if len(held_out) else dataset.rows("train")
    image = dataset.images([rows[seed % len(rows)]])[0]
    loaded = load_model(weights)
    files = explain_model(loaded, image, output, seed)
    tracker = RunTracker(client, version.run_id)
    for file in files:
        tracker.log_file(file, "explain")
    return Explained(model=version.uri, files=files)
