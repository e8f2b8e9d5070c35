"""Editing with models that were not trained for it: inpainting, img2img, and interpolation between noises.

Everything is made of a denoiser and a sampler, in x = x_0 + σ ε; masks are bool, True where an image is kept.
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
    """An image to begin with, instead of with noise, and how it is changed; UserError if that makes no sense.

    With a mask the rest is filled (inpainting), at the full ``strength``; without one all of it is changed (img2img).
    """

    image: Tensor
    """(C, H, W) uint8."""
    kept: Tensor | None = None
    """(H, W) bool, True where the image is kept; None: nowhere."""
    strength: float = 1.0
    """How much is changed, in (0, 1]: see ``levels_for``."""
    resample_steps: int = 1
    """How often each stretch of steps is repeated: see ``repaint``. 1: once, which is fast."""
    stretch: int = 5
    """Steps in a stretch."""
    guided: bool = False
    """Whether the estimate is guided by a gradient to fit what is kept: see ``pigdm``."""

    def __post_init__(self) -> None:
        """Check that everything has an effect."""
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
            theirs, ours = ("×".join(map(str, each)) for each in (self.kept.shape, self.image.shape[-2:]))
            raise UserError(f"the mask has {theirs} pixels and the image {ours} (height × width): make them equal")
        if self.kept.all():
            raise UserError("the mask keeps all of the image: make it white where it is to be filled")
        if not self.kept.any():
            raise UserError("the mask keeps nothing of the image: make it black where it is to stay")

    @property
    def seen(self) -> Tensor:
        """What the reverse process may know of the image: at full strength nothing that lies in the hole."""
        return self.image if self.kept is None or self.strength < 1 else blanked(self.image, self.kept)


def blanked(images: Tensor, kept: Tensor) -> Tensor:
    """``images`` (..., C, H, W) uint8 with the mean of what is ``kept`` (H, W) of each channel everywhere else.

    No noise level hides a hole's brightness altogether: what begins there would come out as it was.
    """
    mean = images[..., kept].float().mean(-1).round().to(images.dtype)
    return torch.where(kept, images, mean[..., None, None])


def replace_known(denoise: Denoise, known: Tensor, kept: Tensor) -> Denoise:
    """``denoise`` as if it saw ``known`` (N, C, H, W) where the mask ``kept`` (N or 1, 1, H, W) says so.

    Any sampler then keeps that part of the image, in the end exactly, and on the way as noisy as the rest: the
    replacement method (arXiv 2011.13456, appendix I.2), with the estimate replaced instead of the state. Fast, but what
    is filled in does not know well enough what lies around it, which is what ``pigdm`` and ``repaint`` are for.
    """
    return lambda x, sigma: torch.where(kept, known, denoise(x, sigma))


def pigdm(denoise: Denoise, known: Tensor, kept: Tensor, sigma_data: float) -> Denoise:
    """``denoise`` with its estimate moved until it explains ``known``; it belongs inside ``replace_known``.

    The estimate x̂ follows the gradient of what is wrong with it where the image is kept: x̂ + (σ/r)² J^T (known − x̂),
    J its derivative by x and r² = σ² σ_data² / (σ² + σ_data²) how unsure it is of a value (ΠGDM, Song et al., ICLR
    2023, for a mask). Each step costs a gradient, about 2.5 times the work.
    """

    def moved(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, as nothing that was made in inference mode may take part in a gradient.
            x, sigma = x.clone().requires_grad_(), sigma.clone()
            estimate = denoise(x, sigma)
            wrong = torch.where(kept, known.clone() - estimate.detach(), 0)
            (towards,) = torch.autograd.grad(estimate, x, wrong.to(estimate.dtype))
        gain = 1 + (sigma.to(x.device) / sigma_data) ** 2
        return estimate.detach() + gain.to(x.dtype).expand(len(x))[:, None, None, None] * towards

    return moved


def whole(kept: Tensor, size: int) -> Tensor:
    """The mask ``kept`` (H, W) bool at ``size``×``size``: what stands for H/size pixels is kept if all of them are."""
    lost = functional.max_pool2d((~kept)[None].float(), len(kept) // size)
    return lost == 0


def repaint(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    stretch: int = 5,
    resample_steps: int = 5,
) -> Tensor:
    """The reverse process over ``sigmas`` with each ``stretch`` of steps repeated ``resample_steps`` times.

    RePaint (arXiv 2201.09865): between two of them the noise that the stretch took away is put back, so that a filled
    hole and its surroundings, ``denoise`` being one of ``replace_known``, come to agree. ``x`` is σ_max ε (N, C, H, W).
    """
    if resample_steps == 1:
        # Whole, so that samplers which remember earlier steps may.
        return sampler(denoise, x, sigmas, noise)
    for start in range(0, len(sigmas) - 1, stretch):
        levels = sigmas[start : start + stretch + 1]
        back = float((levels[0] ** 2 - levels[-1] ** 2).sqrt())
        for repetition in range(resample_steps):
            if repetition:
                x = x + back * noise()
            x = sampler(denoise, x, levels, noise)
    return x


def levels_for(sigmas: Tensor, strength: float) -> Tensor:
    """The end of the grid ``sigmas`` (steps + 1,) at which an image is changed with ``strength``, in (0, 1].

    1 is all of it, and leaves nothing but what a mask keeps; a strength of 0.5 goes through the lower half of the steps
    (SDEdit, arXiv 2108.01073). At least one step is left.
    """
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Gaussian noise on the way from ``one`` to ``other``, both (C, H, W), at each ``share`` (K,), as (K, C, H, W).

    On the great circle through both: on a straight line there would be less noise half-way than at its ends
    (arXiv 2010.02502, appendix D.5).
    """
    angle = torch.acos(((one * other).sum() / (one.norm() * other.norm())).clamp(-1, 1))
    to_each = (share * angle)[:, None, None, None].to(one.dtype)
    return (torch.sin(angle - to_each) * one + torch.sin(to_each) * other) / math.sin(float(angle))
