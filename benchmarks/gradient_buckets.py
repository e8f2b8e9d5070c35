"""Time of a training step whose gradients are sent in buckets during backward, relative to one message after it.

    python benchmarks/gradient_buckets.py --processes 2 4

The processes are on this machine and share its cores, with gloo between them: sums cost cores that the backward pass
could use. Steps with each size of buckets take turns, so that a busy machine slows down all of them.
"""

import argparse
import tempfile
import time
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.presets import preset
from diffusion.training.distributed import GradientReducer

WHOLE = 2**62
"""Bytes of a bucket that holds all gradients, and so is sent after backward."""
SIZES = (WHOLE, 2**25, 2**23, 2**22, 2**21, 2**20)


def work(rank: int, processes: int, folder: str, name: str, batch: int, rounds: int) -> None:
    """Take ``rounds`` steps with each size of buckets; rank 0 prints the median times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    network = UNet(ModelConfig.model_validate(preset(name)["model"]), 3, 32)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(network.parameters())
    # One reducer sees the gradients of a step: the hooks of the others find no pass of theirs.
    reducers = {size: GradientReducer(parameters, 1, size) for size in SIZES}
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    seconds: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
    for _, size in zip(range((rounds + 1) * (len(SIZES) + 1)), cycle(seconds), strict=False):
        dist.barrier()
        start = time.perf_counter()
        loss = network(x, torch.full((batch,), 500.0)).square().mean()
        if size:
            with reducers[size].last_pass(0, None):
                torch.autograd.grad(loss, parameters)
            reducers[size].wait()
        else:
            torch.autograd.grad(loss, parameters)
        seconds[size].append(time.perf_counter() - start)
    if rank == 0:
        # The first round is not counted: it sets up what the others use.
        alone, whole, *others = (median(times[1:]) for times in seconds.values())
        size = sum(parameter.nbytes for parameter in parameters) / 2**20
        print(
            f"| {name} | {size:.0f} MiB | {processes} | {batch} | {1000 * alone:.0f} | {1000 * whole:.0f} | "
            + " | ".join(f"{time_of_size / whole:.2f}" for time_of_size in others)
            + " |",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--presets", nargs="+", default=["fast", "ddpm"])
    parser.add_argument("--batch", type=int, default=4, help="images of each process")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    sizes = " | ".join(f"{size >> 20} MiB" for size in SIZES[1:])
    print(f"| preset | gradients | processes | images each | ms without sums | ms, one message | {sizes} |")
    print("|---|---:|---:|---:|---:|---:|" + "---:|" * len(SIZES[1:]))
    for name in args.presets:
        for processes in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                arguments = processes, str(Path(folder)), name, args.batch, args.rounds
                spawn(work, arguments, processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
