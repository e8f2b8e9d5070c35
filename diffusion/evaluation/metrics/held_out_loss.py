"""Loss and bits per dimension on held-out images: means of their likelihood ``terms``."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.common.fingerprint import autocast
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset, Rows
from diffusion.families.model import Conditioning, Model, to_float
from diffusion.families.text_encoder import stack_encodings
from diffusion.generation.config import Conditions
from diffusion.generation.generate import encode_prompts
from diffusion.generation.super_resolution import task_of
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import SamplingConfig


class LevelLoss(Config):
    """Mean loss in an interval of noise levels."""

    sigma_low: float
    sigma_high: float
    """Ends of the interval: noise over signal."""
    loss: float
    """Mean squared error of the clean image, weighted by 1/σ² + 1/σ_data² (EDM's λ, arXiv 2206.00364): 1, at every
    level, for the best denoiser of Gaussian values of that deviation, and less for a model of images."""
    loss_se: float
    """Standard error over images."""


class HeldOutLoss(Config):
    """Loss and likelihood of a model on held-out images."""

    images: int
    levels: list[LevelLoss]
    """Intervals from the least noise to the most; empty if the model does not denoise."""
    loss: float | None
    """Mean over the levels; None if there are none."""
    loss_se: float | None
    """Standard error over images."""
    bits_per_dim: float | None
    """−log₂ p of a held-out image, or an upper bound on it (``Kind.likelihood``), over the number of its values; lower
    is better. Conditional on class, caption or small version if the model is. None: the model has no likelihood, or
    works on latents, whose likelihood gives no bound for images."""
    bits_per_dim_se: float | None
    """Standard error over images."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        figures = {"held_out_loss": self.loss, "held_out_loss_se": self.loss_se}
        figures |= {"bits_per_dim": self.bits_per_dim, "bits_per_dim_se": self.bits_per_dim_se}
        return {name: value for name, value in figures.items() if value is not None}


def summarize_losses(terms: Terms) -> HeldOutLoss:
    """Compute means and standard errors of ``terms`` of two or more images."""
    intervals = zip(pairwise(terms.edges.tolist()), map(_mean, terms.losses.unbind(1)), strict=True)
    levels = [
        LevelLoss(sigma_low=low, sigma_high=high, loss=loss, loss_se=error) for (low, high), (loss, error) in intervals
    ]
    loss, loss_se = _mean(terms.losses.mean(1)) if levels else (None, None)
    bits, bits_se = (None, None) if terms.bits is None else _mean(terms.bits)
    return HeldOutLoss(
        images=len(terms.losses), levels=levels, loss=loss, loss_se=loss_se, bits_per_dim=bits, bits_per_dim_se=bits_se
    )


def measure_losses(
    model: Model,
    pieces: Iterable[tuple[Tensor, Conditioning]],
    config: SamplingConfig,
    progress: Progress = ignore_progress,
) -> Terms:
    """Compute the likelihood terms of images, (N, C, H, W) uint8, which come in ``pieces`` with their conditioning.

    Computed as ``config`` says. Noise depends on the image number: two models get the same for the same images.
    """
    device = resolve_device(config.device)
    model = model.to(device)
    terms: list[Terms] = []
    count = 0

    def score(images: Tensor, conditioning: Conditioning, offset: int, start: int) -> Terms:
        # The last batch is padded with its last image, so that all have one shape.
        n = min(config.compute_batch, len(images) - start)
        places = start + torch.arange(config.compute_batch).clamp(max=n - 1)
        batch_conditioning = {name: value[places].to(device) for name, value in conditioning.items()}
        x0 = to_float(images[places]).to(device)
        with torch.inference_mode(), autocast(config.precision, device):
            result = model.terms(x0, batch_conditioning, [offset + place for place in places.tolist()])
        return Terms(result.edges, result.losses[:n].cpu(), None if result.bits is None else result.bits[:n].cpu())

    with compute_deterministically(device), worker_threads(None if device.type == "cpu" else 1) as pool:
        for images, conditioning in pieces:
            terms += pool.map(partial(score, images, conditioning, count), range(0, len(images), config.compute_batch))
            count += len(images)
            progress("held-out images looked at", count, None)
    bits = [part.bits for part in terms if part.bits is not None]
    return Terms(terms[0].edges, torch.cat([part.losses for part in terms]), torch.cat(bits) if bits else None)


def conditioning_of_rows(model: Model, dataset: Dataset, rows: Rows) -> Conditioning:
    """Return the conditioning of ``model`` for the images in ``rows``; UserError if its text encoder is unavailable."""
    conditioning = task_of(model.config, model.header.size).conditioning(dataset.images(rows))
    if model.classes:
        conditioning["label"] = dataset.classes(rows, model.classes)
    if model.config.text:
        captions = dataset.captions(rows)
        encodings = encode_prompts(model, Conditions(prompts=tuple(captions)))
        conditioning |= stack_encodings(encodings[caption] for caption in captions)
    return conditioning


def _mean(values: Tensor) -> tuple[float, float]:
    """Return mean and standard error of ``values`` (N,)."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
