"""Editing: holes filled, pictures varied, ways from one to another, with models that were trained for none of it.

Everything is made of a denoiser and a sampler, in x = x_0 + σ ε; masks are bool, True where a picture is kept.
"""

import math

import torch
from torch import Tensor

from diffusion.samplers import Denoise, Noise, Sampler


def keeping(denoise: Denoise, known: Tensor, kept: Tensor) -> Denoise:
    """``denoise`` as if it saw ``known`` (N, C, H, W) where the mask ``kept`` (N or 1, 1, H, W) says so.

    Any sampler then keeps that part of the picture, in the end exactly, and on the way as noisy as the rest: the
    replacement method (arXiv 2011.13456, appendix I.2), with the estimate replaced instead of the state. Fast, but what
    is filled in does not know well enough what lies around it, which is what ``repaint`` is for.
    """
    return lambda x, sigma: torch.where(kept, known, denoise(x, sigma))


def repaint(
    sampler: Sampler, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, jump: int = 5, times: int = 5
) -> Tensor:
    """The reverse process over ``sigmas`` with each stretch of ``jump`` steps gone ``times`` times (arXiv 2201.09865).

    Between two of them the noise that the stretch took away is put back, so that a filled hole and its surroundings,
    ``denoise`` being one of ``keeping``, come to agree. ``x`` is σ_max ε (N, C, H, W); costs ``times`` as much.
    """
    for start in range(0, len(sigmas) - 1, jump):
        stretch = sigmas[start : start + jump + 1]
        back = float((stretch[0] ** 2 - stretch[-1] ** 2).sqrt())
        for again in range(times):
            if again:
                x = x + back * noise()
            x = sampler(denoise, x, stretch, noise)
    return x


def levels_for(sigmas: Tensor, strength: float) -> Tensor:
    """The end of the grid ``sigmas`` (steps + 1,) at which a picture is changed with ``strength``, in (0, 1].

    1 is all of it, and leaves nothing of the picture; a strength of 0.5 goes through the lower half of the steps
    (SDEdit, arXiv 2108.01073). At least one step is left.
    """
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Gaussian noise on the way from ``one`` to ``other``, both (C, H, W), at each ``share`` (K,), as (K, C, H, W).

    On the great circle through both: on a straight line there would be less noise half-way than at its ends
    (arXiv 2010.02502, appendix D.5).
    """
    angle = torch.acos((one * other).sum() / (one.norm() * other.norm()))
    to_each = (share * angle)[:, None, None, None].to(one.dtype)
    return (torch.sin(angle - to_each) * one + torch.sin(to_each) * other) / math.sin(float(angle))
