"""Discretized mixture of logistics, a distribution of pixels (PixelCNN++, arXiv 1701.05517, sections 2.1, 2.2).

Values lie on ``levels`` equidistant levels from −1 to 1. Each has the probability of the continuous mixture between the
midpoints to its neighbours; the first and the last include the tails, so that all probabilities sum to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 256
"""Number of values of stored pixels."""
LOG_SCALE = -7.0
"""Smallest log-scale: less than a quarter of one of 256 levels."""


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of K logistics for pixels of C values; all values of a pixel share one component."""

    logits: Tensor
    """(…, K): unnormalised log-probabilities of the components."""
    means: Tensor
    """(…, C, K)."""
    log_scales: Tensor
    """(…, C, K)."""
    slopes: Tensor
    """(…, C, C, K): coefficients of the preceding channels in the mean of a channel; strictly lower triangular."""


def parameter_count(channels: int, mixtures: int) -> int:
    """Count the parameters of a pixel's mixture."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixtures_of(numbers: Tensor, channels: int) -> Mixtures:
    """Convert a network's output (…, ``parameter_count``) to mixtures."""
    pairs = channels * (channels - 1) // 2
    count = numbers.shape[-1] // parameter_count(channels, 1)
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


def log_probability(mixtures: Mixtures, x: Tensor, levels: int = LEVELS) -> Tensor:
    """Compute ln p of pixels ``x`` (…, C), each value on one of the ``levels``: (…,) float32."""
    means = mixtures.means + (mixtures.slopes * x[..., None, :, None]).sum(-2)
    half, inverse = 1 / (levels - 1), (-mixtures.log_scales).exp()
    centred = x[..., None] - means
    upper, lower = (centred + half) * inverse, (centred - half) * inverse
    # σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l − u)), computed without cancellation.
    below, beyond = functional.logsigmoid(upper), functional.logsigmoid(-lower)
    inside = below + beyond + torch.log(-torch.expm1(-2 * half * inverse))
    at_ends = torch.where((x <= -1 + half)[..., None], below, torch.where((x >= 1 - half)[..., None], beyond, inside))
    return (at_ends.sum(-2) + mixtures.logits.log_softmax(-1)).logsumexp(-1)


def sample_pixels(mixtures: Mixtures, noise: Tensor, levels: int = LEVELS) -> Tensor:
    """Sample pixels (…, C) from standard Gaussian ``noise`` (…, C + 1), whose last value selects the component.

    Sampling inverts the cumulative distributions, so similar mixtures give similar pixels for the same noise.
    """
    quantile = torch.special.ndtr(noise[..., -1:])
    component = (mixtures.logits.softmax(-1).cumsum(-1) < quantile).sum(-1).clamp(max=mixtures.logits.shape[-1] - 1)

    def select(values: Tensor) -> Tensor:
        where = component[(..., *(None,) * (values.ndim - component.ndim))].expand(*values.shape[:-1], 1)
        return values.gather(-1, where).squeeze(-1)

    means, log_scales, slopes = (select(each) for each in (mixtures.means, mixtures.log_scales, mixtures.slopes))
    # The logistic quantile ln u − ln (1 − u) at u = Φ(noise).
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
