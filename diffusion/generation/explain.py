"""Figures that explain how a trained model works on a real image."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import above, figure_png, grid, save_png
from diffusion.common.random import GaussianNoise
from diffusion.families.autoregressive import AutoregressiveModel, bits_of_pixels
from diffusion.families.gan import GANModel
from diffusion.families.model import Conditioning, DiffusionModel, Model, to_float, to_uint8
from diffusion.families.vae import VAEModel
from diffusion.generation.config import Conditions
from diffusion.generation.generate import interpolate, make_conditioning, reconstructed
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import sampling_config
from diffusion.process.schedules import NoiseSchedule

INTERPOLATED = 8
"""Images of a GAN from one seed to another."""
MOST_BITS = 8
"""Bits per value shown as white in the figure of an autoregressive model."""
FRAMES = 8
"""Images in a strip."""
REVERSE_STEPS = 40
"""Steps of the sampler: more than it needs, for an even sequence from noise to image."""
NOISE_RANGE = 3.0
"""Noise is shown from minus this, black, to this, white."""
INK, MUTED, SIGNAL, NOISE = "#1c1f23", "#5c6570", "#2563eb", "#b9c0c8"


@dataclass(frozen=True)
class View:
    """Conversion of a model's states to images for display."""

    image: Callable[[Tensor], Tensor] = to_uint8
    """(C, H, W) float32 to an image, uint8."""
    words: str = ""
    """Suffix of the titles."""


@dataclass(frozen=True)
class Forward:
    """An image in the forward process at K time steps."""

    steps: list[int]
    alpha_bars: list[float]
    images: Tensor
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with one ε for all: (K, C, H, W) float32."""


@dataclass(frozen=True)
class TrainingStep:
    """One image in a training step; all tensors are (C, H, W) float32."""

    step: int
    alpha_bar: float
    image: Tensor
    noise: Tensor
    mixture: Tensor
    predicted: Tensor
    """Predicted noise, for any prediction type."""

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
    """K steps of a reverse process."""

    numbers: list[int]
    """Numbers of the steps, from 1."""
    total: int
    """Number of steps of the sampler."""
    steps: list[float]
    """Time steps t, falling."""
    images: Tensor
    """x_t: (K, C, H, W) float32."""
    estimates: Tensor
    """Estimates of the image: (K, C, H, W) float32."""
    result: Tensor
    """(C, H, W) float32."""


def explain(model: Model, image: Tensor, output: Path, seed: int = 0) -> list[Path]:
    """Draw figures of how ``model`` works into folder ``output``; ``image``: a real image, (C, H, W) uint8."""
    match model:
        case DiffusionModel():
            return explain_diffusion(model, image, output, seed)
        case VAEModel():
            path = output / "reconstruction.png"
            sheet = above(image[None], reconstructed(model, image[None], sampling_config()), scale=4)
        case GANModel():
            path = output / "way.png"
            conditions = [Conditions(labels=(name,)) for name in model.classes] or [Conditions()]
            config = sampling_config(compute_batch=INTERPOLATED)
            rows = [interpolate(model, seed, seed + 1, INTERPOLATED, config, conditions=each) for each in conditions]
            sheet = grid(torch.cat(rows), columns=INTERPOLATED)
        case AutoregressiveModel():
            path = output / "surprise.png"
            with torch.inference_mode():
                bits = bits_of_pixels(model.network, to_float(image[None]), {}) / image.shape[0]
            shown = (bits / MOST_BITS * 255).clamp(0, 255).to(torch.uint8)[:, None].expand(-1, len(image), -1, -1)
            sheet = above(image[None], shown, scale=8)
        case _:
            raise TypeError(type(model))
    save_png(path, sheet)
    return [path]


def explain_diffusion(model: DiffusionModel, image: Tensor, output: Path, seed: int = 0) -> list[Path]:
    """Draw ``forward.png``, ``training_step.png`` and ``reverse.png`` into folder ``output``.

    ``image``: a real one, (C, H, W) uint8, of the model's shape; UserError if it is another. All noise
    comes from ``seed``.
    """
    if tuple(image.shape) != model.shape:
        theirs, ours = ("×".join(map(str, shape)) for shape in (image.shape, model.shape))
        raise UserError(
            f"the image is {theirs} and the model generates {ours} (channels × height × width): "
            "take one from the data set that the model was trained on"
        )
    x0, conditioning = model.encoded(to_float(image)[None])[0], task_of(model.config).conditioning(image[None]) or None
    noise = GaussianNoise(seed, "explain", [0], model.noise_shape)()[0]
    view = view_of(model)
    figures = {
        "forward.png": draw_forward(forward(model.schedule, x0, noise), model.schedule, view),
        "training_step.png": draw_training_step(training_step(model, x0, noise, conditioning), view),
        "reverse.png": draw_reverse(reverse(model, seed, conditioning), view),
    }
    for name, figure in figures.items():
        write_bytes(output / name, figure_png(figure))
    return [output / name for name in figures]


def reverse_process_strip(model: DiffusionModel, conditioning: Conditioning | None) -> Image.Image:
    """The reverse process from image 0 of seed 0, as ``explain`` draws it; ``conditioning`` as in ``reverse``."""
    return Image.open(io.BytesIO(figure_png(draw_reverse(reverse(model, 0, conditioning), view_of(model)))))


def view_of(model: DiffusionModel) -> View:
    """Make the view of ``model``: latents are shown decoded, however noisy."""
    if model.latents is None:
        return View()
    return View(lambda x: to_uint8(model.decoded(x[None]))[0], " (in latents: shown decoded)")


def forward(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, count: int = FRAMES) -> Forward:
    """Mix ``x0``, (C, H, W) in [−1, 1], with ``noise`` at ``count`` time steps spread evenly from 0 to T−1."""
    t = torch.linspace(0, schedule.steps - 1, count).round().long()
    images = schedule.q_sample(x0.expand(count, -1, -1, -1), t, noise.expand(count, -1, -1, -1))
    return Forward(t.tolist(), schedule.alphas_cumprod[t].tolist(), images)


@torch.inference_mode()
def training_step(
    model: DiffusionModel, x0: Tensor, noise: Tensor, conditioning: Conditioning | None = None
) -> TrainingStep:
    """Run one step on ``x0``, (C, H, W) in [−1, 1], at the time with equal weights of image and noise."""
    schedule = model.schedule
    t = (schedule.alphas_cumprod - 0.5).abs().argmin()
    sigma = schedule.sigmas[t].float()
    x = x0 + sigma * noise
    estimate = replace(model.denoiser(conditioning), clip=False)(x[None], sigma)[0]
    return TrainingStep(
        step=int(t),
        alpha_bar=schedule.alphas_cumprod[t].item(),
        image=x0,
        noise=noise,
        mixture=schedule.q_sample(x0[None], t[None], noise[None])[0],
        predicted=(x - estimate) / sigma,
    )


@torch.inference_mode()
def reverse(model: DiffusionModel, seed: int, conditioning: Conditioning | None = None, count: int = FRAMES) -> Reverse:
    """Record the default sampler on image 0 of ``seed`` at up to ``count`` steps spread evenly in time t.

    ``conditioning`` None: as for any generated image.
    """
    sigmas = model.schedule.sigma_grid(REVERSE_STEPS)
    denoiser = model.denoiser(make_conditioning(model, [0], seed) if conditioning is None else conditioning)
    noise = GaussianNoise(seed, "sampling", [0], model.noise_shape)
    seen: list[tuple[Tensor, Tensor]] = []
    result = sampling_config().run(denoiser, sigmas, noise, lambda i, x, x0_hat: seen.append((x, x0_hat)))
    times = model.schedule.time(sigmas[:-1])
    targets = torch.linspace(float(times[0]), float(times[-1]), count)
    chosen = torch.unique((times - targets[:, None]).abs().argmin(1))
    # The sampler's x is x_0 + σ ε; times √ᾱ = 1/√(1 + σ²) it is the forward process' x_t.
    scale = (1 + sigmas[chosen] ** 2).sqrt().float()[:, None, None, None]
    return Reverse(
        numbers=(chosen + 1).tolist(),
        total=len(seen),
        steps=times[chosen].tolist(),
        images=torch.cat([seen[i][0] for i in chosen]) / scale,
        estimates=torch.cat([seen[i][1] for i in chosen]),
        result=result[0],
    )


def draw_forward(frames: Forward, schedule: NoiseSchedule, view: View) -> Figure:
    """Plot the images above a curve of ᾱ, each at its time step."""
    figure = Figure(figsize=(12.0, 4.9), facecolor="#ffffff")
    formula = r"$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$"
    _title(figure, f"The forward process: an image turns into noise{view.words}", formula)
    count, last = len(frames.steps), schedule.steps - 1
    left, width = 0.055, 0.103
    pitch = (0.985 - left - width) / (count - 1)
    for number, (step, alpha_bar) in enumerate(zip(frames.steps, frames.alpha_bars, strict=True)):
        axes = figure.add_axes((left + number * pitch, 0.56, width, 0.26))
        _show(axes, view.image(frames.images[number]))
        _caption(axes, f"$t$ = {step}", rf"$\bar\alpha$ {_share(alpha_bar)}")
    curve = figure.add_axes((left, 0.13, (count - 1) * pitch + width, 0.27))
    _alpha_bar_curve(curve, frames, schedule)
    margin = width / 2 / pitch * last / (count - 1)
    curve.set_xlim(-margin, last + margin)
    return figure


def _alpha_bar_curve(axes: Axes, frames: Forward, schedule: NoiseSchedule) -> None:
    alpha_bars = schedule.alphas_cumprod.numpy()
    t = np.arange(schedule.steps)
    axes.fill_between(t, alpha_bars, color=SIGNAL, alpha=0.15, linewidth=0)
    axes.fill_between(t, alpha_bars, 1, color=NOISE, alpha=0.35, linewidth=0)
    axes.plot(t, alpha_bars, color=SIGNAL, linewidth=2)
    axes.plot(frames.steps, frames.alpha_bars, "o", color=SIGNAL, markersize=6, clip_on=False, zorder=3)
    axes.set_ylim(0, 1)
    axes.set_xticks(frames.steps)
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("time step $t$", color=MUTED, fontsize=10.5)
    axes.set_ylabel(r"$\bar\alpha$", color=MUTED, fontsize=13, rotation=0, labelpad=10)
    half = int(np.abs(alpha_bars - 0.5).argmin())
    axes.text(half / 2, 0.18, r"image: $\bar\alpha$ of the variance", color=SIGNAL, fontsize=10.5, ha="center")
    axes.text((half + schedule.steps) / 2, 0.74, r"noise: $1 - \bar\alpha$", color=MUTED, fontsize=10.5, ha="center")


def draw_training_step(step: TrainingStep, view: View) -> Figure:
    """Plot a training step as an equation of five panels."""
    figure = Figure(figsize=(12.0, 4.0), facecolor="#ffffff")
    about = rf"at $t$ = {step.step}, where $\bar\alpha$ = {step.alpha_bar:.3f}: image and noise weigh the same"
    _title(figure, f"One step of training: tell the noise from the image{view.words}", about)
    signal, spread = step.alpha_bar**0.5, (1 - step.alpha_bar) ** 0.5
    panels = [
        (view.image(step.image), "image $x_0$", f"from the data set, × {signal:.3f}", ""),
        (_noise_image(step.noise), r"noise $\varepsilon$", f"sampled, × {spread:.3f}", "+"),
        (view.image(step.mixture), "mixture $x_t$", "all that the network sees", "="),
        (_noise_image(step.predicted), r"predicted noise $\hat\varepsilon$", "the network's answer", "→"),
        (_noise_image(step.difference), r"$\hat\varepsilon - \varepsilon$", "what it got wrong", "−ε ="),
    ]
    width, gap = 0.15, 0.05
    left = (1 - 5 * width - 4 * gap) / 2
    for number, (pixels, name, about, sign) in enumerate(panels):
        start = left + number * (width + gap)
        axes = figure.add_axes((start, 0.3, width, 0.45))
        _show(axes, pixels)
        _caption(axes, name, about)
        figure.text(start - gap / 2, 0.525, sign, color=INK, fontsize=13, ha="center", va="center")
    loss = rf"loss = mean of $(\hat\varepsilon - \varepsilon)^2$ = {step.loss:.2g}"
    figure.text(0.5, 0.085, loss, color=INK, fontsize=12, ha="center")
    of_which = "" if len(step.noise) in (1, 3) else ", the first channels of it"
    shown = f"It is 1 for a network that answers 0. Noise is shown from −{NOISE_RANGE:g} to {NOISE_RANGE:g}{of_which}."
    figure.text(0.5, 0.03, shown, color=MUTED, fontsize=9.5, ha="center")
    return figure


def draw_reverse(frames: Reverse, view: View) -> Figure:
    """Plot the states above the estimates of the image, and the result at the end."""
    figure = Figure(figsize=(12.0, 4.3), facecolor="#ffffff")
    about = f"{frames.total} steps; each moves towards the model's estimate of the image, then asks again"
    _title(figure, f"The reverse process: noise turns into an image{view.words}", about)
    count = len(frames.numbers) + 1
    left, width = 0.085, 0.092
    pitch = (0.985 - left - width) / (count - 1)
    for number, (step, t) in enumerate(zip(frames.numbers, frames.steps, strict=True)):
        start = left + number * pitch
        _show(figure.add_axes((start, 0.5, width, 0.29)), view.image(frames.images[number]))
        below = figure.add_axes((start, 0.17, width, 0.29))
        _show(below, view.image(frames.estimates[number]))
        _caption(below, f"step {step}", f"$t$ = {t:.0f}")
    end = figure.add_axes((left + (count - 1) * pitch, 0.335, width, 0.29))
    _show(end, view.image(frames.result))
    _caption(end, "image", "")
    for height, name in (0.645, "$x_t$"), (0.315, "estimate\nof $x_0$"):
        figure.text(left - 0.012, height, name, color=INK, fontsize=11, ha="right", va="center")
    return figure


def _title(figure: Figure, title: str, about: str) -> None:
    figure.text(0.5, 0.94, title, color=INK, fontsize=15, fontweight="bold", ha="center", va="center")
    figure.text(0.5, 0.865, about, color=MUTED, fontsize=11, ha="center", va="center")


def _show(axes: Axes, pixels: Tensor) -> None:
    axes.imshow(pixels.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d5d9de")


def _caption(axes: Axes, first: str, second: str) -> None:
    for text, below, colour, size in (first, 17, INK, 10.5), (second, 33, MUTED, 9.5):
        axes.annotate(
            text,
            (0.5, 0),
            xycoords="axes fraction",
            xytext=(0, -below),
            textcoords="offset points",
            color=colour,
            fontsize=size,
            ha="center",
            va="baseline",
        )


def _noise_image(noise: Tensor) -> Tensor:
    # The first channels of latents, as many as an image can show.
    return to_uint8(noise[: 3 if len(noise) >= 3 else 1] / NOISE_RANGE)


def _share(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"
