"""Consistency sampling of students."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffusion.process.samplers.base import BaseSampling, Denoise, Noise

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.process.schedules import NoiseSchedule

LAST_LEVEL = 1.6
"""Noise level of a student's last evaluation of two; of more it is 4/steps, if that is less. Measured on digits."""


def consistency(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Multistep consistency sampling: each estimate is noised to the next level (arXiv 2303.01469, algorithm 1)."""
    for sigma, next_sigma in pairwise(sigmas):
        x = denoise(x, sigma)
        if next_sigma > 0:
            x = x + float(next_sigma) * noise()
    return x


class ConsistencySampling(BaseSampling):
    """Consistency sampling (arXiv 2303.01469), for students of ``darkroom distill``: one to four evaluations."""

    function = consistency
    sampler: Literal["consistency"] = "consistency"
    """Name of the sampler."""
    steps: int = Field(2, ge=1, le=10_000)
    """Number of network evaluations, one at each noise level."""
    sigma_min: float | None = Field(None, gt=0)
    """Lowest σ, at which the last evaluation starts, if there are two or more. Null: 1.6, or 4/steps if that is less,
    and more for images of more than 3×32×32 values."""

    def sigma_grid(self, schedule: NoiseSchedule) -> Tensor:
        """Build the noise levels of the evaluations and 0, (steps + 1,) float64, falling geometrically."""
        import torch

        from diffusion.process.schedules import resolution_scale

        # Students know no higher levels, whatever the schedule has.
        highest = min(math.sqrt(schedule.values), float(schedule.sigmas[-1]))
        if isinstance(self.sigma_max, float):
            highest = min(highest, self.sigma_max)
        lowest = min(LAST_LEVEL, 4 / self.steps) * resolution_scale(schedule.values)
        first, last, end = schedule.sigma_grid(2, highest, self.sigma_min or min(lowest, highest / 2))
        levels = first * (last / first) ** torch.linspace(0, 1, self.steps, dtype=torch.float64)
        return torch.cat([levels, end[None]])
