"""Likelihood under a diffusion model: learned variances of reverse steps, losses by noise level, bits per dimension.

A learned variance of the step from σ to a lower level s lies between two bounds, after Improved DDPM (arXiv 2102.09672,
section 3.1). The bits of single images are the continuous-time bound on the likelihood (arXiv 2107.00630, eq. 15):

    −ln p(x_0) ≤ KL(q(x_σmax | x_0) ‖ N(0, σ_max²)) + ∫ E‖x_0 − D(x; σ)‖² / σ² d ln σ − E ln p(x_0 | x_σmin)

It is the limit of DDPM's sum (arXiv 2006.11239, equation 5). It holds for any function D, so models with different
schedules are compared between the same two levels. The integrand is the loss that is reported by noise level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.special import log_ndtr

from diffusion.common.random import GaussianNoise, uniform
from diffusion.process.samplers import Denoise, fixed_large, fixed_small
from diffusion.process.schedules import SIGMA_MAX, NoiseSchedule

HALF_A_LEVEL = 1 / 255
"""Half the distance between neighbouring values of 8-bit pixels in [−1, 1]."""

LEVELS = 16
"""Number of equal intervals of ln σ, in each of which every image is evaluated once."""
SIGMA_MIN = HALF_A_LEVEL
"""Lowest σ: below it noise changes hardly any 8-bit value. The bound is then too high by 0.03 bits for Gaussian values,
and by 0.25 for pixels known to be black."""


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
        """Make the terms of a model that is not a diffusion model; ``bits`` (N,) of ``count`` images, or None."""
        return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(count, 0, dtype=torch.float64), bits)


def denoising_terms(
    estimate: Denoise, x0: Tensor, sigma_data: float, indices: Sequence[int], pixels: bool = True
) -> Terms:
    """Compute losses and bits of images ``x0``, (N, C, H, W) in [−1, 1], or of latents under any denoiser.

    In each interval of ``noise_levels`` an image is evaluated at one uniformly sampled ln σ, by the images'
    ``indices``, so that sums estimate integrals without bias. Bits are defined only for 8-bit ``pixels``.
    """
    edges = noise_levels()
    noise = GaussianNoise(0, "held_out_loss/noise", indices, tuple(x0.shape[1:]))
    u = uniform(0, "held_out_loss/level", indices).to(x0.device)
    logs = edges.log().to(x0.device)

    def denoise(sigma: Tensor) -> Tensor:
        x = x0 + sigma.to(x0.dtype)[:, None, None, None] * noise().to(x0)
        return estimate(x, sigma).float()

    errors, sigmas = [], []
    for low, high in pairwise(logs):
        sigma = (low + u * (high - low)).exp()
        errors.append((denoise(sigma) - x0).double().square().mean((1, 2, 3)))
        sigmas.append(sigma)
    error, sigma = torch.stack(errors, 1), torch.stack(sigmas, 1)
    losses = (sigma**-2 + sigma_data**-2) * error
    if not pixels:
        return Terms(edges, losses, None)
    lowest = logs[0].exp().expand(len(x0))
    # Posterior standard deviation of Gaussian values at the lowest σ.
    deviation = torch.full_like(x0, (edges[0] ** -2 + sigma_data**-2).rsqrt().item())
    nats = (
        x0.double().square().mean((1, 2, 3)) / (2 * edges[-1].item() ** 2)
        + ((logs[1:] - logs[:-1]) * error / sigma**2).sum(1)
        - log_likelihood(x0, denoise(lowest), deviation).double().mean((1, 2, 3))
    )
    return Terms(edges, losses, nats / math.log(2))


def noise_levels() -> Tensor:
    """Bounds of LEVELS equal intervals of ln σ, from SIGMA_MIN to SIGMA_MAX: σ, (LEVELS + 1,) float64."""
    return torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), LEVELS + 1, dtype=torch.float64).exp()


def interpolate_deviation(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Interpolate the logarithms of the variances ``low`` and ``high`` at (v + 1)/2: standard deviations (eq. 15)."""
    share = (v + 1) / 2
    return low ** ((1 - share) / 2) * high ** (share / 2)


def compute_bound(schedule: NoiseSchedule, t: Tensor, x0: Tensor, error: Tensor, v: Tensor) -> Tensor:
    """Compute the term of the variational bound at each image's integral time ``t`` (N,): bits per value, (N,).

    ``error`` is estimate minus truth for the images ``x0`` (N, C, H, W), which have values as from ``to_float``. The
    term is KL(q(x_s | x_σ, x_0) ‖ p(x_s | x_σ)) at t > 0, and −log p(x_0 | x_σ) at 0 (equations 4 to 6).
    """
    sigmas = schedule.sigmas_on(t.device)
    first = t == 0
    sigma, next_sigma = sigmas[t], sigmas[(t - 1).clamp(min=0)].masked_fill(first, 0)
    # The lower variance of the last step is 0, so the variance of the step before it is used, with ᾱ = 1.
    min_variance = fixed_small(sigmas[1], sigmas[0]) / (1 + sigmas[0] ** 2)
    low, high = fixed_small(sigma, next_sigma).where(~first, min_variance), fixed_large(sigma, next_sigma)
    deviation = interpolate_deviation(v, broadcast_to_images(v, low), broadcast_to_images(v, high))
    mean_error = broadcast_to_images(v, 1 - (next_sigma / sigma) ** 2) * error
    # With the other images' numbers the gradient of a term may be NaN. To select images would wait for their count.
    is_first = first[:, None, None, None]
    last_error, last_deviation = error.masked_fill(~is_first, 0), deviation.masked_fill(~is_first, 1)
    last_term = -log_likelihood(x0, x0 + last_error, last_deviation)
    # KL divergence of Gaussians.
    deviation = deviation.masked_fill(is_first, 1)
    ratio = broadcast_to_images(v, low.sqrt()) / deviation
    divergence = ((mean_error / deviation) ** 2 + ratio**2 - 1) / 2 - ratio.log()
    nats = torch.where(is_first, last_term, divergence)
    return nats.mean((1, 2, 3)) / math.log(2)


def log_likelihood(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute ln p of each value of ``x0`` for a Gaussian rounded to 256 levels (arXiv 2006.11239, equation 13)."""
    half, z = HALF_A_LEVEL / deviation, (x0 - mean) / deviation
    # Black and white include the tails. Elsewhere the tail is taken in which both cumulative probabilities are small,
    # so that their difference keeps its digits.
    black, white = x0 < HALF_A_LEVEL - 1, x0 > 1 - HALF_A_LEVEL
    z = torch.where(black, z, torch.where(white, -z, -z.abs()))
    log_cdf: Tensor = log_ndtr(z + half)
    gap = (log_ndtr(z - half) - log_cdf).exp().masked_fill(black | white, 0)
    return log_cdf + torch.log1p(-gap)


def broadcast_to_images(images: Tensor, number: Tensor) -> Tensor:
    """Broadcast a number of each image (N,) to ``images`` (N, C, H, W), in their type."""
    return number.to(images.dtype)[:, None, None, None]
