"""Samplers: pure functions from noise to images over any denoiser, and their configurations.

A sampler is a file beside this module with its function and its configuration, which is imported below: that makes it
available to the command line, ``params.yaml``, requests and the documentation.

All functions share one signature, followed by their own options. ``x`` is σ_max ε, (N, C, H, W); ``sigmas`` falls
from σ_max to 0, (steps + 1,) float64; ``noise`` returns fresh standard Gaussian noise of x's shape at each call
(deterministic samplers never call it). All states are x = x_0 + σ ε, in which DDIM's steps are straight lines (arXiv
2206.00364, appendix C).

With λ = −ln σ the ODE is dx/dλ = x̂_0 − x. The multistep samplers interpolate their last estimates by a polynomial in
λ, and integrate it exactly.

This package loads without torch, for processes that only read configurations.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from diffusion.common.config import OneOf, classes_in
from diffusion.common.errors import UserError

# isort: off
from diffusion.process.samplers.base import COMPUTING as COMPUTING
from diffusion.process.samplers.base import ZERO_SNR as ZERO_SNR
from diffusion.process.samplers.base import BaseSampling as BaseSampling
from diffusion.process.samplers.base import Denoise as Denoise
from diffusion.process.samplers.base import Noise as Noise
from diffusion.process.samplers.base import Sampler as Sampler
from diffusion.process.samplers.base import describe_sampling_error
from diffusion.process.samplers.base import fixed_large as fixed_large
from diffusion.process.samplers.base import fixed_small as fixed_small
from diffusion.process.samplers.ddpm import DDPMSampling as DDPMSampling
from diffusion.process.samplers.ddim import DDIMSampling as DDIMSampling
from diffusion.process.samplers.edm import EulerSampling as EulerSampling
from diffusion.process.samplers.edm import HeunSampling as HeunSampling
from diffusion.process.samplers.dpmpp import DPMSolverSampling as DPMSolverSampling
from diffusion.process.samplers.dpmpp import DPMSolverSDESampling as DPMSolverSDESampling
from diffusion.process.samplers.multistep import DEISSampling as DEISSampling
from diffusion.process.samplers.multistep import UniPCSampling as UniPCSampling
from diffusion.process.samplers.consistency import ConsistencySampling as ConsistencySampling
from diffusion.process.samplers.scheduler import SchedulerSampling as SchedulerSampling
# isort: on

SAMPLERS: tuple[type[BaseSampling], ...] = classes_in(globals(), BaseSampling)
"""The configuration of each sampler."""
SamplingConfig: TypeAlias = Annotated[BaseSampling, OneOf("sampler", SAMPLERS, default="dpmpp_2m_sde")]
"""The section ``sampling`` of a configuration; options of other samplers are unknown keys."""
SAMPLING_ADAPTER: TypeAdapter[SamplingConfig] = TypeAdapter(SamplingConfig)


def sampling_config(**fields: Any) -> SamplingConfig:
    """Make the configuration with these ``fields`` and defaults; raises UserError for invalid options."""
    try:
        return SAMPLING_ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(describe_error(first, first["loc"])) from error


def with_sampler(config: SamplingConfig, sampler: str) -> SamplingConfig:
    """Copy ``config`` with another ``sampler`` and the defaults of its own options."""
    fields = config.model_dump(include=set(BaseSampling.model_fields))
    if "consistency" in (sampler, config.sampler):  # whose few levels are others
        del fields["steps"], fields["sigma_min"]
    if "scheduler" in (sampler, config.sampler):  # whose levels are the pipeline's
        fields = {name: value for name, value in fields.items() if name not in ("sigma_max", "sigma_min")}
    return sampling_config(**fields | {"sampler": sampler})


def describe_error(error: Mapping[str, Any], location: Sequence[int | str]) -> str:
    """Describe pydantic's error at ``location`` in the section ``sampling``, and how to fix it."""
    return describe_sampling_error(error, location, SAMPLERS)
