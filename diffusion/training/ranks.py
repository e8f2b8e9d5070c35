"""Processes that train together, started by torchrun: each computes its share of every batch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from diffusion.device import resolve_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Which of ``count`` processes this one is."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes files and keeps the record."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits in all of them."""
        if self.count == 1:
            return
        # All at once: many small messages would wait for each other.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def agreed(self, value: Value) -> Value:
        """The leader's ``value``, in all processes."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        agreed: Value = values[0]
        return agreed

    def shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leader's ``tensors``, in all processes; what others pass is not looked at."""
        if self.count == 1:
            return tensors
        kinds = self.agreed({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        mine = {
            name: tensors[name].contiguous() if self.leads else torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in kinds.items()
        }
        for tensor in mine.values():
            dist.broadcast(tensor, src=0)
        return mine

    def wait(self) -> None:
        """Until all processes have come this far."""
        if self.count > 1:
            dist.barrier()


ALONE = Ranks()
PATIENCE = timedelta(days=7)
"""How long the others wait while one takes stock; the end of a process is seen at once, whatever this is."""


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Inside, this process and the others that torchrun started can compute together."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    # What processes of before a restart left in torchrun's store would be taken for the addresses of the new ones.
    store, rank, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(resolve_device("auto"))
    dist.init_process_group(
        backends, store=PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=count, timeout=PATIENCE
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
