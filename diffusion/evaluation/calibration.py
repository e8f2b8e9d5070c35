"""Thresholds that real pictures set, and what it means that so many others fall below."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.01
"""Share of real pictures that may fall below a threshold, in all spaces together: the rate of false alarms."""
DEVIATIONS = 1.959964
"""Standard deviations to either side that make an interval of 95 %."""


@dataclass(frozen=True)
class Threshold:
    """One of the smallest of the values that real pictures have."""

    value: float
    rank: int
    """Its place among them, from 1 on."""
    count: int
    """How many of them there are."""

    @property
    def level(self) -> float:
        """Share of further real pictures that fall below it, in the mean over all calibrations."""
        return self.rank / (self.count + 1)

    def chance(self, below: int, others: int) -> float:
        """How probable it is that of so many ``others`` at least ``below`` lie below it, if they too are real.

        That is exact, whatever the distribution, and knows that the threshold itself is drawn: all orders of
        exchangeable values are equally probable, so the number below is beta-binomial (the exceedance test of Gumbel
        and von Schelling, Ann. Math. Statist. 21, 1950). Among ties it is too large, never too small.
        """
        if below <= 0:
            return 1.0
        low, high = self.rank, self.count - self.rank + 1
        k = torch.arange(below, others + 1, dtype=torch.float64)
        ways = math.lgamma(others + 1) - torch.lgamma(k + 1) - torch.lgamma(others - k + 1)
        logs = ways + _log_beta(k + low, others - k + high) - _log_beta(torch.tensor(low), torch.tensor(high))
        return min(1.0, logs.logsumexp(0).exp().item())


def calibrated(values: Tensor, share: float) -> Threshold:
    """The threshold below which at most ``share`` of real pictures fall, by the ``values`` (M,) of some.

    Where these are too few to tell it is the least of them, below which one in M + 1 falls.
    """
    rank = max(1, math.floor(share * (len(values) + 1)))
    return Threshold(values.kthvalue(rank).values.item(), rank, len(values))


def interval(part: float, whole: float) -> tuple[float, float]:
    """Of the share ``part`` / ``whole``, at 95 %: Wilson's, which holds for small shares too (JASA 22, 1927)."""
    share, spread = part / whole, DEVIATIONS**2 / whole
    centre = share + spread / 2
    half = DEVIATIONS * math.sqrt(share * (1 - share) / whole + spread / (4 * whole))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
