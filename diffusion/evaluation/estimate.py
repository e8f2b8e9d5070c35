"""A metric with its standard error, and intervals for its true value."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from pydantic import Field, FiniteFloat

from diffusion.common.config import Config

CONFIDENCE = 0.95
"""Confidence of all intervals that are shown, two-sided."""
DEVIATIONS = 1.959964
"""Standard errors on either side of a 95 % interval."""


class Interval(Config):
    """Confidence interval: contains the true value in a share ``confidence`` of all evaluations."""

    low: FiniteFloat
    high: FiniteFloat
    confidence: float = Field(gt=0, lt=1)


class Estimate(Config):
    """Estimate of the mean of a metric over samples of images."""

    value: FiniteFloat
    error: FiniteFloat = Field(0.0, ge=0)
    """Standard error; 0 for an exact value."""
    freedom: int = Field(1, ge=1)
    """Degrees of freedom of the error: the number of independent differences it is computed from."""

    def interval(self, confidence: float) -> Interval:
        """Return the two-sided interval from Student's t."""
        reach = self.error_bound((1 + confidence) / 2)
        return Interval(low=self.value - reach, high=self.value + reach, confidence=confidence)

    def lower_bound(self, confidence: float) -> float:
        """Return the one-sided lower bound of the true value."""
        return self.value - self.error_bound(confidence)

    def upper_bound(self, confidence: float) -> float:
        """Return the one-sided upper bound of the true value."""
        return self.value + self.error_bound(confidence)

    def error_bound(self, probability: float) -> float:
        """Return the bound on the error above the true value that holds with this probability."""
        # Imported here: scipy takes longer to load than everything `darkroom --help` needs.
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, probability)) * self.error

    @property
    def p_value(self) -> float:
        """Return the one-sided p-value against a true value of 0 or less."""
        from scipy.special import stdtr

        if not self.error:
            return float(self.value <= 0)
        return float(stdtr(self.freedom, -self.value / self.error))

    def multiply(self, factor: float) -> "Estimate":
        """Return the estimate of ``factor`` times the metric."""
        return self.model_copy(update={"value": self.value * factor, "error": self.error * abs(factor)})

    def subtract(self, other: "Estimate | float") -> "Estimate":
        """Return the estimate of the difference from an independent estimate, or from a number."""
        if not isinstance(other, Estimate):
            return self.model_copy(update={"value": self.value - other})
        return Estimate(
            value=self.value - other.value,
            error=math.hypot(self.error, other.error),
            freedom=min(self.freedom, other.freedom),
        )


class NonNegative(Estimate):
    """Estimate of a figure that is never negative."""

    def interval(self, confidence: float) -> Interval:
        """Return the two-sided interval, cut off at 0."""
        interval = super().interval(confidence)
        return interval.model_copy(update={"low": max(interval.low, 0.0)})


class Share(Estimate):
    """Estimate of a share, between 0 and 1."""

    count: int = Field(ge=1)
    """Number of images that the share is of."""

    def interval(self, confidence: float) -> Interval:
        """Return the two-sided interval, within 0 and 1 and never empty.

        Wilson's (J. Am. Stat. Assoc. 22, 1927) for as many independent images as would give the same error.
        """
        p = self.value
        independent = min(p * (1 - p) / self.error**2, self.count) if self.error and 0 < p < 1 else self.count
        z = self.model_copy(update={"error": 1.0}).error_bound((1 + confidence) / 2)
        low, high = wilson_interval(p, independent, z)
        return Interval(low=low, high=high, confidence=confidence)


class MetricEstimate(Config):
    """A metric with its error and interval."""

    value: FiniteFloat
    error: FiniteFloat
    """Standard error, over other generated and held-out images."""
    interval: Interval

    @classmethod
    def from_estimate(cls, estimate: Estimate) -> "MetricEstimate":
        """Build from ``estimate``, with confidence CONFIDENCE."""
        return cls(value=estimate.value, error=estimate.error, interval=estimate.interval(CONFIDENCE))


def wilson_interval(share: float, count: float, deviations: float = DEVIATIONS) -> tuple[float, float]:
    """Compute Wilson's interval of a share of ``count`` images, valid for small shares too (JASA 22, 1927)."""
    correction = deviations**2 / count
    middle = (share + correction / 2) / (1 + correction)
    half_width = math.sqrt(correction * (share * (1 - share) + correction / 4)) / (1 + correction)
    return max(middle - half_width, 0.0), min(middle + half_width, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests: those under α reject a true hypothesis with probability α at most, altogether.

    Holm's step-down procedure (Scand. J. Statist. 6, 1979), valid whatever the tests have in common.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(largest, 1.0)
    return adjusted


def paired_difference(candidate: Sequence[float], champion: Sequence[float]) -> Estimate:
    """Estimate the mean difference of a per-image metric on the same images in the same order; at least two."""
    differences = [value - other for value, other in zip(candidate, champion, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return Estimate(value=mean, error=math.sqrt(variance / count), freedom=count - 1)


def share_estimate(share: float, count: int) -> Estimate:
    """Estimate a share of ``count`` independent images; none or all of them have an error, too.

    It is the error with one image more of either kind (Agresti and Caffo, Am. Stat. 54, 2000).
    """
    shrunk_share = (share * count + 1) / (count + 2)
    error = math.sqrt(shrunk_share * (1 - shrunk_share) / count)
    return Estimate(value=share, error=error, freedom=max(count - 1, 1))


MAX_DEVIATION = 8.0
"""Standard errors to which statistics of several looks are integrated, and the largest bound of one."""
NODES = 100
"""Nodes of that quadrature, which is right to ten digits."""


@cache
def sequential_confidences(looks: int, confidence: float) -> tuple[float, ...]:
    """Return the one-sided confidence of each of ``looks`` tests, each on twice the images of the one before.

    Together they err with probability 1 − ``confidence``. The bound of each, in standard errors, is √2 times that of
    the next one (O'Brien and Fleming, Biometrics 35, 1979). With independent images, statistic k + 1 given statistic k
    is N(Z/√2, ½), and the probability to pass no bound is integrated from one to the next (Armitage, McPherson and
    Rowe, J. R. Stat. Soc. A 132, 1969). Where they share errors, as of the same held-out images, the statistics are
    more correlated and the tests together err less (Slepian, Bell Syst. Tech. J. 41, 1962).
    """
    # Imported here: scipy takes longer to load than everything `darkroom --help` needs, scipy.stats 2 s.
    from scipy.special import ndtr

    nodes, weights = np.polynomial.legendre.leggauss(NODES)

    def bounds(last: float) -> list[float]:
        return [min(last * math.sqrt(2) ** later, MAX_DEVIATION) for later in range(looks)[::-1]]

    def missing_error(last: float) -> float:
        points, mass, deviation = np.zeros(1), np.ones(1), 1.0
        for bound in bounds(last):
            half_width = (bound + MAX_DEVIATION) / 2
            previous_points, points = points, half_width * (nodes + 1) - MAX_DEVIATION
            scores = (points[:, None] - previous_points / math.sqrt(2)) / deviation
            density = np.exp(-(scores**2) / 2) / (deviation * math.sqrt(2 * math.pi)) @ mass
            mass, deviation = half_width * weights * density, math.sqrt(0.5)
        return float(confidence - mass.sum())

    low, high = 0.0, MAX_DEVIATION
    for _ in range(50):  # halves it to 10⁻¹⁴
        middle = (low + high) / 2
        low, high = (middle, high) if missing_error(middle) > 0 else (low, middle)
    return tuple(ndtr(bounds(high)).tolist())
