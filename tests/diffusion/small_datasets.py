"""Data sets of random pictures: which of them is in which shard is up to the test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.data.manifest import Manifest
from tests.diffusion.built_datasets import BuiltDataset, kept, quarantined


def random_pictures(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    """(count, channels, size, size) uint8, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def as_stored(picture: np.ndarray) -> np.ndarray:
    """A picture (C, H, W) as (H, W) if C is 1, else as (H, W, C)."""
    return picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0))


def write_dataset(
    folder: Path,
    pictures: np.ndarray,
    per_shard: int,
    labels: Sequence[str | None] | None = None,
    captions: Sequence[str | None] | None = None,
    held_out_every: int = 4,
) -> Manifest:
    """The data set of ``pictures``, (N, C, H, W) uint8, in shards of ``per_shard``.

    Every so many pictures are held out, from the first on; 0: none. Each records table also has a row of a picture
    that was refused.
    """
    labels, captions = labels or [None] * len(pictures), captions or [None] * len(pictures)
    rows = [
        kept(
            as_stored(picture),
            f"{number}.png",
            "held_out" if held_out_every and number % held_out_every == 0 else "train",
            label=labels[number],
            caption=captions[number],
        )
        for number, picture in enumerate(pictures)
    ]
    parts = [[quarantined("x", "damaged"), *rows[at : at + per_shard]] for at in range(0, len(rows), per_shard)]
    return BuiltDataset(folder, pictures.shape[-1], folder.name).version(*parts)
