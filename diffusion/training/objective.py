"""Which of the objectives a training configuration names, and which noise levels it draws."""

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.models.config import ModelConfig
from diffusion.objective import Objective, Parametrization, Weight, edm, min_snr, plain, soft_min_snr
from diffusion.process import NoiseSchedule, make_schedule
from diffusion.random import uniform
from diffusion.training.config import TrainingConfig, disagreement


def make_objective(model: ModelConfig, config: TrainingConfig, sigma_data: float) -> Objective:
    """The objective for pictures whose values have the standard deviation ``sigma_data``.

    Raises UserError if model and training do not fit each other.
    """
    if words := disagreement(model, config):
        raise UserError(words)
    parametrization = Parametrization(model.prediction, sigma_data)
    return Objective(make_schedule(model), parametrization, make_weight(config, parametrization))


def make_weight(config: TrainingConfig, parametrization: Parametrization) -> Weight:
    """The weight that ``config`` names."""
    match config.weighting:
        case "plain":
            return plain(parametrization)
        case "min_snr":
            return min_snr(config.gamma)
        case "soft_min_snr":
            return soft_min_snr(parametrization.sigma_data)
        case "edm":
            return edm(parametrization.sigma_data)


def draw_times(config: TrainingConfig, schedule: NoiseSchedule, indices: range) -> Tensor:
    """Times of the pictures number ``indices``, a rank's share of a batch, from 0 to T−1: (N,), whole if uniform."""
    u = uniform(config.seed, "time", indices)
    if config.stratified:
        # One in each equal part of the distribution: free, and the loss varies less from batch to batch.
        place = torch.tensor(indices) % config.batch_size
        u = (place + u) / config.batch_size
    return times_at(config, schedule, u)


def times_at(config: TrainingConfig, schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """The times at the quantiles ``u`` (N,), in [0, 1), of the distribution that ``config`` draws from."""
    if config.times == "uniform":
        return (u * schedule.steps).long().clamp(max=schedule.steps - 1)
    # ln σ is normal (arXiv 2206.00364, table 1).
    mean, std = config.log_sigma
    return schedule.time((mean + std * torch.special.ndtri(u)).exp())
