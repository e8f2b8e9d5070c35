"""Learned variance of a reverse step from σ to a lower level s, between its two bounds.

For x = x_0 + σ ε, after Improved DDPM (arXiv 2102.09672, section 3.1).
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from diffusion.process.samplers import fixed_large, fixed_small
from diffusion.process.schedules import NoiseSchedule

HALF_A_LEVEL = 1 / 255
"""Half the distance between neighbouring values of 8-bit pixels in [−1, 1]."""


def deviation_between(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Interpolate the logarithms of the variances ``low`` and ``high`` at (v + 1)/2; returns the standard deviation.

    ``v`` is the network's output for each value, (N, C, H, W), mostly but not necessarily in [−1, 1] (equation 15).
    """
    share = (v + 1) / 2
    return low ** ((1 - share) / 2) * high ** (share / 2)


def bound(schedule: NoiseSchedule, t: Tensor, x0: Tensor, error: Tensor, v: Tensor) -> Tensor:
    """Compute the term of the variational bound at each image's integral time ``t`` (N,): bits per value, (N,).

    ``error`` is estimate minus truth for the images ``x0`` (N, C, H, W), which have values as from ``to_float``. The
    term is KL(q(x_s | x_σ, x_0) ‖ p(x_s | x_σ)) at t > 0, and −log p(x_0 | x_σ) at 0 (equations 4 to 6).
    """
    sigmas = schedule.sigmas.to(t.device)
    first = t == 0
    sigma, following = sigmas[t], sigmas[(t - 1).clamp(min=0)].masked_fill(first, 0)
    # The lower variance of the last step is 0, so that of the step before it is used, with ᾱ = 1.
    least = fixed_small(sigmas[1], sigmas[0]) / (1 + sigmas[0] ** 2)
    low, high = fixed_small(sigma, following).where(~first, least), fixed_large(sigma, following)
    deviation = deviation_between(v, _of_each(v, low), _of_each(v, high))
    mean_error = _of_each(v, 1 - (following / sigma) ** 2) * error
    nats = torch.empty_like(v)
    # Each term only on its own images: on the others its gradient may be NaN.
    nats[first] = -log_likelihood(x0[first], x0[first] + error[first], deviation[first])
    nats[~first] = divergence(mean_error[~first], _of_each(v, low.sqrt())[~first], deviation[~first])
    return nats.mean((1, 2, 3)) / math.log(2)


def divergence(apart: Tensor, true: Tensor, deviation: Tensor) -> Tensor:
    """Compute the KL divergence of Gaussians of standard deviations ``true`` and ``deviation``, means ``apart``."""
    ratio = true / deviation
    return ((apart / deviation) ** 2 + ratio**2 - 1) / 2 - ratio.log()


def log_likelihood(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute ln p of each value of ``x0`` for a Gaussian rounded to 256 levels (arXiv 2006.11239, equation 13)."""
    half, z = HALF_A_LEVEL / deviation, (x0 - mean) / deviation
    # Black and white include the tails. Elsewhere the tail is taken in which both cumulative probabilities are small,
    # so that their difference keeps its digits.
    black, white = x0 < HALF_A_LEVEL - 1, x0 > 1 - HALF_A_LEVEL
    z = torch.where(black, z, torch.where(white, -z, -z.abs()))
    below: Tensor = log_ndtr(z + half)
    gap = (log_ndtr(z - half) - below).exp().masked_fill(black | white, 0)
    return below + torch.log1p(-gap)


def _of_each(images: Tensor, number: Tensor) -> Tensor:
    """Broadcast a number of each image (N,) to (N, 1, 1, 1), in the images' type."""
    return number.to(images.dtype)[:, None, None, None]
