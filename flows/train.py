"""Flow ``train``: train on a data set, with checkpoints on disk and a run in MLflow."""

from typing import Literal

from mlflow.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_USER
from prefect import flow
from prefect.logging import get_run_logger

from diffusion.api import engine
from diffusion.common.config import Config
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.training.identity import data_digest, identity_fields, train_key, with_digests
from diffusion.training.logging import METRICS_BUFFER, RESTARTED, read_metrics
from diffusion.training.preflight import PREFLIGHT
from diffusion.training.run_folder import Restart, discard
from diffusion.training.train import TrainResult
from flows.config import Params, flatten_sections
from flows.datasets import dvc
from flows.deployment.tasks import concurrency_slot, retryable_task
from flows.environment import data_source, settings
from flows.ingest import dataset_page, find_page, remote_shards, require_shards
from flows.registry import model_versions
from flows.registry.champion import require_champion
from flows.registry.dependencies import ResolvedParams, resolve_params
from flows.registry.ledger import who
from flows.registry.takedown_marks import (
    TAKEDOWN,
    join_takedown_names,
    parse_takedown_names,
    reload_with_takedowns,
    require_current,
)
from flows.storage.s3 import Store
from flows.tracking.buffered import UNANSWERED, BufferedTracker
from flows.tracking.console import reporter
from flows.tracking.runs import AUTOENCODER, START, TRAIN_KEY, WARM_START, RunTracker, find_run, open_run


class TrainingRun(Config):
    """Result of ``train``, with the ID of its MLflow run."""

    run_id: str
    result: TrainResult


@flow(name="train", flow_run_name="train-{params.training.dataset}")
def train(params: Params, restart: Restart | Literal["always"] = "never") -> TrainingRun:
    """Train with live MLflow tracking; resumes an interrupted run."""
    # Promotion will require these: fail before the training.
    Store().require_conditional_puts(settings().bucket, "ledger")
    require_champion(params)
    with concurrency_slot(f"training-{resolve_device(params.training.device).type}"):
        if restart == "always":
            # A separate task: a retry of the training must not discard its progress.
            retryable_task(discard)(params.run_folder)
            restart = "never"
        return train_and_track(params, restart)


@retryable_task
def train_and_track(params: Params, restart: Restart) -> TrainingRun:
    """Train in ``params.run_folder``; the MLflow run is identified by the digest of its inputs."""
    require_current(params.dataset_folder)
    ready = resolve_params(params)
    params = ready.params
    manifest = read_manifest(params.dataset_folder)
    trackers: list[BufferedTracker] = []

    def track(is_new: bool) -> BufferedTracker:
        folder = params.run_folder / METRICS_BUFFER
        # Only a discarded training gets another MLflow run: a fresh one may be running on another machine as well.
        is_discarded = (folder / RESTARTED).exists()
        trackers.append(BufferedTracker(_open(ready, manifest, is_discarded), folder, is_new or is_discarded))
        return trackers[0]

    if restart == "set_aside" and _is_registered(params):
        restart = "if_different"
    streams = params.training.stream_bytes is not None
    store = remote_shards(params) if streams else None
    if not streams:
        require_shards(params)
    try:
        result = engine.train(params, restart=restart, track=track, store=store, start=ready.start, progress=reporter())
    except BaseException:
        for buffered_tracker in trackers:
            # Before a retry opens the same folder.
            buffered_tracker.abandon()
            try:
                buffered_tracker.tracker.finish("FAILED")
            except UNANSWERED as error:  # the training's own error matters more
                get_run_logger().warning("the MLflow run could not be marked as failed: %s", error)
        raise
    if trackers:
        trackers[0].close()
    tracker = trackers[0].tracker if trackers else _recover_tracker(ready, manifest, result)
    if not tracker.finished:
        for record in (result.output / "history.csv", result.output / "losses.csv"):
            tracker.log_file(record, "history")
        _finish(ready, tracker)
    return TrainingRun(run_id=tracker.run_id, result=result)


def _is_registered(params: Params) -> bool:
    """Whether the registry has a version of the finished training in the run folder, which may go then."""
    if not (final := params.run_folder / "final.safetensors").is_file():
        return False
    client, key = MlflowClient(), str(read_header(final).get("train_key"))
    run = find_run(client, params.model_name, TRAIN_KEY, key)
    return run is not None and bool(client.search_model_versions(f"run_id='{run.info.run_id}'"))


def _finish(ready: ResolvedParams, tracker: RunTracker) -> None:
    """Finish the run; it fails with UserError if some of its training images were taken down meanwhile."""
    # A takedown writes its record before it searches for runs, and the run has named its data set from the start:
    # either the takedown finds the run, or this finds the record.
    try:
        require_current(ready.params.dataset_folder, tracker)
    except UserError:
        tracker.finish("FAILED")
        raise
    sources = [model_versions.resolve(tracker.client, uri) for uri in (ready.autoencoder, ready.start) if uri]
    if names := [
        name for source in sources for name in parse_takedown_names(reload_with_takedowns(source).tags.get(TAKEDOWN))
    ]:
        tracker.tag({TAKEDOWN: join_takedown_names(ready.takedown, *names)})
    tracker.finish()


def _recover_tracker(ready: ResolvedParams, manifest: Manifest, result: TrainResult) -> RunTracker:
    """Tracker of a training that had finished before; a missing MLflow run is recreated from its history."""
    client, params = MlflowClient(), ready.params
    run = find_run(client, params.model_name, TRAIN_KEY, result.train_key)
    tracker = RunTracker(client, run.info.run_id) if run else _open(ready, manifest, False)
    buffered_tracker = BufferedTracker(tracker, params.run_folder / METRICS_BUFFER)
    if not tracker.finished:
        # The whole history, as an earlier attempt may have been killed; existing points are skipped.
        for name in ("history.csv", "losses.csv"):
            for row in read_metrics(result.output / name):
                buffered_tracker.log_metrics(row, int(row.pop("images")))
    buffered_tracker.close()
    return tracker


def _open(ready: ResolvedParams, manifest: Manifest, restart: bool) -> RunTracker:
    params = ready.params
    model, training = with_digests(params.model, params.training.with_batch_size(params.model, manifest.size))
    key = train_key(data_digest(manifest, training), model, training)
    parameters = flatten_sections(
        {"model": model.model_dump(mode="json"), "training": identity_fields(training, model)}
    )
    code, data = dvc.code_version(), dvc.data_version(params.dataset_folder)
    tracker = open_run(params.model_name, key, parameters, manifest, code, data, data_source(), restart)
    tracker.client.log_text(tracker.run_id, ready.requested.model_dump_json(indent=2), "params.json")
    user = who().partition("@")[0]
    tags = {AUTOENCODER: ready.autoencoder, START: ready.start, TAKEDOWN: ready.takedown}
    tracker.tag(tags | {WARM_START: ready.warm_start, MLFLOW_USER: user})
    tracker.log_file(params.dataset_folder / "manifest.json", "dataset")
    if (preflight := params.run_folder / PREFLIGHT).is_file():
        tracker.log_file(preflight, "history")
    # A page that is not there yet would need all shards, which streaming avoids to have here.
    page, summary = (dataset_page if params.training.stream_bytes is None else find_page)(params)
    if summary is not None:
        for path in (page, page.with_suffix(".json")):
            tracker.log_file(path, "dataset")
    return tracker
