"""MLflow runs, one per training and identified by its inputs; evaluated checkpoints as logged models."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import mlflow
from mlflow.client import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE
from PIL import Image

from diffusion.common.escaping import pluralize
from diffusion.data.manifest import Manifest, parse_manifest
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation
from flows.datasets.dvc import CodeVersion, DataVersion
from flows.storage.numbered_objects import Claims
from flows.tracking.json_logs import RUN_ID

MANIFEST_ARTIFACT = "dataset/manifest.json"  # path of the data set's manifest among the artifacts of a run
ORIGIN_ARTIFACT = "origin.json"  # path of the origin of an imported model among the artifacts of its run
TRAIN_KEY = "darkroom.train_key"
"""Tag that identifies the run of a training: digest of everything that determines its weights."""
AUTOENCODER, START = "darkroom.autoencoder", "darkroom.start"
"""Tags of a run: the registered autoencoder that it works in, and its initial model, models:/NAME/NUMBER."""
WARM_START = "darkroom.warm_start"
"""Tag of a run and its version: the number of warm starts in its chain, its own included; none: from nothing."""
IMPORTED = "darkroom.imported"  # tag that identifies the run of an import: digest of the weights
SWEEP = "darkroom.sweep"  # tag that identifies the parent run of a sweep: digest of its settings and data
DIGEST_LENGTH = 36  # longest data set digest that MLflow stores; the tags hold the full one
CHECKPOINT, CHECKPOINT_SHA256 = "darkroom.checkpoint", "darkroom.checkpoint_sha256"
"""Tags of a logged model: the file of its checkpoint, and the digest that identifies it."""
EVAL_KEY, EVALUATED = "darkroom.eval_key", "darkroom.evaluated"
"""Tags: scores of two models are comparable if the first is equal; the second is ``in full`` or ``preliminary``."""
EXPERIMENT = {
    # The kind that MLflow gives to experiments of model training; its UI goes by the address, see ``_page``.
    "mlflow.experimentKind": "custom_model_development",
    MLFLOW_RUN_NOTE: "Trainings and evaluations of generative image models by Darkroom. Each run is a training on one "
    "version of a data set; its artifact `evaluation/report.html` shows how good it became.",
}
"""Tags of an experiment."""
TRAINING, EVALUATION = "train/", "eval/"
"""Prefixes of the names of a run's metrics, by which MLflow groups them; system metrics have their own."""
PRELIMINARY = "preliminary_"  # name prefix of metrics on fewer images, which are not comparable with the others


@dataclass(frozen=True)
class RunTracker:
    """Unbuffered logger of an MLflow run; skips steps up to the last on the server, as other machines may log them."""

    client: MlflowClient
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Log ``metrics`` at step ``images``."""
        now = int(time.time() * 1000)
        self.log_points([Metric(name, value, now, images) for name, value in metrics.items() if math.isfinite(value)])

    def log_points(self, points: Sequence[Metric]) -> None:
        """Log at most a thousand points."""
        last_steps = self._last_steps()
        if new_points := [point for point in points if point.step > last_steps.get(point.key, -1)]:
            self.client.log_batch(self.run_id, metrics=new_points)

    def _last_steps(self) -> dict[str, int]:
        return {metric.key: metric.step for metric in self.client.get_run(self.run_id).data._metric_objs}

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Log ``image`` as the image ``name`` at step ``images``."""
        marker = image_marker(name)
        if images > self._last_steps().get(marker, -1):
            self.client.log_image(self.run_id, image, key=name, step=images)
            self.log_metrics({marker: images}, images)

    @property
    def finished(self) -> bool:
        """Whether the run has been marked as finished."""
        return bool(self.client.get_run(self.run_id).info.status == "FINISHED")

    def log_file(self, path: Path, folder: str) -> None:
        """Log a file as an artifact of the run."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags, except those with value None."""
        entities = [RunTag(name, str(value)) for name, value in tags.items() if value is not None]
        self.client.log_batch(self.run_id, tags=entities)

    def finish(self, status: Literal["FINISHED", "FAILED"] = "FINISHED") -> None:
        """Mark the run as finished or failed; a failed one can be resumed."""
        self.client.set_terminated(self.run_id, status)


def image_marker(name: str) -> str:
    """Name of the metric with the last step of the images ``name``."""
    return f"{TRAINING}{name}_at_images"


def training_metric(name: str) -> str:
    """Name in MLflow of a metric of the training: losses by noise level are ``noise_level/1`` and so on."""
    _, by_level, level = name.partition("_level_")
    return f"noise_level/{level}" if by_level else f"{TRAINING}{name}"


def run_page(client: MlflowClient, run_id: str, artifact: str | None = None) -> str:
    """Address of a run, or of one of its artifacts, in MLflow's UI."""
    place = f"experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    return _page(place if artifact is None else f"{place}/artifacts/{quote(artifact)}")


def version_page(model: str, number: int) -> str:
    """Address of a version of a registered model in MLflow's UI."""
    return _page(f"models/{quote(model)}/versions/{number}")


def version_artifact(weights_sha256: str) -> str:
    """Path, among the artifacts of its run, of what a version with these weights scored."""
    return f"evaluation/versions/{weights_sha256[:16]}.json"


def _page(place: str) -> str:
    # Without credentials, which an address may hold; the UI shows GenAI applications by default.
    server = re.sub(r"//[^/]*@", "//", mlflow.get_tracking_uri()).rstrip("/")
    return f"{server}/#/{place}?workflowType=machine_learning"


def read_run_manifest(client: MlflowClient, run_id: str) -> Manifest | None:
    """Manifest of the data set version that a run saw; None if it keeps none, as an import's."""
    if MANIFEST_ARTIFACT not in {item.path for item in client.list_artifacts(run_id, "dataset")}:
        return None
    uri = f"runs:/{run_id}/{MANIFEST_ARTIFACT}"
    return parse_manifest(mlflow.artifacts.load_text(uri).encode(), uri)


def find_run(client: MlflowClient, experiment: str, tag: str, value: str) -> MlflowRun | None:
    """Find the run of ``experiment`` whose ``tag`` is ``value``, of several the one claimed first; or None."""
    if (entity := client.get_experiment_by_name(experiment)) is None:
        return None
    run_id = Claims.of(experiment, value).holder(
        lambda run_id: _is_of(client, entity.experiment_id, run_id, tag, value)
    )
    if run_id is not None:
        return client.get_run(run_id)
    filter_string = f"tags.`{tag}` = '{value}'"
    runs = client.search_runs([entity.experiment_id], filter_string, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def find_or_create_run(
    client: MlflowClient, experiment: str, tag: str, value: str, name: str, extra_tags: Mapping[str, str] | None = None
) -> MlflowRun:
    """Find the run of ``experiment`` whose ``tag`` is ``value``, or create it with this ``name`` and further tags.

    Concurrent callers all get the run that is claimed first. The others are deleted in MLflow if they are empty.
    """
    run = find_run(client, experiment, tag, value) or client.create_run(
        experiment_id(client, experiment), tags={tag: value, **(extra_tags or {})}, run_name=name
    )
    run_experiment = run.info.experiment_id
    run_id = Claims.of(experiment, value).claim(
        run.info.run_id, lambda candidate: _is_of(client, run_experiment, candidate, tag, value)
    )
    for candidate in client.search_runs([run_experiment], f"tags.`{tag}` = '{value}'"):
        if candidate.info.run_id != run_id and not candidate.data.metrics and not candidate.data.params:
            client.delete_run(candidate.info.run_id)
    return run if run_id == run.info.run_id else client.get_run(run_id)


def experiment_id(client: MlflowClient, name: str) -> str:
    """ID of the experiment ``name``, which is created if missing."""
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, tags=EXPERIMENT))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None, "another process created it"
    return str(experiment.experiment_id)


def _is_of(client: MlflowClient, experiment: str, run_id: str, tag: str, value: str) -> bool:
    """Whether a run of this ID, which comes from S3, exists in the experiment, is not deleted, and has the tag."""
    query = f"attributes.run_id = '{run_id}' and tags.`{tag}` = '{value}'"
    return bool(re.fullmatch(r"[0-9a-f]{32}", run_id) and client.search_runs([experiment], query))


def open_run(
    experiment: str,
    train_key: str,
    parameters: Mapping[str, Any],
    manifest: Manifest,
    code: CodeVersion,
    data: DataVersion | None,
    data_source: str,
    restart: bool,
) -> RunTracker:
    """Resume or create the run of this training; ``restart`` detaches an earlier one."""
    client = MlflowClient()
    if restart and (run := find_run(client, experiment, TRAIN_KEY, train_key)) is not None:
        client.set_tag(run.info.run_id, TRAIN_KEY, f"{train_key} (restarted)")
    family = parameters.get("model.family", "ddpm")
    run_tags = {
        MLFLOW_RUN_NOTE: f"Training of a {family} model on {manifest.counts['train']:,} images of the data set "
        f"**{manifest.name}**, {manifest.stored_as}, "
        f"{pluralize(len(manifest.class_histogram), 'class', 'classes')}; "
        f"{manifest.counts['held_out']:,} held out. "
        "Artifacts: `evaluation/report.html` (how good it is), `dataset` (what it learned from), `params.json`.",
        MLFLOW_SOURCE_NAME: "darkroom train",
        MLFLOW_SOURCE_TYPE: "LOCAL",
    }
    run = find_or_create_run(
        client, experiment, TRAIN_KEY, train_key, f"{manifest.name}-{family}-{train_key[:8]}", run_tags
    )
    # Also on an existing run: its creator may have been killed before this.
    client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in parameters.items()])
    source, digest = resolve_dataset_source(data_source), manifest.content_digest[:DIGEST_LENGTH]
    dataset = MetaDataset(source, manifest.name, digest)  # type: ignore[abstract]
    tags = [InputTag("mlflow.data.context", "training"), *([InputTag("dvc_digest", data.digest)] if data else [])]
    client.log_inputs(run.info.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags)])
    tracker = RunTracker(client, run.info.run_id)
    RUN_ID.set(tracker.run_id)
    client.update_run(run.info.run_id, status="RUNNING")
    tracker.tag(
        {
            "darkroom.dataset": manifest.name,
            "darkroom.content_digest": manifest.content_digest,
            "darkroom.dvc_digest": data and data.digest,
            "darkroom.dvc_pointer": data and data.pointer,
            "mlflow.source.git.commit": code.commit,
            "darkroom.git_dirty": code.dirty,
        }
    )
    return tracker


def log_evaluation(tracker: RunTracker, evaluation: Evaluation) -> None:
    """Log each evaluated checkpoint as a model of the run with its scores, once."""
    client, run_id = tracker.client, tracker.run_id
    experiment = client.get_run(run_id).info.experiment_id
    dataset = {
        "dataset_name": evaluation.dataset,
        "dataset_digest": evaluation.conditions.content_digest[:DIGEST_LENGTH],
    }
    results: list[tuple[CheckpointEvaluation, str, dict[str, float]]] = []
    for entry in evaluation.preliminary:
        metric = entry.selection_metric
        figures = {f"{PRELIMINARY}{metric.name}": metric.value, f"{PRELIMINARY}samples": float(metric.count)}
        results.append((entry, "preliminary", figures))
    # The best of several EMA lengths comes last, so that it becomes the run's value at that step.
    for entry in sorted(evaluation.checkpoints, key=lambda entry: (entry.images, entry.selection_metric.rank)):
        results.append((entry, "in full", entry.metrics()))
    for checkpoint, mode, scores in results:
        figures = {f"{EVALUATION}{name}": value for name, value in scores.items()}
        tags = {
            CHECKPOINT: checkpoint.file,
            CHECKPOINT_SHA256: checkpoint.sha256,
            EVAL_KEY: evaluation.eval_key,
            EVALUATED: mode,
            "darkroom.images": str(checkpoint.images),
            MLFLOW_MODEL_IS_EXTERNAL: "true",
        }
        models = client.search_logged_models([experiment], f"tags.`{CHECKPOINT_SHA256}` = '{checkpoint.sha256}'")
        if own := [model for model in models if model.source_run_id == run_id]:
            model = min(own, key=lambda model: model.creation_timestamp)
        else:
            name = f"{checkpoint.family}-{checkpoint.images}-{checkpoint.sha256[:8]}"
            model = client.create_logged_model(experiment, name, run_id, tags, model_type=checkpoint.family)
        if model.status != LoggedModelStatus.READY:
            model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if new_tags := {name: value for name, value in tags.items() if model.tags.get(name) != value}:
            client.set_logged_model_tags(model.model_id, new_tags)
        last_values = {
            point.key: point.value
            for point in sorted(model.metrics or [], key=lambda point: (point.timestamp, point.step))
            if {"dataset_name": point.dataset_name, "dataset_digest": point.dataset_digest} == dataset
        }
        now = int(time.time() * 1000)
        new_points = [
            Metric(name, value, now, checkpoint.images, model_id=model.model_id, run_id=run_id, **dataset)
            for name, value in figures.items()
            if math.isfinite(value) and last_values.get(name) != value
        ]
        if new_points:
            client.log_batch(run_id, metrics=new_points)
