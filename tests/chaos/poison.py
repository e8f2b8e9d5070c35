"""Files that call themselves images and are not, or not such as anybody should open."""

import os
import pickle
import struct
import zlib
from pathlib import Path

from tests.builders.shapes import disc


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    """A PNG of a few kilobytes that says that it is 60,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def poison(folder: Path, trace: Path) -> list[str]:
    """Put them into ``folder``, of which one makes the folder ``trace`` if it is unpickled; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    disc(0).save(folder / "cut.png")
    files = {
        "bomb.png": bomb(),
        "cut.png": (folder / "cut.png").read_bytes()[:60],
        "empty.png": b"",
        "page.jpg": b"<html>not found</html>",
        "pickle.png": pickle.dumps(Payload(trace)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sorted(files)
