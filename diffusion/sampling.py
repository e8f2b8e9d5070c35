"""Pictures from a trained model, the same bits for picture i of seed s whatever else is asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.fingerprint import autocast
from diffusion.model import DiffusionModel, to_uint8
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise
from diffusion.samplers import SAMPLERS, sigma_grid


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
    batches = sorted({index // size for index in indices})
    drawn: dict[int, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        members = range(batch * size, (batch + 1) * size)
        drawn |= zip(members, _sample_batch(model, members, seed, config), strict=True)
        progress("pictures sampled", min(number * size, len(indices)), len(indices))
    return torch.stack([drawn[index] for index in indices])


@torch.inference_mode()
def _sample_batch(model: DiffusionModel, members: range, seed: int, config: SamplingConfig) -> Tensor:
    noise = GaussianNoise(seed, "sampling", members, model.shape)
    sigmas = sigma_grid(model.schedule, config.steps)
    with autocast(config.precision):
        pictures = SAMPLERS[config.sampler](model.denoiser(), sigmas[0] * noise(), sigmas, noise)
    return to_uint8(pictures)
