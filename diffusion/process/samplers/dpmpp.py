"""DPM-Solver++ and its stochastic variant."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffusion.process.samplers.base import BaseSampling, Denoise, Noise

if TYPE_CHECKING:
    from torch import Tensor


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Tensor:
    """DPM-Solver++ (2M), second order by reuse of the last estimate (arXiv 2211.01095, algorithm 2).

    The first and the last step are of first order. With a share ``eta`` of fresh noise of 1 it is SDE-DPM-Solver++.
    """
    previous: Tensor | None = None
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        estimate = x0
        if previous is not None and next_sigma > 0:
            step, last_step = (sigma / next_sigma).log(), (sigmas[i - 1] / sigma).log()
            extrapolation = float(step / (2 * last_step))
            estimate = (1 + extrapolation) * x0 - extrapolation * previous
        ratio = next_sigma / sigma
        weight = float(ratio ** (1 + eta))
        x = weight * x + (1 - weight) * estimate
        if eta and next_sigma > 0:
            x = x + float(next_sigma * (1 - ratio ** (2 * eta)).sqrt()) * noise()
        previous = x0
    return x


class DPMSolverSampling(BaseSampling):
    """DPM-Solver++ (2M) (arXiv 2211.01095): deterministic, second order with one evaluation per step."""

    function = dpmpp_2m
    sampler: Literal["dpmpp_2m"] = "dpmpp_2m"
    """Name of the sampler."""


class DPMSolverSDESampling(BaseSampling):
    """SDE-DPM-Solver++ (2M) (arXiv 2211.01095), the default: fresh noise corrects errors of earlier steps."""

    function = dpmpp_2m
    sampler: Literal["dpmpp_2m_sde"] = "dpmpp_2m_sde"
    """Name of the sampler."""
    eta: float = Field(1.0, ge=0, le=1)
    """Share of the noise that is fresh in each step, from none (0, which is dpmpp_2m) to as much as in ddpm (1)."""
