"""Metrics by class, with the linear discriminant that classifies generated images, and by shape."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.shapes import Shape, shape_name
from diffusion.evaluation.estimate import Estimate, MetricEstimate, share_estimate, wilson_interval
from diffusion.evaluation.metrics.kid import compute_kid

MIN_VARIANCE = 1e-12
SHRINKAGE = 0.3
"""Shrinkage of the covariance towards a multiple of the identity, as features may outnumber images."""


@dataclass(frozen=True)
class LinearDiscriminant:
    """Linear classifier of K classes from D features."""

    weights: Tensor
    """(D, K) float64."""
    offsets: Tensor
    """(K,) float64."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the predicted class of each of ``features``, (N, D): (N,) int64."""
        return (features.double() @ self.weights + self.offsets).argmax(1)


def fit_discriminant(pieces: Iterable[tuple[Tensor, Tensor]], classes: int) -> LinearDiscriminant:
    """Fit to features (B, D) and their classes (B,), which come in ``pieces``.

    Class numbers outside 0 … K − 1 are ignored. Each class is Gaussian with its own mean and the pooled within-class
    covariance, shrunk towards the identity; priors are equal (Hastie, Tibshirani and Friedman, The Elements of
    Statistical Learning, sections 4.3 and 18.3). A class without images is never predicted.
    """
    counts, sums, squares = torch.zeros(classes, dtype=torch.float64), None, None
    for features, numbers in pieces:
        mask = (numbers >= 0) & (numbers < classes)
        x, labels = features[mask].double(), numbers[mask]
        if sums is None or squares is None:
            sums, squares = x.new_zeros(classes, x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        counts += torch.bincount(labels, minlength=classes)
        sums.index_add_(0, labels, x)
        squares.addmm_(x.T, x)
    if sums is None or squares is None:
        raise ValueError("no images to learn classes from")
    means = sums / counts.clamp(min=1)[:, None]
    covariance = (squares - (sums.T @ means)) / counts.sum()
    dimensions = len(covariance)
    # With one image per class the covariance is 0, and the nearest mean is predicted.
    variance = (covariance.trace() / dimensions).clamp(min=MIN_VARIANCE)
    estimate = (1 - SHRINKAGE) * covariance + SHRINKAGE * (torch.eye(dimensions, dtype=torch.float64) * variance)
    weights = torch.linalg.solve(estimate, means.T)
    offsets = -0.5 * (means * weights.T).sum(1)
    return LinearDiscriminant(weights, offsets.masked_fill(counts == 0, -torch.inf))


MIN_PER_CLASS = 20
"""Smallest number of images of a class, generated and real, for which its distance is meaningful."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Images of known classes."""

    features: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64, class numbers; any other number: no class."""

    def select_class(self, label: int) -> Tensor:
        """Return the features of one class."""
        return self.features[self.labels == label]


class ClassScores(Config):
    """Scores of one class."""

    name: str
    samples: int
    """Number of generated images of the class."""
    reference: int
    """Number of real images of the class that they were compared with."""
    kid: float
    """KID of generated against real images of the class: 0 is best. Not comparable with the KID of all classes."""
    kid_se: float
    """Standard error of ``kid``."""
    agreement: float
    """Share of the generated images that a classifier assigns to this class."""
    agreement_low: float
    agreement_high: float
    """Ends of its 95 % interval."""
    agreement_real: float
    """The same share of the real images: an upper limit in practice."""
    taken_for: str | None
    """The class to which most of the others are assigned; None if there are not any."""

    @property
    def estimate(self) -> Estimate:
        """Return the KID with its error."""
        return Estimate(value=self.kid, error=self.kid_se, freedom=min(self.samples, self.reference) - 1)

    @property
    def agreements(self) -> tuple[Estimate, Estimate]:
        """Return the agreement of generated and of real images."""
        return share_estimate(self.agreement, self.samples), share_estimate(self.agreement_real, self.reference)


class SkippedClass(Config):
    """A class with too few images: ``samples`` generated ones, ``reference`` real ones."""

    name: str
    samples: int
    reference: int


class PerClass(Config):
    """Metrics of a model class by class."""

    extractor: str
    classes: list[ClassScores]
    """Classes with enough images, in the order of the model's classes."""
    skipped: list[SkippedClass]
    agreement: float | None
    """Share of all conditionally generated images assigned to their class; None if there are none."""
    agreement_real: float | None
    """The same share of real images."""

    @property
    def agreements(self) -> tuple[Estimate, Estimate] | None:
        """Return the agreement of all generated and of all real images; None if either has none of a class."""
        if self.agreement is None or self.agreement_real is None:
            return None
        scores = [*self.classes, *self.skipped]
        samples, reference = (sum(getattr(each, side) for each in scores) for side in ("samples", "reference"))
        return share_estimate(self.agreement, samples), share_estimate(self.agreement_real, reference)

    @property
    def worst(self) -> ClassScores | None:
        """Return the class with the largest KID, which is partly chance among many; None if none was evaluated."""
        return max(self.classes, key=lambda scores: scores.kid, default=None)

    @property
    def worst_first(self) -> list[ClassScores]:
        """Return the classes by decreasing KID."""
        return sorted(self.classes, key=lambda scores: -scores.kid)

    @property
    def least_recognized(self) -> ClassScores | None:
        """Return the class whose agreement is lowest relative to its real images; None if none was evaluated."""
        return min(self.classes, key=lambda scores: scores.agreement - scores.agreement_real, default=None)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        figures = {"class_agreement": self.agreement, "class_agreement_real": self.agreement_real}
        if self.worst is not None:
            figures[f"kid_worst_class_{self.extractor}"] = self.worst.kid
            figures[f"kid_worst_class_se_{self.extractor}"] = self.worst.kid_se
        return {name: value for name, value in figures.items() if value is not None}


def evaluate_classes(
    generated: LabelledFeatures,
    real: LabelledFeatures,
    reader: LinearDiscriminant,
    names: Sequence[str],
    extractor: str,
) -> PerClass:
    """Compare ``generated`` with held-out ``real`` images, class by class.

    ``reader`` was fitted to other real images; ``names`` holds the name of each class.
    """
    predictions, real_predictions = reader(generated.features), reader(real.features)
    class_scores, skipped_classes = [], []
    for label, name in enumerate(names):
        class_samples, class_reference = generated.select_class(label), real.select_class(label)
        if min(len(class_samples), len(class_reference)) < MIN_PER_CLASS:
            skipped_classes.append(SkippedClass(name=name, samples=len(class_samples), reference=len(class_reference)))
            continue
        kid, kid_se = compute_kid(class_samples, class_reference)
        counts = torch.bincount(predictions[generated.labels == label], minlength=len(names))
        correct_count = int(counts[label])
        counts[label] = 0
        low, high = wilson_interval(correct_count / len(class_samples), len(class_samples))
        class_scores.append(
            ClassScores(
                name=name,
                samples=len(class_samples),
                reference=len(class_reference),
                kid=kid,
                kid_se=kid_se,
                agreement=correct_count / len(class_samples),
                agreement_low=low,
                agreement_high=high,
                agreement_real=(real_predictions[real.labels == label] == label).double().mean().item(),
                taken_for=names[int(counts.argmax())] if counts.any() else None,
            )
        )
    return PerClass(
        extractor=extractor,
        classes=class_scores,
        skipped=skipped_classes,
        agreement=_agreement(predictions, generated.labels, len(names)),
        agreement_real=_agreement(real_predictions, real.labels, len(names)),
    )


def _agreement(predictions: Tensor, labels: Tensor, classes: int) -> float | None:
    mask = (labels >= 0) & (labels < classes)
    return (predictions[mask] == labels[mask]).double().mean().item() if mask.any() else None


class ShapeScores(Config):
    """Distance of the images of one shape to held-out ones of the same shape."""

    name: str
    """The shape, as 96x64."""
    samples: int
    """Number of generated images of the shape."""
    reference: int
    """Number of held-out images of the shape."""
    kid: MetricEstimate | None
    """KID: 0 is best. Not comparable with the KID of all shapes. None: there are too few images."""


class PerShape(Config):
    """Metrics of a model shape by shape, from the narrowest to the widest."""

    extractor: str
    shapes: list[ShapeScores]

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        kids = {f"kid_{shape.name}": shape.kid for shape in self.shapes if shape.kid is not None}
        values = {f"{name}_{self.extractor}": kid.value for name, kid in kids.items()}
        return values | {f"{name}_se_{self.extractor}": kid.error for name, kid in kids.items()}


def evaluate_shapes(
    generated: Tensor, shapes: Sequence[Shape], real: Tensor, real_shapes: Sequence[Shape], extractor: str
) -> PerShape:
    """Compare features of generated (N, D) and ``real`` images (M, D), each shape by itself."""
    scores = []
    for shape in sorted({*shapes, *real_shapes}, key=lambda shape: shape[1] / shape[0]):
        pairs = (generated, shapes), (real, real_shapes)
        samples, reference = (features[torch.tensor([size == shape for size in sizes])] for features, sizes in pairs)
        kid = None
        if (min_count := min(len(samples), len(reference))) >= MIN_PER_CLASS:
            value, error = compute_kid(samples, reference)
            kid = MetricEstimate.from_estimate(Estimate(value=value, error=error, freedom=min_count - 1))
        scores.append(ShapeScores(name=shape_name(shape), samples=len(samples), reference=len(reference), kid=kid))
    return PerShape(extractor=extractor, shapes=scores)
