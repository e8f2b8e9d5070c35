"""Images that are not square, and the data set of their buckets."""

from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest

SIZES = [(48, 24)] * 14 + [(24, 48)] * 9 + [(32, 32)] * 6 + [(82, 50)] * 12
"""Width and height of the images; the last ones fit no bucket exactly."""
BUCKETS = ("48x24", "24x48", "32x32")


def rectangle(number: int, width: int, height: int) -> Image.Image:
    """Colours that tell the image by its blue channel, and the place in it by the others."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 250, width), np.linspace(0, 250, height)[:, None]
    pixels[..., 2] = 3 * number
    return Image.fromarray(pixels)


def write_rectangles(folder: Path) -> Path:
    """Write one image of each of SIZES to a new ``folder``."""
    folder.mkdir()
    for number, size in enumerate(SIZES):
        rectangle(number, *size).save(folder / f"{number:02d}.png")
    return folder


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 32, "fit": "bucket", "held_out": 0.3} | fields)


def bucketed_set(root: Path) -> Path:
    """The data set of ``write_rectangles`` in buckets of half the sides of BUCKETS."""
    pictures, buckets = write_rectangles(root / "pictures"), ("24x12", "12x24", "16x16")
    ingest(root / "bucketed", config(pictures, size=16, buckets=buckets))
    return root / "bucketed"
