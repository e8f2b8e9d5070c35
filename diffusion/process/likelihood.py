"""Losses by noise level and bits per dimension of single images under a diffusion model.

The bits are the continuous-time bound on the likelihood (arXiv 2107.00630, eq. 15):

    −ln p(x_0) ≤ KL(q(x_σmax | x_0) ‖ N(0, σ_max²)) + ∫ E‖x_0 − D(x; σ)‖² / σ² d ln σ − E ln p(x_0 | x_σmin)

It is the limit of DDPM's sum (arXiv 2006.11239, equation 5), lies below it, and depends neither on a number of steps
nor on a choice of variances. It holds for any function D, so all models are evaluated between the same two levels;
outside its own schedule a network gets the nearest time. So models with different schedules can be compared, and the
integrand is the loss that is reported by noise level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.common.random import GaussianNoise, uniform
from diffusion.process.parametrization import edm
from diffusion.process.schedules import SIGMA_MAX
from diffusion.process.variance import HALF_A_LEVEL, log_likelihood

LEVELS = 16
"""Number of equal intervals of ln σ, in each of which every image is evaluated once."""
SIGMA_MIN = HALF_A_LEVEL
"""Lowest σ: below it noise changes hardly any 8-bit value. The bound is then too high by 0.03 bits for Gaussian values,
and by 0.25 for pixels known to be black."""
STREAM = "held_out_loss"
"""Name of the random stream, which is the same for all models."""
Estimate = Callable[[Tensor, Tensor], Tensor]
"""From x = x_0 + σ ε (N, C, H, W) and σ (N,) to an estimate of x_0."""


@dataclass(frozen=True)
class Terms:
    """Losses and bits of each of N images, for paired comparison of two models."""

    edges: Tensor
    """Bounds of the L intervals of σ, (L + 1,) float64; without intervals (0,)."""
    losses: Tensor
    """Loss of each image in each interval, (N, L) float64."""
    bits: Tensor | None
    """Bits per dimension, (N,) float64; None if undefined."""

    @classmethod
    def without_levels(cls, bits: Tensor | None, count: int) -> "Terms":
        """Make the terms of a model that is no diffusion model; ``bits`` (N,) of ``count`` images, or None."""
        return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(count, 0, dtype=torch.float64), bits)


def denoising_terms(
    estimate: Estimate, x0: Tensor, sigma_data: float, indices: Sequence[int], pixels: bool = True
) -> Terms:
    """Compute losses and bits of images under any denoiser.

    In each interval of ``noise_levels`` an image is evaluated at one uniformly sampled ln σ, so sums over intervals
    are unbiased estimates of integrals.

    Args:
        estimate: The denoiser.
        x0: Images, (N, C, H, W) in [−1, 1], or latents.
        sigma_data: Standard deviation of the data.
        indices: Index of each image, from which its random numbers follow.
        pixels: Whether ``x0`` are 8-bit pixels, for which alone bits are defined.
    """
    edges = noise_levels()
    noise = GaussianNoise(0, f"{STREAM}/noise", indices, tuple(x0.shape[1:]))
    u = uniform(0, f"{STREAM}/level", indices).to(x0.device)
    logs = edges.log().to(x0.device)

    def estimated(sigma: Tensor) -> Tensor:
        x = x0 + sigma.to(x0.dtype)[:, None, None, None] * noise().to(x0)
        return estimate(x, sigma).float()

    errors, sigmas = [], []
    for low, high in pairwise(logs):
        sigma = (low + u * (high - low)).exp()
        errors.append((estimated(sigma) - x0).double().square().mean((1, 2, 3)))
        sigmas.append(sigma)
    error, sigma = torch.stack(errors, 1), torch.stack(sigmas, 1)
    losses = edm(sigma_data)(sigma) * error
    if not pixels:
        return Terms(edges, losses, None)
    lowest = logs[0].exp().expand(len(x0))
    # Posterior standard deviation of Gaussian values at the lowest σ.
    deviation = torch.full_like(x0, (edges[0] ** -2 + sigma_data**-2).rsqrt().item())
    nats = (
        x0.double().square().mean((1, 2, 3)) / (2 * edges[-1].item() ** 2)
        + ((logs[1:] - logs[:-1]) * error / sigma**2).sum(1)
        - log_likelihood(x0, estimated(lowest), deviation).double().mean((1, 2, 3))
    )
    return Terms(edges, losses, nats / math.log(2))


def noise_levels() -> Tensor:
    """Bounds of LEVELS equal intervals of ln σ, from SIGMA_MIN to SIGMA_MAX: σ, (LEVELS + 1,) float64."""
    return torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), LEVELS + 1, dtype=torch.float64).exp()
