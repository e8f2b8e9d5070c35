"""Explain: pictures of what diffusion does, from a real picture and a trained model."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.files import write_bytes
from diffusion.grids import figure_png
from diffusion.model import DiffusionModel, to_float, to_uint8
from diffusion.process import NoiseSchedule
from diffusion.random import GaussianNoise
from diffusion.samplers import SAMPLERS, sigma_grid

FRAMES = 8
"""Pictures in a strip."""
NOISE_RANGE = 3.0
"""Noise is shown from minus this, black, to this, white."""
INK, MUTED, SIGNAL, NOISE = "#1c1f23", "#5c6570", "#2563eb", "#b9c0c8"


@dataclass(frozen=True)
class Forward:
    """A picture at growing time steps; K of them."""

    steps: list[int]
    alpha_bars: list[float]
    pictures: Tensor
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with one ε for all: (K, C, H, W) float32."""


@dataclass(frozen=True)
class TrainingStep:
    """What happens to one picture in one step of training; all tensors are (C, H, W) float32."""

    step: int
    alpha_bar: float
    picture: Tensor
    noise: Tensor
    mixture: Tensor
    predicted: Tensor
    """The noise that the network's output stands for, whatever it predicts."""

    @property
    def difference(self) -> Tensor:
        """Predicted minus true noise."""
        return self.predicted - self.noise

    @property
    def loss(self) -> float:
        """Mean square of the difference, DDPM's simple loss (arXiv 2006.11239, equation 14)."""
        return self.difference.square().mean().item()


@dataclass(frozen=True)
class Reverse:
    """A sampler on its way from noise to a picture; K of its moments."""

    numbers: list[int]
    """Which of the sampler's steps, from 1."""
    total: int
    """Steps the sampler takes."""
    steps: list[float]
    """Time steps t, falling."""
    pictures: Tensor
    """x_t: (K, C, H, W) float32."""
    estimates: Tensor
    """What the model takes the picture to be: (K, C, H, W) float32."""
    result: Tensor
    """(C, H, W) float32."""


def explain(model: DiffusionModel, picture: Tensor, output: Path, seed: int = 0) -> list[Path]:
    """Draw ``forward.png``, ``training_step.png`` and ``reverse.png`` into folder ``output``.

    ``picture``: a real one, (C, H, W) uint8, of the model's shape; UserError if it is another. All noise
    comes from ``seed``.
    """
    if tuple(picture.shape) != model.shape:
        theirs, ours = ("×".join(map(str, shape)) for shape in (picture.shape, model.shape))
        raise UserError(
            f"the picture is {theirs} and the model draws {ours} (channels × height × width): "
            "take one from the data set that the model was trained on"
        )
    x0 = to_float(picture)
    noise = GaussianNoise(seed, "explain", [0], model.shape)()[0]
    figures = {
        "forward.png": draw_forward(forward(model.schedule, x0, noise), model.schedule),
        "training_step.png": draw_training_step(training_step(model, x0, noise)),
        "reverse.png": draw_reverse(reverse(model, seed)),
    }
    for name, figure in figures.items():
        write_bytes(output / name, figure_png(figure))
    return [output / name for name in figures]


def forward(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, count: int = FRAMES) -> Forward:
    """``x0``, (C, H, W) in [−1, 1], mixed with ``noise`` at ``count`` time steps spread evenly from 0 to T−1."""
    t = torch.linspace(0, schedule.steps - 1, count).round().long()
    pictures = schedule.q_sample(x0.expand(count, -1, -1, -1), t, noise.expand(count, -1, -1, -1))
    return Forward(t.tolist(), schedule.alphas_cumprod[t].tolist(), pictures)


@torch.inference_mode()
def training_step(model: DiffusionModel, x0: Tensor, noise: Tensor) -> TrainingStep:
    """One step on ``x0``, (C, H, W) in [−1, 1], at the time where picture and noise weigh the same."""
    schedule = model.schedule
    t = (schedule.alphas_cumprod - 0.5).abs().argmin()
    sigma = schedule.sigmas[t].float()
    x = x0 + sigma * noise
    estimate = replace(model.denoiser(), clip=False)(x[None], sigma)[0]
    return TrainingStep(
        step=int(t),
        alpha_bar=schedule.alphas_cumprod[t].item(),
        picture=x0,
        noise=noise,
        mixture=schedule.q_sample(x0[None], t[None], noise[None])[0],
        predicted=(x - estimate) / sigma,
    )


@torch.inference_mode()
def reverse(model: DiffusionModel, seed: int, count: int = FRAMES) -> Reverse:
    """``count`` evenly spread moments of the default sampler drawing picture 0 of ``seed``."""
    config = SamplingConfig()
    sigmas = sigma_grid(model.schedule, config.steps)
    denoiser = model.denoiser()
    noise = GaussianNoise(seed, "sampling", [0], model.shape)
    seen: list[tuple[Tensor, Tensor]] = []
    result = SAMPLERS[config.sampler](
        denoiser, sigmas[0] * noise(), sigmas, noise, lambda i, x, x0_hat: seen.append((x, x0_hat))
    )
    chosen = torch.linspace(0, len(seen) - 1, count).round().long()
    levels = sigmas[chosen]
    # The sampler's x is x_0 + σ ε; times √ᾱ = 1/√(1 + σ²) it is the forward process' x_t.
    x_t = torch.cat([seen[i][0] for i in chosen]) / (1 + levels**2).sqrt().float()[:, None, None, None]
    return Reverse(
        numbers=(chosen + 1).tolist(),
        total=len(seen),
        steps=denoiser.time(levels).tolist(),
        pictures=x_t,
        estimates=torch.cat([seen[i][1] for i in chosen]),
        result=result[0],
    )


def draw_forward(frames: Forward, schedule: NoiseSchedule) -> Figure:
    """The strip, and below it ᾱ over time: each picture stands above its own time step."""
    figure = _sheet(12.0, 4.9)
    _title(figure, "The forward process: a picture turns into noise", "x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε")
    count, last = len(frames.steps), schedule.steps - 1
    left, width, pitch = 0.045, 0.104, (0.91 - 0.104) / (len(frames.steps) - 1)
    for number, (step, alpha_bar) in enumerate(zip(frames.steps, frames.alpha_bars, strict=True)):
        axes = figure.add_axes((left + number * pitch, 0.56, width, 0.26))
        _show(axes, to_uint8(frames.pictures[number]))
        _caption(axes, f"t = {step}", f"ᾱ = {_figure(alpha_bar)}")
    margin = width / 2 / pitch * last / (count - 1)
    curve = figure.add_axes((left, 0.13, (count - 1) * pitch + width, 0.27))
    alpha_bars = schedule.alphas_cumprod.numpy()
    t = np.arange(schedule.steps)
    curve.fill_between(t, alpha_bars, color=SIGNAL, alpha=0.15, linewidth=0)
    curve.fill_between(t, alpha_bars, 1, color=NOISE, alpha=0.35, linewidth=0)
    curve.plot(t, alpha_bars, color=SIGNAL, linewidth=2)
    curve.plot(frames.steps, frames.alpha_bars, "o", color=SIGNAL, markersize=6, clip_on=False, zorder=3)
    curve.set_xlim(-margin, last + margin)
    curve.set_ylim(0, 1)
    curve.set_xticks(frames.steps)
    curve.set_yticks([0, 0.5, 1])
    curve.tick_params(colors=MUTED, labelsize=9, length=0)
    curve.spines[:].set_visible(False)
    curve.set_xlabel("time step t", color=MUTED, fontsize=10)
    curve.set_ylabel("ᾱ", color=MUTED, fontsize=11, rotation=0, labelpad=10)
    half = int(np.abs(alpha_bars - 0.5).argmin())
    curve.text(half / 2, 0.2, "picture, ᾱ of the variance", color=SIGNAL, fontsize=10, ha="center")
    curve.text((half + last) / 2, 0.75, "noise, 1 − ᾱ", color=MUTED, fontsize=10, ha="center")
    return figure


def draw_training_step(step: TrainingStep) -> Figure:
    """Five panels that read like an equation."""
    figure = _sheet(12.0, 3.7)
    _title(
        figure,
        "One step of training: tell the noise from the picture",
        f"at t = {step.step}, ᾱ = {_figure(step.alpha_bar)}: picture and noise weigh the same",
    )
    panels = [
        (to_uint8(step.picture), "picture x_0", "from the data set", ""),
        (_noise_picture(step.noise), "noise ε", "drawn at random", "+"),
        (to_uint8(step.mixture), "mixture x_t", "all that the network sees", "="),
        (_noise_picture(step.predicted), "predicted noise ε̂", "what the network makes of it", "→"),
        (_noise_picture(step.difference), "difference ε̂ − ε", f"mean square {_figure(step.loss)}", "−ε ="),
    ]
    width, gap = 0.155, 0.038
    left = (1 - 5 * width - 4 * gap) / 2
    for number, (pixels, name, about, sign) in enumerate(panels):
        start = left + number * (width + gap)
        axes = figure.add_axes((start, 0.2, width, 0.56))
        _show(axes, pixels)
        _caption(axes, name, about)
        figure.text(start - gap / 2, 0.48, sign, color=INK, fontsize=15, ha="center", va="center")
    figure.text(
        0.5,
        0.035,
        f"The loss is that mean square: {_figure(step.loss)} here, 1 for a network that predicts no noise at all. "
        f"Noise is shown from {-NOISE_RANGE:g} (black) to {NOISE_RANGE:g} (white).",
        color=MUTED,
        fontsize=9.5,
        ha="center",
    )
    return figure


def draw_reverse(frames: Reverse) -> Figure:
    """Above, what the sampler holds; below, what the model takes it to be; at the end, the picture."""
    figure = _sheet(12.0, 4.5)
    _title(
        figure,
        "The reverse process: noise turns into a picture",
        f"{frames.total} steps; each moves towards the model's estimate of the picture, then asks again",
    )
    count = len(frames.numbers) + 1
    left, width = 0.075, 0.092
    pitch = (0.98 - left - width) / (count - 1)
    for number in range(count - 1):
        start = left + number * pitch
        above = figure.add_axes((start, 0.49, width, 0.28))
        _show(above, to_uint8(frames.pictures[number]))
        below = figure.add_axes((start, 0.17, width, 0.28))
        _show(below, to_uint8(frames.estimates[number]))
        _caption(below, f"step {frames.numbers[number]}", f"t = {frames.steps[number]:.0f}")
    end = figure.add_axes((left + (count - 1) * pitch, 0.33, width, 0.28))
    _show(end, to_uint8(frames.result))
    _caption(end, "picture", "")
    for height, name in (0.63, "x_t"), (0.31, "estimate\nof x_0"):
        figure.text(left - 0.012, height, name, color=INK, fontsize=10.5, ha="right", va="center")
    return figure


def _sheet(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="#ffffff")


def _title(figure: Figure, title: str, about: str) -> None:
    figure.text(0.5, 0.935, title, color=INK, fontsize=15, fontweight="bold", ha="center", va="center")
    figure.text(0.5, 0.865, about, color=MUTED, fontsize=11, ha="center", va="center")


def _show(axes: Axes, pixels: Tensor) -> None:
    array = pixels.permute(1, 2, 0).numpy()
    axes.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d5d9de")


def _caption(axes: Axes, first: str, second: str) -> None:
    axes.text(0.5, -0.07, first, transform=axes.transAxes, color=INK, fontsize=10.5, ha="center", va="top")
    axes.text(0.5, -0.22, second, transform=axes.transAxes, color=MUTED, fontsize=9.5, ha="center", va="top")


def _noise_picture(noise: Tensor) -> Tensor:
    return to_uint8(noise / NOISE_RANGE)


def _figure(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.3f}"
