"""Metrics of pixels: PSNR and SSIM, resampling baselines, and drift of colours and brightness."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from diffusion.common.config import Config
from diffusion.common.shapes import Images
from diffusion.evaluation.metrics.scores import Scores

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
"""Resampling filters of the baselines, by name."""
TITLES = {"bicubic": "bicubic", "lanczos": "Lanczos"}
"""Display names of the filters."""
ROUNDING = 1 / 12
"""Mean squared error of rounding to integers."""
WINDOW, SIGMA = 11, 1.5
"""Size and standard deviation, in pixels, of the window of SSIM."""


class ImageSimilarity(Config):
    """Mean similarity of images to the real ones that they reproduce."""

    psnr: float
    """Peak signal-to-noise ratio in dB; higher is better. Identical images count as rounded to integers: 58.9."""
    psnr_se: float
    """Standard error, over other images."""
    ssim: float
    """Structural similarity (Wang et al., IEEE Trans. Image Processing 13, 2004), at most 1; higher is better."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {"psnr": self.psnr, "psnr_se": self.psnr_se, "ssim": self.ssim}


class ResamplingBaseline(Config):
    """Scores of small images enlarged by interpolation instead of a model."""

    scores: Scores
    similarity: ImageSimilarity


def resample(small: Tensor, scale: int, name: str) -> Tensor:
    """Resize ``small``, (N, C, h, w) uint8, with Pillow's RESAMPLING ``name``: (N, C, h·scale, w·scale) uint8."""
    _, _, height, width = small.shape
    planes = [
        np.asarray(Image.fromarray(plane).resize((width * scale, height * scale), RESAMPLING[name]))
        for plane in small.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).view(*small.shape[:2], height * scale, width * scale)


def compare_images(images: Images, real: Images) -> ImageSimilarity:
    """Compare ``images`` with the ``real`` ones of the same numbers, each (C, H, W) uint8."""
    if isinstance(images, Tensor) and isinstance(real, Tensor):
        ratios, similar = psnr(images, real), ssim(images, real)
    else:
        pairs = [(image[None], real_image[None]) for image, real_image in zip(images, real, strict=True)]
        ratios, similar = (torch.cat([measure(*pair) for pair in pairs]) for measure in (psnr, ssim))
    return ImageSimilarity(
        psnr=ratios.mean().item(), psnr_se=ratios.std().item() / math.sqrt(len(ratios)), ssim=similar.mean().item()
    )


def psnr(images: Tensor, real: Tensor) -> Tensor:
    """Compute 10 log₁₀(255² / mean squared error) of each image, in dB: (N,) float64."""
    error = (images.double() - real.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=ROUNDING))


def ssim(images: Tensor, real: Tensor) -> Tensor:
    """Compute the structural similarity of each image, the mean over its channels: (N,) float64.

    As in the original paper: a Gaussian window with σ = 1.5 of 11 pixels, or as many as the image has, at all positions
    within the image; K₁ = 0.01, K₂ = 0.03, and variances divided by n.
    """
    x, y = (batch.double().flatten(0, 1)[:, None] for batch in (images, real))
    size = min(WINDOW, *x.shape[-2:])
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()

    def smooth(values: Tensor) -> Tensor:
        return conv2d(conv2d(values, window[None, None, :, None]), window[None, None, None, :])

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3)).view(len(images), -1).mean(1)


def describe_baselines(scores: Scores, baselines: dict[str, ResamplingBaseline]) -> str:
    """Describe in a sentence whether these ``scores`` beat the ``baselines`` on the Fréchet distance."""
    beaten_names = [TITLES[name] for name, baseline in baselines.items() if scores.fd < baseline.scores.fd]
    unbeaten_names = [TITLES[name] for name, baseline in baselines.items() if scores.fd >= baseline.scores.fd]
    phrases = [f"beats {' and '.join(beaten_names)} enlargement"] if beaten_names else []
    phrases += [f"does not beat {' or '.join(unbeaten_names)} enlargement"] if unbeaten_names else []
    return f"On the Fréchet distance to real images it {', and '.join(phrases)}."


LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


class AppearanceShift(Config):
    """Difference of one property between generated and real images."""

    generated: float
    real: float
    """Means over the generated and over the real images."""
    difference: float
    """Generated minus real."""
    standard_error: float
    """Standard error of the difference, over new samples of both (Welch, Biometrika 34, 1947)."""
    generated_spread: float
    real_spread: float
    """Standard deviations over the images: a smaller one of the generated images means missing variety."""

    @property
    def spreads(self) -> float | None:
        """Return the difference in units of the real spread; None if that is 0."""
        return self.difference / self.real_spread if self.real_spread > 0 else None


class AppearanceDrift(Config):
    """Drift of colours and brightness of generated images from real ones."""

    generated: int
    real: int
    """Numbers of images."""
    shifts: dict[str, AppearanceShift]
    """Shift of each property: see ``measure_appearance``."""

    def metrics(self) -> dict[str, float]:
        """Return the differences in units of the real spread, by name."""
        drifts = {f"drift_{name}": shift.spreads for name, shift in self.shifts.items()}
        return {name: value for name, value in drifts.items() if value is not None}


def measure_appearance(images: Images) -> dict[str, Tensor]:
    """Measure colours and brightness of each of ``images``, (C, H, W) uint8 with C 1 or 3: all (N,) float64.

    ``brightness``: mean luma, 0 to 1. ``contrast``: its standard deviation over the image. RGB images also have
    ``red_green`` and ``yellow_blue``, the means of red minus green and of yellow minus blue, −1 to 1 (the opponent
    colours of Hasler and Süsstrunk, SPIE 5007, 2003), and ``saturation``, the mean of the largest minus the smallest
    channel, 0 to 1.
    """
    if isinstance(images, list):
        measurements = [measure_appearance(image[None]) for image in images]
        return {name: torch.cat([measurement[name] for measurement in measurements]) for name in measurements[0]}
    values, colours = images.double() / 255, {}
    luma = values[:, 0]
    if values.shape[1] == 3:
        red, green, blue = values.unbind(1)
        luma = torch.einsum("c,nchw->nhw", torch.tensor(LUMA, dtype=torch.float64), values)
        colours = {
            "red_green": red - green,
            "yellow_blue": (red + green) / 2 - blue,
            "saturation": values.amax(1) - values.amin(1),
        }
    statistics = {"brightness": luma.mean((1, 2)), "contrast": luma.std((1, 2), correction=0)}
    return statistics | {name: value.mean((1, 2)) for name, value in colours.items()}


def compare_appearance(generated: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> AppearanceDrift:
    """Compare the ``measure_appearance`` of ``generated`` and ``real`` images, two or more of each."""
    shifts = {}
    for name, values in generated.items():
        real_values = real[name]
        shifts[name] = AppearanceShift(
            generated=values.mean().item(),
            real=real_values.mean().item(),
            difference=(values.mean() - real_values.mean()).item(),
            standard_error=(values.var() / len(values) + real_values.var() / len(real_values)).sqrt().item(),
            generated_spread=values.std().item(),
            real_spread=real_values.std().item(),
        )
    return AppearanceDrift(generated=len(generated["brightness"]), real=len(real["brightness"]), shifts=shifts)
