"""Processes write checkpoints together, to the file that one alone would write, and read them on any mesh."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.files import sha256_file
from diffusion.training.checkpointing import Checkpoints, read_everywhere, write_together
from diffusion.training.distributed import SINGLE_PROCESS, Ranks, full_tensor, make_mesh, shard_like
from tests.builders.forked_ranks import spawn

HEADER: dict[str, Any] = {"model_header": {"images": 64}, "note": 'é "quoted"\n\t\x01'}


def tensors() -> dict[str, Tensor]:
    """Tensors of several types and sizes; the rows of most are no multiple of the processes."""
    random = torch.Generator().manual_seed(0)
    shapes = {"network.stem": (7, 3, 3), "b.bias": (2,), "a.weight": (1, 5), "ema.π": (16, 4), "moments": (9,)}
    floats = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return floats | {"step": torch.tensor(5.0), "half": torch.ones(3, 2).bfloat16(), "index": torch.arange(3)}


def sharded(given: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    mesh = make_mesh(torch.device("cpu"), group)
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return {
        name: distribute_tensor(value, mesh, placements) if value.is_floating_point() and value.ndim else value
        for name, value in given.items()
    }


def write(rank: int, processes: int, group: int, folder: Path, sees_files: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    ranks, checkpoints = Ranks(rank, processes), Checkpoints(folder / "checkpoints")
    if rank and not sees_files:
        Path.is_file = lambda *_: False  # type: ignore[assignment,method-assign]
    mine = sharded(tensors(), group)
    # Only the main process knows the header.
    checkpoint = write_together(folder, mine, HEADER if ranks.is_main else {}, ranks)
    if ranks.is_main:
        checkpoints.save(checkpoint, HEADER)
    ranks.barrier()
    arrays = read_everywhere(folder / "checkpoints" / "0000000064.safetensors", ranks)
    for name, value in tensors().items():
        again = shard_like(arrays[name], mine[name])
        assert torch.equal(full_tensor(again), value)
        if isinstance(again, DTensor):
            assert again.to_local().shape == mine[name].to_local().shape  # type: ignore[attr-defined]
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "group", "sees_files"), [(2, 2, True), (2, 2, False), (4, 4, True), (4, 2, True), (4, 2, False)]
)
def test_checkpoints_written_by_all_processes_are_those_of_one(
    processes: int, group: int, sees_files: bool, tmp_path: Path
) -> None:
    alone = save_tensors(tmp_path / "alone.safetensors", tensors(), HEADER)
    spawn(write, (processes, group, tmp_path, sees_files), processes)
    [path] = Checkpoints(tmp_path / "checkpoints").paths()
    assert sha256_file(path) == alone
    assert not list(tmp_path.glob(".*.partial"))


def test_a_process_alone_lays_files_out_as_safetensors_does(tmp_path: Path) -> None:
    alone = save_tensors(tmp_path / "alone.safetensors", tensors(), HEADER)
    write_together(tmp_path, tensors(), HEADER, SINGLE_PROCESS)
    [partial] = tmp_path.glob(".*.partial")
    assert sha256_file(partial) == alone
