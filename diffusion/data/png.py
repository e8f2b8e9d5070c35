"""PNG for stored pictures: files of one plain shape, which are decoded many at a time.

Source: W3C, Portable Network Graphics (PNG) Specification, third edition.
"""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = 33
"""Length in bytes of the signature and IHDR."""
END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
NONE, SUB, UP = range(3)
"""Filters: a byte as it is, less the one of the pixel to the left, less the one above."""
TOGETHER = 2**18
"""About how many bytes of pixels are unfiltered at a time, so that they stay in the processor's cache."""
SUMMED = 2**14
"""About how many of them are summed at a time: what takes less than 128 KiB is not new memory of the system's."""


def encode(pixels: np.ndarray) -> bytes:
    """The 8-bit PNG of ``pixels``, uint8 (H, W) for grey or (H, W, 3) for RGB.

    Equal pixels give equal bytes, whatever the machine, given the version of zlib.
    """
    height, width = pixels.shape[:2]
    channels = 3 if pixels.ndim == 3 else 1
    # Runs are all that the compressor looks for: that takes two thirds of the time that its fastest level takes,
    # and makes photographs smaller than that does, by 3 %. Drawings, which repeat themselves, lose as much.
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    data = (
        compressor.compress(_filtered(pixels.reshape(height, width * channels), channels).tobytes())
        + compressor.flush()
    )
    return _header(channels, height, width) + _chunk(b"IDAT", data) + END


def _filtered(values: np.ndarray, channels: int) -> np.ndarray:
    """Each row of ``values``, (H, W·C), behind the number of its filter: (H, 1 + W·C).

    The filter of a row is the one whose bytes, taken as signed, are nearest to 0. Only those three are used that can
    be undone for many pixels at a time; the other two save 3 % of a photograph.
    """
    tried = np.stack([values, values, values])
    tried[SUB, :, channels:] -= values[:, :-channels]
    tried[UP, 1:] -= values[:-1]
    # The magnitude of -128 does not fit int8: it wraps round, and is right as uint8.
    best = np.abs(tried.view(np.int8)).view(np.uint8).sum(-1, dtype=np.uint32).argmin(0)
    return np.concatenate([best[:, None].astype(np.uint8), tried[best, np.arange(len(best))]], axis=1)


def _header(channels: int, height: int, width: int) -> bytes:
    """The first 33 bytes of an 8-bit PNG without interlacing, grey (1 channel) or RGB (3)."""
    return SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def decode_many(pngs: Sequence[bytes | memoryview], shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of ``pngs``, each of ``shape`` (C, H, W), as (N, C, H, W) uint8; a grey one is repeated over RGB.

    Any PNG of that shape will do, but files as ``encode`` writes them are decoded much faster, without a look at the
    checksums of their chunks: the compressed rows have one of their own. ``shape`` bounds the memory that is taken,
    whatever the files say. Raises ValueError, saying what is wrong, for a file that is damaged or of another shape.
    """
    channels, height, width = shape
    out = np.empty((len(pngs), *shape), np.uint8)
    headers = {_header(each, height, width): each for each in (1, channels)}
    step = max(TOGETHER // (channels * height * width), 16)
    for start in range(0, len(pngs), step):
        plain: dict[int, dict[int, bytes]] = {each: {} for each in headers.values()}
        for number, png in enumerate(pngs[start : start + step], start):
            data = bytes(png)
            found = headers.get(data[:HEADER])
            rows = _plain_rows(data, height, width * found) if found else None
            if found and rows:
                plain[found][number] = rows
            else:
                out[number] = _decode(data, shape)
        for each, some in plain.items():
            if some:
                out[list(some)] = _unfiltered(b"".join(some.values()), each, height, width)
    return out


def _plain_rows(png: bytes, height: int, width: int) -> bytes | None:
    """The filtered rows, ``width`` bytes each behind the filter's, if ``png`` is such a file as ``encode`` writes."""
    begin = HEADER + 8
    if len(png) < begin:
        return None
    size, kind = struct.unpack_from(">I4s", png, HEADER)
    if kind != b"IDAT" or png[begin + size + 4 :] != END:
        return None
    length = height * (1 + width)
    inflater = zlib.decompressobj()
    try:
        # One byte more, without which it would stop before the checksum at the end.
        rows = inflater.decompress(memoryview(png)[begin : begin + size], length + 1)
    except zlib.error:
        return None
    whole = inflater.eof and len(rows) == length
    return rows if whole and max(rows[:: 1 + width]) <= UP else None


def _unfiltered(rows: bytes, channels: int, height: int, width: int) -> np.ndarray:
    """The pixels of filtered rows, (N, H, 1 + W·C) bytes, as (N, C, H, W)."""
    filtered = np.frombuffer(rows, np.uint8).reshape(-1, height, 1 + width * channels).swapaxes(0, 1)
    filters = filtered[:, :, 0]
    # Rows first, then pictures: what is done to a row is done to those of all the pictures at once.
    values = np.empty((*filters.shape, channels, width), np.uint8)
    for channel in range(channels):
        values[:, :, channel] = filtered[:, :, 1 + channel :: channels]
    lines = values.reshape(-1, channels, width)
    left, step = np.flatnonzero(filters == SUB), max(SUMMED // (channels * width), 1)
    for start in range(0, len(left), step):
        some = left[start : start + step]
        # numpy sums integers of 32 bits three times as fast as those of 8; what is more than a byte is cut off.
        lines[some] = np.cumsum(lines[some], axis=-1, dtype=np.uint32)
    above = (filters == UP).astype(np.uint8)[..., None, None]
    for y in range(1, height):
        values[y] += values[y - 1] * above[y]
    return values.transpose(1, 2, 0, 3)


def _decode(png: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Any PNG of ``shape``, as (C, H, W)."""
    channels, height, width = shape
    if not png.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    try:
        # Not by Image.open, which warns of large pictures, where the shape is the limit.
        picture: Image.Image = PngImageFile(io.BytesIO(png))
        if picture.size != (width, height):
            raise ValueError(f"{picture.width}×{picture.height} pixels instead of {width}×{height}")
        grey = picture.mode in ("1", "L", "LA", "I;16")
        if channels == 1 and not grey:
            raise ValueError(f"colours ({picture.mode}) instead of grey")
        if picture.mode == "I;16":  # Pillow would cut off what is over 255
            picture = Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
        pixels = np.asarray(picture.convert("L" if grey else "RGB"))
        # Decoding looks at no checksum.
        PngImageFile(io.BytesIO(png)).verify()
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"not a whole PNG: {error}") from error
    return pixels.reshape(height, width, -1).transpose(2, 0, 1)
