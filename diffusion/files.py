"""Files that appear whole, under their final name, or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file at ``path``, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full_disk(error: BaseException) -> bool:
    """Whether ``error`` says that a disk, or somebody's share of it, is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries that are not written in Python raise types of their own, with the system's words in them.
    return "No space left on device" in str(error) or "disk is full" in str(error)


def canonical_json(value: Any) -> str:
    """``value`` as JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value).encode())


def write_atomically(path: Path, write: Callable[[Path], None]) -> str:
    """Let ``write`` fill a temporary neighbour of ``path``, flush it to disk and rename it into place.

    Returns the SHA-256 of what was written. A crash leaves either the old file or the new one,
    and at most a ``.partial`` file that the next writer of the same path replaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    digest = sha256_file(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return digest


def write_bytes(path: Path, data: bytes) -> str:
    """Write ``data`` to ``path`` atomically; returns its SHA-256."""

    def write(partial: Path) -> None:
        partial.write_bytes(data)

    return write_atomically(path, write)


def write_json(path: Path, value: Any) -> str:
    """Write ``value`` to ``path`` atomically as indented, key-sorted JSON; returns its SHA-256."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, f"{text}\n".encode())


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (POSIX keeps them in the folder's own data)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
