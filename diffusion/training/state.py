"""The state in which a run begins."""

import torch

from diffusion.models.unet import UNet
from diffusion.training.checkpoint import TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import ExponentialAverage, PowerAverage, WeightAverage
from diffusion.training.ranks import Ranks
from diffusion.training.sharding import shard
from diffusion.training.uncertainty import Uncertainty

BETAS = (0.9, 0.99)
"""Of AdamW. Its own 0.999 remembers more steps than a run of minutes has to give: measured worse."""


def make_state(network: UNet, config: TrainingConfig, ranks: Ranks, device: torch.device) -> TrainingState:
    """The state of a run that has seen nothing; several ``ranks`` each have their share of it."""
    uncertainty = Uncertainty() if config.learned_uncertainty else None
    networks = [network, uncertainty] if uncertainty else [network]
    for each in networks:
        if ranks.count > 1:
            shard(each, device)
        each.to(device)
    trained = [parameter for each in networks for parameter in each.parameters()]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, BETAS, weight_decay=config.weight_decay, fused=True)
    return TrainingState(network, make_averages(network, config), optimizer, uncertainty)


def make_averages(network: UNet, config: TrainingConfig) -> list[WeightAverage]:
    """The averages of the weights that ``config`` asks for; the first is the model."""
    if config.ema_lengths is not None:
        return [PowerAverage(network, length) for length in config.ema_lengths]
    return [ExponentialAverage(network, 0.999 if config.ema_decay is None else config.ema_decay)]
