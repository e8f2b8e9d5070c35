"""Scores: what all metrics say of one set of images against a reference.

Every score carries the name of its features (``fd_efflite0``), as "FID" alone means Inception-v3. Under 5,120 images
KID decides, and every score is shown beside its real baseline: the score of as many training images against the same
reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ConfigDict, Field
from torch import Tensor

from diffusion.common.config import Config, is_unset
from diffusion.common.progress import Progress, ignore_progress
from diffusion.evaluation.metrics import check_figures, load_metrics
from diffusion.evaluation.metrics.frechet import Moments
from diffusion.evaluation.metrics.metric import SPLITS, ImageSet, Reference
from diffusion.evaluation.metrics.precision_recall import DENSITY_NEIGHBOURS

MIN_FOR_ERRORS = 2 * (DENSITY_NEIGHBOURS + 1)
"""Smallest number of features of a set for which every half has neighbourhoods."""


class Scores(Config):
    """Scores of one set of images against a reference set.

    The fields are the figures that Darkroom itself reads; figures of other metrics stand beside them by name. See
    ``diffusion.evaluation.metrics`` for what each means.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    extractor: str
    """Name of the features."""
    samples: int
    reference: int
    """Numbers of images evaluated, and of real images that they were compared with."""
    fd: float
    fd_infinity: float | None = Field(None, exclude_if=is_unset)
    kid: float
    kid_se: float
    precision: float
    recall: float
    density: float
    coverage: float

    def find(self, figure: str) -> float | None:
        """Return the value of a figure; None if it was not computed."""
        value = getattr(self, figure, None)
        return None if value is None else float(value)

    def get_metric(self, figure: str) -> float:
        """Return the value of a figure that every set of images has."""
        return float(getattr(self, figure))

    def metrics(self) -> dict[str, float]:
        """Return the scores by name, such as ``kid_efflite0``."""
        counts = {"samples": self.samples, "reference": self.reference}
        figures = self.model_dump(exclude={"extractor", *counts})
        return {f"{name}_{self.extractor}": value for name, value in figures.items()} | counts


@dataclass(frozen=True, kw_only=True)
class PreparedReference(ImageSet):
    """Real images as a reference for scores, with everything that metrics precomputed of them."""

    statistics: dict[str, dict[str, Tensor]]
    """Of each metric by its name."""

    def select_statistics(self, metric: str) -> Reference:
        """Return the reference as one metric sees it."""
        return Reference(self.features, self.images, self.statistics[metric])

    @property
    def moments(self) -> Moments:
        """Return the Gaussian that the Fréchet distance fits."""
        return Moments(**self.statistics["fd"])


def prepare_reference(real: ImageSet | Tensor, progress: Progress = ignore_progress) -> PreparedReference:
    """Precompute everything of real images, or of their features (M, D) alone, M at least 6."""
    real = ImageSet(real) if isinstance(real, Tensor) else real
    statistics = {name: metric.prepare(real.features, progress) for name, metric in load_metrics().items()}
    return PreparedReference(features=real.features, images=real.images, statistics=statistics)


def compute_scores(samples: ImageSet | Tensor, reference: PreparedReference | Tensor, extractor: str) -> Scores:
    """Compare images, or their features (N, D), with real ones (M, D); N and M at least 10.

    Pass a ``PreparedReference`` if it is used again: most of the time is spent on it. Raises UserError if a metric
    computes what it should not.
    """
    samples = ImageSet(samples) if isinstance(samples, Tensor) else samples
    real = prepare_reference(reference) if isinstance(reference, Tensor) else reference
    figures: dict[str, float] = {}
    for name, metric in load_metrics().items():
        values = metric.compute(samples, real.select_statistics(name))
        check_figures(name, metric, values)
        figures |= {figure: float(value) for figure, value in values.items()}
    return Scores(extractor=extractor, samples=len(samples), reference=len(real), **figures)


def compute_halves(
    sets: Sequence[ImageSet | Tensor],
    reference: PreparedReference | Tensor,
    splits: int = SPLITS,
    progress: Progress = ignore_progress,
) -> list[dict[str, Tensor]]:
    """Compute every figure that has an interval on the halves of each of ``sets`` and of ``reference``.

    Each has MIN_FOR_ERRORS images or more. Pass all sets at once: most of the work depends on the reference alone.
    Returns for each set (splits, 2) float64 by figure, with equal bits on any number of cores.
    """
    image_sets = [ImageSet(samples) if isinstance(samples, Tensor) else samples for samples in sets]
    real = ImageSet(reference) if isinstance(reference, Tensor) else reference
    halves: list[dict[str, Tensor]] = [{} for _ in image_sets]
    for metric in load_metrics().values():
        own = metric.compute_halves(image_sets, Reference(real.features, real.images), splits, progress)
        for figures, values in zip(halves, own, strict=True):
            figures |= values
    return halves
