"""Samples of 12 or 16 bits brought to 8, rounded, where Pillow would cut their lower bits off."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

PIXELS_AT_ONCE = 2**20


def has_sixteen_bits(picture: ImageFile) -> bool:
    """Whether the samples in the file of ``picture``, which is not loaded yet, have 12 or 16 bits."""
    deep = (";16", ";12")
    return isinstance(picture, PngImageFile | TiffImageFile) and any(
        mark in _layout(tile.args) for tile in picture.tile for mark in deep
    )


def _layout(args: Any) -> str:
    """The layout of samples in a file, as Pillow names it: the first of a decoder's arguments, or the only one."""
    return str(args[0] if isinstance(args, tuple) else args)


def from_sixteen_bits(picture: ImageFile, open_again: Callable[[], ImageFile]) -> Image.Image:
    """``picture``, not loaded yet, whose samples have 12 or 16 bits, with 8."""
    if _layout(picture.tile[0].args).startswith("RGBa"):
        return picture  # what is lost in dividing by alpha is more than what Pillow cuts off
    made = None
    for top, samples in _bands(picture, open_again):
        transparent = picture.info.get("transparency")
        if transparent is not None:
            opaque = (samples != transparent).any(-1, keepdims=True)
            samples = np.concatenate([samples, opaque * 65535], axis=-1)
        height, width, channels = samples.shape
        mode = picture.mode if picture.mode == "CMYK" else {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        made = made or Image.new(mode, picture.size)
        made.paste(Image.frombytes(mode, (width, height), eight_bits(samples).tobytes()), (0, top))
    if made is None:
        raise ValueError("it has no rows")
    made.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return made


def eight_bits(samples: np.ndarray) -> np.ndarray:
    """The nearest of 0…255 to each of 0…65535."""
    return ((samples + 128) // 257).astype(np.uint8)


def _bands(picture: ImageFile, open_again: Callable[[], ImageFile]) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the samples of some rows at a time, as all would take ten times the memory of the picture.

    Samples are 0…65535, (H, W, C) int32. Where there is more than one channel Pillow cuts off the lower bytes; they are
    had by decoding once more with the two bytes of a sample taken for each other.
    """
    layout = _layout(picture.tile[0].args)
    if picture.mode.startswith("I;16"):
        white_is_zero = isinstance(picture, TiffImageFile) and picture.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
        for top, band in _cut(picture):
            samples = band[..., None]
            if layout == "I;12":
                samples = samples << 4 | samples >> 8
            yield top, 65535 - samples if white_is_zero else samples
    elif layout == "LA;16B":
        for top, both in _cut(_laid_out(picture, "RGBA")):
            yield top, both[..., ::2] << 8 | both[..., 1::2]
    else:
        native = "L" if sys.byteorder == "little" else "B"
        order = layout[-1].replace("N", native)
        swapped = _laid_out(open_again(), layout[:-1] + ("B" if order == "L" else "L"))
        for (top, upper), (_, lower) in zip(_cut(picture), _cut(swapped), strict=True):
            yield top, upper << 8 | lower


def _cut(picture: ImageFile) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the values of some rows at a time, as int32."""
    width, height = picture.size
    rows = max(1, PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        yield top, np.asarray(picture.crop((0, top, width, min(top + rows, height)))).astype(np.int32)


def _laid_out(picture: ImageFile, layout: str) -> ImageFile:
    """``picture``, before it is loaded, with the samples in its file taken for laid out like ``layout``."""
    picture.tile = [
        tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
        for tile in picture.tile
    ]
    return picture
