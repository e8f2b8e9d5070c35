"""How near enlarged pictures come to those that they were made small of, and what any of them must beat."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from diffusion.config import Config
from diffusion.evaluation.metrics import Scores

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
"""Enlargement without a model, by name."""
TITLES = {"bicubic": "bicubic", "lanczos": "Lanczos"}
"""How they are written."""
RANGE = 255
"""From the least to the most that a pixel can be."""
ROUNDING = 1 / 12
"""Mean squared error of rounding to whole numbers."""
WINDOW, SIGMA = 11, 1.5
"""Size and standard deviation, in pixels, of the window of SSIM."""


class Likeness(Config):
    """Mean likeness of pictures, each to the real one that it stands for."""

    psnr: float
    """Peak signal-to-noise ratio in dB; more is nearer. Exact pictures count as rounded to whole numbers: 58.9."""
    psnr_se: float
    """Its standard error, over other images."""
    ssim: float
    """Structural similarity (Wang et al., IEEE Trans. Image Processing 13, 2004), at most 1; more is nearer."""

    def named(self) -> dict[str, float]:
        """The metrics by name."""
        return {"psnr": self.psnr, "psnr_se": self.psnr_se, "ssim": self.ssim}


class Enlarged(Config):
    """Pictures that no model drew: the small ones enlarged by interpolation."""

    scores: Scores
    likeness: Likeness


def resampled(small: Tensor, scale: int, name: str) -> Tensor:
    """``small``, (N, C, h, w) uint8, enlarged as Pillow does by RESAMPLING ``name``: (N, C, h·scale, w·scale) uint8."""
    _, _, height, width = small.shape
    planes = [
        np.asarray(Image.fromarray(plane).resize((width * scale, height * scale), RESAMPLING[name]))
        for plane in small.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).view(*small.shape[:2], height * scale, width * scale)


def likeness(pictures: Tensor, real: Tensor) -> Likeness:
    """Of ``pictures`` to the ``real`` ones of the same numbers, both (N, C, H, W) uint8."""
    ratios = psnr(pictures, real)
    return Likeness(
        psnr=ratios.mean().item(),
        psnr_se=ratios.std().item() / math.sqrt(len(ratios)),
        ssim=ssim(pictures, real).mean().item(),
    )


def psnr(pictures: Tensor, real: Tensor) -> Tensor:
    """10 log₁₀(255² / mean squared error) of each picture, in dB: (N,) float64."""
    error = (pictures.double() - real.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(RANGE**2 / error.clamp(min=ROUNDING))


def ssim(pictures: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of each picture, the mean over its channels: (N,) float64.

    As its authors have it: a Gaussian window with σ = 1.5 of 11 pixels, or as many as the picture has, everywhere that
    it lies within the picture; K₁ = 0.01, K₂ = 0.03, and variances divided by n.
    """
    x, y = (each.double().flatten(0, 1)[:, None] for each in (pictures, real))
    window = gaussian(min(WINDOW, *x.shape[-2:]))

    def local(values: Tensor) -> Tensor:
        return conv2d(conv2d(values, window[None, None, :, None]), window[None, None, None, :])

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3)).view(len(pictures), -1).mean(1)


def gaussian(size: int) -> Tensor:
    """``size`` weights of a Gaussian with σ = 1.5, which sum to 1: (size,) float64."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def verdict(ours: Scores, baselines: dict[str, Enlarged]) -> str:
    """Whether ``ours`` beats the ``baselines`` on the Fréchet distance, in a sentence."""
    beaten = [TITLES[name] for name, each in baselines.items() if ours.fd < each.scores.fd]
    others = [TITLES[name] for name, each in baselines.items() if ours.fd >= each.scores.fd]
    said = [f"beats {' and '.join(beaten)} enlargement"] if beaten else []
    said += [f"does not beat {' or '.join(others)} enlargement"] if others else []
    return f"On the Fréchet distance to real pictures it {', and '.join(said)}."
