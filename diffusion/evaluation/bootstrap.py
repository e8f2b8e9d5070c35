"""Standard errors of metrics, for one set of images and for the difference between two.

Both sets are cut at random into halves A and B, which have no image in common, and the figure T is computed of half of
the samples against half of the reference. Whatever the figure, E[(T(A) − T(B))² / 4] = V(half) / 2, where V is its
variance over new samples of both sets. That is V(all) where V falls as 1/n, as that of nearly every figure does in the
end; for KID and the Fréchet distance of equal distributions, where it falls as 1/n², the error comes out too large by
√2, never too small. Of many such cuts the mean is taken: the bootstrap with weights 0 and 2 (Præstgaard and Wellner,
Ann. Prob. 21, 1993). With replacement, an image would be its own nearest neighbour at distance 0.

The intervals are about other images generated from the same weights and other held-out images of the same kind, so the
reference is resampled as well: held fixed, a model that happens to suit these very images would surely be better. In a
comparison both models have the same image numbers and the same reference in each half, and what they have in common
cancels. Nothing is said of other trainings of the same configuration.
"""

from dataclasses import dataclass

from torch import Tensor

from diffusion.evaluation.estimate import Estimate, NonNegative, Share
from diffusion.evaluation.metrics import load_figures
from diffusion.evaluation.metrics.frechet import PER_FEATURE


@dataclass(frozen=True)
class Replicates:
    """A metric of one set of samples against a reference, on all images and on halves of both."""

    figure: str
    """Name of the figure."""
    whole: float
    """Value on all images, as in ``Scores``."""
    halves: Tensor
    """Values on the two halves of each cut, (splits, 2) float64."""
    samples: int
    reference: int
    """Numbers of images."""
    dimensions: int
    """Number of features of each."""

    @property
    def value(self) -> float:
        """The figure that the error is about; without its bias if that is nearly c/n and there are images enough.

        On halves it is c/n more than on n images of each set (for the Fréchet distance: arXiv 1911.07023).
        """
        has_enough_images = min(self.samples, self.reference) >= PER_FEATURE * self.dimensions
        is_corrected = load_figures()[self.figure].is_biased and has_enough_images
        return 2 * self.whole - float(self.halves.mean()) if is_corrected else self.whole

    @property
    def estimate(self) -> Estimate:
        """Return the metric with its standard error."""
        estimate = _estimate(self.value, self.halves, self.samples, self.reference)
        match load_figures()[self.figure].interval:
            case "share of samples":
                return Share(**estimate.model_dump(), count=self.samples)
            case "share of reference":
                return Share(**estimate.model_dump(), count=self.reference)
            case "non-negative":
                return NonNegative(**estimate.model_dump())
        return estimate


def difference(candidate: Replicates, champion: Replicates) -> Estimate:
    """Estimate candidate minus champion, on the same image numbers and the same reference."""
    sets = [(side.figure, side.samples, side.reference) for side in (candidate, champion)]
    if sets[0] != sets[1]:
        raise ValueError(f"figures of unlike sets have no paired difference: {sets[0]} and {sets[1]}")
    differences = candidate.halves - champion.halves
    return _estimate(candidate.value - champion.value, differences, candidate.samples, candidate.reference)


def _estimate(value: float, halves: Tensor, samples: int, reference: int) -> Estimate:
    contrasts = (halves[:, 0] - halves[:, 1]) / 2
    return Estimate(
        value=value,
        error=float(contrasts.square().mean().sqrt()),
        freedom=min(len(contrasts), samples - 1, reference - 1),
    )
