"""Contact sheets, many small images as one that can be looked at, and how images become PNG files."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.common.files import write_bytes

if TYPE_CHECKING:  # matplotlib is slow to load, and training draws only grids
    from matplotlib.figure import Figure


def grid(images: Tensor, columns: int | None = None, pad: int = 2, scale: int | None = None) -> Image.Image:
    """Lay out ``images``, (N, C, H, W) uint8 with C 1 or 3, row by row on a white sheet.

    ``columns``: default as square as possible. ``pad``: white pixels between and around the images.
    ``scale``: whole-number enlargement without smoothing; default: images of some 64 pixels.
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
    """``image``, (C, H, W) uint8 with C 1 or 3."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).contiguous().cpu().numpy())


def beside(*sets: Tensor) -> Tensor:
    """Sets of as many images, each (N, C, H, W), as one in which those of a number stand together."""
    return torch.stack(sets, dim=1).flatten(0, 1)


def blocks(small: Tensor, size: int) -> Tensor:
    """``small``, (N, C, h, h), at ``size``, a multiple of h: each pixel a block, as it is."""
    scale = size // small.shape[-1]
    return small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def above(images: Tensor, others: Tensor, columns: int = 8, scale: int | None = None) -> Image.Image:
    """``images``, each above its counterpart in ``others``, both (N, C, H, W) uint8, as far as rows are full."""
    columns = min(columns, len(images))
    full = len(images) // columns * columns
    rows = zip(torch.split(images[:full], columns), torch.split(others[:full], columns), strict=True)
    return grid(torch.cat([half for pair in rows for half in pair]), columns, scale=scale)


def png_bytes(image: Image.Image) -> bytes:
    """``image`` as the bytes of a PNG file; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image) -> str:
    """Write ``image`` to ``path`` atomically; returns the file's SHA-256."""
    return write_bytes(path, png_bytes(image))


def figure_png(figure: "Figure", dpi: int = 160) -> bytes:
    """``figure`` as the bytes of a PNG file, without the time or the version that drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
