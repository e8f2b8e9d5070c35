"""Metrics of a model that need more than features: its images among themselves, their classes, losses, training images.

To add one, write a class of ``ModelMetric`` here, or name it in another package under the entry points of
``darkroom.metrics``.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from diffusion.common.config import Config, classes_in
from diffusion.evaluation.cache import Tensors, load_or_compute
from diffusion.evaluation.metrics import check_figures, load_group
from diffusion.evaluation.metrics.copies import Duplicates, Memorization, detect_duplicates, detect_memorization
from diffusion.evaluation.metrics.held_out_loss import (
    HeldOutLoss,
    conditioning_of_rows,
    measure_losses,
    summarize_losses,
)
from diffusion.evaluation.metrics.metric import BaseMetric
from diffusion.evaluation.metrics.per_group import LabelledFeatures, PerClass, evaluate_classes
from diffusion.evaluation.metrics.pixel_metrics import AppearanceDrift, compare_appearance
from diffusion.evaluation.model_evaluator import ModelEvaluator, count_gflop
from diffusion.evaluation.real_images import appearance_of_pieces, thumbnails_of_pieces
from diffusion.evaluation.results import ModelEvaluation
from diffusion.process.likelihood import Terms


class ModelMetric(BaseMetric):
    """Metric of a model, computed where a candidate is compared with the champion."""

    @abstractmethod
    def compute(self, model: ModelEvaluator) -> Config | Mapping[str, float] | None:
        """Compute the figures by name, each finite; None: they do not apply to the model.

        Those that Darkroom itself reads have a field of the metric's name in ``ModelEvaluation``, and are of its type.
        """


class Copies(ModelMetric):
    """Copies of training images."""

    name = "memorization"

    def compute(self, model: ModelEvaluator) -> Memorization:
        """Compare generated images, and held-out ones, with training images."""
        real, flip = model.real, bool(model.header.training.get("flip", False))  # then mirrored copies count as well
        rows = real.held_out
        return detect_memorization(
            real.neighbours(model.features_key, model.pieces(), model.features, flip),
            real.neighbours(real.key(rows), real.images(rows), real.features(rows), flip),
        )


class Repetitions(ModelMetric):
    """Images that were generated more than once."""

    name = "duplicates"

    def compute(self, model: ModelEvaluator) -> Duplicates:
        """Compare generated images with one another."""
        return detect_duplicates(thumbnails_of_pieces(model.pieces()), model.real.thumbnails)


class Drift(ModelMetric):
    """Drift of colours and brightness."""

    name = "drift"

    def compute(self, model: ModelEvaluator) -> AppearanceDrift:
        """Compare generated with real images."""
        return compare_appearance(appearance_of_pieces(model.pieces()), model.real.appearance)


class ClassMetrics(ModelMetric):
    """Metrics by class."""

    name = "per_class"

    def compute(self, model: ModelEvaluator) -> PerClass | None:
        """Compare class by class; None for models without classes, or none that the data set has images of."""
        classes, real = model.model.classes, model.real
        if model.labels is None or not real.dataset.manifest.class_histogram.keys() & set(classes):
            return None
        generated, held_out = LabelledFeatures(model.features, model.labels), real.select_labelled_features(classes)
        return evaluate_classes(generated, held_out, real.reader(classes), classes, real.extractor.name)


class Loss(ModelMetric):
    """Loss and likelihood."""

    name = "held_out_loss"

    def compute(self, model: ModelEvaluator) -> HeldOutLoss:
        """Measure on as many held-out images as are generated."""
        rows, dataset = model.real.held_out[: model.config.samples], model.real.dataset

        def work() -> Tensors:
            pieces = (
                (dataset.images(chunk), conditioning_of_rows(model.model, dataset, chunk))
                for chunk in model.real.split_rows(rows)
            )
            terms = measure_losses(model.model, pieces, model.sampling, model.progress)
            bits = {} if terms.bits is None else {"bits": terms.bits}
            return {"edges": terms.edges, "losses": terms.losses, **bits}

        tensors = load_or_compute(model.folder, model.held_out_key("losses", len(rows)), work)
        return summarize_losses(Terms(tensors["edges"], tensors["losses"], tensors.get("bits")))


def load_model_metrics() -> dict[str, ModelMetric]:
    """Return all metrics of models by name, extensions last; raises UserError for one that cannot be used."""
    built_in = {kind.name: kind for kind in classes_in(globals(), ModelMetric)}  # type: ignore[type-abstract]
    return load_group(ModelMetric, built_in)  # type: ignore[type-abstract]


def evaluate_in_full(model: ModelEvaluator) -> ModelEvaluation:
    """Compute all metrics of ``model``, without estimates; raises UserError if an extension computes other figures."""
    results: dict[str, Any] = {}
    for name, metric in load_model_metrics().items():
        if (result := metric.compute(model)) is None:
            continue
        if not isinstance(result, Config):
            check_figures(name, metric, result)
        results[name] = result
    gflop = count_gflop(model.model, model.guided)
    return ModelEvaluation(**dict(model.compute_model_scores()), sampling=model.guided, gflop=gflop, **results)
