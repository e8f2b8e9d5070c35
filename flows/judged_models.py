"""Judged checkpoints in MLflow: a logged model for each, with its scores, so that MLflow can rank them.

They hold no weights, which stay where training left them: tags say which file that is, and its digest. What becomes a
version is another logged model, with the weights in it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow.client import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Metric
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from diffusion.evaluation.results import CheckpointEvaluation, Evaluation
from flows.tracking import DIGEST_LENGTH

CHECKPOINT = "darkroom.checkpoint"
"""Tag of a logged model: the checkpoint's file."""
CHECKPOINT_SHA256 = "darkroom.checkpoint_sha256"
"""Tag by which the logged model of a checkpoint is found again."""
EVAL_KEY = "darkroom.eval_key"
"""Tag: scores of two models compare where it is equal."""
JUDGED = "darkroom.judged"
"""Tag: ``in full`` or ``preliminary``."""
PRELIMINARY = "preliminary_"
"""Before the name of a figure that rests on fewer pictures, so that it does not rank among the others."""


@dataclass(frozen=True)
class Scoreboard:
    """The evaluated checkpoints of one MLflow run."""

    client: MlflowClient
    run_id: str

    def show(self, evaluation: Evaluation) -> None:
        """Log each evaluated checkpoint as a model with its scores; what is there already is not logged twice."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        for each in evaluation.preliminary:
            metric = each.selection_metric
            figures = {f"{PRELIMINARY}{metric.name}": metric.value, f"{PRELIMINARY}samples": float(metric.count)}
            self._log(experiment, evaluation, each, "preliminary", figures)
        # The best of several averages comes last, and so is the run's own point at its number of images.
        for each in sorted(evaluation.checkpoints, key=lambda each: (each.images, each.selection_metric.rank)):
            self._log(experiment, evaluation, each, "in full", each.metrics())

    def _log(
        self,
        experiment: str,
        evaluation: Evaluation,
        evaluated: CheckpointEvaluation,
        how: str,
        figures: Mapping[str, float],
    ) -> None:
        tags = {
            CHECKPOINT: evaluated.file,
            CHECKPOINT_SHA256: evaluated.sha256,
            EVAL_KEY: evaluation.eval_key,
            JUDGED: how,
            "darkroom.images": str(evaluated.images),
            MLFLOW_MODEL_IS_EXTERNAL: "true",
        }
        model = self._model(experiment, evaluated, tags)
        if changed := {name: value for name, value in tags.items() if model.tags.get(name) != value}:
            self.client.set_logged_model_tags(model.model_id, changed)
        content = evaluation.conditions.content_digest[:DIGEST_LENGTH]
        newest = _newest(model, evaluation.dataset, content)
        now = int(time.time() * 1000)
        fresh = [
            Metric(
                name,
                value,
                now,
                evaluated.images,
                model_id=model.model_id,
                dataset_name=evaluation.dataset,
                dataset_digest=content,
                run_id=self.run_id,
            )
            for name, value in figures.items()
            if math.isfinite(value) and newest.get(name) != value
        ]
        if fresh:
            self.client.log_batch(self.run_id, metrics=fresh)

    def _model(self, experiment: str, evaluated: CheckpointEvaluation, tags: dict[str, str]) -> LoggedModel:
        """The logged model of a checkpoint; made if the run has none, and finished if whoever made it was killed."""
        found = self.client.search_logged_models([experiment], f"tags.`{CHECKPOINT_SHA256}` = '{evaluated.sha256}'")
        ours = [model for model in found if model.source_run_id == self.run_id]
        name = f"{evaluated.family}-{evaluated.images}-{evaluated.sha256[:8]}"
        model = (
            min(ours, key=lambda model: model.creation_timestamp)
            if ours
            else self.client.create_logged_model(experiment, name, self.run_id, tags, model_type=evaluated.family)
        )
        if model.status != LoggedModelStatus.READY:
            model = self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model


def _newest(model: LoggedModel, dataset: str, digest: str) -> dict[str, float]:
    """The last value of each figure that ``model`` has for a data set."""
    there = [point for point in model.metrics or [] if (point.dataset_name, point.dataset_digest) == (dataset, digest)]
    return {point.key: point.value for point in sorted(there, key=lambda point: (point.timestamp, point.step))}
