"""Files that appear whole, under their final name, or not at all."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

PARTIAL = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.partial|\.tmp[A-Za-z0-9]{6}")
"""What files are called until they are whole: each writer has a name of its own. Safetensors has the second kind."""


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

    Returns the SHA-256 of what was written; of several writers at once the last one's file stays. An exception leaves
    what was there, a kill also a ``.partial`` file, for ``remove_partials`` or ``darkroom gc`` to take away.
    """
    make_folder(path.parent)
    # Not a fixed name: two who write the same path at once would tear each other's file.
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(partial)
        digest = sha256_file(partial)
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return digest


def remove_partials(folder: Path) -> None:
    """Take away what killed writers left anywhere in ``folder``, of which the caller is the only writer now."""
    for path in folder.rglob(".*"):
        if PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_bytes(path: Path, data: bytes) -> str:
    """Write ``data`` to ``path`` atomically; returns its SHA-256."""

    def write(partial: Path) -> None:
        partial.write_bytes(data)

    return write_atomically(path, write)


def write_json(path: Path, value: Any) -> str:
    """Write ``value`` to ``path`` atomically as indented, key-sorted JSON; returns its SHA-256."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, f"{text}\n".encode())


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make ``folder`` and those above it, as far as they are missing, so that a power cut does not take them away.

    ``mode``: who may do what with ``folder`` itself, if it is new.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode, exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Make what was written to the file at ``path`` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (POSIX keeps them in the folder's own data)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
