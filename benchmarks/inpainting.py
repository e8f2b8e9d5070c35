"""Inpainting quality: Darkroom with an unconditional model, the mean image, and the nearest image.

    python benchmarks/inpainting.py data/photographs runs/photographs/final.safetensors --of data/others

A square of half the width is cut out of the middle of images: held-out ones, or with ``--of`` those of another data
set, which neither the model nor the nearest image can know. ``mean`` fills it with the mean of the training images,
``nearest`` with that of the most similar training image around it; the others are Darkroom's methods. Metric is the
Fréchet distance to real images on EfficientNet-Lite0's features at 64 px, of whole images and of the hole with a
border of two pixels. ``missed`` is how far the features of a filled image lie from those of its own original, on
average.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quality import FEATURES_AT
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from diffusion.checkpoints import load_model
from diffusion.common.fingerprint import autocast
from diffusion.common.image_grids import make_grid, save_png
from diffusion.common.random import GaussianNoise
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_float, to_uint8
from diffusion.process.denoiser import clip_estimates
from diffusion.process.editing import fill_hole, pigdm, repaint, replace_known
from diffusion.process.samplers import Denoise, sampling_config

SHOWN = 8
BATCH = 64
MAX_COMPARED = 20_000
"""Training images among which the nearest is sought, and real ones that distances are to."""
BORDER = 2
"""Pixels around the hole that are evaluated with it."""


class InpaintingScorer:
    """Scores of filled images beside ``real`` ones, (N, C, H, W) uint8, and beside their ``originals``."""

    def __init__(self, real: Tensor, originals: Tensor) -> None:
        self.extractor = EfficientNetLite0(FEATURES_AT)
        self.real = fid_features_to_statistics(self.extractor(real))
        self.originals = self.extractor(originals)

    def score(self, images: Tensor) -> tuple[float, float]:
        """Fréchet distance from the real ones, and mean distance from the own original."""
        features = self.extractor(images)
        statistics = fid_features_to_statistics(features)
        distance = fid_statistics_to_metric(statistics, self.real, verbose=False)[KEY_METRIC_FID]
        return float(distance), float((features - self.originals).norm(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--of", type=Path, help="a data set whose images get the holes")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--image", type=Path, help="where to draw some of the images, a row for each method (PNG)")
    args = parser.parse_args()

    dataset, model = Dataset.open(args.dataset), load_model(args.model)
    assert isinstance(model, DiffusionModel)
    training = dataset.images(dataset.rows("train")[:MAX_COMPARED])
    if args.of:
        others = Dataset.open(args.of)
        real = others.images(others.rows("train")[:MAX_COMPARED])
        originals = real[: args.count]
    else:
        real, originals = training, dataset.images(dataset.rows("held_out")[: args.count])
    size = originals.shape[-1]
    hole = slice(size // 4, size - size // 4)
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[hole, hole] = False

    mean = training.float().mean(0).round().to(torch.uint8)
    methods: dict[str, Callable[[], Tensor]] = {
        "nothing cut out": lambda: originals,
        "mean": lambda: torch.where(mask, originals, mean),
        "nearest": lambda: torch.where(mask, originals, training[nearest(originals, training, mask)]),
        "replacement": lambda: inpaint(model, originals, mask),
        "`repaint`": lambda: inpaint(model, originals, mask, resample_steps=5),
        "`pigdm`": lambda: inpaint(model, originals, mask, guided=True),
        "`pigdm`, `resample_steps` 3": lambda: inpaint(model, originals, mask, resample_steps=3, guided=True),
    }
    around = slice(hole.start - BORDER, hole.stop + BORDER)
    whole = InpaintingScorer(real, originals)
    inside = InpaintingScorer(real[..., around, around], originals[..., around, around])
    rows = [torch.where(mask, originals, torch.tensor(128, dtype=torch.uint8))[:SHOWN]]
    print(f"{len(originals)} images")
    print("| | whole: distance | missed | hole: distance | missed | seconds an image |\n|---|---:|---:|---:|---:|---:|")
    for name, fill in methods.items():
        start = time.perf_counter()
        images = fill()
        seconds = (time.perf_counter() - start) / len(images)
        figures = (*whole.score(images), *inside.score(images[..., around, around]))
        print(
            f"| {name} | {figures[0]:.0f} | {figures[1]:.1f} | {figures[2]:.0f} | {figures[3]:.1f} | {seconds:.3f} |",
            flush=True,
        )
        rows.append(images[:SHOWN])
    if args.image:
        save_png(args.image, make_grid(torch.cat(rows), columns=SHOWN))


def inpaint(
    model: DiffusionModel, originals: Tensor, mask: Tensor, resample_steps: int = 1, guided: bool = False
) -> Tensor:
    """Fill each of ``originals`` (N, C, H, W) once where ``mask`` (H, W) is false, in batches."""
    config, batches = sampling_config(), []
    sampler, levels = config.build_sampler(), config.sigma_grid(model.schedule)
    for numbers in torch.arange(len(originals)).split(BATCH):  # type: ignore[no-untyped-call]
        noise = GaussianNoise(0, "sampling", numbers.tolist(), model.shape)
        known = to_float(fill_hole(originals[numbers], mask))
        denoise: Denoise = model.denoiser()
        if guided:
            denoise = clip_estimates(pigdm(denoise, known, mask, model.header.sigma_data))
        denoise = replace_known(denoise, known, mask)
        with torch.inference_mode(), autocast(config.precision, torch.device("cpu")):
            batches.append(
                repaint(
                    sampler, denoise, known + float(levels[0]) * noise(), levels, noise, resample_steps=resample_steps
                )
            )
    return to_uint8(torch.cat(batches))


def nearest(images: Tensor, training: Tensor, mask: Tensor) -> Tensor:
    """The number of the training image that is nearest to each image where ``mask`` is true: (len(images),)."""
    ours, theirs = (each[..., mask].flatten(1).float() for each in (images, training))
    return torch.cat([torch.cdist(part, theirs).argmin(1) for part in ours.split(64)])  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
