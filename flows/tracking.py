"""Runs in MLflow: one per training, found again by what went into it, written to live."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.client import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from PIL import Image

from diffusion.data.manifest import Manifest
from flows.lineage import CodeVersion, DataVersion
from flows.logs import RUN_ID

TRAIN_KEY = "darkroom.train_key"
"""Tag by which the run of a training is found again: the digest of all that decides its weights."""
AUTOENCODER = "darkroom.autoencoder"
"""Tag of a run in the latents of a registered model: which version, models:/NAME/NUMBER."""
SWEEP = "darkroom.sweep"
"""Tag of the parent of runs that were compared, and by which it is found again: the digest of what was to be tried."""
RELEASED_FROM = "darkroom.released_from"
"""Tag of a released version, and of its run: where they come from, and what the version is called there."""
START = "darkroom.start"
"""Tag of a run that began with the weights of a registered model: which version, models:/NAME/NUMBER."""
DIGEST_LENGTH = 36
"""MLflow keeps this many characters of a data set's digest; the tags hold all of them."""


@dataclass
class RunTracker:
    """A run on an MLflow server, written to at once.

    Positions up to those that the run has already are passed over, so that each is there once.
    """

    client: MlflowClient
    run_id: str
    seen: dict[str, int] = field(default_factory=dict)
    """Last position known to the server, by metric or picture."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Keep ``metrics`` at step ``images``."""
        now = int(time.time() * 1000)
        fresh = [
            Metric(name, value, now, images)
            for name, value in metrics.items()
            if math.isfinite(value) and images > self._last_step(name)
        ]
        if fresh:
            self.client.log_batch(self.run_id, metrics=fresh)
        self.seen |= {metric.key: images for metric in fresh}

    def log_picture(self, name: str, picture: Image.Image, images: int) -> None:
        """Keep ``picture`` as the image ``name`` at step ``images``."""
        marker = picture_marker(name)
        if images > self._last_step(marker):
            self.client.log_image(self.run_id, picture, key=name, step=images)
            self.log_metrics({marker: images}, images)

    @property
    def finished(self) -> bool:
        """Whether the run has been marked as finished."""
        return bool(self.client.get_run(self.run_id).info.status == "FINISHED")

    def log_file(self, path: Path, folder: str) -> None:
        """Keep a file among the run's artifacts."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a value of None is left out."""
        entities = [RunTag(name, str(value)) for name, value in tags.items() if value is not None]
        self.client.log_batch(self.run_id, tags=entities)

    def finish(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run_id)

    def fail(self) -> None:
        """Mark the run as failed; the same command finds it again and goes on."""
        self.client.set_terminated(self.run_id, "FAILED")

    def _last_step(self, name: str) -> int:
        if name not in self.seen:
            points = self.client.get_metric_history(self.run_id, name)
            self.seen[name] = max((point.step for point in points), default=-1)
        return self.seen[name]


def picture_marker(name: str) -> str:
    """The metric that says up to which position a run has pictures called ``name``."""
    return f"{name}_at_images"


def find_run(client: MlflowClient, experiment: str, train_key: str) -> MlflowRun | None:
    """The run of the training called ``train_key``, or None."""
    return run_by_tag(client, experiment, TRAIN_KEY, train_key)


def run_by_tag(client: MlflowClient, experiment: str, tag: str, value: str) -> MlflowRun | None:
    """The first run of ``experiment`` whose ``tag`` is ``value``, or None."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    filter_string = f"tags.`{tag}` = '{value}'"
    runs = client.search_runs([found.experiment_id], filter_string, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def open_run(
    experiment: str,
    train_key: str,
    parameters: Mapping[str, Any],
    manifest: Manifest,
    code: CodeVersion,
    data: DataVersion | None,
    data_source: str,
    anew: bool,
) -> RunTracker:
    """Go on with the run of this training, or begin one; ``anew`` sets an earlier one aside."""
    client = MlflowClient()
    run = find_run(client, experiment, train_key)
    if run is not None and anew:
        client.set_tag(run.info.run_id, TRAIN_KEY, f"{train_key} (restarted)")
        run = None
    if run is None:
        run = _create_run(client, experiment, train_key)
    # Also on a run that was there: whoever made it may have been killed before this.
    client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in parameters.items()])
    client.log_inputs(run.info.run_id, [_dataset_input(manifest, data, data_source)])
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


def _create_run(client: MlflowClient, experiment: str, train_key: str) -> MlflowRun:
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    return client.create_run(experiment_id, tags={TRAIN_KEY: train_key}, run_name=f"train-{train_key[:8]}")


def _dataset_input(manifest: Manifest, data: DataVersion | None, source: str) -> DatasetInput:
    digest = manifest.content_digest[:DIGEST_LENGTH]
    dataset = MetaDataset(  # type: ignore[abstract]
        resolve_dataset_source(source), manifest.name, digest
    )
    tags = [InputTag("mlflow.data.context", "training")]
    if data is not None:
        tags.append(InputTag("dvc_digest", data.digest))
    return DatasetInput(dataset._to_mlflow_entity(), tags)
