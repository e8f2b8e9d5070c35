"""Estimate of a rank's memory and messages at any world size, without the GPUs, with torch's fake process group.

The network is built on the meta device and sharded as in training. Messages are counted in a forward and backward pass
of fake tensors. Neither takes the memory of the network. Time is not estimated.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from humanize import naturalsize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.common.config import Config
from diffusion.common.device import CPU
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import resolve_precision
from diffusion.data.shards import ShardStore
from diffusion.families import family_of
from diffusion.families.config import FamilyConfig
from diffusion.families.model import OptimizerStep, TrainingBatch
from diffusion.process.samplers import SamplingConfig
from diffusion.training.config import TrainingConfig
from diffusion.training.data import open_dataset
from diffusion.training.distributed import (
    SINGLE_PROCESS,
    GradientReducer,
    Ranks,
    local_part,
    make_mesh,
    shard_module,
    sum_over_replicas,
)
from diffusion.training.preflight import FLOAT, meta_network
from diffusion.training.setup import TrainingSetup, make_setup
from diffusion.training.step_memory import StepMemory, measure_step, muon_size
from diffusion.training.trainer import thread_count


class RankCost(Config):
    """Bytes that one of ``ranks`` processes holds, and sends in a step; the one with the largest shards."""

    ranks: int
    images: int
    """Images of each batch that the rank computes."""
    weights: int
    """Weights, frozen ones and encoded captions included."""
    gradients: int
    optimizer: int
    """Moments."""
    averages: int
    gathered: int
    """Weights of other ranks that are here at a time: those outside of blocks, and two blocks."""
    activations: int
    """Estimate of what the images that are in the network at once leave for the backward pass."""
    muon: int
    """Temporary tensors of a step of Muon, when activations are gone."""
    all_reduce: int
    """Bytes sent for sums of gradients over replicas, by rings: 2 (n − 1) / n of them among n."""
    all_gather: int
    """Bytes sent for weights that other ranks need, by rings: n − 1 times the own ones."""
    reduce_scatter: int
    """Bytes sent for sums of gradients of shards, by rings: n − 1 times a shard's gradients."""

    @property
    def memory(self) -> int:
        """Return the sum of all that is in memory at a time."""
        state = self.weights + self.gradients + self.optimizer + self.averages + self.gathered
        return state + max(self.activations, self.muon)


class RankCosts(Config):
    """Costs of a rank at several world sizes."""

    world_sizes: list[RankCost]

    def lines(self) -> list[str]:
        """Format the costs as a table, without columns that are empty."""
        names = [*RankCost.model_fields][2:]
        names.insert(names.index("all_reduce"), "memory")
        columns = [name for name in names if any(getattr(cost, name) for cost in self.world_sizes)]
        table = [["ranks", "images", *(name.replace("_", "-") for name in columns)]]
        for cost in self.world_sizes:
            sizes = (naturalsize(getattr(cost, name), binary=True) for name in columns)
            table.append([f"{cost.ranks:,}", f"{cost.images:,}", *sizes])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "of each rank: images in a step, memory (activations are an estimate), and what it sends in a step",
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table),
        ]


class _Messages(TorchDispatchMode):
    """Mode that counts the bytes of a rank's tensors in collectives, by their names, and lists what is gathered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: Counter[str] = Counter()
        self.gathered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func.name():
            case "c10d::allreduce_":
                self.own["all_reduce"] += sum(tensor.nbytes for tensor in args[0])
            case "c10d::_allgather_base_":
                self.own["all_gather"] += args[1].nbytes
                self.gathered.append(args[0].nbytes)
            case "c10d::_reduce_scatter_base_":
                self.own["reduce_scatter"] += args[0].nbytes
        return func(*args, **(kwargs or {}))


@contextmanager
def _fake_process_group(count: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def estimate_ranks(
    data: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    world_size: int,
    store: ShardStore | None = None,
) -> RankCosts:
    """Compute memory and messages of each of ``world_size`` processes that ``train`` with the same arguments.

    Also of fewer processes: powers of two from 8 on that divide the batch. Measures and writes nothing. Raises
    UserError as ``train``, and if ``world_size`` does not divide the batch, or training.shard does not divide it.
    """
    with open_dataset(data, config, store) as dataset:
        setup = make_setup(dataset, model, config, sampling, SINGLE_PROCESS)
        batch = setup.config.images_per_step
        if batch % world_size:
            raise UserError(
                f"training.batch_size = {batch} cannot be shared equally by {world_size} ranks: make it a multiple of "
                f"{world_size}"
            )
        _ = replace(setup, ranks=Ranks(0, world_size)).shard  # raises
        sizes = [2**power for power in range(3, 13) if 2**power < world_size and batch % 2**power == 0]
        if setup.config.shard not in (True, False):
            sizes = [size for size in sizes if size % setup.config.shard == 0]
        precision = {"precision": resolve_precision(setup.config.precision, setup.device)}
        memory = measure_step(replace(setup, config=setup.config.model_copy(update=precision)))
        setups = (replace(setup, ranks=Ranks(0, size)) for size in (*sizes, world_size))
        return RankCosts(world_sizes=[_rank_cost(variant, memory) for variant in setups])


def _rank_cost(setup: TrainingSetup, memory: StepMemory) -> RankCost:
    config, ranks = setup.config, setup.ranks
    images, threads = config.images_per_step // ranks.count, thread_count(config, ranks)
    part = math.ceil(images / threads)
    network = meta_network(setup)
    objective = family_of(setup.model).make_objective(setup.model_header(0), config)
    steps, messages, gathered_bytes = objective.optimizer_steps(network), Counter[str](), 0
    with _fake_process_group(ranks.count):
        for step in steps:
            if setup.shard == 1:
                messages += _count_replicated_bytes(step)
            else:
                counts, gathered_bytes = _count_sharded_bytes(step, setup)
                messages += counts
        trained = [parameter for step in steps for parameter in step.parameters if parameter.requires_grad]
        average_bytes = _size([parameter for parameter in network.parameters() if parameter.requires_grad])
        frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
        frozen += list(setup.autoencoder.parameters()) if setup.autoencoder else []
        if config.student is not None and setup.initial is not None:
            frozen += list(setup.initial.network.parameters())
        matrices = [parameter for step in steps for parameter in step.matrices]
        has_muon = config.optimizer == "muon" and setup.base is None
        size, replicas, group = _size(trained), ranks.count // setup.shard, setup.shard
        return RankCost(
            ranks=ranks.count,
            images=images,
            weights=size + _size(frozen) + (setup.captions.nbytes if setup.captions else 0),
            # Gradients of each thread and their sum, or of the own shards.
            gradients=size * (1 + threads if group == 1 else 1),
            optimizer=round(config.moments * size) - (_size(matrices) if has_muon else 0),
            averages=average_bytes * ((1 if config.ema_stds is None else len(config.ema_stds)) + setup.has_guide),
            gathered=gathered_bytes,
            activations=threads * memory.activations(min(part, config.micro_batch or part)),
            muon=max(muon_size(step.matrices, threads) for step in steps) if has_muon else 0,
            all_reduce=2 * messages["all_reduce"] * (replicas - 1) // replicas,
            all_gather=messages["all_gather"] * (group - 1),
            reduce_scatter=messages["reduce_scatter"] * (group - 1),
        )


def _size(parameters: list[nn.Parameter]) -> int:
    """Count the bytes of ``parameters``, or of this rank's shards of them."""
    return FLOAT * sum(local_part(parameter).numel() for parameter in parameters)


def _count_replicated_bytes(step: OptimizerStep) -> Counter[str]:
    """Count the bytes that are summed over ranks which have a network each."""
    messages = _Messages()
    with FakeTensorMode(), messages:
        # All that matters of a network is the shapes of its gradients.
        parameters = [nn.Parameter(torch.empty(weight.shape)) for weight in step.parameters if weight.requires_grad]
        reducer = GradientReducer(parameters, 1)
        with reducer.last_pass(0, None):
            torch.autograd.grad(sum((parameter.sum() for parameter in parameters), torch.zeros(())), parameters)
        reducer.wait()
    return messages.own


def _count_sharded_bytes(step: OptimizerStep, setup: TrainingSetup) -> tuple[Counter[str], int]:
    """Count the bytes of a rank in the collectives of a step, and of other ranks' weights that it holds at once."""
    config, family = setup.config, family_of(setup.model)
    images = config.images_per_step // setup.ranks.count
    other_passes = math.ceil(images / (config.micro_batch or images)) - 1
    mesh, modules = make_mesh(CPU, setup.shard), list(step.modules.values())
    for module in modules:
        shard_module(module.to("meta"), mesh)
    counts = Counter[str]()
    # Fake tensors of shards, as FSDP2 runs no meta tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        for is_last, times in ((False, other_passes), (True, 1)):
            if times:
                sum_over_replicas(modules, is_last)
                messages = _Messages()
                with messages:
                    losses: Tensor = family.forward(modules[0], setup.shape).view(1)
                    batch = TrainingBatch(torch.empty(1), {}, {"t": torch.zeros(1)})
                    step.compute_objective(losses, batch).sum().backward()  # type: ignore[no-untyped-call]
                counts += Counter({name: size * times for name, size in messages.own.items()})
    outer, *blocks = messages.gathered
    return counts, outer + sum(sorted(blocks)[-2:])
