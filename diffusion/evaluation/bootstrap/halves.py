"""Sets of pictures cut in half again and again, and what a figure is on the halves."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion.evaluation.estimate import Estimate, Share
from diffusion.evaluation.moments import PER_FEATURE
from diffusion.random import generator

SPLITS = 100
"""Cuts: 200 halves. The error itself is then right to 1/√200, 7 %, which Student's t takes into account."""
Figure = Literal["fd", "kid", "precision", "recall", "density", "coverage"]
SHARES = ("precision", "recall", "coverage")


def halves(count: int, stream: Literal["samples", "reference"], splits: int) -> Tensor:
    """Which of ``count`` images are in which half: (2·splits, count) bool.

    Rows 2r and 2r+1 are the two halves of cut r. Of an odd number, the last image is in no half. The same for all sets
    of as many images, so that image numbers stay together.
    """
    half = count // 2
    members = torch.zeros(2 * splits, count, dtype=torch.bool)
    draws = generator(0, f"bootstrap/{stream}", 0)
    for split in range(splits):
        order = torch.from_numpy(draws.permutation(2 * half))
        members[2 * split, order[:half]] = True
        members[2 * split + 1, order[half:]] = True
    return members


@dataclass(frozen=True)
class Replicates:
    """A figure of one set of samples against a reference, on all pictures and on halves of both."""

    figure: Figure
    whole: float
    """On all images, as ``Scores`` has it."""
    halves: Tensor
    """On the two halves of each cut, (splits, 2) float64."""
    samples: int
    reference: int
    extrapolated: bool
    """Whether ``value`` is continued to endlessly many pictures of either set."""

    @classmethod
    def of(cls, figure: Figure, whole: float, halves: Tensor, samples: Tensor, reference: Tensor) -> "Replicates":
        """Of features (N, D) against (M, D): the Fréchet distance is extrapolated where both have enough for that."""
        enough = min(len(samples), len(reference)) >= PER_FEATURE * samples.shape[1]
        return cls(figure, whole, halves, len(samples), len(reference), figure == "fd" and enough)

    @property
    def value(self) -> float:
        """The figure that the error is about.

        The Fréchet distance is too large by nearly c/n on n pictures of each set (arXiv 1911.07023), so on halves by
        c/n more. Where there are pictures enough that difference is subtracted, and the true distance estimated; else,
        as of shares and density, what as many pictures of both sets get on average. KID has no bias.
        """
        return 2 * self.whole - float(self.halves.mean()) if self.extrapolated else self.whole

    @property
    def estimate(self) -> Estimate:
        """The figure with its error."""
        found = _estimate(self.value, self.halves, self.samples, self.reference)
        return Share(**found.model_dump(), count=self._counted) if self.figure in SHARES else found

    @property
    def _counted(self) -> int:
        return self.samples if self.figure == "precision" else self.reference


def difference(challenger: Replicates, champion: Replicates) -> Estimate:
    """How much larger the challenger's figure is, both of as many pictures, numbered alike, against one reference."""
    ours, theirs = ((each.figure, each.samples, each.reference) for each in (challenger, champion))
    if ours != theirs:
        raise ValueError(f"figures of unlike sets have no paired difference: {ours} and {theirs}")
    apart = challenger.halves - champion.halves
    return _estimate(challenger.value - champion.value, apart, challenger.samples, challenger.reference)


def _estimate(value: float, of_halves: Tensor, samples: int, reference: int) -> Estimate:
    contrasts = (of_halves[:, 0] - of_halves[:, 1]) / 2
    return Estimate(
        value=value,
        error=float(contrasts.square().mean().sqrt()),
        freedom=min(len(contrasts), samples - 1, reference - 1),
    )
