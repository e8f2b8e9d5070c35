"""The noise schedule of a pipeline's scheduler."""

import math
from dataclasses import replace

from diffusion.common.errors import UserError
from diffusion.families.pretrained.components import build
from diffusion.families.pretrained.pipeline import Pipeline
from diffusion.process.schedules import NoiseSchedule, flow_schedule, make_final_sigma_finite


def make_pipeline_schedule(pipeline: Pipeline) -> NoiseSchedule:
    """Build the noise schedule of a pipeline's scheduler; raises UserError if its levels are not distinct."""
    values, scheduler = math.prod(pipeline.noise_shape), build(pipeline.scheduler)
    if pipeline.prediction == "flow_prediction":
        return flow_schedule(scheduler.config.num_train_timesteps, values)
    alphas = scheduler.alphas_cumprod.double().cpu()
    is_list = alphas.ndim == 1 and len(alphas) > 1
    schedule = NoiseSchedule(alphas, values)
    if is_list and scheduler.config.get("rescale_betas_zero_snr"):
        schedule = replace(make_final_sigma_finite(schedule), zero_terminal_snr=True)
    if not (is_list and (schedule.alphas_cumprod.diff() < 0).all() and schedule.alphas_cumprod[-1] > 0):
        raise UserError(f"the {pipeline.scheduler.kind} has no distinct noise levels: its configuration is damaged")
    return schedule
