"""How well holes are filled: Darkroom with a model trained for none of it, the mean picture, the nearest picture.

    python benchmarks/inpainting.py data/digits runs/digits/final.safetensors

A square of half the width is cut out of the middle of held-out pictures. ``mean`` fills it with the mean of the
training pictures, ``nearest`` with that of the training picture most alike around it; ``replacement`` and ``repaint``
are Darkroom's two schemes. What counts is the Fréchet distance of the whole pictures to the real ones, on
EfficientNet-Lite0's features at 64 px; the floor is that of the pictures before anything was cut out. ``missed`` is how
far the features of a filled picture lie from those of its own original, on average.
"""

import argparse
import time
from pathlib import Path

import torch
from quality import Judge
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.editing import keeping, repaint
from diffusion.fingerprint import autocast
from diffusion.grids import grid, save_png
from diffusion.model import DiffusionModel, load_model, to_float, to_uint8
from diffusion.random import GaussianNoise
from diffusion.samplers import levels_of, make_sampler

SHOWN = 8
BATCH = 64
MOST_COMPARED = 20_000
"""Training pictures among which the nearest is sought."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--times", type=int, default=5, help="of repaint")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality/inpainting"))
    parser.add_argument("--picture", type=Path, help="where to draw some of the pictures, a row for each way (PNG)")
    args = parser.parse_args()

    dataset, model = Dataset.open(args.dataset), load_model(args.model)
    assert isinstance(model, DiffusionModel)
    originals = dataset.pictures(dataset.rows("held_out")[: args.count])
    training = dataset.pictures(dataset.rows("train")[:MOST_COMPARED])
    size = originals.shape[-1]
    kept = torch.ones(size, size, dtype=torch.bool)
    kept[size // 4 : size - size // 4, size // 4 : size - size // 4] = False

    def painted(times: int) -> Tensor:
        """Each hole filled once, in batches."""
        config, filled = SamplingConfig(), []
        sampler, levels = make_sampler(config), levels_of(config, model.schedule)
        for numbers in torch.arange(len(originals)).split(BATCH):
            noise, known = GaussianNoise(0, "sampling", numbers.tolist(), model.shape), to_float(originals[numbers])
            denoise = keeping(model.denoiser(), known, kept)
            with torch.inference_mode(), autocast(config.precision, torch.device("cpu")):
                filled.append(repaint(sampler, denoise, known + float(levels[0]) * noise(), levels, noise, times=times))
        return to_uint8(torch.cat(filled))

    mean = training.float().mean(0).round().to(torch.uint8)
    ways = {
        "mean": lambda: torch.where(kept, originals, mean),
        "nearest": lambda: torch.where(kept, originals, training[nearest(originals, training, kept)]),
        "replacement": lambda: painted(1),
        f"repaint, {args.times} times": lambda: painted(args.times),
    }
    judge = Judge(dataset, args.scratch)
    ours = judge.extractor(originals)

    shown = [originals[:SHOWN], torch.where(kept, originals, torch.tensor(128, dtype=torch.uint8))[:SHOWN]]
    print(
        f"{len(originals)} pictures, Fréchet distance; with nothing cut out {judge.distance(originals.numpy()):.0f}\n"
    )
    print("| | Fréchet distance | missed | seconds a picture |\n|---|---:|---:|---:|")
    for name, way in ways.items():
        began = time.perf_counter()
        filled = way()
        seconds = (time.perf_counter() - began) / len(filled)
        missed = (judge.extractor(filled) - ours).norm(dim=1).mean()
        print(f"| {name} | {judge.distance(filled.numpy()):.0f} | {missed:.2f} | {seconds:.3f} |", flush=True)
        shown.append(filled[:SHOWN])
    if args.picture:
        save_png(args.picture, grid(torch.cat(shown), columns=SHOWN))


def nearest(pictures: Tensor, training: Tensor, kept: Tensor) -> Tensor:
    """The number of the training picture that is nearest to each picture where it is ``kept``: (len(pictures),)."""
    ours, theirs = (each[..., kept].flatten(1).float() for each in (pictures, training))
    return torch.cat([torch.cdist(part, theirs).argmin(1) for part in ours.split(64)])


if __name__ == "__main__":
    main()
