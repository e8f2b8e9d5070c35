"""A figure with its error, and what may be said of the true one."""

import math
from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from diffusion.common.config import Config

DEVIATIONS = 1.959964
"""Standard errors to either side that make an interval of 95 %."""


class Interval(Config):
    """Where the true value lies, in a share ``confidence`` of all evaluations."""

    low: FiniteFloat
    high: FiniteFloat
    confidence: float = Field(gt=0, lt=1)


class Estimate(Config):
    """A figure measured on some images, for what it would be on average over other ones."""

    value: FiniteFloat
    error: FiniteFloat = Field(0.0, ge=0)
    """Its standard error; 0 of what is known exactly."""
    freedom: int = Field(1, ge=1)
    """Degrees of freedom of the error: on how many independent differences it rests."""

    def interval(self, confidence: float) -> Interval:
        """Two-sided, from Student's t."""
        reach = self.reach((1 + confidence) / 2)
        return Interval(low=self.value - reach, high=self.value + reach, confidence=confidence)

    def at_least(self, confidence: float) -> float:
        """What the true value is at least, with this confidence."""
        return self.value - self.reach(confidence)

    def at_most(self, confidence: float) -> float:
        """What the true value is at most, with this confidence."""
        return self.value + self.reach(confidence)

    def reach(self, probability: float) -> float:
        """How far above the true value the figure comes out at most, with this probability."""
        # Not at the top: it takes longer to load than all that `darkroom --help` needs.
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, probability)) * self.error

    def times(self, factor: float) -> "Estimate":
        """The estimate of ``factor`` times as much."""
        return self.model_copy(update={"value": self.value * factor, "error": self.error * abs(factor)})

    def less(self, other: "Estimate | float") -> "Estimate":
        """The estimate of the difference to an independent one, or to a number."""
        if not isinstance(other, Estimate):
            return self.model_copy(update={"value": self.value - other})
        return Estimate(
            value=self.value - other.value,
            error=math.hypot(self.error, other.error),
            freedom=min(self.freedom, other.freedom),
        )


class Share(Estimate):
    """A figure between 0 and 1."""

    count: int = Field(ge=1)
    """Images of which it is the share."""

    def interval(self, confidence: float) -> Interval:
        """Two-sided, within 0 and 1, and wider than nothing where all images agree.

        Wilson's (J. Am. Stat. Assoc. 22, 1927) for as many independent images as would give the same error.
        """
        p = self.value
        independent = min(p * (1 - p) / self.error**2, self.count) if self.error and 0 < p < 1 else self.count
        z = self.model_copy(update={"error": 1.0}).reach((1 + confidence) / 2)
        low, high = wilson_interval(p, independent, z)
        return Interval(low=low, high=high, confidence=confidence)


def wilson_interval(share: float, count: float, deviations: float = DEVIATIONS) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` images, which holds for small shares, too (JASA 22, 1927)."""
    squared = deviations**2 / count
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired_difference(candidate: Sequence[float], champion: Sequence[float]) -> Estimate:
    """Mean difference of a figure that each image has, both on the same images in the same order; at least two.

    What makes some images harder than others for both cancels, which an interval from two errors would count twice.
    """
    differences = [ours - theirs for ours, theirs in zip(candidate, champion, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((each - mean) ** 2 for each in differences) / (count - 1)
    return Estimate(value=mean, error=math.sqrt(variance / count), freedom=count - 1)
