"""The training state: everything that changes from step to step, saved as the tensors of a checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoints import AUTOENCODER
from diffusion.families.model import OptimizerStep, TrainingObjective
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import shard_like, shard_module
from diffusion.training.ema import PREFIXES, ExponentialAverage, PowerAverage, WeightAverage

NETWORK = "network."
"""Prefix of the raw weights' names in a checkpoint."""


class TrainingState:
    """Weights, averages, optimizer moments and counts; random numbers are functions of ``images`` and need no state."""

    def __init__(
        self,
        network: nn.Module,
        objective: TrainingObjective,
        config: TrainingConfig,
        device: torch.device,
        frozen: dict[str, Tensor],
        shard: bool,
    ) -> None:
        self.network = network
        self.frozen = {AUTOENCODER + name: value for name, value in frozen.items()}
        """Tensors of the model's autoencoder, which training does not change."""
        self.steps = objective.optimizer_steps(network)
        for module in [module for step in self.steps for module in step.modules.values()]:
            if shard:
                shard_module(module, device)
            module.to(device)
        self.optimizers = [
            torch.optim.AdamW(
                step.parameters, config.learning_rate, objective.betas, weight_decay=config.weight_decay, fused=True
            )
            for step in self.steps
        ]
        self.averages: list[WeightAverage]
        """Averages of the network's weights; the first is the model."""
        if config.ema_stds is not None:
            self.averages = [PowerAverage(network, std) for std in config.ema_stds]
        else:
            self.averages = [ExponentialAverage(network, 0.999 if config.ema_decay is None else config.ema_decay)]
        self.images = self.skipped = self.skipped_in_a_row = 0
        """Images seen, and optimizer steps skipped because of a non-finite loss or gradient: in all, most recently."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, named by module or optimizer."""
        named = self._weights()
        for step, optimizer in zip(self.steps, self.optimizers, strict=True):
            for index, moments in optimizer.state_dict()["state"].items():
                named |= {f"{_optimizer_prefix(step)}{index}.{name}": value for name, value in moments.items()}
        return named

    def _weights(self) -> dict[str, Tensor]:
        named = dict(self.frozen)
        for prefix, average in zip(PREFIXES, self.averages, strict=False):
            named |= {prefix + name: value for name, value in average.averages.items()}
        for step in self.steps:
            for prefix, module in step.modules.items():
                named |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        return named

    def counts(self) -> dict[str, int]:
        """Return the counts for the header of a checkpoint."""
        return {"images": self.images, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Restore the state from ``tensors`` and ``counts``, or this process' shard of it."""
        for name, value in self._weights().items():
            # In place: network and optimizer share these tensors.
            value.copy_(shard_like(tensors[name], value))
        for step, optimizer in zip(self.steps, self.optimizers, strict=True):
            prefix, moments = _optimizer_prefix(step), dict[int, dict[str, Tensor]]()
            for name, value in tensors.items():
                if name.startswith(prefix):
                    index, moment = name.removeprefix(prefix).split(".", 1)
                    if value.ndim:
                        # Fused AdamW walks parameter and moments in step through memory: their strides must agree.
                        like = step.parameters[int(index)]
                        value = torch.empty_like(like).copy_(shard_like(value, like))
                    moments.setdefault(int(index), {})[moment] = value
            groups: Any = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.images, self.skipped = counts["images"], counts["skipped"]
        self.skipped_in_a_row = counts["skipped_in_a_row"]


def _optimizer_prefix(step: OptimizerStep) -> str:
    return f"optimizer.{next(iter(step.modules))}."
