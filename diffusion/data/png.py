"""PNG for stored pictures: a plain shape of file that many pictures at a time are decoded from."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = 33
"""Length in bytes of the signature and IHDR."""
DATA = HEADER + 8
"""Where the data of the first chunk after IHDR begins."""
UP = 2
"""Number of the filter that stores each byte as its difference from the one above."""
LEVEL = 1


def encode(pixels: np.ndarray) -> bytes:
    """The 8-bit PNG of ``pixels``, (H, W) for grey or (H, W, 3) for RGB: equal pixels and zlibs give equal bytes."""
    height, width = pixels.shape[:2]
    values = np.ascontiguousarray(pixels).reshape(height, -1)
    rows = np.empty((height, 1 + values.shape[1]), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    data = zlib.compress(rows, LEVEL)
    return header(3 if pixels.ndim == 3 else 1, height, width) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def header(channels: int, height: int, width: int) -> bytes:
    """The first 33 bytes of an 8-bit PNG without interlacing, grey (1 channel) or RGB (3)."""
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG: length, kind, data, CRC."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def decode_many(pngs: Sequence[bytes | memoryview], shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of ``pngs``, each of ``shape`` (C, H, W), as (N, C, H, W) uint8; a grey one is repeated over RGB.

    Raises ValueError, saying what is wrong, for one that is damaged or of another shape.
    """
    channels, height, width = shape
    out = np.empty((len(pngs), channels, height, width), np.uint8)
    for number, png in enumerate(pngs):
        out[number] = _decode(bytes(png), shape).transpose(2, 0, 1)
    return out


def _decode(png: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = shape
    try:
        picture = Image.open(io.BytesIO(png), formats=("PNG",))
        if picture.size != (width, height):
            raise ValueError(f"{picture.width}×{picture.height} pixels instead of {width}×{height}")
        return np.asarray(picture.convert("RGB" if channels == 3 else "L")).reshape(height, width, channels)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a whole PNG: {error}") from error
