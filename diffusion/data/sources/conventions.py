"""Labels and captions of images by the conventions of Hugging Face's ImageFolder: folders, or a metadata file."""

import csv
import json
import os
import posixpath
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from diffusion.common.errors import UserError
from diffusion.common.parsing import parse_json
from diffusion.data.sources.base import MISSING, Entry, Payload, Source
from diffusion.data.sources.local_files import open_text, read_file, stamp_if_exists

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Extensions of possible images; the format is determined by the bytes."""
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
)
"""Names of images in formats that cannot be read: these are quarantined instead of ignored as other files are."""
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
MAX_LINE = 2**20
"""Maximum characters of a line of a table, or of all lines of a CSV record: other files may be one endless line."""


def make_printable(name: str) -> str:
    """Convert a file name of any bytes to text: control characters and what is not UTF-8 become backslash escapes."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\u{code:04x}" if 0xD800 <= code < 0xDC80 or code > 0xDCFF else f"\\x{code & 0xFF:02x}"

    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", escape, name)


def is_image(name: str) -> bool:
    """Return whether a path has an image's extension and no hidden component."""
    return posixpath.splitext(name)[1].lower() in EXTENSIONS | FOREIGN and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether any component of a path begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def list_images(
    files: Iterable[tuple[str, str, str]],
    where: str,
    open_table: Callable[[str, str], AbstractContextManager[TextIO]],
    passed_over: Counter[str],
) -> Iterator[Entry]:
    """Yield the images among ``files``, given by name relative to ``where``, locator and stamp.

    With a ``metadata.csv`` or ``metadata.jsonl``, opened by ``open_table(locator, stamp)``, exactly the files that it
    names (``file_name``, and optionally ``label`` and ``text`` or ``caption``). Without one, every file with an image's
    extension that is not hidden; its label is the name of its folder if there are several and none of the images lies
    in the root. The extensions of other visible files are counted in ``passed_over``. Of several files of a name the
    last one counts. Raises UserError for metadata that cannot be read.
    """
    where = where.rstrip("/")
    # SQLite's name for a private temporary file.
    with closing(sqlite3.connect("", check_same_thread=False, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE TABLE files (number INTEGER PRIMARY KEY, name, locator, stamp, folder)")
        database.execute("BEGIN")
        # Only images have a folder.
        rows = ((*file, posixpath.dirname(file[0]) if is_image(file[0]) else None) for file in files)
        database.executemany("INSERT INTO files (name, locator, stamp, folder) VALUES (?, ?, ?, ?)", rows)
        # Of several columns beside max(), SQLite returns the values of the row with the maximum.
        last_query = "SELECT locator, stamp, name, max(number) FROM files WHERE name = ? GROUP BY name"
        tables = [row for name in METADATA_FILES for row in database.execute(last_query, (name,))]
        if len(tables) > 1:
            raise UserError(f"{where} has both {' and '.join(METADATA_FILES)}: keep one of them")
        for locator, stamp, table, _ in tables:
            database.execute("CREATE INDEX names ON files (name, number)")
            (count,) = database.execute("SELECT count(*) FROM files").fetchone()
            max_records = 10 * count + 1000  # records compress well
            with open_table(locator, stamp) as lines:
                for number, (name, label, caption) in enumerate(read_descriptions(lines, f"{where}/{table}"), start=1):
                    if number > max_records:
                        raise UserError(
                            f"the metadata of {count} files has over {max_records} records: take those of others out"
                        )
                    row = database.execute(last_query, (name,)).fetchone() or (json.dumps(MISSING), "")
                    yield Entry(name, row[0], row[1], label, caption)
            return
        label_query = "SELECT min(folder) != max(folder) AND min(folder) != '' FROM files"
        (has_labels,) = database.execute(label_query).fetchone()
        for name, locator, stamp, folder in database.execute("SELECT name, locator, stamp, folder FROM files"):
            if folder is not None:
                yield Entry(name, locator, stamp, posixpath.basename(folder) if has_labels else None)
            elif not is_hidden(name):
                passed_over[posixpath.splitext(name)[1].lower()] += 1


def read_descriptions(lines: TextIO, where: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield path, label and caption of each record; raises UserError for one that names no file in the folder."""
    for number, record in enumerate(records(lines, where), start=1):
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}, record {number} has no file_name: give each image's path in it")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            root = posixpath.dirname(where)
            raise UserError(
                f"{where}, record {number}: {make_printable(name)} leads out of {root}: use a path inside it"
            )
        if make_printable(name) != name:
            raise UserError(
                f"{where}, record {number}: {make_printable(name)} is not the name of a file: take its control "
                "characters out"
            )
        yield path.as_posix(), *texts_of(record, f"{where}, record {number}")


def texts_of(record: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    """Return label and caption (``text`` or ``caption``) of a record; raises UserError for lists and such."""
    try:
        return to_text(record.get("label")), to_text(record.get("text") or record.get("caption"))
    except ValueError as error:
        raise UserError(f"{where}: {error}: give one text for each of label and caption") from error


def to_text(value: object) -> str | None:
    """Convert a label or caption from JSON or a table to text; empty: None. Raises ValueError for lists and such."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:60]!r} is neither text nor a number")
    return str(value).encode("utf-8", "backslashreplace").decode()


def records(lines: TextIO, where: str) -> Iterator[dict[str, Any]]:
    """Yield the records of the table ``where``: a CSV with a header, or else JSON lines."""
    try:
        if where.lower().endswith(".csv"):
            yield from _csv_records(lines)
            return
        for line in filter(str.strip, _short_lines(lines)):
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(f"{line.strip()[:60]} is not a JSON object")
            yield record
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} cannot be read ({error}): fix it or remove it") from error


def _csv_records(lines: TextIO) -> Iterator[dict[str, Any]]:
    characters = 0

    def count_characters() -> Iterator[str]:
        # An unclosed quote would include all lines that follow.
        nonlocal characters
        for line in _short_lines(lines):
            characters += len(line)
            if characters > MAX_LINE:
                raise ValueError(f"a record is longer than {MAX_LINE} characters")
            yield line

    for number, row in enumerate(csv.DictReader(count_characters()), start=1):
        characters = 0
        # Each takes memory and time in every record, even if its line is short.
        if len(row) > 1000:
            raise ValueError(f"it has {len(row)} columns, over the limit of 1000")
        if None in row:
            raise ValueError(f"record {number} has more fields than the header: put quotes around commas")
        yield row


def _short_lines(lines: TextIO) -> Iterator[str]:
    for line in iter(lambda: lines.readline(MAX_LINE), ""):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE} characters")
        yield line


class Folder(Source):
    """The images below a folder, as ``list_images`` finds them. Links are followed."""

    scheme = "folder"
    form = "a folder"

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the folder's order; raises UserError for unreadable metadata."""
        return list_images(self._files(), str(self.path), self._table, self.access.passed_over)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes."""
        for entry in entries:
            yield read_file(self.path / json.loads(entry.locator), self.access.config.max_bytes)

    def _table(self, locator: str, _: str) -> AbstractContextManager[TextIO]:
        return open_text(self.path / json.loads(locator))

    def _files(self) -> Iterator[tuple[str, str, str]]:
        for name in visible_files(self.path):
            yield make_printable(name), json.dumps(name), stamp_if_exists(self.path / name)


def holds_images(root: Path) -> bool:
    """Return whether the folder ``root`` may hold images: a metadata file, or a file with an image's extension."""
    return any(is_image(name) or name in METADATA_FILES for name in map(make_printable, visible_files(root)))


def visible_files(root: Path) -> Iterator[str]:
    """Yield the visible files below ``root``, relative to it, each once, however links lead to it."""
    return _walk(str(root), "", (_real_path(root),))


def _walk(folder: str, prefix: str, parents: tuple[str, ...]) -> Iterator[str]:
    # ``parents`` are its real parents.
    try:
        children = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): mend its permissions or take it away") from error
    with children:
        for child in children:
            name, is_folder = f"{prefix}{child.name}", False
            if child.name.startswith("."):
                continue
            with suppress(OSError):  # a link to itself, say
                is_folder = child.is_dir()
            if not is_folder:
                yield name
                continue
            target, top = _real_path(child.path) if child.is_symlink() else f"{parents[-1]}/{child.name}", parents[0]
            # A folder that a walk from the root reaches without following links is read there.
            is_elsewhere = target != f"{top}/{name}" and target.startswith(f"{top}/") and "/." not in target[len(top) :]
            if target not in parents and not is_elsewhere:
                yield from _walk(child.path, f"{name}/", (*parents, target))


def _real_path(path: Path | str) -> str:
    return os.path.realpath(path).rstrip("/")
