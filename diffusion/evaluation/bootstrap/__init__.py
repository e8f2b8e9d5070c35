"""Standard errors of distances and shares, for one set of images and for the difference between two.

Both sets are cut at random into halves A and B, and the figure T is computed of either: of half of the samples against
half of the reference. A and B have no image in common and are independent, so

    E[(T(A) − T(B))² / 4] = V(half) / 2,

where V is the variance of the figure over new samples of both sets. That is exact, whatever the figure. And V(half) / 2
is V(all) where V falls as 1/n, as that of nearly every figure does in the end; where it falls faster (KID and the
Fréchet distance of sets that have the same distribution: as 1/n²) the error comes out too large, by √2, never too
small. Of many such cuts the mean is taken. It is the bootstrap with weights 0 and 2 (Præstgaard and Wellner, Ann. Prob.
21, 1993). Shares near 1 may be nearer still on halves, with too small an error, for which ``Share`` has wider
intervals.

Why not resample with replacement: an image generated twice is its own nearest neighbour at distance 0, and similar to
itself; that shrinks neighbourhoods and moves KID. Halves hold nothing twice, keep the proportion of both sets, on which
coverage depends, and each costs a half. The mean of T over halves tells the bias, too: see ``Replicates.value``.

What the intervals are about: other images generated from the same weights, and other held-out images of the same kind.
So the reference is resampled: held fixed, a model that happens to suit these very images would surely be better.
In a comparison both models have the same image numbers and the same reference in each half, and what they have in
common cancels. Nothing is said of other trainings of the same configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.progress import Progress, silent
from diffusion.evaluation.bootstrap.halves import (
    FEWEST,
    SPLITS,
    Figure,
    frechet_of_halves,
    kid_of_halves,
    shares_of_halves,
)
from diffusion.evaluation.estimate import Estimate, Share
from diffusion.evaluation.metrics.distances import PER_FEATURE, Reference, Scores, compute_scores

__all__ = [
    "FEWEST",
    "SPLITS",
    "Figure",
    "Replicates",
    "compute_replicates",
    "difference",
    "frechet_of_halves",
    "kid_of_halves",
    "shares_of_halves",
]

SHARES = ("precision", "recall", "coverage")


@dataclass(frozen=True)
class Replicates:
    """A metric of one set of samples against a reference, on all images and on halves of both."""

    figure: Figure
    whole: float
    """Value on all images, as in ``Scores``."""
    halves: Tensor
    """Values on the two halves of each cut, (splits, 2) float64."""
    samples: int
    reference: int
    extrapolated: bool
    """Whether ``value`` is extrapolated to infinitely many images."""

    @classmethod
    def of(cls, figure: Figure, whole: float, halves: Tensor, samples: Tensor, reference: Tensor) -> "Replicates":
        """Build from features (N, D) and (M, D); the Fréchet distance is extrapolated if both sets are large enough."""
        enough = min(len(samples), len(reference)) >= PER_FEATURE * samples.shape[1]
        return cls(figure, whole, halves, len(samples), len(reference), figure == "fd" and enough)

    @property
    def value(self) -> float:
        """The figure that the error is about.

        The Fréchet distance is too large by nearly c/n on n images of each set (arXiv 1911.07023), so on halves by
        c/n more. Where there are images enough that difference is subtracted, and the true distance estimated; else,
        as of shares and density, what as many images of both sets get on average. KID has no bias.
        """
        return 2 * self.whole - float(self.halves.mean()) if self.extrapolated else self.whole

    @property
    def estimate(self) -> Estimate:
        """Return the metric with its standard error."""
        found = _estimate(self.value, self.halves, self.samples, self.reference)
        return Share(**found.model_dump(), count=self._counted) if self.figure in SHARES else found

    @property
    def _counted(self) -> int:
        return self.samples if self.figure == "precision" else self.reference


def difference(candidate: Replicates, champion: Replicates) -> Estimate:
    """Estimate candidate minus champion, on the same image numbers and the same reference."""
    ours, theirs = ((each.figure, each.samples, each.reference) for each in (candidate, champion))
    if ours != theirs:
        raise ValueError(f"figures of unlike sets have no paired difference: {ours} and {theirs}")
    apart = candidate.halves - champion.halves
    return _estimate(candidate.value - champion.value, apart, candidate.samples, candidate.reference)


def _estimate(value: float, of_halves: Tensor, samples: int, reference: int) -> Estimate:
    contrasts = (of_halves[:, 0] - of_halves[:, 1]) / 2
    return Estimate(
        value=value,
        error=float(contrasts.square().mean().sqrt()),
        freedom=min(len(contrasts), samples - 1, reference - 1),
    )


def compute_replicates(
    sets: Sequence[Tensor],
    reference: Tensor,
    splits: int = SPLITS,
    progress: Progress = silent,
    scores: Sequence[Scores] | None = None,
) -> list[dict[Figure, Replicates]]:
    """Compute every metric of each of ``sets``, features (N, D), against ``reference``, (M, D), with its halves.

    Pass all sets to compare in one call (candidate, champion, real baseline): most of the work depends on the reference
    alone and is done once. Equal input gives equal bits on any number of cores. ``scores``: of each set as a whole, if
    they are known. Raises UserError for sets of fewer than 12, of which no half has neighbourhoods.
    """
    fewest = min(map(len, (*sets, reference)))
    if fewest < FEWEST:
        raise UserError(
            f"errors of metrics need {FEWEST} images on either side, and there are {fewest}: generate more with "
            "evaluation.samples, or hold more out with ingest.held_out"
        )
    if scores is None:
        known = Reference.of(reference)
        scores = [compute_scores(each, known, "features") for each in sets]
    of_halves: list[dict[Figure, Tensor]] = [
        {"fd": fd, "kid": mmd, **shares}
        for fd, mmd, shares in zip(
            frechet_of_halves(sets, reference, splits, progress),
            kid_of_halves(sets, reference, splits, progress),
            shares_of_halves(sets, reference, splits, progress),
            strict=True,
        )
    ]
    return [
        {figure: Replicates.of(figure, whole.of(figure), halves, samples, reference) for figure, halves in each.items()}
        for samples, whole, each in zip(sets, scores, of_halves, strict=True)
    ]
