"""What names and metadata files mean, wherever they lie: the conventions of Hugging Face's ImageFolder."""

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
"""Characters in a line of a table, or of all lines that a record of a CSV goes over; so that a file that is no table is
not read into memory."""
MOST_COLUMNS = 1000
"""Columns of a CSV; each takes memory and time in every record, also where its line is short."""

_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def sane(name: str) -> str:
    """A file's name as text that can be written down, whatever bytes it is made of.

    Control characters and bytes that are no UTF-8 (surrogates, by PEP 383) become backslash escapes.
    """
    return _UNSAFE.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if 0xD800 <= code < 0xDC80 or code > 0xDCFF else f"\\x{code & 0xFF:02x}"


def is_image(name: str) -> bool:
    """Whether a path has an image's extension and no part of it is hidden."""
    return extension(name) in EXTENSIONS | FOREIGN and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether any part of a path begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def extension(name: str) -> str:
    """How a path ends, from its last dot on, in small letters; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


def folder_label(name: str) -> str:
    """The name of the folder that the path ``name`` lies in."""
    return posixpath.basename(posixpath.dirname(name))


def as_text(value: object) -> str | None:
    """A label or caption as it came from JSON or a table; empty ones are None. Raises ValueError for lists and such."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:60]!r} is neither text nor a number")
    return str(value).encode("utf-8", "backslashreplace").decode()


def too_large(size: int, limit: int) -> Refused:
    """Why a file of ``size`` bytes is not read."""
    return Refused(f"{size} bytes are over the limit of {limit}")


@dataclass(frozen=True, slots=True)
class Described:
    """What a metadata file says about one image."""

    name: str
    """Path relative to the metadata file, inside its folder."""
    label: str | None
    caption: str | None


def records(lines: TextIO, name: str, where: str) -> Iterator[dict[str, Any]]:
    """The records of a CSV with a header or, by ``name``, of JSON lines; ``where`` they lie is for messages."""
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
    """The lines of a CSV, of which no record may have too many: quotes that are never closed hold all that follow."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = _short(lines)
        self.characters = 0
        """Of the record that is being read."""

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
    """Metadata ``found`` in the file ``where``: ``file_name``, and optionally ``label`` and ``text`` or ``caption``.

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
