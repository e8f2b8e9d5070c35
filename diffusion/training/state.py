"""The state in which a run begins."""

import torch
from torch import Tensor, nn

from diffusion.checkpoints import AUTOENCODER
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.families import family_of
from diffusion.families.base import Learner
from diffusion.models.config import FamilyConfig
from diffusion.models.unet import UNet
from diffusion.training.checkpoint import Opponent, TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import ExponentialAverage, PowerAverage, WeightAverage
from diffusion.training.first_stage import FirstStage
from diffusion.training.ranks import Ranks
from diffusion.training.sharding import shard
from diffusion.training.uncertainty import Uncertainty
from diffusion.upscaling import detail

LEAST_DEVIATION = 1e-4
"""Of values in [−1, 1], far below a level of 8 bits: what differs by less does not differ."""
LOOKED_AT = 1024
"""Pictures, at most, that say what there is beyond small ones."""


def make_network(
    model: FamilyConfig, dataset: Dataset, classes: list[str], first_stage: FirstStage | None, recompute: bool = False
) -> nn.Module:
    """A network of ``model`` for ``dataset`` with random weights; ``recompute`` as in TrainingConfig."""
    network: nn.Module = family_of(model).network(model, worked_on(dataset, first_stage), len(classes))
    if isinstance(network, UNet):
        network.recompute = recompute
    return network


def worked_on(dataset: Dataset, first_stage: FirstStage | None) -> tuple[int, int, int]:
    """(C, H, W) of what the network works on, pictures or latents."""
    return first_stage.space.shape if first_stage else dataset.shape


def deviation(dataset: Dataset, model: FamilyConfig, first_stage: FirstStage | None) -> float:
    """Standard deviation of the values that the network works on; UserError if there is nothing to learn from them."""
    if first_stage:
        return 1.0
    name, low = dataset.manifest.name, model.low_resolution
    if low is None:
        found, why = dataset.manifest.sigma_data, "are one flat tone"
    else:
        # Rows are in the order of their keys, and so the first are any.
        found = detail(low, dataset.pictures(dataset.rows("train")[:LOOKED_AT]))
        why = f"show all that they have at {low}×{low}"
    if found < LEAST_DEVIATION:
        raise UserError(f"the training pictures of {name} {why}, so there is nothing to learn: ingest others")
    return found


def frozen_tensors(first_stage: FirstStage | None, device: torch.device) -> dict[str, Tensor]:
    """What belongs to the model besides and is not trained, brought to ``device``."""
    if first_stage is None:
        return {}
    return {AUTOENCODER + name: value for name, value in first_stage.latents.to(device).state_dict().items()}


def make_state(
    network: nn.Module,
    learner: Learner,
    config: TrainingConfig,
    ranks: Ranks,
    device: torch.device,
    frozen: dict[str, Tensor],
) -> TrainingState:
    """The state of a run that has seen nothing; several ``ranks`` each have a share of it, and all of ``frozen``.

    The opponent of ``learner`` is brought to ``device`` as it is, and not copied.
    """
    uncertainty = Uncertainty() if config.learned_uncertainty else None
    networks = [network, uncertainty] if uncertainty else [network]
    for each in networks:
        if ranks.count > 1:
            shard(each, device)
        each.to(device)
    trained = [parameter for each in networks for parameter in each.parameters()]
    opponent = None
    if learner.contest is not None:
        against = learner.contest.opponent.to(device)
        opponent = Opponent(against, _optimizer(list(against.parameters()), config, learner.betas))
    averages, optimizer = make_averages(network, config), _optimizer(trained, config, learner.betas)
    return TrainingState(network, averages, optimizer, uncertainty, opponent, frozen)


def _optimizer(trained: list[nn.Parameter], config: TrainingConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)


def make_averages(network: nn.Module, config: TrainingConfig) -> list[WeightAverage]:
    """The averages of the weights that ``config`` asks for; the first is the model."""
    if config.ema_lengths is not None:
        return [PowerAverage(network, length) for length in config.ema_lengths]
    return [ExponentialAverage(network, 0.999 if config.ema_decay is None else config.ema_decay)]
