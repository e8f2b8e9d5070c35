"""The variance of a reverse step from σ to a lower level s: its two bounds, and how a network learns what lies between.

All for x = x_0 + σ ε, after Improved DDPM (arXiv 2102.09672, section 3.1).
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from diffusion.process.samplers import fixed_large, fixed_small
from diffusion.process.schedules import NoiseSchedule

HALF_A_LEVEL = 1 / 255
"""From one of the 256 values of a pixel, in [−1, 1], to half the way to the next."""


def deviation_between(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The standard deviation whose logarithm lies (v + 1)/2 of the way from ``low`` to ``high``, which are variances.

    ``v`` is what the network says of each value, (N, C, H, W), mostly in [−1, 1], as nothing forces it (equation 15).
    """
    share = (v + 1) / 2
    return low ** ((1 - share) / 2) * high ** (share / 2)


def bound(schedule: NoiseSchedule, t: Tensor, x0: Tensor, missed: Tensor, v: Tensor) -> Tensor:
    """The term of the variational bound at each image's whole time ``t`` (N,): bits a value, (N,).

    ``missed`` is by how much the estimate of the images ``x0`` (N, C, H, W), with values as ``to_float`` gives them,
    is wrong. At t > 0 it is KL(q(x_s | x_σ, x_0) ‖ p(x_s | x_σ)), at 0 −log p(x_0 | x_σ) (equations 4 to 6).
    """
    sigmas = schedule.sigmas.to(t.device)
    first = t == 0
    sigma, following = sigmas[t], sigmas[(t - 1).clamp(min=0)].masked_fill(first, 0)
    # The smaller variance of the last step to the image is 0: there that of the step before it is taken, as ᾱ = 1.
    least = fixed_small(sigmas[1], sigmas[0]) / (1 + sigmas[0] ** 2)
    low, high = fixed_small(sigma, following).where(~first, least), fixed_large(sigma, following)
    deviation = deviation_between(v, _of_each(v, low), _of_each(v, high))
    missed_means = _of_each(v, 1 - (following / sigma) ** 2) * missed
    nats = torch.empty_like(v)
    # Each on its own images: where one of them does not hold, its gradient may not even be a number.
    nats[first] = -log_likelihood(x0[first], x0[first] + missed[first], deviation[first])
    nats[~first] = divergence(missed_means[~first], _of_each(v, low.sqrt())[~first], deviation[~first])
    return nats.mean((1, 2, 3)) / math.log(2)


def divergence(apart: Tensor, true: Tensor, deviation: Tensor) -> Tensor:
    """KL of a Gaussian from one whose mean is ``apart`` from its own, of the deviations ``true`` and ``deviation``."""
    ratio = true / deviation
    return ((apart / deviation) ** 2 + ratio**2 - 1) / 2 - ratio.log()


def log_likelihood(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How likely each value of ``x0`` is among 256 to which a Gaussian is rounded (arXiv 2006.11239, equation 13)."""
    half, z = HALF_A_LEVEL / deviation, (x0 - mean) / deviation
    # To black belongs all that is darker, to white all that is brighter. Elsewhere we look from the side on which the
    # two ends are small numbers, of which the difference keeps its digits.
    black, white = x0 < HALF_A_LEVEL - 1, x0 > 1 - HALF_A_LEVEL
    z = torch.where(black, z, torch.where(white, -z, -z.abs()))
    below: Tensor = log_ndtr(z + half)
    gap = (log_ndtr(z - half) - below).exp().masked_fill(black | white, 0)
    return below + torch.log1p(-gap)


def _of_each(images: Tensor, number: Tensor) -> Tensor:
    """A number of each image (N,) as (N, 1, 1, 1), in the images' own type."""
    return number.to(images.dtype)[:, None, None, None]
