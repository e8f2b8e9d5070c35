"""DDIM."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffusion.process.samplers.base import BaseSampling, Denoise, Noise, fixed_small

if TYPE_CHECKING:
    from torch import Tensor


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM with a share ``eta`` of fresh noise (arXiv 2010.02502, eq. 12, 16): 0 is Euler's method, 1 is ``ddpm``."""
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoise(x, sigma)
        ratio = next_sigma / sigma
        x = x0 + float(ratio * (1 - eta**2 * (1 - ratio**2)).sqrt()) * (x - x0)
        if eta and next_sigma > 0:
            x = x + eta * float(fixed_small(sigma, next_sigma).sqrt()) * noise()
    return x


class DDIMSampling(BaseSampling):
    """DDIM (arXiv 2010.02502): first order, deterministic or with a share of fresh noise."""

    function = ddim
    sampler: Literal["ddim"] = "ddim"
    """Name of the sampler."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the noise that is fresh in each step, from none (0) to as much as in ddpm (1)."""
