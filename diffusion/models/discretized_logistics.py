"""Pixels drawn from a discretised mixture of logistic distributions (PixelCNN++, arXiv 1701.05517, sections 2.1, 2.2).

Values lie on ``levels`` even steps from −1 to 1. Each step has the probability that the continuous mixture has between
halfway to its neighbours, the first and the last all that lies beyond them too: the probabilities of all add up to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 256
"""Of stored pixels."""
LOG_SCALE = -7.0
"""Least logarithm of a scale: less than a quarter of a level of 256."""


@dataclass(frozen=True)
class Mixtures:
    """Of pixels of C values in K logistics, of which one is chosen for all values of a pixel."""

    logits: Tensor
    """(…, K): logarithms of how probable each is, but for a constant."""
    means: Tensor
    """(…, C, K)."""
    log_scales: Tensor
    """(…, C, K)."""
    slopes: Tensor
    """(…, C, C, K): by how much the mean of a value grows with each value before it; 0 with itself and those after."""


def width(channels: int, mixtures: int) -> int:
    """Numbers that say the mixtures of a pixel."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixtures_of(numbers: Tensor, channels: int) -> Mixtures:
    """What a network's answers (…, ``width``) say."""
    pairs = channels * (channels - 1) // 2
    count = numbers.shape[-1] // width(channels, 1)
    parts = [count, count * channels, count * channels, count * pairs]
    logits, means, log_scales, slopes = torch.split(numbers.float(), parts, dim=-1)
    lower = torch.tril_indices(channels, channels, -1, device=numbers.device)
    square = numbers.new_zeros(*numbers.shape[:-1], channels, channels, count, dtype=torch.float32)
    square[..., lower[0], lower[1], :] = torch.unflatten(slopes, -1, (pairs, count)).tanh()
    return Mixtures(
        logits,
        torch.unflatten(means, -1, (channels, count)),
        torch.unflatten(log_scales, -1, (channels, count)).clamp(min=LOG_SCALE),
        square,
    )


def log_probability(found: Mixtures, x: Tensor, levels: int = LEVELS) -> Tensor:
    """ln p of pixels ``x`` (…, C), each value on one of the ``levels``: (…,) float32."""
    means = found.means + (found.slopes * x[..., None, :, None]).sum(-2)
    half, inverse = 1 / (levels - 1), (-found.log_scales).exp()
    centred = x[..., None] - means
    upper, lower = (centred + half) * inverse, (centred - half) * inverse
    # σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l − u)), of which no part is a difference of nearly equal numbers.
    below, beyond = functional.logsigmoid(upper), functional.logsigmoid(-lower)
    inside = below + beyond + torch.log(-torch.expm1(-2 * half * inverse))
    at_ends = torch.where((x <= -1 + half)[..., None], below, torch.where((x >= 1 - half)[..., None], beyond, inside))
    return (at_ends.sum(-2) + found.logits.log_softmax(-1)).logsumexp(-1)


def drawn(found: Mixtures, noise: Tensor, levels: int = LEVELS) -> Tensor:
    """Pixels (…, C) from standard Gaussian ``noise`` (…, C + 1), of which the last number chooses the logistic.

    Equal noise gives nearly equal pixels where mixtures are nearly equal: every distribution is drawn by its quantiles.
    """
    quantile = torch.special.ndtr(noise[..., -1:])
    chosen = (found.logits.softmax(-1).cumsum(-1) < quantile).sum(-1).clamp(max=found.logits.shape[-1] - 1)

    def of_chosen(values: Tensor) -> Tensor:
        where = chosen[(..., *(None,) * (values.ndim - chosen.ndim))].expand(*values.shape[:-1], 1)
        return values.gather(-1, where).squeeze(-1)

    means, log_scales, slopes = (of_chosen(each) for each in (found.means, found.log_scales, found.slopes))
    # The logistic's quantile, ln u − ln (1 − u), of the Gaussian's.
    spread = torch.special.log_ndtr(noise[..., :-1]) - torch.special.log_ndtr(-noise[..., :-1])
    steps = (levels - 1) / 2
    values: list[Tensor] = []
    for channel in range(means.shape[-1]):
        mean = means[..., channel]
        for before, value in enumerate(values):
            mean = mean + slopes[..., channel, before] * value
        value = mean + log_scales[..., channel].exp() * spread[..., channel]
        values.append(((value + 1) * steps).round().clamp(0, levels - 1) / steps - 1)
    return torch.stack(values, -1)
