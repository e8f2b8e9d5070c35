"""Ancestral sampling."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from diffusion.common.config import is_unset
from diffusion.process.samplers.base import BaseSampling, Denoise, Noise, fixed_large, fixed_small

if TYPE_CHECKING:
    from torch import Tensor

FixedVariance: TypeAlias = Literal["fixed_small", "fixed_large"]


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, variance: FixedVariance | None = None) -> Tensor:
    """DDPM's ancestral sampling (arXiv 2006.11239, algorithm 2 and section 3.2), without noise in the last step.

    Without ``variance``: the learned one (2102.09672) if ``denoise`` is a ``Denoiser`` with one, else ``fixed_small``.
    """
    is_learned = variance is None and getattr(denoise, "learned_variance", False)
    compute_variance = fixed_large if variance == "fixed_large" else fixed_small
    for sigma, next_sigma in pairwise(sigmas):
        if is_learned:
            x0, deviation = denoise.posterior(x, sigma, next_sigma)  # type: ignore[attr-defined]
        else:
            x0, deviation = denoise(x, sigma), compute_variance(sigma, next_sigma).sqrt()
        x = x0 + float((next_sigma / sigma) ** 2) * (x - x0)
        if next_sigma > 0:
            x = x + deviation * noise()
    return x


class DDPMSampling(BaseSampling):
    """DDPM's ancestral sampling (arXiv 2006.11239): fresh noise in each step, best with many steps."""

    function = ddpm
    sampler: Literal["ddpm"] = "ddpm"
    """Name of the sampler."""
    variance: FixedVariance | None = Field(None, exclude_if=is_unset)
    """Variance of the noise in each step: its lower or its upper bound (section 3.2). Null: the variance learned with
    model.variance = learned_range, or else fixed_small."""
