"""Metrics by shape, of images of several shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.shapes import Shape, shape_name
from diffusion.evaluation.estimate import Estimate, MetricEstimate
from diffusion.evaluation.metrics.kid import compute_kid
from diffusion.evaluation.metrics.per_class import MIN_PER_CLASS


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
