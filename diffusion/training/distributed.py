"""Distributed training under torchrun: collectives, and networks sharded by FSDP2."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion.common.device import resolve_device
from diffusion.models.unet import ResidualBlock


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the ``count`` that share each batch."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and logs."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, bit-identical in all of them."""
        if self.count == 1:
            return
        # One message: many small ones would wait for each other.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def broadcast(self, value: Any) -> Any:
        """Return the main process' ``value`` in all processes."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the main process' ``tensors`` in all processes; those of other processes are ignored."""
        if self.count == 1:
            return tensors
        kinds = self.broadcast({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        mine = {
            name: tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in kinds.items()
        }
        for tensor in mine.values():
            dist.broadcast(tensor, src=0)
        return mine

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()


SINGLE_PROCESS = Ranks()
TIMEOUT = timedelta(days=7)
"""Timeout of collectives while one process evaluates; the exit of a process is noticed at once."""


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that torchrun started and yield this process' rank."""
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield SINGLE_PROCESS
        return
    # A new key prefix per restart: addresses left in torchrun's store by earlier processes must not be used.
    store, rank, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(resolve_device("auto"))
    dist.init_process_group(
        backends, store=PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=count, timeout=TIMEOUT
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shard_module(network: nn.Module, device: torch.device) -> None:
    """Shard the weights of ``network`` to ``device`` by block; gradients are summed over the processes."""
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    # FSDP2 does not support channels-last weights.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in [*(module for module in network.modules() if isinstance(module, ResidualBlock)), network]:
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # Gloo does not support sums with a factor.
        module.set_force_sum_reduction_for_comms(True)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full ``tensor``, which may be sharded; all processes must call this together."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor`` as ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
