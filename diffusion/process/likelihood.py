"""How well a model foresees single images: its loss on each by noise level, and how many bits it says they are.

Of the bounds on a diffusion model's likelihood this is that of infinitely many steps (arXiv 2107.00630, eq. 15):

    −ln p(x_0) ≤ KL(q(x_σmax | x_0) ‖ N(0, σ_max²)) + ∫ E‖x_0 − D(x; σ)‖² / σ² d ln σ − E ln p(x_0 | x_σmin)

It is the limit of DDPM's sum (arXiv 2006.11239, equation 5) and lies below it, and depends neither on a number of steps
nor on a choice of variances. It holds for any function D, so all models are evaluated between the same two levels,
whatever their schedules; beyond its own a network gets the nearest time that it knows. Then models of different
schedules compare, and the integrand is the very loss that is reported by noise level.
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
"""Equal parts of ln σ, at each of which every image is looked at once."""
SIGMA_MIN = HALF_A_LEVEL
"""Where they begin: below it noise leaves nearly all pixels the values they have. Of Gaussian values the bound is then
too high by 0.03 bits; of black ones, were it known for sure that they are, by 0.25."""
STREAM = "held_out_loss"
"""Of the random numbers, which are the same for all models."""
Estimate = Callable[[Tensor, Tensor], Tensor]
"""From x = x_0 + σ ε (N, C, H, W) and σ (N,) to an estimate of x_0."""


@dataclass(frozen=True)
class Terms:
    """What a model makes of each of N images, which of two models can be compared one by one."""

    edges: Tensor
    """σ at the ends of the levels, (L + 1,) float64; none: (0,)."""
    losses: Tensor
    """(N, L) float64."""
    bits: Tensor | None
    """Per dimension, (N,) float64."""

    @classmethod
    def without_levels(cls, bits: Tensor | None, count: int) -> "Terms":
        """Of a model that takes no noise away; ``bits`` (N,) of ``count`` images, or None."""
        return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(count, 0, dtype=torch.float64), bits)


def denoising_terms(
    estimate: Estimate, x0: Tensor, sigma_data: float, indices: Sequence[int], pixels: bool = True
) -> Terms:
    """Losses and bits of images ``x0``, (N, C, H, W) in [−1, 1], number ``indices``, under any denoiser.

    Each of the ``noise_levels`` is looked at in one place for each image, which lies anywhere in it with equal
    probability: so sums over levels are integrals without bias. ``pixels``: whether x_0 has the values of stored
    images, of which alone bits are defined.
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
    least = logs[0].exp().expand(len(x0))
    # The deviation of what is left to know of Gaussian values.
    deviation = torch.full_like(x0, (edges[0] ** -2 + sigma_data**-2).rsqrt().item())
    nats = (
        x0.double().square().mean((1, 2, 3)) / (2 * edges[-1].item() ** 2)
        + ((logs[1:] - logs[:-1]) * error / sigma**2).sum(1)
        - log_likelihood(x0, estimated(least), deviation).double().mean((1, 2, 3))
    )
    return Terms(edges, losses, nats / math.log(2))


def noise_levels() -> Tensor:
    """σ at the ends of LEVELS equal parts of ln σ, from SIGMA_MIN to SIGMA_MAX: (LEVELS + 1,) float64."""
    return torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), LEVELS + 1, dtype=torch.float64).exp()
