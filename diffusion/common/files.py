"""Atomic file writes, SHA-256 digests and canonical JSON."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import Any, TypeGuard
from uuid import uuid4

from diffusion.common.errors import UserError

PARTIAL = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.partial|\.tmp[A-Za-z0-9]{6}")
"""Names of incomplete files, unique for each writer; the second form is safetensors'."""


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file at ``path``, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FULL_DISK = re.compile(
    "No space left on device|Disk quota exceeded|disk is full|failed to offload data block", re.IGNORECASE
)
"""What the system, SQLite and DuckDB say of a full disk, in errors of native libraries and of other processes."""


def is_full_disk(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it was raised from or holds, reports a full disk or an exceeded disk quota."""
    if error is None:
        return False
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or FULL_DISK.search(str(error)):
        return True
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(map(is_full_disk, (error.__cause__, *parts)))


def canonical_json(value: Any) -> str:
    """Serialize ``value`` as JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value).encode())


def write_atomically(path: Path, write: Callable[[Path], object]) -> str:
    """Write a temporary file beside ``path`` with ``write``, flush it to disk and rename it to ``path``.

    Of several concurrent writers the last one wins. An exception leaves the previous file in place; a killed process
    also leaves a ``.partial`` file, which ``remove_partials`` and ``darkroom gc`` delete. Returns the file's SHA-256.
    """
    make_folder(path.parent)
    # A unique name, since concurrent writers of one path would corrupt a shared file.
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


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Context with a folder in the system's temporary folder; those of processes that were killed are removed first."""
    # With the host's name, as containers may share the folder, and not the numbers of processes.
    prefix = f"darkroom-process-{platform.node()}-"
    for path in Path(gettempdir()).glob(f"{prefix}*-*"):
        try:
            os.kill(int(path.name.removeprefix(prefix).partition("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError, OverflowError):  # of another user
            continue
    with TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def remove_partials(folder: Path) -> None:
    """Delete the incomplete files of killed writers under ``folder``; the caller must be its only writer."""
    for path in folder.rglob(".*"):
        if PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_bytes(path: Path, data: bytes) -> str:
    """Write ``data`` to ``path`` atomically; returns its SHA-256."""
    return write_atomically(path, lambda partial: partial.write_bytes(data))


def write_json(path: Path, value: Any) -> str:
    """Write ``value`` to ``path`` atomically as indented, key-sorted JSON; returns its SHA-256."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, f"{text}\n".encode())


def sibling(path: Path, suffix: str) -> Path:
    """Path beside a file or folder whose name is the name of ``path`` with ``suffix``."""
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}{suffix}")


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create ``folder``, with the permissions ``mode``, and its missing parents: they survive a power failure."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode, exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Flush the file at ``path`` to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush renames inside ``folder`` to disk (POSIX stores them in the folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path, option: str) -> None:
    """Raise UserError that names the ``option`` if ``path`` is not a folder to write to, and cannot be made one."""
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file: give the path of a folder")
    try:
        # Permission bits say little on network file systems, and to root.
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option}: nothing can be written to {folder} ({error.strerror}): give another folder"
        ) from error


def is_model_file(model: str | None) -> TypeGuard[str]:
    """Whether ``model`` is the path of a model file, and not the URI of a registered one."""
    return model is not None and model.endswith(".safetensors")
