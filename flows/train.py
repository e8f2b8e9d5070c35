"""The flow ``train``: a data set in, a run in MLflow and checkpoints on disk out."""

from pathlib import Path

from prefect import flow

from diffusion.config import Config
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.training.train import Restart, TrainResult, identity_fields, train_key
from diffusion.training.train import train as train_model
from flows import lineage
from flows.environment import data_source
from flows.params import Params, flattened
from flows.progress import reporter
from flows.steps import step
from flows.tracking import RunTracker, open_run


class TrainingRun(Config):
    """What ``train`` hands on."""

    run_id: str
    result: TrainResult


@flow(name="train", flow_run_name="train-{params.training.dataset}")
def train(params: Params, restart: Restart = "never") -> TrainingRun:
    """Train as ``params`` say and record it live in MLflow; goes on where it was stopped."""
    return train_and_track(params, restart)


@step
def train_and_track(params: Params, restart: Restart) -> TrainingRun:
    """Train in ``params.run_folder``; the MLflow run is found again by what goes into it."""
    manifest = read_manifest(params.dataset_folder)
    tracker = _open(params, manifest, anew=restart == "always")
    try:
        result = train_model(
            params.dataset_folder,
            params.run_folder,
            params.model,
            params.training,
            params.sampling,
            tracker,
            reporter(),
            restart,
        )
    except BaseException:
        tracker.fail()
        raise
    for record in (result.output / "history.csv", result.output / "losses.csv"):
        tracker.log_file(record, "history")
    tracker.finish()
    return TrainingRun(run_id=tracker.run_id, result=result)


def _open(params: Params, manifest: Manifest, anew: bool) -> RunTracker:
    key = train_key(manifest.content_digest, params.model, params.training)
    parameters = flattened(
        {"model": params.model.model_dump(mode="json"), "training": identity_fields(params.training)}
    )
    tracker = open_run(
        params.model_name,
        key,
        parameters,
        manifest,
        lineage.code_version(),
        lineage.data_version(params.dataset_folder),
        data_source(),
        anew,
    )
    tracker.client.log_text(tracker.run_id, params.model_dump_json(indent=2), "params.json")
    tracker.log_file(Path(params.dataset_folder / "manifest.json"), "dataset")
    return tracker
