"""Training throughput of Darkroom and diffusers on networks of the same shape, and the time of each operation.

    python benchmarks/step.py --scratch /tmp/quality

The networks have the same resolutions, channels, residual blocks and attention, so about the same parameters. Each
step is whole: Darkroom's as ``darkroom train`` takes it, from the loader to the average of the weights, and diffusers'
as its training script does, once as it is and once with bf16 and channels last as well. They take turns; the median of
the rounds counts. Work is counted by torch's FlopCounterMode, and compared with the fastest matrix product here. All on
a GPU where there is one, or on what ``--device`` says.
"""

import argparse
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
from diffusion.common.device import device_name, repeatable, resolve_device
from diffusion.common.fingerprint import autocast
from diffusion.common.threads import cores, worker_threads
from diffusion.data.dataset import Dataset
from diffusion.models.config import ModelConfig
from diffusion.models.text_encoder import WIDTH
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
WARM_UP = 3
"""Steps before the clock starts: the first compile and set up what the others use."""
KINDS = {
    "convolution": ("conv", "mkldnn", "addmm", "linear"),
    "normalisation": ("norm",),
    "attention": ("bmm", "matmul", "softmax"),
    "optimizer, average": ("adam", "lerp", "foreach", "clip"),
}
Step = Callable[[], object]


def rate(step: Step, batch: int, seconds: float) -> float:
    """Images per second over about so many seconds."""
    for _ in range(WARM_UP):
        step()
    done()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step()
        count += batch
    done()
    return count / (time.perf_counter() - began)


def done() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product on all of ``device``, the best of a few."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(8):
        done()
        began = time.perf_counter()
        a @ b
        done()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def step_of(trainer: Trainer) -> Step:
    """Darkroom's step, at the peak learning rate."""
    return lambda: trainer.train_step(trainer.config.learning_rate)


def theirs(batch: int, size: int, bf16: bool, device: torch.device) -> tuple[Step, int, int]:
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


def kinds(step: Step) -> Counter[str]:
    """Seconds of the processor in a step, or of the GPU, by what it computes."""
    with profile(activities=sorted(supported_activities(), key=str)) as seen:
        for _ in range(3):
            step()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = next(
            (kind for kind, words in KINDS.items() if any(word in event.key.lower() for word in words)), "other"
        )
        device_time = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        spent[kind] += device_time / 3e6
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=get_args(DeviceName), default="auto")
    parser.add_argument("--scratch", type=Path, help="where the data set lies or is made; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-") as temporary:
        dataset = Dataset.open(prepare((args.scratch or Path(temporary)).resolve(), "32 px grey"))
        config = TrainingConfig(images=2**40, batch_size=args.batch, cpu_threads=cores(), device=args.device)
        device = resolve_device(args.device)
        fp32, bf16 = peak(torch.float32, device), peak(torch.bfloat16, device)
        with worker_threads(thread_count(config, SINGLE_PROCESS)) as pool:
            setup = make_setup(
                dataset,
                MODEL,
                config,
                sampling_config(),
                SINGLE_PROCESS,
                lambda _, texts: torch.zeros(len(texts), WIDTH),
            )
            trainer = Trainer(setup, pool)
            trainer.total = 2**40
            with FlopCounterMode(display=False) as counter:
                x = torch.zeros(1, *dataset.shape, device=device)
                trainer.state.network.forward(x, torch.zeros(1, device=device)).sum().backward()
            ours = sum(p.numel() for p in trainer.state.network.parameters()), counter.get_total_flops()
        rates: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            with repeatable(device), worker_threads(thread_count(config, SINGLE_PROCESS)) as pool:
                trainer.threads = pool
                rates.setdefault("darkroom", []).append(rate(step_of(trainer), args.batch, args.seconds))
            for name, flag in (("diffusers", False), ("diffusers, bf16, channels last", True)):
                step, parameters, flops = theirs(args.batch, dataset.shape[1], flag, device)
                rates.setdefault(name, []).append(rate(step, args.batch, args.seconds))
        medians = {name: median(each) for name, each in rates.items()}
        print(device_name(device))
        print(f"fastest matrix product: {fp32 / 1e9:.0f} GFLOP/s in fp32, {bf16 / 1e9:.0f} in bf16\n")
        for name, value in medians.items():
            count, work = ours if name == "darkroom" else (parameters, flops)
            done = value * work
            print(
                f"{name:32} {value:7.1f} images/s {medians['darkroom'] / value:5.2f}×  {count / 1e6:5.2f} M  "
                f"{work / 1e9:6.2f} GFLOP each, {done / 1e9:5.0f} GFLOP/s, {done / fp32:4.0%} of the fp32 product"
            )
        with repeatable(device), worker_threads(1):
            # In this thread, which alone is seen by the profiler.
            trainer.threads = SimpleNamespace(map=map)  # type: ignore[assignment]
            spent = kinds(step_of(trainer))
        print("\nwhere a step's time goes")
        for kind, seconds in spent.most_common():
            print(f"  {kind:20} {seconds / spent.total():5.0%}")
        trainer.loader.close()


if __name__ == "__main__":
    main()
