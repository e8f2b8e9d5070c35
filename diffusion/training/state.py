"""The training state: everything that changes from step to step, saved as the tensors of a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.families.base import OptimizerStep, TrainingObjective
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import full_tensor, shard_like, shard_module
from diffusion.training.ema import ExponentialAverage, PowerAverage, WeightAverage
from diffusion.training.post_hoc_ema import average_prefix, averaged_tensors

NETWORK = "network."
"""Prefix of the raw weights' names in a checkpoint."""


@dataclass
class TrainingState:
    """Weights, averages, optimizer moments and counts.

    Random numbers are functions of ``images`` and need no state.
    """

    network: nn.Module
    averages: list[WeightAverage]
    """Averages of the network's weights; the first is the model."""
    steps: list[OptimizerStep]
    optimizers: list[torch.optim.AdamW]
    """The optimizer of each of ``steps``."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Frozen tensors of the model: those of ``diffusion.checkpoints.AUTOENCODER``."""
    images: int = 0
    """Number of images seen."""
    skipped: int = 0
    """Number of optimizer steps skipped because of a non-finite loss or gradient."""
    skipped_in_a_row: int = 0
    """Number of most recent steps skipped in a row."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, named by module or optimizer."""
        named = averaged_tensors(self.averages) | self.frozen
        for step, optimizer in zip(self.steps, self.optimizers, strict=True):
            for name, module in step.modules.items():
                named |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
            for index, moments in optimizer.state_dict()["state"].items():
                named |= {f"{_optimizer_prefix(step)}{index}.{name}": value for name, value in moments.items()}
        return named

    def full_tensors(self, is_main: bool) -> dict[str, Tensor]:
        """Gather the tensors of a sharded state on the main process' CPU; all processes must call this together."""
        gathered: dict[str, Tensor] = {}
        for name, value in self.tensors().items():
            # One tensor at a time, to the CPU: a network that is sharded does not fit on the device.
            full = full_tensor(value)
            if is_main:
                gathered[name] = full.cpu()
        return gathered

    def counts(self) -> dict[str, int]:
        """Return the counts for the header of a checkpoint."""
        return {"images": self.images, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Restore the state from ``tensors`` and ``counts``, or this process' shard of it."""
        own = {name: shard_like(tensors[name], like) for name, like in self.tensors().items() if name in tensors}
        for number, average in enumerate(self.averages):
            average.load_state_dict(_under(average_prefix(number), own))
        for name, value in self.frozen.items():
            # In place: network and optimizer share these tensors.
            value.copy_(own[name])
        for step, optimizer in zip(self.steps, self.optimizers, strict=True):
            for name, module in step.modules.items():
                module.load_state_dict(_under(f"{name}.", own))
            _load_moments(optimizer, step.parameters, _under(_optimizer_prefix(step), tensors))
        self.images, self.skipped = counts["images"], counts["skipped"]
        self.skipped_in_a_row = counts["skipped_in_a_row"]


def make_state(
    network: nn.Module,
    objective: TrainingObjective,
    config: TrainingConfig,
    device: torch.device,
    frozen: dict[str, Tensor],
    shard: bool = False,
) -> TrainingState:
    """Build the initial state of a run on ``device``; with ``shard``, this process' shard of it."""
    steps = objective.optimizer_steps(network)
    for module in [module for step in steps for module in step.modules.values()]:
        if shard:
            shard_module(module, device)
        module.to(device)
    optimizers = [
        torch.optim.AdamW(
            step.parameters, config.learning_rate, objective.betas, weight_decay=config.weight_decay, fused=True
        )
        for step in steps
    ]
    averages: list[WeightAverage]
    if config.ema_stds is not None:
        averages = [PowerAverage(network, length) for length in config.ema_stds]
    else:
        averages = [ExponentialAverage(network, 0.999 if config.ema_decay is None else config.ema_decay)]
    return TrainingState(network, averages, steps, optimizers, frozen)


def _optimizer_prefix(step: OptimizerStep) -> str:
    return f"optimizer.{next(iter(step.modules))}."


def _load_moments(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, moment = name.split(".", 1)
        if value.ndim:
            # Fused AdamW walks parameter and moments in step through memory: their strides must agree.
            like = parameters[int(index)]
            value = torch.empty_like(like).copy_(shard_like(value, like))
        moments.setdefault(int(index), {})[moment] = value
    groups: Any = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
