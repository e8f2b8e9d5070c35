"""Images beside their masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest


def two_tone(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    """A grey image of 0 and 255 in blocks of four pixels: it is its own mask."""
    blocks = np.random.default_rng(seed).integers(0, 2, (height // 4, width // 4), np.uint8) * 255
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


def write_masked(root: Path, count: int = 12, first: int = 0, **size: int) -> Path:
    """Images beside masks that are the images again, but for every third, which has none."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image = two_tone(number, **size)
        image.save(root / f"{number:02d}.png")
        if number % 3:
            image.save(root / f"{number:02d}.mask.png")
    return root


def read_masked(folder: Path, source: Path | str, **fields: object) -> IngestResult:
    config = {"source": str(source), "size": 24, "masks": "files", "held_out": 0.3} | fields
    return ingest(folder, IngestConfig.model_validate(config))


def write_watermarked(root: Path, count: int = 64, size: int = 8) -> Path:
    """Dark images with a white mark in their upper left quarter, which their masks leave out."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(20, 60, (size, size), np.uint8)
        mask = np.full((size, size), 255, np.uint8)
        pixels[: size // 2, : size // 2], mask[: size // 2, : size // 2] = 250, 0
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        Image.fromarray(mask).save(root / f"{number:02d}.mask.png")
    return root
