"""Consistency sampling of students."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffusion.common.config import is_unset
from diffusion.process.samplers.base import BaseSampling, Denoise, Noise

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.process.schedules import NoiseSchedule

LAST_LEVEL = 1.6
"""Noise level of a student's last evaluation, on which registered students land. Measured on digits."""


def last_level(values: int, steps: int = 2) -> float:
    """Compute the last of ``steps`` noise levels for images of ``values`` C·H·W; students land on that of two."""
    from diffusion.process.schedules import resolution_scale

    return min(LAST_LEVEL, 4 / steps) * resolution_scale(values)


def consistency(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float | None = None) -> Tensor:
    """Multistep consistency sampling: each estimate is noised to the next level (arXiv 2303.01469, algorithm 1).

    ``eta`` of the noise is new, and the rest what the estimate leaves of it, as in DDIM; None: all is new.
    """
    new_share = 1.0 if eta is None else eta
    for sigma, next_sigma in pairwise(sigmas):
        estimate = denoise(x, sigma)
        if next_sigma == 0:
            return estimate
        unit_noise = (x - estimate) / float(sigma)
        if new_share > 0:
            unit_noise = math.sqrt(1 - new_share**2) * unit_noise + new_share * noise()
        x = estimate + float(next_sigma) * unit_noise
    return x


class ConsistencySampling(BaseSampling):
    """Consistency sampling (arXiv 2303.01469), for students of ``darkroom distill``: one to four evaluations."""

    function = consistency
    sampler: Literal["consistency"] = "consistency"
    """Name of the sampler."""
    steps: int = Field(2, ge=1, le=10_000)
    """Number of network evaluations, one at each noise level."""
    sigma_min: float | None = Field(None, gt=0)
    """Lowest σ, at which the last evaluation starts, if there are two or more. Null: 1.6, or with new noise 4/steps if
    that is less, and more for images of more than 3×32×32 values."""
    eta: float | None = Field(None, ge=0, le=1, exclude_if=is_unset)
    """Share of each level's noise that is new; 0 is for students whose evaluations lead to the next level; edits take
    new noise alone. Null: as the student was distilled."""

    def sigma_grid(self, schedule: NoiseSchedule) -> Tensor:
        """Build the noise levels of the evaluations and 0, (steps + 1,) float64, falling geometrically."""
        import torch

        # Students know no higher levels, whatever the schedule has.
        highest = min(math.sqrt(schedule.values), float(schedule.sigmas[-1]))
        if isinstance(self.sigma_max, float):
            highest = min(highest, self.sigma_max)
        lowest = last_level(schedule.values, 2 if self.eta == 0 else self.steps)
        first, last, end = schedule.sigma_grid(2, highest, self.sigma_min or min(lowest, highest / 2))
        levels = first * (last / first) ** torch.linspace(0, 1, self.steps, dtype=torch.float64)
        return torch.cat([levels, end[None]])
