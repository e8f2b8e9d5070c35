"""Where pictures come from: a folder, by the conventions of Hugging Face's ImageFolder."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffusion.errors import UserError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Candidate:
    """A file that may be a picture, and what its source says about it."""

    source: str
    """Path relative to the source's root, with forward slashes."""
    path: Path
    label: str | None = None
    caption: str | None = None


def read_folder(root: Path) -> list[Candidate]:
    """All candidates below ``root`` in the order of their relative paths.

    With a ``metadata.csv`` or ``metadata.jsonl`` in ``root``, exactly the files that it names
    (``file_name``, and optionally ``label`` and ``text`` or ``caption``). Without one, every file with
    a picture's extension that is not hidden; its label is the name of its folder if the set has
    several such folders.

    Raises UserError for a folder that is missing, or metadata that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"source {root} is not a folder: give the folder that holds the pictures")
    described = [root / name for name in METADATA_FILES if (root / name).is_file()]
    if len(described) > 1:
        raise UserError(f"{root} has both {' and '.join(METADATA_FILES)}: keep one of them")
    if described:
        return _read_metadata(root, described[0])
    files = sorted(_picture_files(root), key=lambda path: path.relative_to(root).as_posix())
    folders = {path.parent for path in files}
    labelled = len(folders) > 1 and root not in folders
    return [
        Candidate(_text(path.relative_to(root).as_posix()), path, _text(path.parent.name) if labelled else None)
        for path in files
    ]


def _text(name: str) -> str:
    """A file's name as text that can be written down, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _picture_files(root: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend its permissions or take it away")

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(folder)) in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(folder) / name


def _read_metadata(root: Path, metadata: Path) -> list[Candidate]:
    try:
        with metadata.open(newline="", encoding="utf-8-sig") as lines:
            if metadata.suffix == ".csv":
                records: list[dict[str, object]] = list(csv.DictReader(lines))
            else:
                records = [json.loads(line) for line in lines if line.strip()]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{metadata} cannot be read ({error}): mend it or take it away") from error
    candidates = {}
    for number, record in enumerate(records, start=1):
        name = record.get("file_name") if isinstance(record, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{metadata}, record {number} has no file_name: give each picture's path in it")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{metadata}, record {number}: {name} leads out of {root}: use a path inside it")
        caption = record.get("text") or record.get("caption")
        label = record.get("label")
        candidates[relative.as_posix()] = Candidate(
            source=relative.as_posix(),
            path=root / relative,
            label=None if label in (None, "") else str(label),
            caption=None if not caption else str(caption),
        )
    return [candidates[source] for source in sorted(candidates)]
