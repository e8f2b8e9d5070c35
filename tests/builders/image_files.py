"""Image files, some made byte by byte for what Pillow cannot write, and what becomes of them in short words."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, prepare

PNG_COLOURS = {"L": 0, "RGB": 2, "P": 3, "LA": 4, "RGBA": 6}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, and steps of both, of each pass."""
SHORT, LONG = 3, 4


def config(size: int = 8, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"size": size} | fields)


def noise(*shape: int, most: int = 255, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most + 1, shape)


def pixels(payload: bytes | Image.Image, **fields: object) -> np.ndarray:
    return prepare(payload, config(**fields)).pixels


def reason(payload: bytes | Image.Image, **fields: object) -> str:
    with pytest.raises(UnusableEntryError) as error:
        prepare(payload, config(**fields))
    return str(error.value)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file that Pillow makes of ``image``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_file(
    samples: np.ndarray,
    mode: str,
    depth: int = 8,
    *,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    filters: Sequence[int] = (0,),
    interlaced: bool = False,
    pieces: int = 1,
) -> bytes:
    """A PNG of ``samples`` (H, W, C): ``filters`` take turns row by row, ``chunks`` come before the pixels."""
    height, width, channels = samples.shape
    rows = []
    for top, left, down, across in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::across]
        if part.size:
            rows.append(_filtered(_packed(part, depth), max(channels * depth // 8, 1), filters))
    data = zlib.compress(b"".join(rows))
    step = -(-len(data) // pieces)
    head = struct.pack(">IIBBBBB", width, height, depth, PNG_COLOURS[mode], 0, 0, int(interlaced))
    idats = [(b"IDAT", data[start : start + step]) for start in range(0, len(data), step)]
    return png_of_chunks([(b"IHDR", head), *chunks, *idats, (b"IEND", b"")])


def png_of_chunks(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG with right checksums, whatever else is wrong with it."""
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _packed(part: np.ndarray, depth: int) -> list[bytes]:
    flat = part.reshape(len(part), -1)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in flat]
    if depth == 8:
        return [row.astype(np.uint8).tobytes() for row in flat]
    bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1)).tobytes() for row in bits]


def _filtered(rows: list[bytes], pixel: int, filters: Sequence[int]) -> bytes:
    out, above = bytearray(), bytes(len(rows[0]))
    for number, row in enumerate(rows):
        kind = filters[number % len(filters)]
        out.append(kind)
        for at, value in enumerate(row):
            left, corner = (row[at - pixel], above[at - pixel]) if at >= pixel else (0, 0)
            up = above[at]
            guess = left + up - corner
            # In this order, in which min takes the first of equals: left, above, upper left.
            paeth = min((left, up, corner), key=lambda near, guess=guess: abs(guess - near))
            out.append((value - (0, left, up, (left + up) // 2, paeth)[kind]) % 256)
        above = row
    return bytes(out)


def tiff_file(width: int, height: int, blocks: Sequence[bytes], order: str = "<", **tags: object) -> bytes:
    """A TIFF of uncompressed ``blocks``; further ``tags`` by number, as t258=(8, 8, 8): short, t258=… ints only."""
    count = len(blocks)
    tiled = "t322" in tags
    offsets = np.cumsum([8, *(len(block) for block in blocks)]).tolist()
    entries: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        259: (1,),
        (324 if tiled else 273): tuple(offsets[:count]),
        (325 if tiled else 279): tuple(len(block) for block in blocks),
    }
    for name, value in tags.items():
        entries[int(name[1:])] = value if isinstance(value, tuple) else (value,)  # type: ignore[assignment]
    directory = offsets[count]
    outside = directory + 2 + 12 * len(entries) + 4
    body, extra = b"", b""
    for tag, values in sorted(entries.items()):
        kind = LONG if tag in (256, 257, 273, 279, 324, 325) else SHORT
        packed = struct.pack(f"{order}{len(values)}{'I' if kind == LONG else 'H'}", *values)
        if len(packed) > 4:
            field, extra = struct.pack(f"{order}I", outside + len(extra)), extra + packed
        else:
            field = packed.ljust(4, b"\0")
        body += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start
        + struct.pack(f"{order}I", directory)
        + b"".join(blocks)
        + struct.pack(f"{order}H", len(entries))
        + body
        + bytes(4)
        + extra
    )


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB with red and blue swapped: what is red by this profile is blue."""
    profile = srgb_profile()
    table = profile[132 : 132 + 12 * struct.unpack_from(">I", profile, 128)[0]]
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    swapped = b"".join(
        names.get(table[at : at + 4], table[at : at + 4]) + table[at + 4 : at + 12] for at in range(0, len(table), 12)
    )
    return profile[:132] + swapped + profile[132 + len(swapped) :]


def linear_grey_profile() -> bytes:
    """Grey whose values are proportional to light."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, 256)})


def press_profile() -> bytes:
    """CMYK whose inks take lightness away in proportion: L* = 100 (1 − 0.6 K) (1 − mean of C, M, Y), and no hue."""
    nodes = b"".join(
        bytes([round(255 * (1 - 0.6 * k) * (1 - (c + m + y) / 3)), 128, 128])
        for c in (0, 1)
        for m in (0, 1)
        for y in (0, 1)
        for k in (0, 1)
    )
    identity = struct.pack(">9i", *(65536 if at % 4 == 0 else 0 for at in range(9)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + nodes + 3 * ramp
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table})


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ " + bytes(4) + d50} | tags
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + d50
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
