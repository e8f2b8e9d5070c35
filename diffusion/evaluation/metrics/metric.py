"""What a metric is: a class that compares images with real ones and says how its numbers are read.

Metrics are listed in ``diffusion.evaluation.metrics``. Other packages add their own under the entry points of
``darkroom.metrics``. Reports, ``metrics.json``, MLflow and the documentation take all that they say of a number from
its ``Figure``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator
from diffusion.common.shapes import Images
from diffusion.evaluation.metrics.neighbours import map_blocks

SPLITS = 100
"""Number of cuts: 200 halves. The standard error is then right to 1/√200, 7 %, which Student's t accounts for."""


@dataclass(frozen=True)
class Figure:
    """A number that a metric computes."""

    name: str
    """Name, to which ``metrics.json`` and MLflow append the name of the features: ``kid_efflite0``."""
    title: str
    """Name in tables of reports."""
    definition: str
    """What it is, with source and range, for the documentation."""
    reading: str | None = None
    """How to read it, in a sentence for reports; None: it has no line of its own there, such as a standard error."""
    lower_is_better: bool = True
    interval: Literal["distance", "non-negative", "share of samples", "share of reference"] | None = None
    """How its interval is computed from halves: of any number, of one that is at least 0, or of a share of either set
    of images; None: it has none."""
    is_biased: bool = False
    """Whether its bias is nearly c/n on n images of each set, which its interval then corrects."""

    @property
    def direction(self) -> str:
        """Return which values are better."""
        return "lower" if self.lower_is_better else "higher"

    @property
    def column_note(self) -> str:
        """Return the first clause of ``reading``, and whether lower values are better, for the head of a column."""
        clause = (self.reading or "").partition(":")[0].rstrip(".")
        return ("lower is better; " if self.lower_is_better else "") + clause[:1].lower() + clause[1:]


def _no_images() -> Iterable[Images]:
    raise ValueError("these features were computed without keeping the images")


@dataclass(frozen=True)
class ImageSet:
    """Images with their features."""

    features: Tensor
    """(N, D) float32."""
    images: Callable[[], Iterable[Images]] = _no_images
    """Yields the same images in chunks, each (C, H, W) uint8; they may be read or generated only then."""

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: Tensor) -> "ImageSet":
        """Return the images in ``rows``, (n,) int64, which ascend."""
        return ImageSet(self.features[rows], lambda: self._select_images(rows))

    def _select_images(self, rows: Tensor) -> Iterator[Images]:
        start = 0
        for piece in self.images():
            numbers = rows[(rows >= start) & (rows < start + len(piece))] - start
            start += len(piece)
            if len(numbers):
                yield piece[numbers] if isinstance(piece, Tensor) else [piece[number] for number in numbers.tolist()]


@dataclass(frozen=True)
class Reference(ImageSet):
    """Real images that others are compared with."""

    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """What the metric's ``prepare`` returned."""


class BaseMetric(ABC):
    """A metric, of images or of models (``diffusion.evaluation.model_metrics``)."""

    name: ClassVar[str]
    """Its name; another package's is the name of its entry point."""
    figures: ClassVar[tuple[Figure, ...]] = ()
    """The numbers that it computes."""


class Metric(BaseMetric):
    """Comparison of images with real ones."""

    def prepare(self, features: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Compute what all comparisons with real images of these features (M, D) share; it is cached."""
        return {}

    @abstractmethod
    def compute(self, samples: ImageSet, reference: Reference) -> Mapping[str, float]:
        """Compute the figures by name, each finite, with 10 images or more in each set.

        A figure that these images are too few for is left out. Equal images must give equal bits on any number of
        cores, as results are cached.
        """

    def compute_halves(
        self, sets: Sequence[ImageSet], reference: Reference, splits: int, progress: Progress = ignore_progress
    ) -> list[dict[str, Tensor]]:
        """Compute the figures with intervals on the halves of each of ``sets`` and of ``reference``, 12 images or more.

        Returns for each set (splits, 2) float64 by name. Override it where all halves together are faster than each.
        """
        names = [figure.name for figure in self.figures if figure.interval is not None]
        if not names:
            return [{} for _ in sets]
        real_members = draw_halves(len(reference), "reference", splits)
        results = []
        for samples in sets:
            members = draw_halves(len(samples), "samples", splits)

            def compute_half(half: int, samples: ImageSet = samples, members: Tensor = members) -> Mapping[str, float]:
                real = reference.select(real_members[half].nonzero()[:, 0])
                prepared = Reference(real.features, real.images, self.prepare(real.features, ignore_progress))
                return self.compute(samples.select(members[half].nonzero()[:, 0]), prepared)

            halves = list(map_blocks(compute_half, 2 * splits, 1, f"{names[0]} of halves", progress))
            results.append(
                {
                    name: torch.tensor([values[name] for values in halves], dtype=torch.float64).view(-1, 2)
                    for name in names
                }
            )
        return results


def draw_halves(count: int, stream: Literal["samples", "reference"], splits: int) -> Tensor:
    """Assign ``count`` images to halves at random: (2·splits, count) bool, of which rows 2r and 2r+1 are cut r.

    With an odd count, the last image is in no half. Equal counts get equal halves, so that image numbers stay paired.
    """
    half = count // 2
    members = torch.zeros(2 * splits, count, dtype=torch.bool)
    rng = generator(0, f"bootstrap/{stream}", 0)
    for split in range(splits):
        order = torch.from_numpy(rng.permutation(2 * half))
        members[2 * split, order[:half]] = True
        members[2 * split + 1, order[half:]] = True
    return members
