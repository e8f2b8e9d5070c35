"""Small data sets: of random images, which of them in which shard is up to the test, and of blobs in two classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest
from tests.builders.built_datasets import BuiltDataset, image_record, quarantined
from tests.builders.shapes import blob


def random_images(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    """(count, channels, size, size) uint8, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def as_stored(image: np.ndarray) -> np.ndarray:
    """An image (C, H, W) as (H, W) if C is 1, else as (H, W, C)."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))


def write_dataset(
    folder: Path,
    images: np.ndarray,
    per_shard: int,
    labels: Sequence[str | None] | None = None,
    captions: Sequence[str | None] | None = None,
    held_out_every: int = 4,
) -> Manifest:
    """The data set of ``images``, (N, C, H, W) uint8, in shards of ``per_shard``.

    Every so many images are held out, from the first on; 0: none. Each records table also has a row of an image
    that was quarantined.
    """
    labels, captions = labels or [None] * len(images), captions or [None] * len(images)
    rows = [
        image_record(
            as_stored(image),
            f"{number}.png",
            "held_out" if held_out_every and number % held_out_every == 0 else "train",
            label=labels[number],
            caption=captions[number],
        )
        for number, image in enumerate(images)
    ]
    parts = [[quarantined("x", "damaged"), *rows[at : at + per_shard]] for at in range(0, len(rows), per_shard)]
    return BuiltDataset(folder, images.shape[-1], folder.name).version(*parts)


def write_blobs(root: Path) -> Path:
    """A folder with 2 classes of 24 grey images each, 12×12."""
    for number in range(48):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    return root


def ingest_blobs(images: Path, folder: Path) -> Path:
    """The data set made of these images at 8×8, about a third of it held out."""
    ingest(folder, IngestConfig(source=str(images), size=8, held_out=0.33))
    return folder
