"""A turn: what moves in a step of training, and the gradients of a batch that say where to."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.device import resolve_device
from diffusion.fingerprint import autocast
from diffusion.training.config import TrainingConfig
from diffusion.training.drawn import Drawn
from diffusion.training.ranks import Ranks
from diffusion.training.sharding import gathered


def as_they_are(losses: Tensor, drawn: Drawn) -> Tensor:
    """``losses`` are minimised themselves."""
    return losses


@dataclass(frozen=True)
class Turn:
    """The part of a step in which some parameters move, and all others stand still."""

    optimizer: torch.optim.AdamW
    parameters: list[nn.Parameter]
    """Those that move."""
    losses: Callable[[Drawn], Tensor]
    """Of each picture, (N,)."""
    minimised: Callable[[Tensor, Drawn], Tensor] = as_they_are
    """What is minimised instead, (N,)."""

    def gradients(
        self, drawn: Drawn, config: TrainingConfig, device: torch.device, pool: Executor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Give the parameters the batch's gradients, of all processes, cut to ``clip_norm``; returns loss and norm."""

        def share(part: Drawn) -> tuple[Tensor, Tensor]:
            """What these pictures add to the loss of the batch, and to what is minimised."""
            with autocast(config.precision, device):
                losses = self.losses(part)
            return losses.detach().sum() / config.batch_size, self.minimised(losses, part).sum() / config.batch_size

        def lane(part: Drawn) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss, minimised = share(part)
            return loss, torch.autograd.grad(minimised, self.parameters)

        if config.shard:
            # Each process gets those of its share of the weights.
            loss, minimised = share(drawn)
            minimised.backward()  # type: ignore[no-untyped-call]
            ranks.sum([loss])
        else:
            parts = list(pool.map(lane, drawn.split(lanes_of(config, ranks))))
            loss = torch.stack([part_loss for part_loss, _ in parts]).sum()
            self._add([gradients for _, gradients in parts])
            ranks.sum([loss, *(parameter.grad for parameter in self.parameters if parameter.grad is not None)])
        return loss, gathered(torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm))

    def _add(self, parts: list[tuple[Tensor, ...]]) -> None:
        for parameter, *gradients in zip(self.parameters, *parts, strict=True):
            # In the parameter's own memory format, which autograd.grad does not promise and the optimizer relies on.
            parameter.grad = torch.zeros_like(parameter)
            for gradient in gradients:
                parameter.grad.add_(gradient)

    def move(self, rate: float, finite: Tensor) -> None:
        """Move the parameters at this learning rate, unless loss and gradients were not ``finite``, ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The optimizer itself leaves the step out, on its device, without anyone waiting to know.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def lanes_of(config: TrainingConfig, ranks: Ranks) -> int:
    """How many lanes each process has: as many as there would be in one process, shared out.

    A GPU shares its work out by itself, and what is gathered for a block of a sharded network is there once.
    """
    if config.shard or resolve_device(config.device).type != "cpu":
        return 1
    return max(1, config.lanes // ranks.count)
