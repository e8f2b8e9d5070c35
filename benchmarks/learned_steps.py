"""Learned noise levels for a deterministic sampler: the levels that end nearest to many fine steps.

    python benchmarks/learned_steps.py MODEL.safetensors data/images --steps 6 8 12 16

LD3 (arXiv 2405.15506) in its plain form: DPM-Solver++ (2M) with few steps starts from the same noise as one with
``TEACHER_STEPS``, and the levels between the ends are moved by the gradient of how far its images end from the other's.
Images of other noise are then scored with both grids, by the Fréchet distance of ``quality.py``.
"""

import argparse
from pathlib import Path

import torch
from quality import FrechetScorer
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.random import generator
from diffusion.data.dataset import Dataset
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.process.samplers import Denoise, sampling_config

TEACHER_STEPS, BATCH, LEARNING_RATE = 64, 32, 0.02
"""Steps of the reference, images in a batch, and the rate of Adam."""


def solve(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    """DPM-Solver++ (2M) over ``levels`` (steps,), and to 0 at last, which gradients of the levels flow through."""
    previous: Tensor | None = None
    for place, sigma in enumerate(levels):
        x0 = denoise(x, sigma)
        if place + 1 == len(levels):
            return x0
        ratio, estimate = levels[place + 1] / sigma, x0
        if previous is not None:
            share = ratio.log() / (2 * (sigma / levels[place - 1]).log())
            estimate = (1 + share) * x0 - share * previous
        x, previous = (ratio * x + (1 - ratio) * estimate).float(), x0
    raise ValueError("no levels")


def levels_of(gaps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Levels from ``first`` to ``last``, whose logarithms are apart as the softmax of ``gaps`` says."""
    shares = torch.cat([gaps.new_zeros(1), gaps.softmax(0).cumsum(0)])
    return (first.log() + shares * (last / first).log()).exp()


def batch(model: DiffusionModel, number: int, count: int, sigma: Tensor) -> tuple[Denoise, Tensor]:
    """A denoiser with random classes, and ``count`` images of noise around the mean of the data."""
    rng = generator(0, "learned steps", number)
    noise = torch.from_numpy(rng.standard_normal((count, *model.noise_shape), dtype="float32"))
    classes = model.classes
    conditioning = {"label": torch.from_numpy(rng.integers(0, len(classes), count))} if classes else {}
    mean = model.start(conditioning)
    return model.denoiser(conditioning), sigma.float() * noise + (0 if mean is None else mean.float())


def learn(model: DiffusionModel, grid: Tensor, iterations: int) -> Tensor:
    """Learn levels from those of ``grid`` (steps,), with Adam: (steps,)."""
    fine = sampling_config(sampler="dpmpp_2m", steps=TEACHER_STEPS).sigma_grid(model.schedule)[:-1]
    gaps = (grid[:-1] / grid[1:]).log().log().requires_grad_()
    optimizer = torch.optim.Adam([gaps], LEARNING_RATE)
    mean = torch.zeros_like(gaps)
    for iteration in range(iterations):
        denoise, x = batch(model, iteration, BATCH, grid[0])
        with torch.no_grad():
            target = solve(denoise, x, fine * (grid[0] / fine[0]))
        loss = (solve(denoise, x, levels_of(gaps, grid[0], grid[-1])) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if iteration >= iterations // 2:
            mean += gaps.detach() / (iterations - iterations // 2)
        if iteration % 20 == 0:
            print(f"{iteration}: {loss.item():.5f}", flush=True)
    return levels_of(mean, grid[0], grid[-1])


@torch.no_grad()
def score(model: DiffusionModel, levels: Tensor, count: int, scorer: FrechetScorer) -> float:
    """Fréchet distance of ``count`` images over ``levels``."""
    images = []
    for start in range(0, count, 64):
        denoise, x = batch(model, 10**6 + start, 64, levels[0])
        images.append(solve(denoise, x, levels))
    return scorer.distance(((torch.cat(images) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 8, 12, 16])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/learned-steps"))
    args = parser.parse_args()

    model = load_model(args.model)
    assert isinstance(model, DiffusionModel)
    scorer = FrechetScorer(Dataset.open(args.dataset), args.scratch)
    for steps in args.steps:
        grid = sampling_config(sampler="dpmpp_2m", steps=steps).sigma_grid(model.schedule)[:-1]
        learned = learn(model, grid, args.iterations)
        print(f"{steps} steps:", " ".join(f"{level:.3g}" for level in learned.tolist()))
        distances = [score(model, levels, args.samples, scorer) for levels in (grid, learned)]
        print("Fréchet distance {:.1f}, with learned levels {:.1f}".format(*distances), flush=True)


if __name__ == "__main__":
    main()
