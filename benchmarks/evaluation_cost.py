"""Time and peak memory of evaluation once features are computed, for each step.

    python benchmarks/evaluation_cost.py                # 10,000 samples against 60,000 references of 1,280 features
    python benchmarks/evaluation_cost.py --scale 0.1    # a tenth of both, as a quick check

Features are Gaussian with a spectrum like EfficientNet-Lite0's, the samples' slightly shifted. The aim, on two cores:
all point values in under 60 seconds, the intervals of 200 replicates (100 cuts × 2 halves) in under 10 minutes, and
within 2 GiB. The reference's moments, neighbours and kernels are computed once for all evaluations, and timed apart.
The reference, the point values and the intervals have a process each, whose peak memory counts libraries and features.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.common.threads import cores
from diffusion.evaluation.metrics.frechet import (
    compute_moments,
    distance_at_infinity,
    frechet_distance,
    frechet_of_halves,
)
from diffusion.evaluation.metrics.kid import compute_kid, kernel_sums, kid_of_halves
from diffusion.evaluation.metrics.metric import SPLITS
from diffusion.evaluation.metrics.precision_recall import compute_overlap, nearest_distances, shares_of_halves
from diffusion.evaluation.metrics.scores import PreparedReference, compute_scores

SAMPLES, REFERENCE, FEATURES = 10_000, 60_000, 1_280
PIECE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of both numbers of images")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--step", choices=("reference", "evaluation", "intervals"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](args.scratch)))
        return

    samples, reference = round(SAMPLES * args.scale), round(REFERENCE * args.scale)
    print(f"{samples:,} samples against {reference:,} references of {FEATURES:,} features, {cores()} cores\n")
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"features": synthetic(samples, 1, 0.05)}, Path(scratch) / "samples.safetensors")
        save_file({"features": synthetic(reference, 0, 0.0)}, Path(scratch) / "reference.safetensors")
        figures = {step: measure_step(step, Path(scratch)) for step in STEPS}
    for step, measurement in figures.items():
        print(f"| {step} | |\n|---|---:|")
        for name, seconds in measurement["seconds"].items():
            print(f"| {name} | {seconds:.1f} s |")
        print(f"| most memory | {measurement['peak'] / 2**30:.2f} GiB |\n")
    if args.json:
        args.json.write_text(json.dumps({"samples": samples, "reference": reference, **figures}, indent=2))


def synthetic(count: int, seed: int, shift: float) -> Tensor:
    """``count`` features, (count, FEATURES) float32, whose standard deviations fall as 1/√k, moved by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, FEATURES + 1).rsqrt() * 5
    pieces = [
        torch.randn(min(PIECE, count - start), FEATURES, generator=generator) * deviations + shift
        for start in range(0, count, PIECE)
    ]
    return torch.cat(pieces)


def measure_step(step: str, scratch: Path) -> dict[str, Any]:
    """The figures of one step, taken in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--scratch", str(scratch)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measurement: dict[str, Any] = json.loads(process.stdout)
    return measurement


class Clock:
    """Seconds of each piece of work, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr)
        return result

    def figures(self) -> dict[str, Any]:
        """With the most memory that this process ever held, in bytes."""
        return {"seconds": self.seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def compute_statistics(scratch: Path) -> dict[str, Any]:
    """Compute and store the statistics of a reference."""
    clock, features = Clock(), load_file(scratch / "reference.safetensors")["features"]
    moments = clock("moments", lambda: compute_moments(features))
    nearest = clock("nearest neighbours", lambda: nearest_distances(features))
    sums = clock("kernels", lambda: kernel_sums(features))
    statistics = {"mean": moments.mean, "root": moments.root, "nearest": nearest, "kernel_sums": sums}
    save_file(statistics, scratch / "statistics.safetensors")
    return clock.figures()


def evaluate(scratch: Path) -> dict[str, Any]:
    """What an evaluation computes: the point values together as ``compute_scores`` does, and their parts."""
    clock, samples = Clock(), load_file(scratch / "samples.safetensors")["features"]
    features = load_file(scratch / "reference.safetensors")["features"]
    statistics = load_file(scratch / "statistics.safetensors")
    moments = {name: statistics.pop(name) for name in ("mean", "root")}
    kernel, neighbours = ({name: statistics[name]} for name in ("kernel_sums", "nearest"))
    real = PreparedReference(features=features, statistics={"kid": kernel, "fd": moments, "overlap": neighbours})
    clock("all point values", lambda: compute_scores(samples, real, "synthetic"))
    clock("  Fréchet distance", lambda: frechet_distance(compute_moments(samples), real.moments))
    clock("  and of endlessly many", lambda: distance_at_infinity(samples, real.moments))
    clock("  KID", lambda: compute_kid(samples, features, kernel["kernel_sums"]))
    nearest = clock("  the samples' neighbours", lambda: nearest_distances(samples))
    clock(
        "  precision, recall, density, coverage",
        lambda: compute_overlap(samples, features, nearest, neighbours["nearest"]),
    )
    return clock.figures()


def intervals(scratch: Path) -> dict[str, Any]:
    """What the errors of figures take, as ``bootstrap.compute_halves`` computes them: by part, and in all.

    Each replicate is a figure on one half of the samples against one half of the reference: two of each cut.
    """
    clock, samples = Clock(), load_file(scratch / "samples.safetensors")["features"]
    features = load_file(scratch / "reference.safetensors")["features"]
    clock("Fréchet distance of halves", lambda: frechet_of_halves([samples], features))
    clock("KID of halves", lambda: kid_of_halves([samples], features))
    clock("precision, recall, density, coverage of halves", lambda: shares_of_halves([samples], features))
    clock.seconds[f"all intervals, {2 * SPLITS} replicates"] = sum(clock.seconds.values())
    return clock.figures()


Step = Literal["reference", "evaluation", "intervals"]
STEPS: dict[Step, Callable[[Path], dict[str, Any]]] = {
    "reference": compute_statistics,
    "evaluation": evaluate,
    "intervals": intervals,
}


if __name__ == "__main__":
    main()
