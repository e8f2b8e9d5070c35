"""Distributed training under torchrun: collectives, gradients summed in buckets, and networks sharded by FSDP2."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from diffusion.common.device import collective_backends, resolve_device, set_current_device
from diffusion.families.model import LayeredNetwork

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the ``count`` that share each batch."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and logs."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all processes, bit-identical in all of them."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Start to reduce ``flag``, read now; the returned function waits for the result: whether any rank had it set.

        Work between the two calls hides the time of the reduction. A single process reads its flag in the second call.
        """
        if self.count == 1:
            return flag
        # On the CPU, so that a GPU has nothing to wait for.
        total = torch.tensor(float(flag()))
        work = dist.all_reduce(total, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(total)

        return answer

    def run_in_main(self, work: Callable[[Callable[[], bool]], T] | None, flag: Callable[[], bool]) -> T:
        """Run ``work`` in the main process, which alone has it, while all wait; returns its result in all of them.

        It gets a function that says whether ``flag`` is set in any process, as of a second ago.
        """
        if self.count == 1:
            assert work is not None
            return work(flag)
        is_set, end_event = threading.Event(), threading.Event()

        def share() -> None:
            while True:
                flags = torch.tensor([float(flag()), float(end_event.is_set())])
                dist.all_reduce(flags)
                if flags[0]:
                    is_set.set()
                if flags[1]:
                    return
                end_event.wait(POLL_SECONDS)

        if work is None:
            share()
            return cast(T, self.broadcast(None))
        thread = threading.Thread(target=share, daemon=True)
        thread.start()
        try:
            result = work(is_set.is_set)
        finally:
            end_event.set()
            thread.join()
        return cast(T, self.broadcast(result))

    def all(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in all processes."""
        return not self.any(lambda: not flag)()

    def broadcast(self, value: Any) -> Any:
        """Return the main process' ``value`` in all processes."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the main process' ``tensors`` in all processes; the tensors of other processes are ignored."""
        if self.count == 1:
            return tensors
        kinds = self.broadcast({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        copies = {
            name: tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in kinds.items()
        }
        for tensor in copies.values():
            dist.broadcast(tensor, src=0)
        return copies

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()


SINGLE_PROCESS = Ranks()
BUCKET_BYTES = 4 * 2**20
"""Bytes of gradients in a message: enough that its latency does not count, and little enough that the first ones are on
their way early in a backward pass (see benchmarks/gradient_buckets.py)."""
POLL_SECONDS = 0.5
"""Seconds between two exchanges of flags while the main process works alone."""
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
    set_current_device(resolve_device("auto"))
    dist.init_process_group(
        collective_backends(),
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class GradientReducer:
    """Sum of gradients over the parts of a batch and over all processes, while the backward passes go on.

    ``parameters`` are divided into buckets of about ``bucket_bytes``, from the last one on, as backward passes reach
    them. When all of ``parts`` have the gradients of a bucket, it is sent; buckets are sent in their order, so that the
    bits do not depend on timing. Not DistributedDataParallel, whose reducer has one backward pass per process and none
    inside a loss: on CPUs several threads compute parts of a batch, and GANs differentiate gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], parts: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._parameters, self._parts = parameters, parts
        self._buckets: list[list[int]] = [[]]
        for index in reversed(range(len(parameters))):
            if sum(parameters[i].nbytes for i in self._buckets[-1]) >= bucket_bytes:
                self._buckets.append([])
            self._buckets[-1].append(index)
        self._bucket_of = {index: number for number, bucket in enumerate(self._buckets) for index in bucket}
        self._lock = threading.Lock()
        # A GPU computes the gradients of its only part in a thread of autograd's.
        self._thread: Any = SimpleNamespace() if parts == 1 else threading.local()
        self._begin()
        for index, parameter in enumerate(parameters):
            parameter.register_hook(partial(self._add, index))  # type: ignore[no-untyped-call]

    def _begin(self) -> None:
        self._gradients: list[dict[int, Tensor]] = [{} for _ in self._parameters]
        self._missing = [self._parts * len(bucket) for bucket in self._buckets]
        self._works: list[dist.Work] = []

    @contextmanager
    def last_pass(self, part: int, earlier: Sequence[Tensor] | None) -> Iterator[None]:
        """Take the gradients of the backward pass inside, the last one of ``part``, and add ``earlier`` gradients.

        Args:
            part: Number of the part, from 0, of which each has one such pass in a thread of its own.
            earlier: Sums over the part's other passes, one for each parameter; None: it has no other.
        """
        self._thread.part, self._thread.earlier = part, earlier
        self._thread.unused = set(range(len(self._parameters)))
        try:
            yield
            for index in sorted(self._thread.unused):
                self._add(index, torch.zeros_like(self._parameters[index]))
        finally:
            self._thread.part = None

    def _add(self, index: int, gradient: Tensor) -> None:
        """Take the gradient of a parameter in the pass of this thread, and send all buckets that it completes."""
        part = getattr(self._thread, "part", None)
        if part is None:
            return
        self._thread.unused.discard(index)
        if self._thread.earlier is not None:
            gradient = self._thread.earlier[index] + gradient
        with self._lock:
            self._gradients[index][part] = gradient
            self._missing[self._bucket_of[index]] -= 1
            while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
                self._send(self._buckets[len(self._works)])

    @torch.no_grad()
    def _send(self, bucket: list[int]) -> None:
        """Sum the gradients of ``bucket`` over the parts, in their order, and start the sum over the processes."""
        flat = self._parameters[bucket[0]].new_zeros(sum(self._parameters[index].numel() for index in bucket))
        start = 0
        for index in bucket:
            parameter, gradients = self._parameters[index], self._gradients[index]
            # In the parameter's own memory format, which backward passes do not promise and the optimizer relies on.
            parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()
            for part in range(self._parts):
                parameter.grad.add_(gradients.pop(part))
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._works.append(work)

    def wait(self) -> None:
        """Wait until all parameters have their gradients; raises RuntimeError if the passes left any without one."""
        works = self._works
        for work in works:
            work.wait()
        self._begin()
        if gap := len(self._buckets) - len(works):
            raise RuntimeError(f"{gap} of {len(self._buckets)} buckets lack gradients of some parameter")


def make_mesh(device: torch.device, group: int) -> DeviceMesh:
    """Arrange the processes for a network that ``group`` consecutive ones share: in a row, or replicas × group."""
    ranks = torch.arange(dist.get_world_size()).view(-1, group)
    if len(ranks) == 1:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    replica, member = divmod(dist.get_rank(), group)
    # Not init_device_mesh, whose groups have timeouts of minutes.
    groups = [
        dist.new_group(members.tolist(), timeout=TIMEOUT, use_local_synchronization=True)
        for members in (ranks[:, member], ranks[replica])
    ]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard_module(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of ``network`` over the last dimension of ``mesh`` by block; gradients are summed over all."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for parameter in network.parameters():
        # FSDP2 does not support channels-last weights.
        parameter.data = parameter.data.contiguous()
    for module in [*(network.blocks() if isinstance(network, LayeredNetwork) else ()), network]:
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # Gloo does not support sums with a factor.
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether processes hold shards of ``tensor``."""
    # Not isinstance: a second of imports, for each command that trains in one process.
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full ``tensor``, which may be sharded; all processes must call this together."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this process' shard of ``tensor``, or all of it if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sum_over_replicas(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Set whether backward passes through ``modules`` sum gradients over replicas, or collect them until one does."""
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(enabled)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor`` as ``like`` is sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
