"""Names and metadata files of images: the conventions of Hugging Face's ImageFolder."""

import csv
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TextIO

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import Refused
from diffusion.data.sources.base import EXTENSIONS, FOREIGN

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
LONGEST_LINE = 2**20
"""Maximum characters of a line of a table, or of all lines of a CSV record, so that a file that is not a table is not
read into memory."""
MOST_COLUMNS = 1000
"""Maximum columns of a CSV; each takes memory and time in every record, even if its line is short."""

_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def sane(name: str) -> str:
    """Convert a file name of any bytes to printable text.

    Control characters and bytes that are not UTF-8 (surrogates, by PEP 383) become backslash escapes.
    """
    return _UNSAFE.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if 0xD800 <= code < 0xDC80 or code > 0xDCFF else f"\\x{code & 0xFF:02x}"


def is_image(name: str) -> bool:
    """Return whether a path has an image's extension and no hidden component."""
    return extension(name) in EXTENSIONS | FOREIGN and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether any component of a path begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def extension(name: str) -> str:
    """Return the extension of a path, from its last dot, in lower case; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


def folder_label(name: str) -> str:
    """Return the name of the folder of the path ``name``."""
    return posixpath.basename(posixpath.dirname(name))


def as_text(value: object) -> str | None:
    """Convert a label or caption from JSON or a table to text; empty: None. Raises ValueError for lists and such."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:60]!r} is neither text nor a number")
    return str(value).encode("utf-8", "backslashreplace").decode()


def too_large(size: int, limit: int) -> Refused:
    """Return the reason why a file of ``size`` bytes is not read."""
    return Refused(f"{size} bytes are over the limit of {limit}")


@dataclass(frozen=True, slots=True)
class Described:
    """Entry of a metadata file about one image."""

    name: str
    """Path relative to the metadata file, inside its folder."""
    label: str | None
    caption: str | None


def records(lines: TextIO, name: str, where: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a CSV with a header or, by ``name``, of JSON lines; ``where`` is for messages."""
    try:
        if not name.lower().endswith(".csv"):
            for line in _short(lines):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"{line.strip()[:60]} is no JSON object")
                    yield record
            return
        table = _Record(lines)
        for number, row in enumerate(csv.DictReader(table), start=1):
            table.characters = 0
            if len(row) > MOST_COLUMNS:
                raise ValueError(f"it has {len(row)} columns, over the limit of {MOST_COLUMNS}")
            if None in row:
                raise ValueError(f"record {number} has more fields than the header: put quotes around commas")
            yield row
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{where} cannot be read ({error}): mend it or take it away") from error


class _Record:
    """Lines of a CSV with a limit per record: an unclosed quote would include all lines that follow."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = _short(lines)
        self.characters = 0
        """Characters of the current record."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.characters += len(line)
        if self.characters > LONGEST_LINE:
            raise ValueError(f"a record is longer than {LONGEST_LINE} characters")
        return line


def _short(lines: TextIO) -> Iterator[str]:
    for line in iter(lambda: lines.readline(LONGEST_LINE), ""):
        if len(line) == LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE} characters")
        yield line


def described(found: Iterable[dict[str, Any]], where: str) -> Iterator[Described]:
    """Parse metadata ``found`` in ``where``: ``file_name``, and optionally ``label`` and ``text`` or ``caption``.

    Raises UserError for records without a ``file_name``, or with one that leads out of the file's folder.
    """
    for number, record in enumerate(found, start=1):
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}, record {number} has no file_name: give each image's path in it")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            root = posixpath.dirname(where)
            raise UserError(f"{where}, record {number}: {sane(name)} leads out of {root}: use a path inside it")
        if sane(name) != name:
            raise UserError(
                f"{where}, record {number}: {sane(name)} is no file's name: take its control characters out"
            )
        try:
            label, caption = as_text(record.get("label")), as_text(record.get("text") or record.get("caption"))
        except ValueError as error:
            raise UserError(f"{where}, record {number}: {error}: give one text for label and caption") from error
        yield Described(path.as_posix(), label, caption)
