"""Image grids and PNG encoding."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.common.files import write_bytes

if TYPE_CHECKING:  # matplotlib is slow to import, and training needs only grids
    from matplotlib.figure import Figure


def grid(images: Tensor, columns: int | None = None, pad: int = 2, scale: int | None = None) -> Image.Image:
    """Arrange images row by row on a white background.

    Args:
        images: (N, C, H, W) uint8 with C 1 or 3.
        columns: Images per row; default: as square as possible.
        pad: White pixels between and around the images.
        scale: Integer enlargement without smoothing; default: to about 64 pixels.
    """
    count, channels, height, width = images.shape
    columns = columns or max(1, math.ceil(math.sqrt(count)))
    scale = scale or max(1, round(64 / max(height, width)))
    rows = math.ceil(count / columns)
    high, wide = height * scale + pad, width * scale + pad
    sheet = np.full((rows * high + pad, columns * wide + pad, channels), 255, dtype=np.uint8)
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for number, pixels in enumerate(enlarged.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = number // columns * high + pad, number % columns * wide + pad
        sheet[top : top + height * scale, left : left + width * scale] = pixels
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def image_of(image: Tensor) -> Image.Image:
    """Convert ``image``, (C, H, W) uint8 with C 1 or 3, to Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).contiguous().cpu().numpy())


def beside(*sets: Tensor) -> Tensor:
    """Interleave sets of N images, each (N, C, H, W): the first of every set, then the second of every set."""
    return torch.stack(sets, dim=1).flatten(0, 1)


def blocks(small: Tensor, size: int) -> Tensor:
    """Enlarge ``small``, (N, C, h, h), to ``size``, a multiple of h, by repeating pixels."""
    scale = size // small.shape[-1]
    return small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def above(images: Tensor, others: Tensor, columns: int = 8, scale: int | None = None) -> Image.Image:
    """Arrange ``images`` above their counterparts in ``others``, both (N, C, H, W) uint8, in full rows only."""
    columns = min(columns, len(images))
    full = len(images) // columns * columns
    rows = zip(torch.split(images[:full], columns), torch.split(others[:full], columns), strict=True)
    return grid(torch.cat([half for pair in rows for half in pair]), columns, scale=scale)


def png_bytes(image: Image.Image) -> bytes:
    """Encode ``image`` as PNG; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image) -> str:
    """Write ``image`` to ``path`` atomically; returns the file's SHA-256."""
    return write_bytes(path, png_bytes(image))


def figure_png(figure: "Figure", dpi: int = 160) -> bytes:
    """Encode ``figure`` as PNG, without creation time or software version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
