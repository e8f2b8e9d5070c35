"""Samplers with their options."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.samplers import SamplingConfig, sampling_config

DETERMINISTIC = (
    sampling_config(sampler="ddim"),
    sampling_config(sampler="euler"),
    sampling_config(sampler="heun"),
    sampling_config(sampler="dpmpp_2m"),
    sampling_config(sampler="deis"),
    sampling_config(sampler="deis", order=2),
    sampling_config(sampler="unipc"),
    sampling_config(sampler="unipc", order=3),
)

STOCHASTIC = (
    sampling_config(sampler="ddpm"),
    sampling_config(sampler="ddpm", variance="fixed_large"),
    sampling_config(sampler="ddim", eta=0.5),
    sampling_config(sampler="ddim", eta=1),
    sampling_config(sampler="dpmpp_2m_sde", eta=0.5),
    sampling_config(sampler="dpmpp_2m_sde"),
    sampling_config(sampler="euler", churn={"amount": 10}),
    sampling_config(sampler="heun", churn={"amount": 10, "sigma_min": 0.05, "sigma_max": 50}),
)


def options(config: SamplingConfig) -> str:
    """What is set, to name a test by."""
    fields = config.model_dump(include={"sampler", "variance", "eta", "churn", "order"}, exclude_defaults=True)
    fields = {"sampler": config.sampler} | fields
    return " ".join(f"{name}={value}" if name != "sampler" else value for name, value in fields.items())


def noises(seed: int, count: int, size: int = 4) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, size, size, generator=generator)
