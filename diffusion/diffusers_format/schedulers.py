"""Diffusers' schedulers that are equivalent to Darkroom's samplers (tests compare them step for step)."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.diffusers_format.network import draws_with_learned_variance
from diffusion.families.ddpm import DiffusionModel
from diffusion.process.samplers import DPMSolverSDESampling, EulerSampling, HeunSampling, SamplingConfig
from diffusion.process.schedules import NoiseSchedule

WHOLE = (DDPMScheduler, DDIMScheduler)
"""Schedulers limited to integral times."""
IN_SIGMA = (EulerDiscreteScheduler, HeunDiscreteScheduler)
"""Schedulers whose state is x_0 + σ ε, as in Darkroom; that of the others is x_t."""
SUPPORTED = (*WHOLE, *IN_SIGMA, DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler)


def scheduler_of(model: DiffusionModel, sampling: SamplingConfig) -> SchedulerMixin:
    """Make the scheduler that takes the steps of ``sampling`` on the schedule of ``model``, whose network says x̂_0.

    In a pipeline of diffusers' own it visits the same noise levels, to the next whole time; DDPM's and DDIM's are
    theirs. Raises UserError if diffusers has none.
    """
    if isinstance(sampling, EulerSampling | HeunSampling) and sampling.churn is not None:
        raise UserError(
            "schedulers of diffusers keep no sampling.churn: leave it out, or use dpmpp_2m_sde, whose noise is fresh"
        )
    if isinstance(sampling, DPMSolverSDESampling) and sampling.eta != 1:
        raise UserError(
            f"diffusers samples dpmpp_2m_sde with all noise fresh, not with sampling.eta = {sampling.eta:g}: leave it "
            "out, or use sampling.sampler=dpmpp_2m for none"
        )
    if sampling.sampler in ("ddpm", "ddim") and sampling.steps > model.schedule.steps:
        raise UserError(
            f"in diffusers {sampling.sampler} visits whole times, of which there are {model.schedule.steps}, and "
            f"sampling.steps = {sampling.steps}: lower it"
        )
    alpha_bar = model.schedule.alphas_cumprod
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    shared: dict[str, Any] = {
        "num_train_timesteps": model.schedule.steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    learned = model.config.learned_variance and draws_with_learned_variance(sampling)
    variance = "learned_range" if learned else getattr(sampling, "variance", None) or "fixed_small"
    order = getattr(sampling, "order", None)
    karras = {"use_karras_sigmas": True}
    to_zero = karras | {"final_sigmas_type": "zero"}
    kinds: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
        "ddpm": (DDPMScheduler, {"variance_type": variance, "clip_sample": False}),
        "ddim": (DDIMScheduler, {"clip_sample": False}),
        "euler": (EulerDiscreteScheduler, karras),
        "heun": (HeunDiscreteScheduler, karras),
        "dpmpp_2m": (DPMSolverMultistepScheduler, to_zero),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, to_zero | {"algorithm_type": "sde-dpmsolver++"}),
        "deis": (DEISMultistepScheduler, karras | {"solver_order": order, "lower_order_final": False}),
        "unipc": (UniPCMultistepScheduler, to_zero | {"solver_order": order, "solver_type": "bh2"}),
    }
    kind, options = kinds[sampling.sampler]
    scheduler = kind(**shared, **options)
    if not isinstance(scheduler, WHOLE):
        levels = sampling.sigma_grid(model.schedule)
        # Not among its arguments, but it looks there when it lays out levels as Karras et al. do.
        scheduler.register_to_config(sigma_max=float(levels[0]), sigma_min=float(levels[-2]))
    return scheduler


def visited(scheduler: SchedulerMixin, schedule: NoiseSchedule, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Set the noise levels of ``config`` in ``scheduler``; returns its times, and σ at each as float64.

    DDPM and DDIM keep their own integral times, which equal Darkroom's if all steps of the schedule are used.
    """
    scheduler.set_timesteps(config.steps)
    if isinstance(scheduler, WHOLE):
        return scheduler.timesteps, schedule.sigma(scheduler.timesteps)
    sigmas = config.sigma_grid(schedule)
    if isinstance(scheduler, DEISMultistepScheduler):
        sigmas[-1] = sigmas[-2]  # it cannot go to 0
    if isinstance(scheduler, HeunDiscreteScheduler):  # which evaluates twice at each level but the first
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = sigmas[:-1]
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), schedule.time(levels)
    # By number, as two levels may have one time.
    scheduler.set_begin_index(0)
    return scheduler.timesteps, levels
