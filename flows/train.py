"""The flow ``train``: a data set in, a run in MLflow and checkpoints on disk out."""

from typing import Literal

from mlflow.client import MlflowClient
from prefect import flow
from prefect.logging import get_run_logger

from diffusion.common.config import Config
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.training.autoencoder import with_autoencoder_digest
from diffusion.training.logging import ANEW, SPOOL, read_metrics
from diffusion.training.preflight import PREFLIGHT
from diffusion.training.setup import data_digest, identity_fields, train_key
from diffusion.training.train import Restart, TrainResult, discard
from diffusion.training.train import train as train_model
from diffusion.training.warm_start import open_warm_start, with_start_digest
from flows.config import Params, flattened
from flows.dataset_page import find_dataset_page
from flows.datasets import lineage
from flows.datasets.lineage import RemoteShards
from flows.deployment.tasks import step, turn
from flows.environment import data_source, settings
from flows.registry import model_versions
from flows.registry.champion import require_champion
from flows.registry.dependencies import ResolvedParams, resolve_params
from flows.registry.takedown_marks import TAKEDOWN, joined_names, names_of, require_current, with_takedowns
from flows.storage.s3 import Store
from flows.tracking.buffered import UNANSWERED, SpooledTracker
from flows.tracking.progress_reporter import reporter
from flows.tracking.runs import AUTOENCODER, START, RunTracker, find_run, open_run


class TrainingRun(Config):
    """What ``train`` hands on."""

    run_id: str
    result: TrainResult


@flow(name="train", flow_run_name="train-{params.training.dataset}")
def train(params: Params, restart: Restart | Literal["always"] = "never") -> TrainingRun:
    """Train as ``params`` say and record it live in MLflow; goes on where it was stopped."""
    # What promotes the version that is trained demands it: better to hear of it now.
    Store().require_conditional_puts(settings().bucket, "ledger")
    require_champion(params)
    with turn(f"training-{resolve_device(params.training.device).type}"):
        if restart == "always":
            # A step of its own: were it part of the next one, a retry would throw away finished work.
            start_over(params)
            restart = "never"
        return train_and_track(params, restart)


@step
def start_over(params: Params) -> None:
    """Throw away what the run's folder holds."""
    discard(params.run_folder)


@step
def train_and_track(params: Params, restart: Restart) -> TrainingRun:
    """Train in ``params.run_folder``; the MLflow run is found again by what goes into it."""
    require_current(params.dataset_folder)
    ready = resolve_params(params)
    params = ready.params
    manifest = read_manifest(params.dataset_folder)
    opened: list[SpooledTracker] = []

    def track(anew: bool) -> SpooledTracker:
        spool = params.run_folder / SPOOL
        # Only a training that was thrown away gets another run: one that begins here may be at work elsewhere, too.
        discarded = (spool / ANEW).exists()
        opened.append(SpooledTracker(_open(ready, manifest, discarded), spool, anew or discarded))
        return opened[0]

    try:
        result = train_model(
            params.dataset_folder,
            params.run_folder,
            params.model,
            params.training,
            params.sampling,
            track,
            reporter(),
            restart,
            RemoteShards(params.dataset_folder, data_source()) if params.training.stream_bytes is not None else None,
        )
    except BaseException:
        for each in opened:
            # Before another try opens the same spool.
            each.abandon()
            _say_failed(each.tracker)
        raise
    tracker = _delivered(opened[0]) if opened else _recorded(ready, manifest, result)
    if not tracker.finished:
        for record in (result.output / "history.csv", result.output / "losses.csv"):
            tracker.log_file(record, "history")
        _finish(ready, tracker)
    return TrainingRun(run_id=tracker.run_id, result=result)


def _finish(ready: ResolvedParams, tracker: RunTracker) -> None:
    """End the run, unless images that it learned from were taken down meanwhile: then it fails, and says so.

    A takedown writes its record first and looks for runs then. The run has named its data set since it began, so either
    the takedown finds the run, or this finds the record.
    """
    try:
        require_current(ready.params.dataset_folder, tracker)
    except UserError:
        tracker.fail()
        raise
    with_it = [
        model_versions.resolve(tracker.client, uri) for uri in (ready.autoencoder, ready.start) if uri is not None
    ]
    names = [name for each in with_it for name in names_of(with_takedowns(each).tags.get(TAKEDOWN))]
    if names:
        tracker.tag({TAKEDOWN: joined_names(ready.takedown, *names)})
    tracker.finish()


def _delivered(spooled: SpooledTracker) -> RunTracker:
    spooled.close()
    return spooled.tracker


def _say_failed(tracker: RunTracker) -> None:
    try:
        tracker.fail()
    except UNANSWERED as error:  # what went wrong with the training itself matters more
        get_run_logger().warning("MLflow could not be told that the run failed: %s", error)


def _recorded(ready: ResolvedParams, manifest: Manifest, result: TrainResult) -> RunTracker:
    """The MLflow run of a training that had ended before; if this server has none, one made from its history."""
    client, params = MlflowClient(), ready.params
    run = find_run(client, params.model_name, result.train_key)
    if run is None:
        tracker = _open(ready, manifest, anew=False)
    else:
        tracker = _delivered(SpooledTracker(RunTracker(client, run.info.run_id), params.run_folder / SPOOL))
    if not tracker.finished:
        # All of it, as this may have been killed before: what the run has already is passed over.
        for name in ("history.csv", "losses.csv"):
            for row in read_metrics(result.output / name):
                tracker.log_metrics(row, int(row.pop("images")))
    return tracker


def _open(ready: ResolvedParams, manifest: Manifest, anew: bool) -> RunTracker:
    params = ready.params
    model = with_autoencoder_digest(params.model)
    training = with_start_digest(params.training, open_warm_start(params.training))
    key = train_key(data_digest(manifest, training), model, training)
    parameters = flattened({"model": model.model_dump(mode="json"), "training": identity_fields(training, model)})
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
    tracker.client.log_text(tracker.run_id, ready.requested.model_dump_json(indent=2), "params.json")
    tracker.tag({AUTOENCODER: ready.autoencoder, START: ready.start, TAKEDOWN: ready.takedown})
    tracker.log_file(params.dataset_folder / "manifest.json", "dataset")
    if (preflight := params.run_folder / PREFLIGHT).is_file():
        tracker.log_file(preflight, "history")
    if page := find_dataset_page(params):
        tracker.log_file(page.html, "dataset")
        tracker.log_metrics(page.summary.metrics(), images=0)
    return tracker
