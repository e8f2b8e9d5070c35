"""The reverse process: a sampler runs from noise to an image with any denoiser."""

import torch
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.denoiser import Denoiser
from diffusion.guidance import guided
from diffusion.process import NoiseSchedule
from diffusion.samplers import Callback, Denoise, Noise, ancestral, levels_of, make_sampler


def reversed_from_noise(
    denoise: Denoise, sigmas: Tensor, noise: Noise, config: SamplingConfig, callback: Callback | None = None
) -> Tensor:
    """The reverse process over ``sigmas``, from noise alone, with the sampler that ``config`` names."""
    return reversed_from(float(sigmas[0]) * noise(), denoise, sigmas, noise, config, callback)


def reversed_from(
    x: Tensor,
    denoise: Denoise,
    sigmas: Tensor,
    noise: Noise,
    config: SamplingConfig,
    callback: Callback | None = None,
) -> Tensor:
    """The reverse process over ``sigmas`` from ``x``, which is as noisy as the first of them.

    What is guided, or edited, has no learned variance: it is no one network's answer.
    """
    plain = config.sampler == "ddpm" and config.variance is None
    if plain and isinstance(denoise, Denoiser) and denoise.learned_variance:
        return ancestral(denoise.posterior, x, sigmas, noise, callback)
    return make_sampler(config)(denoise, x, sigmas, noise, callback)


def count_evaluations(config: SamplingConfig, schedule: NoiseSchedule) -> int:
    """Count the evaluations of the network for one image, by running the sampler on a function that only counts."""
    asked = 0

    def count(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return x

    guidance = 1.0 if config.guidance is None else config.guidance
    denoise = guided(count, count, guidance, config.guidance_interval)
    reversed_from_noise(denoise, levels_of(config, schedule), lambda: torch.zeros(1, 1, 1, 1), config)
    return asked
