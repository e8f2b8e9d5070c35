"""Editing without training for it: inpainting, img2img, and interpolation between noises.

All functions take a denoiser or a sampler, with x = x_0 + σ ε; masks are bool, True where the image is kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.common.errors import UserError
from diffusion.process.samplers import Denoise, Noise, Sampler


@dataclass(frozen=True)
class Edit:
    """An image to edit, by inpainting or without a mask img2img; UserError for options that contradict each other."""

    image: Tensor
    """(C, H, W) uint8."""
    kept: Tensor | None = None
    """(H, W) bool, True where the image is kept; None: img2img."""
    strength: float = 1.0
    """Share of the reverse process that is run, in (0, 1]: see ``select_levels``."""
    resample_steps: int = 1
    """How often each stretch of steps is run: see ``repaint``. 1: no resampling."""
    stretch: int = 5
    """Steps per stretch."""
    guided: bool = False
    """Whether a gradient guides the estimate to fit the kept part: see ``pigdm``."""

    def __post_init__(self) -> None:
        """Check that all options have an effect."""
        if not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength:g} is not above 0 and at most 1: try 0.6")
        if self.resample_steps < 1 or self.stretch < 1:
            raise UserError(
                f"resample_steps = {self.resample_steps} of stretches of {self.stretch} steps: use 1 or more of either"
            )
        if self.kept is None:
            if self.guided or self.resample_steps > 1:
                raise UserError("without a mask there is nothing for the image to fit: give a mask, or leave it out")
            if self.strength == 1:
                raise UserError("without a mask nothing of the image is left: give a mask, or a strength below 1")
            return
        if self.kept.shape != self.image.shape[-2:]:
            other, size = ("×".join(map(str, shape)) for shape in (self.kept.shape, self.image.shape[-2:]))
            raise UserError(f"the mask has {other} pixels and the image {size} (height × width): make them equal")
        if self.kept.all():
            raise UserError("the mask keeps all of the image: make it white where it is to be filled")
        if not self.kept.any():
            raise UserError("the mask keeps nothing of the image: make it black where it is to stay")


def fill_hole(images: Tensor, mask: Tensor) -> Tensor:
    """Fill the hole of ``images`` (..., C, H, W) uint8 with each channel's mean over the pixels of ``mask`` (H, W)."""
    # Even at the highest noise level the brightness of the hole would shine through.
    mean = images[..., mask].float().mean(-1).round().to(images.dtype)
    return torch.where(mask, images, mean[..., None, None])


def replace_known(denoise: Denoise, content: Tensor, mask: Tensor) -> Denoise:
    """Replace the estimate of ``denoise`` by ``content`` (N, C, H, W) where ``mask`` (N or 1, 1, H, W) is True.

    The replacement method (arXiv 2011.13456, appendix I.2), applied to the estimate instead of the state. It is fast,
    but the hole may not fit its surroundings well; ``pigdm`` and ``repaint`` improve on that.
    """
    return lambda x, sigma: torch.where(mask, content, denoise(x, sigma))


def pigdm(denoise: Denoise, content: Tensor, mask: Tensor, sigma_data: float) -> Denoise:
    """Guide the estimate of ``denoise`` towards ``content`` by a gradient; to be wrapped in ``replace_known``.

    The estimate x̂ becomes x̂ + (σ/r)² J^T (content − x̂) over the kept part, where J is its derivative by x and
    r² = σ² σ_data² / (σ² + σ_data²) the posterior variance of a value (ΠGDM, Song et al., ICLR 2023, for a mask).
    Each step costs a gradient, about 2.5 times the work.
    """

    def guided_estimate(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Clones, since tensors created in inference mode cannot take part in a gradient.
            x, sigma = x.clone().requires_grad_(), sigma.clone()
            estimate = denoise(x, sigma)
            residual = torch.where(mask, content.clone() - estimate.detach(), 0)
            (gradient,) = torch.autograd.grad(estimate, x, residual.to(estimate.dtype))
        gain = 1 + (sigma.to(x.device) / sigma_data) ** 2
        return estimate.detach() + gain.to(x.dtype).expand(len(x))[:, None, None, None] * gradient

    return guided_estimate


def downsample_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Downsample ``mask`` (H, W) bool to ``shape`` (h, w): a position is kept if all of its pixels are."""
    holes = functional.max_pool2d((~mask)[None].float(), len(mask) // shape[0])
    return holes == 0


def repaint(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    stretch: int = 5,
    resample_steps: int = 5,
) -> Tensor:
    """Run the reverse process over ``sigmas`` with each ``stretch`` of steps run ``resample_steps`` times.

    RePaint (arXiv 2201.09865): each repetition first adds back the noise that the stretch removed, so that the hole
    fits its surroundings. ``denoise`` comes from ``replace_known``, ``x`` is σ_max ε (N, C, H, W).
    """
    if resample_steps == 1:
        # In one call, so that multistep samplers can use their earlier steps.
        return sampler(denoise, x, sigmas, noise)
    for start in range(0, len(sigmas) - 1, stretch):
        levels = sigmas[start : start + stretch + 1]
        std = float((levels[0] ** 2 - levels[-1] ** 2).sqrt())
        for repetition in range(resample_steps):
            if repetition:
                x = x + std * noise()
            x = sampler(denoise, x, levels, noise)
    return x


def select_levels(sigmas: Tensor, strength: float) -> Tensor:
    """Select the last share ``strength``, in (0, 1], of the steps of ``sigmas``, at least one (SDEdit, 2108.01073)."""
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Interpolate noise (C, H, W) spherically at each ``share`` (K,), as (K, C, H, W) (arXiv 2010.02502, app. D.5)."""
    angle = torch.acos(((start * end).sum() / (start.norm() * end.norm())).clamp(-1, 1))
    angles = (share * angle)[:, None, None, None].to(start.dtype)
    return (torch.sin(angle - angles) * start + torch.sin(angles) * end) / math.sin(float(angle))
