"""Pictures from a trained model, the same bits for picture i of seed s whatever else is asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.device import repeatable, resolve_device
from diffusion.fingerprint import autocast
from diffusion.lanes import lanes
from diffusion.model import DiffusionModel, to_uint8
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise, uniform
from diffusion.samplers import Callback, Noise, ancestral, make_sampler, sigma_grid


def sample(
    model: DiffusionModel,
    indices: Sequence[int],
    seed: int,
    config: SamplingConfig,
    progress: Progress = silent,
) -> Tensor:
    """Draw the pictures number ``indices`` of ``seed``, as (len(indices), C, H, W) uint8.

    Picture i is always computed as member i mod B of the compute batch i div B (B = ``config.compute_batch``),
    with its neighbours beside it, because floating-point sums change with a batch's shape. So asking for
    whole multiples of B, starting at one, costs nothing extra.
    """
    size = config.compute_batch
    batches = [range(b * size, (b + 1) * size) for b in sorted({index // size for index in indices})]
    drawn: dict[int, Tensor] = {}
    device = resolve_device(config.device)
    model = model.on(device)
    # A GPU shares its work out by itself.
    with repeatable(device), lanes(None if device.type == "cpu" else 1) as pool:
        finished = pool.map(lambda members: _sample_batch(model, members, seed, config, device), batches)
        for number, (members, pictures) in enumerate(zip(batches, finished, strict=True), start=1):
            drawn |= zip(members, pictures, strict=True)
            progress("pictures sampled", min(number * size, len(indices)), len(indices))
    return torch.stack([drawn[index] for index in indices])


def labels_of(model: DiffusionModel, indices: Sequence[int], seed: int) -> Tensor | None:
    """The class of each picture, drawn as often as the data set has it: numbers in ``model.classes``, (N,).

    None for a model without classes.
    """
    if not model.classes:
        return None
    counts = torch.tensor([model.header.class_histogram[label] for label in model.classes])
    shares = counts.cumsum(0).double() / counts.sum()
    return torch.searchsorted(shares, uniform(seed, "label", indices), right=True)


def reversed_from_noise(
    denoiser: Denoiser, sigmas: Tensor, noise: Noise, config: SamplingConfig, callback: Callback | None = None
) -> Tensor:
    """The reverse process over ``sigmas``, from noise alone, with the sampler that ``config`` names."""
    start = float(sigmas[0]) * noise()
    if config.sampler == "ddpm" and config.variance is None and denoiser.learned_variance:
        return ancestral(denoiser.posterior, start, sigmas, noise, callback)
    return make_sampler(config)(denoiser, start, sigmas, noise, callback)


@torch.inference_mode()
def _sample_batch(
    model: DiffusionModel, members: range, seed: int, config: SamplingConfig, device: torch.device
) -> Tensor:
    draws = GaussianNoise(seed, "sampling", members, model.shape)

    def noise() -> Tensor:
        return draws().to(device)

    sigmas = sigma_grid(model.schedule, config.steps)
    labels = labels_of(model, members, seed)
    denoiser = model.denoiser(None if labels is None else labels.to(device))
    with autocast(config.precision, device):
        pictures = reversed_from_noise(denoiser, sigmas, noise, config)
    return to_uint8(pictures).cpu()
