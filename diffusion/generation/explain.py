"""Figures that explain how a trained model works on a real image."""

import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import figure_png, make_grid, make_paired_grid, save_png
from diffusion.common.random import GaussianNoise
from diffusion.common.shapes import height_and_width
from diffusion.families.autoregressive.model import AutoregressiveModel, bits_of_pixels
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.gan.model import GANModel
from diffusion.families.model import Conditioning, Model, to_float, to_uint8
from diffusion.families.vae.model import VAEModel
from diffusion.generation.config import Conditions
from diffusion.generation.generate import interpolate, make_conditioning, reconstruct_images
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import sampling_config
from diffusion.process.schedules import NoiseSchedule

FRAMES = 8
"""Images in a strip."""
REVERSE_STEPS = 40
"""Steps of the sampler: more than it needs, for an even sequence from noise to image."""
NOISE_RANGE = 3.0
INK, MUTED, SIGNAL, NOISE = "#1c1f23", "#5c6570", "#2563eb", "#b9c0c8"


class ReverseProcess(NamedTuple):
    """K steps of a reverse process."""

    numbers: list[int]
    """Numbers of the steps, from 1, of the sampler's REVERSE_STEPS."""
    steps: list[float]
    """Time steps t, falling."""
    images: Tensor
    """x_t: (K, C, H, W) float32."""
    estimates: Tensor
    """Estimates of the image: (K, C, H, W) float32."""
    result: Tensor
    """(C, H, W) float32."""


def explain(model: Model, image: Tensor, output: Path, seed: int = 0) -> list[Path]:
    """Draw figures of how ``model`` works on ``image``, (C, H, W) uint8; raises UserError if it is of another shape."""
    shapes = [(model.header.channels, *shape) for shape in model.header.trained_shapes]
    if tuple(image.shape) not in shapes:
        actual, *expected = ("×".join(map(str, shape)) for shape in (image.shape, *shapes))
        raise UserError(
            f"the image is {actual} and the model generates {' or '.join(expected)} (channels × height × width): "
            "take one from the data set that the model was trained on"
        )
    model = model.with_size(height_and_width(image))
    match model:
        case DiffusionModel():
            x0 = model.encode(to_float(image)[None])[0]
            noise = GaussianNoise(seed, "explain", [0], model.noise_shape)()[0]
            conditioning = task_of(model.config, model.header.size).conditioning(image[None]) or None
            if model.has_frozen_parts:
                # A pipeline's network is always conditioned: on no prompt, or on a class.
                conditioning = make_conditioning(model, [0], seed) or None
            figures = {
                output / "forward.png": draw_forward(model, x0, noise),
                output / "training_step.png": draw_training_step(model, x0, noise, conditioning),
                output / "reverse.png": draw_reverse(model, reverse(model, seed, conditioning)),
            }
            for path, figure in figures.items():
                write_bytes(path, figure_png(figure))
            return list(figures)
        case VAEModel():
            path = output / "reconstruction.png"
            sheet = make_paired_grid(image[None], reconstruct_images(model, image[None], sampling_config()), scale=4)
        case GANModel():
            path = output / "way.png"
            conditions = [Conditions(labels=(name,)) for name in model.classes] or [Conditions()]
            config = sampling_config(compute_batch=FRAMES)
            rows = [interpolate(model, seed, seed + 1, FRAMES, config, conditions=label) for label in conditions]
            sheet = make_grid(torch.cat(rows), columns=FRAMES)
        case AutoregressiveModel():
            path = output / "surprise.png"
            with torch.inference_mode():
                bits = bits_of_pixels(model.network, to_float(image[None]), {}) / image.shape[0]
            # Eight bits per value are white.
            surprise = (bits / 8 * 255).clamp(0, 255).to(torch.uint8)[:, None].expand(-1, len(image), -1, -1)
            sheet = make_paired_grid(image[None], surprise, scale=8)
        case _:
            raise UserError(f"there are no figures of models of the family {model.config.family}")
    save_png(path, sheet)
    return [path]


def reverse_process_strip(model: Model, conditioning: Conditioning | None) -> Image.Image:
    """The reverse process from image 0 of seed 0, as ``explain`` draws it; ``conditioning`` as in ``reverse``."""
    assert isinstance(model, DiffusionModel)
    return Image.open(io.BytesIO(figure_png(draw_reverse(model, reverse(model, 0, conditioning)))))


def forward(schedule: NoiseSchedule, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mix ``x0``, (C, H, W), with one ``noise`` at FRAMES even time steps: t, (FRAMES,), and x_t, (FRAMES, C, H, W)."""
    t = torch.linspace(0, schedule.steps - 1, FRAMES).round().long()
    return t, schedule.q_sample(x0.expand(FRAMES, -1, -1, -1), t, noise.expand(FRAMES, -1, -1, -1))


@torch.inference_mode()
def training_step(
    model: DiffusionModel, x0: Tensor, noise: Tensor, conditioning: Conditioning | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step on ``x0``, (C, H, W), where image and noise weigh the same: t, x_t and the predicted noise."""
    schedule = model.schedule
    t = (schedule.alphas_cumprod - 0.5).abs().argmin()
    sigma = schedule.sigmas[t].float()
    x = x0 + sigma * noise
    prediction = (x - replace(model.denoiser(conditioning), clip=False)(x[None], sigma)[0]) / sigma
    return t, schedule.q_sample(x0[None], t[None], noise[None])[0], prediction


@torch.inference_mode()
def reverse(model: DiffusionModel, seed: int, conditioning: Conditioning | None = None) -> ReverseProcess:
    """Record the default sampler on image 0 of ``seed`` at up to FRAMES steps spread evenly in time t."""
    sigmas = model.schedule.sigma_grid(REVERSE_STEPS)
    conditioning = make_conditioning(model, [0], seed) if conditioning is None else conditioning
    denoiser = model.denoiser(conditioning)
    pairs: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        pairs.append((x, denoiser(x, sigma)))
        return pairs[-1][1]

    noise = GaussianNoise(seed, "sampling", [0], model.noise_shape)
    result = sampling_config().run(denoise, sigmas, noise, model.start(conditioning))
    times = model.schedule.time(sigmas[:-1])
    targets = torch.linspace(float(times[0]), float(times[-1]), FRAMES)
    indices = torch.unique((times - targets[:, None]).abs().argmin(1))
    # The sampler's x is x_0 + σ ε; times √ᾱ = 1/√(1 + σ²) it is the forward process' x_t.
    scale = (1 + sigmas[indices] ** 2).sqrt().float()[:, None, None, None]
    return ReverseProcess(
        numbers=(indices + 1).tolist(),
        steps=times[indices].tolist(),
        images=torch.cat([pairs[i][0] for i in indices]) / scale,
        estimates=torch.cat([pairs[i][1] for i in indices]),
        result=result[0],
    )


def draw_forward(model: DiffusionModel, x0: Tensor, noise: Tensor) -> Figure:
    """Plot the images of ``forward`` above a curve of ᾱ, each at its time step."""
    steps, images = forward(model.schedule, x0, noise)
    alpha_bars, last_step = model.schedule.alphas_cumprod.numpy(), model.schedule.steps - 1
    formula = r"$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$"
    figure = _figure(model, 4.9, "The forward process: an image turns into noise", formula)
    columns = figure.add_gridspec(2, FRAMES, left=0.05, right=0.99, bottom=0.13, top=0.8, hspace=0.65)
    for number, (step, image) in enumerate(zip(steps.tolist(), images, strict=True)):
        share = f"= {alpha_bars[step]:.3f}" if alpha_bars[step] >= 0.001 else "< 0.001"
        _panel(figure, columns[0, number], _decode(model, image), f"$t$ = {step}", rf"$\bar\alpha$ {share}")
    axes, t = figure.add_subplot(columns[1, :]), np.arange(last_step + 1)
    axes.fill_between(t, alpha_bars, color=SIGNAL, alpha=0.15, linewidth=0)
    axes.fill_between(t, alpha_bars, 1, color=NOISE, alpha=0.35, linewidth=0)
    axes.plot(t, alpha_bars, color=SIGNAL, linewidth=2)
    axes.plot(steps, alpha_bars[steps], "o", color=SIGNAL, markersize=6, clip_on=False, zorder=3)
    margin = 0.42 * last_step / (FRAMES - 1)
    axes.set(xlim=(-margin, last_step + margin), ylim=(0, 1), xticks=steps.tolist(), yticks=[0, 0.5, 1])
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("time step $t$", color=MUTED, fontsize=10.5)
    axes.set_ylabel(r"$\bar\alpha$", color=MUTED, fontsize=13, rotation=0, labelpad=10)
    middle = int(np.abs(alpha_bars - 0.5).argmin())
    axes.text(middle / 2, 0.18, r"image: $\bar\alpha$ of the variance", color=SIGNAL, fontsize=10.5, ha="center")
    axes.text((middle + last_step + 1) / 2, 0.74, r"noise: $1 - \bar\alpha$", color=MUTED, fontsize=10.5, ha="center")
    return figure


def draw_training_step(
    model: DiffusionModel, x0: Tensor, noise: Tensor, conditioning: Conditioning | None = None
) -> Figure:
    """Plot ``training_step`` as an equation of five panels."""
    t, mixture, prediction = training_step(model, x0, noise, conditioning)
    alpha_bar = model.schedule.alphas_cumprod[t].item()
    subtitle = rf"at $t$ = {t}, where $\bar\alpha$ = {alpha_bar:.3f}: image and noise weigh the same"
    figure = _figure(model, 4.0, "One step of training: tell the noise from the image", subtitle)
    # The first channels of latents, as many as an image can show.
    target, answer, difference = (
        to_uint8(tensor[: 3 if len(tensor) >= 3 else 1] / NOISE_RANGE)
        for tensor in (noise, prediction, prediction - noise)
    )
    panels = [
        (_decode(model, x0), "image $x_0$", f"from the data set, × {alpha_bar**0.5:.3f}", ""),
        (target, r"noise $\varepsilon$", f"sampled, × {(1 - alpha_bar) ** 0.5:.3f}", "+"),
        (_decode(model, mixture), "mixture $x_t$", "all that the network sees", "="),
        (answer, r"predicted noise $\hat\varepsilon$", "the network's answer", "→"),
        (difference, r"$\hat\varepsilon - \varepsilon$", "what it got wrong", "−ε ="),
    ]
    columns = figure.add_gridspec(1, 5, left=0.02, right=0.98, bottom=0.3, top=0.76, wspace=0.3)
    for number, (pixels, name, caption, sign) in enumerate(panels):
        axes = _panel(figure, columns[number], pixels, name, caption)
        axes.text(-0.15, 0.5, sign, color=INK, fontsize=13, ha="center", va="center", transform=axes.transAxes)
    # DDPM's simple loss (arXiv 2006.11239, equation 14).
    loss = rf"loss = mean of $(\hat\varepsilon - \varepsilon)^2$ = {(prediction - noise).square().mean():.2g}"
    figure.text(0.5, 0.085, loss, color=INK, fontsize=12, ha="center")
    note = "" if len(noise) in (1, 3) else ", the first channels of it"
    legend = f"It is 1 for a network that answers 0. Noise is shown from −{NOISE_RANGE:g} to {NOISE_RANGE:g}{note}."
    figure.text(0.5, 0.03, legend, color=MUTED, fontsize=9.5, ha="center")
    return figure


def draw_reverse(model: DiffusionModel, frames: ReverseProcess) -> Figure:
    """Plot the states above the estimates of the image, and the result at the end."""
    subtitle = f"{REVERSE_STEPS} steps; each moves towards the model's estimate of the image, then asks again"
    figure = _figure(model, 4.3, "The reverse process: noise turns into an image", subtitle)
    columns = figure.add_gridspec(2, len(frames.numbers) + 1, left=0.08, right=0.99, bottom=0.16, top=0.8, wspace=0.1)
    for number, (step, t) in enumerate(zip(frames.numbers, frames.steps, strict=True)):
        state = _panel(figure, columns[0, number], _decode(model, frames.images[number]))
        estimate = _decode(model, frames.estimates[number])
        panel = _panel(figure, columns[1, number], estimate, f"step {step}", f"$t$ = {t:.0f}")
        if number == 0:
            for axes, name in (state, "$x_t$"), (panel, "estimate\nof $x_0$"):
                axes.set_ylabel(name, color=INK, fontsize=11, rotation=0, ha="right", va="center")
    _panel(figure, columns[:, -1], _decode(model, frames.result), "image")
    return figure


def _decode(model: DiffusionModel, x: Tensor) -> Tensor:
    """Show a state or an estimate as an image: latents are decoded, however noisy."""
    return to_uint8(model.decode(x[None]))[0]


def _figure(model: DiffusionModel, height: float, title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(12.0, height), facecolor="#ffffff")
    title += "" if model.latents is None else " (in latents: shown decoded)"
    figure.text(0.5, 0.94, title, color=INK, fontsize=15, fontweight="bold", ha="center", va="center")
    figure.text(0.5, 0.865, subtitle, color=MUTED, fontsize=11, ha="center", va="center")
    return figure


def _panel(figure: Figure, place: SubplotSpec, pixels: Tensor, title: str = "", subtitle: str = "") -> Axes:
    """Show ``pixels``, (C, H, W) uint8, above two lines of text."""
    axes = figure.add_subplot(place, xticks=[], yticks=[])
    axes.imshow(pixels.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.spines[:].set_color("#d5d9de")
    for text, offset, colour, size in (title, 17, INK, 10.5), (subtitle, 33, MUTED, 9.5):
        axes.annotate(
            text, (0.5, 0), (0, -offset), "axes fraction", "offset points", color=colour, fontsize=size, ha="center"
        )
    return axes
