"""DEIS and UniPC: polynomials in λ through the last estimates, integrated exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from diffusion.process.samplers.base import BaseSampling, Denoise, Noise

if TYPE_CHECKING:
    from torch import Tensor


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 3) -> Tensor:
    """DEIS: polynomial extrapolation of the last ``order`` estimates of the noise, here in λ (arXiv 2204.13902)."""
    levels = (-sigmas.log()).tolist()
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        history = [(levels[i], (x - x0) / float(sigma)), *history][: order if next_sigma > 0 else 1]
        step = levels[i + 1] - levels[i]
        # ∫ e^−τ (τ/h)^k dτ from 0 to h = step, by parts from k to k: dx is ε dσ, and dσ is −σ e^−τ dτ.
        moments = [-math.expm1(-step)]
        for k in range(1, len(history)):
            moments.append(k / step * moments[-1] - math.exp(-step))
        x = x - float(sigma) * _integral(history, step, moments)
    return x


class DEISSampling(BaseSampling):
    """DEIS (arXiv 2204.13902): deterministic multistep, accurate in few steps."""

    function = deis
    sampler: Literal["deis"] = "deis"
    """Name of the sampler."""
    order: Literal[2, 3] = 3
    """Number of estimates used in a step."""


def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 2) -> Tensor:
    """UniPC: each estimate first corrects the last step, then predicts the next one (arXiv 2302.04867), with B_2(h).

    ``order`` is the predictor's; the corrector's is one higher. Both fall towards the end.
    """
    levels, start = (-sigmas.log()).tolist(), x
    history: list[tuple[float, Tensor]] = []
    for i, sigma in enumerate(sigmas[:-1]):
        x0 = denoise(x, sigma)
        if history:
            x = _advance([*history, (levels[i], x0)], start, levels[i] - levels[i - 1])
        history = [(levels[i], x0), *history][: min(order, len(sigmas) - 1 - i)]
        start, x = x, _advance(history, x, levels[i + 1] - levels[i])
    return x


class UniPCSampling(BaseSampling):
    """UniPC (arXiv 2302.04867): deterministic multistep predictor-corrector, accurate in few steps."""

    function = unipc
    sampler: Literal["unipc"] = "unipc"
    """Name of the sampler."""
    order: Literal[2, 3] = 2
    """Number of estimates used by the predictor; the corrector uses one more."""


def _advance(history: Sequence[tuple[float, Tensor]], x: Tensor, step: float) -> Tensor:
    """Advance x by a ``step`` of λ with x̂_0 as the polynomial through ``history``, the estimate at its start first."""
    # ∫ e^(τ−h) (τ/h)^k dτ from 0 to h = step, by parts from k to k.
    moments = [-math.expm1(-step)]
    if len(history) == 2:
        # With a single difference UniPC uses half of B_2(h), which is of the same order.
        moments.append(moments[0] / 2)
    else:
        for k in range(1, len(history)):
            moments.append(1 - k / step * moments[-1])
    return math.exp(-step) * x + _integral(history, step, moments)


def _integral(history: Sequence[tuple[float, Tensor]], step: float, moments: Sequence[float]) -> Tensor:
    """Integrate the polynomial through ``history`` over a ``step``; ``moments`` are the integrals of (τ/step)^k."""
    import torch

    (origin, value), *others = history
    offsets = torch.tensor([(level - origin) / step for level, _ in others], dtype=torch.float64)
    powers = offsets ** torch.arange(1, len(history))[:, None]
    shares = torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
    integral = moments[0] * value
    for share, (_, point) in zip(shares, others, strict=True):
        integral = integral + share * (point - value)
    return integral
