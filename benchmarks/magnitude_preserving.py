"""Ablation: layers that keep the magnitude of activations (EDM2, arXiv 2312.02696) in the place of group norm.

    python benchmarks/magnitude_preserving.py
    python benchmarks/magnitude_preserving.py --images emoji.tar.gz --seen 32512 --samples 512

The default network trains twice on as many images: as it is, and with its layers replaced. Embeddings and the
optimizer, Muon, stay as they are, and filters are normalised where they are used, not after each step as well
(equation 66). The metric is the Fréchet distance of ``quality.py``, and the cost is processor time; what was trained
lies in ``--scratch`` and is not trained again. Darkroom reads no model files of the second network.
"""

import argparse
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, chdir
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quality import FrechetScorer, workspace_of
from torch import Tensor, nn
from torch.nn import functional

import diffusion
from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.families import layers
from diffusion.families.ddpm import network as unet
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config

RESIDUAL = 0.3
"""Share t of the residual branch in a sum of unit variance (EDM2, equation 88)."""
SILU = 0.596
"""Root mean square of SiLU of Gaussian values (equation 81)."""
TINY = 1e-4


def unit(x: Tensor, dim: int) -> Tensor:
    """Scale ``x`` to a mean square of 1 over ``dim``."""
    return x * (x.float().square().mean(dim, keepdim=True) + TINY).rsqrt().to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Compute SiLU, scaled to keep the magnitude."""
    return functional.silu(x) / SILU


def add(x: Tensor, residual: Tensor) -> Tensor:
    """Add with the weights 1 − t and t, scaled to keep the magnitude."""
    return torch.lerp(x, residual, RESIDUAL) / math.hypot(1 - RESIDUAL, RESIDUAL)


class Convolution(nn.Conv2d):
    """Convolution without bias, whose filters have length 1 (equation 47)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        with torch.no_grad():
            self.weight.normal_().div_(self.weight.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W), or with a stride smaller."""
        length = self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return functional.conv2d(x, self.weight / (length + TINY), None, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Residual block; where the number of channels stays, its input is scaled at each position."""

    def __init__(self, inputs: int, outputs: int, embedding: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.normalised = inputs == outputs
        self.conv1, self.conv2 = Convolution(inputs, outputs, 3), Convolution(outputs, outputs, 3)
        self.modulation, self.gain = nn.Linear(embedding, outputs), nn.Parameter(torch.zeros(()))
        self.skip = nn.Identity() if self.normalised else Convolution(inputs, outputs, 1)
        self.attention = SelfAttention(outputs, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, inputs, H, W) and (N, embedding) to (N, outputs, H, W)."""
        x = unit(x, 1) if self.normalised else x
        h = self.conv1(silu(x))
        scale = self.modulation(embedding)[:, :, None, None] * self.gain + 1
        out: Tensor = self.attention(add(self.skip(x), self.conv2(silu(h * scale.to(h.dtype)))))
        return out


class SelfAttention(nn.Module):
    """Self-attention by cosines."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = Convolution(channels, 3 * channels, 1), Convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        qkv = unit(self.qkv(x).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads), -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return add(x, self.out(unet.attend(query, key, value).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)))


class Downsample(unet.Downsample):
    """Downsampling by a factor of 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = Convolution(channels, channels, 3, stride=2)


class Upsample(layers.Upsample):
    """Upsampling by a factor of 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = Convolution(channels, channels, 3)


class Normalisation(nn.Module):
    """In the place of the last group norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Scale each position of (N, C, H, W)."""
        return unit(x, 1)


LAYERS = (ResidualBlock, SelfAttention, Downsample, Upsample)


def main() -> None:
    replaced: dict[str, type[nn.Module]] = {
        f"diffusion.families.ddpm.network.{layer.__name__}": layer for layer in LAYERS
    }
    replaced["diffusion.families.ddpm.network.normalisation"] = Normalisation
    compare(__doc__, "group-norm", "magnitude-preserving", replaced)


def compare(
    description: str,
    name: str,
    other: str,
    replaced: Mapping[str, object],
    settings: Mapping[str, Any] | None = None,
    both: Mapping[str, Any] | None = None,
) -> None:
    """Train the default network, ``name``, and the ``other``, for which ``replaced`` says what stands in what place.

    ``settings`` are those of the other training alone, ``both`` those of either.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a source to train on; default: Fashion-MNIST, padded to 32×32")
    parser.add_argument("--size", type=int, default=64, help="of its images")
    parser.add_argument("--seen", type=int, default=92_160, help="images to see")
    parser.add_argument("--other-seen", type=int, help="for the other, if its steps take another time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.images, args.size).resolve()
    scorer = FrechetScorer(Dataset.open(workspace / "data" / "images"), workspace)
    rows: list[tuple[str, int, Mapping[str, object], Mapping[str, Any]]] = [
        (name, args.seen, {}, both or {}),
        (other, args.other_seen or args.seen, replaced, {**(both or {}), **(settings or {})}),
    ]
    for seed, (each, seen, changes, fields) in product(args.seeds, rows):
        with ExitStack() as stack:
            stack.enter_context(chdir(workspace))
            for place, change in changes.items():
                stack.enter_context(mock.patch(place, change))
            output = Path("runs", f"{each}-{seen}-{seed}")
            before, start = time.process_time(), time.perf_counter()
            run = diffusion.train("images", images=seen, seed=seed, output=os.fspath(output), **fields)
            cpu, seconds = time.process_time() - before, time.perf_counter() - start
            model = load_model(run.final)
            distances = [
                scorer.distance(sample(model, range(args.samples), seed, sampling_config()).numpy()) for seed in (0, 1)
            ]
        print(f"{each:20} seed {seed}: {distances[0]:.0f}, {distances[1]:.0f}", end="  ")
        print(f"{seen:,} images in {cpu:.0f} s of processor time, {seconds:.0f} s", flush=True)
