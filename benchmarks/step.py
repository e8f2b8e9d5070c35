"""Training throughput of Darkroom and diffusers on networks of the same shape, and the time of each operation.

    python benchmarks/step.py --scratch /tmp/quality

The networks have the same resolutions, channels, residual blocks and attention, so about the same parameters. Each
step is whole: Darkroom's as ``darkroom train`` takes it, from the loader to the average of the weights, and diffusers'
as its training script does, once as it is and once with bf16 and channels last as well. They take turns, in short
rounds and with matrix products between them; medians of the rounds count, and of their ratios. All run in one process,
so that diffusers, too, has Darkroom's settings of the memory allocator. Work is counted by torch's FlopCounterMode.
Runs on a GPU where there is one, or on what ``--device`` says. ``--threads 1`` counts seconds of the processor instead
of the clock's, which other work on the machine hardly changes.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import get_args

import torch
from loading import prepare
from torch.profiler import profile, supported_activities
from torch.utils.flop_counter import FlopCounterMode
from trainers import diffusers

from diffusion.common.config import DeviceName
from diffusion.common.device import compute_deterministically, device_name, resolve_device
from diffusion.common.fingerprint import autocast, describe_precision, resolve_precision
from diffusion.common.threads import cores, worker_threads
from diffusion.data.dataset import Dataset
from diffusion.families.config import ModelConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.setup import make_setup
from diffusion.training.trainer import Trainer, thread_count

MODEL = ModelConfig(
    width=32,
    channel_mult=(1, 2, 2),
    blocks=2,
    attention=(2,),
    heads=8,
    patch=1,
    conditional=False,
    prediction="epsilon",
)
"""The shape of the network in ``trainers.py``."""
KINDS = {
    "convolution": ("conv", "mkldnn", "addmm", "linear"),
    "normalisation": ("norm",),
    "attention": ("bmm", "matmul", "softmax"),
    "optimizer, average": ("adam", "lerp", "foreach", "clip"),
}
Step = Callable[[], object]


def rate(step: Step, batch: int, seconds: float, clock: Callable[[], float]) -> float:
    """Images per second over about so many seconds."""
    step()
    synchronize()
    count, start = 0, clock()
    while clock() - start < seconds:
        step()
        count += batch
    synchronize()
    return count / (clock() - start)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_matrix_products(device: torch.device, clock: Callable[[], float]) -> dict[str, float]:
    """Floating-point operations per second of products of square matrices on ``device``, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    c, d = a.bfloat16(), b.bfloat16()
    products: dict[str, Callable[[], torch.Tensor]] = {"fp32": lambda: a @ b, "bf16": lambda: c @ d}
    peak_rates = {}
    for name, product in products.items():
        seconds = []
        for _ in range(8):
            synchronize()
            start = clock()
            product()
            synchronize()
            seconds.append(clock() - start)
        peak_rates[name] = 2 * size**3 / min(seconds)
    return peak_rates


def step_of(trainer: Trainer) -> Step:
    """Darkroom's step, at the peak learning rate."""
    return lambda: trainer.train_step(trainer.config.learning_rate)


def diffusers_step(batch: int, size: int, bf16: bool, device: torch.device) -> tuple[Step, int, int]:
    """diffusers' step, its parameters, and the operations of an image."""
    with device:
        network, step, _ = diffusers(1, size)
        if bf16:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.rand(batch, 1, size, size)
        with FlopCounterMode(display=False) as counter:
            network(images[:1], torch.tensor([5])).sample.sum().backward()

    def whole() -> None:
        with device, autocast("bf16" if bf16 else "fp32", device):
            step(images, 0.0)

    return whole, sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def profile_step(step: Step) -> Counter[str]:
    """Seconds of the processor in a step, or of the GPU, by what it computes."""
    with profile(activities=sorted(supported_activities(), key=str)) as profiler:  # type: ignore[no-untyped-call]
        for _ in range(3):
            step()
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, words in KINDS.items() if any(word in event.key.lower() for word in words)), "other"
        )
        device_time = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        seconds[kind] += device_time / 3e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--device", choices=get_args(DeviceName), default="auto")
    parser.add_argument("--scratch", type=Path, help="where the data set lies or is made; default: a temporary folder")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product of matrices on CUDA
    with tempfile.TemporaryDirectory(prefix="step-") as temporary:
        dataset = Dataset.open(prepare((args.scratch or Path(temporary)).resolve(), "32 px grey"))
        config = TrainingConfig(images=2**40, batch_size=args.batch, cpu_threads=args.threads, device=args.device)
        device = resolve_device(args.device)
        threads, clock = thread_count(config, SINGLE_PROCESS), time.perf_counter
        if device.type == "cpu":
            torch.set_num_threads(args.threads)
            clock = time.process_time if args.threads == 1 else clock
        with worker_threads(threads) as pool:
            trainer = Trainer(make_setup(dataset, MODEL, config, sampling_config(), SINGLE_PROCESS), pool)
            trainer.total = 2**40
            with FlopCounterMode(display=False) as counter:
                x = torch.zeros(1, *dataset.shape, device=device)
                trainer.state.network.forward(x, torch.zeros(1, device=device)).sum().backward()
            ours = sum(p.numel() for p in trainer.state.network.parameters()), counter.get_total_flops()
        others = {
            name: diffusers_step(args.batch, dataset.shape[1], bf16, device)
            for name, bf16 in (("diffusers", False), ("diffusers, bf16, channels last", True))
        }
        work = {"darkroom": ours} | {name: (parameters, flops) for name, (_, parameters, flops) in others.items()}
        rates, products = dict[str, list[float]](), dict[str, list[float]]()
        for _ in range(args.rounds):
            for name, product in measure_matrix_products(device, clock).items():
                products.setdefault(name, []).append(product)
            with compute_deterministically(device), worker_threads(threads) as pool:
                trainer.threads = pool
                rates.setdefault("darkroom", []).append(rate(step_of(trainer), args.batch, args.seconds, clock))
            for name, (step, *_) in others.items():
                rates.setdefault(name, []).append(rate(step, args.batch, args.seconds, clock))
        print(f"{device_name(device)}; {describe_precision(config.precision, device)}; {args.threads} threads")
        best = {name: median(product_rates) for name, product_rates in products.items()}
        print("matrix product: " + ", ".join(f"{each / 1e9:.0f} GFLOP/s {name}" for name, each in best.items()) + "\n")
        product_rates = products[resolve_precision(config.precision, device)]
        for name, speeds in rates.items():
            count, flops = work[name]
            ratio = median(mine / each for mine, each in zip(rates["darkroom"], speeds, strict=True))
            share = median(each * flops / product for each, product in zip(speeds, product_rates, strict=True))
            print(
                f"{name:32} {median(speeds):7.1f} images/s {ratio:5.2f}× {count / 1e6:5.2f} M  {flops / 1e9:6.2f} "
                f"GFLOP each, {median(speeds) * flops / 1e9:5.0f} GFLOP/s, "
                f"{share:4.0%} of the product in Darkroom's format"
            )
        with compute_deterministically(device), worker_threads(1):
            # In this thread, which alone is seen by the profiler.
            trainer.threads = SimpleNamespace(map=map)  # type: ignore[assignment]
            seconds_by_kind = profile_step(step_of(trainer))
        print("\nwhere a step's time goes")
        for kind, seconds in seconds_by_kind.most_common():
            print(f"  {kind:20} {seconds / seconds_by_kind.total():5.0%}")
        trainer.loader.close()


if __name__ == "__main__":
    main()
