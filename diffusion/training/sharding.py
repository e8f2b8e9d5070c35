"""Networks that do not fit into one process: each keeps a share of every weight, moment and average (FSDP2)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion.models.unet import ResidualBlock


def shard(network: nn.Module, device: torch.device) -> None:
    """Leave on ``device`` this process's share of the weights; those of a block are gathered while it computes.

    Gradients are summed over the processes, and not averaged as they would be by default.
    """
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    # It refuses weights that lie channels last.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for block in [module for module in network.modules() if isinstance(module, ResidualBlock)]:
        _shard(block, mesh)
    _shard(network, mesh)


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    # Gloo knows no sum with a factor in it.
    module.set_force_sum_reduction_for_comms(True)


def gathered(tensor: Tensor) -> Tensor:
    """All of ``tensor``, of which this process may have a share; all processes ask for it at the same time."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of ``tensor`` if it is to stand where ``like`` does."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
