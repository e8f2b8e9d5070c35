"""Local files: read within limits, matched by patterns, unpacked once for all workers."""

import bz2
import errno
import glob
import gzip
import lzma
import os
import shutil
import stat
import zlib
from collections.abc import Callable
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from braceexpand import braceexpand
from filelock import FileLock

from diffusion.common.config import MAX_NAME_LENGTH
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sync_file
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import MISSING, Access, Payload, too_large_error

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
NEVER = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
"""Permanent errors."""
LEADS_OUT = "a link out of the folder: put a copy in its place"
"""Reason why a file of a folder is not read."""
WILD = "*?["
MAX_NAMES = 2**16
"""Maximum number of names that the braces of a pattern stand for; patterns may come from the card of a data set."""
RESERVE, RESERVED_SHARE = 2**30, 0.05
"""Bytes that unpacking leaves free on the disk, and the share of a smaller disk: data may be crafted to fill any."""
PACKED: dict[str, Callable[[Path], object]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def stamp(status: os.stat_result) -> str:
    """Return a stamp that differs if a file may have changed: its size and time."""
    return f"{status.st_size}:{status.st_mtime_ns}"


def stamp_of(path: Path) -> str:
    """Return the stamp of a file; raises UserError if it does not exist."""
    try:
        return stamp(path.stat())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error


def stamp_if_exists(path: Path) -> str:
    """Return the stamp of a file, or an empty one if it does not exist, which reading it reports."""
    try:
        return stamp(path.stat())
    except OSError:
        return ""


def resolve_in(root: Path, path: Path) -> str | None:
    """Return the real path of a file of the folder ``root``; None if a link leads out of it."""
    real, top = os.path.realpath(path), os.path.realpath(root).rstrip("/")
    return real if real.startswith(f"{top}/") else None


def open_file(path: Path, root: Path | None) -> BinaryIO:
    """Open a regular file, below the folder ``root`` unless that is None; raises UnusableEntryError for any other.

    Links are resolved first, and what has become a link since then is not followed. A folder on its way that is
    replaced by a link at that moment is.
    """
    real = str(path) if root is None else resolve_in(root, path)
    if real is None:
        raise UnusableEntryError(LEADS_OUT)
    # A pipe without a writer would wait for one.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if root is None else os.O_NOFOLLOW)
    descriptor = os.open(real, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnusableEntryError("not a plain file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, limit: int, root: Path | None = None) -> Payload:
    """Read a file, of the folder ``root`` if given.

    The reason why not if it is missing, not a regular file, forbidden, outside of ``root``, or larger than ``limit``
    bytes.
    """
    try:
        with open_file(path, root) as file:
            size = os.fstat(file.fileno()).st_size
            return too_large_error(size, limit) if size > limit else file.read(size)
    except UnusableEntryError as error:
        return error
    except (FileNotFoundError, NotADirectoryError):
        return UnusableEntryError(MISSING)
    except OSError as error:
        if error.errno not in NEVER:
            raise
        return UnusableEntryError(f"cannot be read: {error.strerror}")


def open_unchanged(path: Path, file_stamp: str) -> BinaryIO | None:
    """Open ``path`` for reading; None if it is gone. Raises UserError if its stamp differs from ``file_stamp``."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if stamp(os.fstat(file.fileno())) != file_stamp:
        file.close()
        raise changed_file_error(str(path))
    return file


def changed_file_error(where: str) -> UserError:
    """Return the error for a file that has changed since it was listed."""
    return UserError(f"{where} has changed since it was listed: run the ingest again")


def open_text(path: Path, root: Path | None = None) -> TextIO:
    """Open a text table for reading, of the folder ``root`` if given, or else of any kind, such as a pipe."""
    try:
        file = path.open("rb") if root is None else open_file(path, root)
        return TextIOWrapper(file, newline="", encoding="utf-8-sig")
    except UnusableEntryError as error:
        raise UserError(f"{path} cannot be read: it is {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error


def literal_prefix(pattern: str, signs: str = f"{WILD}{{") -> str:
    """Return the part of ``pattern`` before its first wildcard."""
    return pattern[: min((pattern.index(sign) for sign in signs if sign in pattern), default=len(pattern))]


def find_files(pattern: str, suffix: str) -> list[tuple[str, Path]]:
    """Return names and paths of the files that match ``pattern``, sorted by name.

    It is a file, a folder (all files below it that end in ``suffix``), a glob, or has ``{00..42}`` or ``{a,b}`` in it.
    Names are relative to what comes before its first wildcard. Raises UserError if a named file does not exist.
    """
    path = Path(pattern)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        base, pieces = path, [f"{glob.escape(pattern)}/**/*{suffix}"]
    else:
        base = Path(literal_prefix(pattern).rpartition("/")[0] or ("/" if pattern.startswith("/") else "."))
        pieces = expand_braces(pattern)
    names: dict[str, Path] = {}
    for piece in pieces:
        is_pattern = any(sign in piece for sign in WILD)
        matches = glob.glob(piece, recursive=True) if is_pattern else [piece]  # noqa: PTH207 (Path.glob finds hidden files)
        files = [match for match in map(Path, matches) if match.is_file()]
        if not files:
            raise UserError(f"there is no file {piece}: check the path")
        names |= {match.relative_to(base).as_posix(): match for match in files}
    return sorted(names.items(), key=lambda item: os.fsencode(item[0]))


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces in ``pattern``; raises UserError if they are unbalanced or stand for too many names."""
    try:
        names = list(islice(braceexpand(pattern), MAX_NAMES + 1))
    except ValueError as error:
        raise UserError(f"{pattern} has unbalanced braces: write them as {{000..123}} or {{a,b}}") from error
    if len(names) > MAX_NAMES:
        raise UserError(f"{pattern[:MAX_NAME_LENGTH]} stands for over {MAX_NAMES:,} names: give fewer")
    return names


def write_once(path: Path, write: Callable[[Path], object]) -> Path:
    """Return ``path``, written atomically by ``write`` unless it exists; concurrent workers wait."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            try:
                write(partial)
                sync_file(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def decompress(path: Path, file_stamp: str, access: Access) -> Path:
    """Return ``path``, or its unpacked scratch copy; raises UserError if it is damaged, changed, or fills the disk."""
    opener = PACKED.get(path.suffix.lower())
    if opener is None:
        return path
    name = digest_of([os.fsencode(path.resolve()).hex(), file_stamp])[:32]

    def unpack(partial: Path) -> None:
        if stamp(path.stat()) != file_stamp:
            raise changed_file_error(str(path))
        try:
            with cast(BinaryIO, opener(path)) as source, partial.open("wb") as file:
                while piece := source.read(2**20):
                    disk = shutil.disk_usage(partial.parent)
                    reserve = min(RESERVE, int(RESERVED_SHARE * disk.total))
                    if disk.free - len(piece) < reserve:
                        raise UserError(
                            f"{path}, {path.stat().st_size} bytes, unpacks to {file.tell() + len(piece)} or more, and "
                            f"where {partial.parent} lies {reserve} are to stay free: make room there, or if you do "
                            "not trust it, leave it"
                        )
                    file.write(piece)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # Damage has no errno; system errors have one.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{path} cannot be unpacked ({error}): it is damaged or was cut short") from error

    return write_once(access.scratch / f"unpacked-{name}", unpack)
