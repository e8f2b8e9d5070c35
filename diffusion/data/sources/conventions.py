"""Labels and captions of images by the conventions of Hugging Face's ImageFolder: folders, or a metadata file."""

import csv
import json
import os
import posixpath
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from diffusion.common.errors import UserError
from diffusion.common.parsing import parse_json
from diffusion.data.ingest.config import CaptionSource, FolderNames, IngestConfig
from diffusion.data.sources.base import MISSING, Access, Entry, Payload, Source
from diffusion.data.sources.caption_files import (
    CAPTION_COLUMNS,
    CAPTION_FILES,
    CAPTION_TABLE,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    CaptionTally,
    ForeignFileError,
    Texts,
    find_column,
    to_caption,
    to_text,
)
from diffusion.data.sources.local_files import open_text, read_file, resolve_in, stamp_if_exists
from diffusion.data.sources.mask_files import mask_of, separate_masks, stem_of_image

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Extensions of possible images; the format is determined by the bytes."""
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
)
"""Names of images in formats that cannot be read: these are quarantined instead of ignored as other files are."""
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
BATCH = 256
"""Images whose captions are read at a time."""
REPEATED_FOLDER = re.compile(r"([1-9]\d{0,4})_(.*\S)")
"""Name of a folder of sd-scripts: how often its images are repeated, and a word for them."""
MAX_FOLDERS = 1000
"""Maximum number of such folders that are named."""
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
    read_texts: Callable[[Sequence[Entry]], Iterator[Payload]],
    access: Access,
) -> Iterator[Entry]:
    """Yield the images among ``files``, given by name relative to ``where``, locator and stamp.

    With a ``metadata.csv`` or ``metadata.jsonl``, opened by ``open_table(locator, stamp)``, exactly the files that it
    names (``file_name``, and optionally ``label`` and ``text`` or ``caption``); so, too, with one in each folder that
    images lie in, such as one for each split. Without one, every file with an image's extension that is not hidden;
    its label is the name of its folder if there are several and none of the images lies in the root, its caption what
    ``read_texts`` reads from a file beside it, or ``captions.csv`` says. The extensions of other visible files are
    counted in ``access.passed_over``, and what of them is not a caption in ``access.captions``. Of several files of a
    name the last one counts. Raises UserError for tables that cannot be read.
    """
    where = where.rstrip("/")
    # SQLite's name for a private temporary file.
    with closing(sqlite3.connect("", check_same_thread=False, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute(
            "CREATE TABLE files (number INTEGER PRIMARY KEY, name, locator, stamp, folder, stem, caption_file, mask_of)"
        )
        database.execute("BEGIN")
        rows = ((*file, *_classify(file[0], access.config.captions)) for file in files)
        columns = "name, locator, stamp, folder, stem, caption_file, mask_of"
        database.executemany(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        separate_masks(database, access)
        tables = [row for name in METADATA_FILES for row in database.execute(LAST, (name,))]
        tables = tables or _tables_of_splits(database)
        folders = [posixpath.dirname(table) for _, _, table, _ in tables]
        if len(set(folders)) < len(folders):
            place = "/".join(filter(None, [where, max(folders, key=folders.count)]))
            raise UserError(f"{place} has both {' and '.join(METADATA_FILES)}: keep one of them")
        if tables:
            yield from _list_metadata(database, where, tables, open_table, access)
        else:
            yield from _list_folder(database, where, open_table, read_texts, access)


LAST = "SELECT locator, stamp, name, max(number) FROM files WHERE name = ? GROUP BY name"
"""Query: of several columns beside max(), SQLite returns the values of the row with the maximum."""


def _classify(name: str, captions: CaptionSource | None) -> tuple[str | None, str | None, int | None, str | None]:
    """Return the folder of an image, the name without extension of an image or caption file, and the kind of it.

    Then follows, for what may be a mask, the name without extension of its image.
    """
    stem, extension = posixpath.splitext(name)
    if is_image(name):
        return posixpath.dirname(name), stem, None, stem_of_image(stem)
    for number, kind in enumerate(CAPTION_FILES):
        if extension.lower() == kind.extension and captions in (None, kind.name) and not is_hidden(name):
            return None, stem, number, None
    return None, None, None, None


def _tables_of_splits(database: sqlite3.Connection) -> list[tuple[str, str, str, int]]:
    """Find a metadata file in each of the folders that images lie in, as ImageFolder has one for each split."""
    query = "SELECT locator, stamp, name, max(number) FROM files WHERE name LIKE '%/metadata.%' GROUP BY name"
    tables = [
        row for row in database.execute(query) if row[2].partition("/")[2] in METADATA_FILES and not is_hidden(row[2])
    ]
    folders = {posixpath.dirname(table) for _, _, table, _ in tables}
    images = database.execute("SELECT DISTINCT folder FROM files WHERE folder IS NOT NULL")
    return tables if all(folder.partition("/")[0] in folders for (folder,) in images) else []


def _list_metadata(
    database: sqlite3.Connection,
    where: str,
    tables: Sequence[tuple[str, str, str, int]],
    open_table: Callable[[str, str], AbstractContextManager[TextIO]],
    access: Access,
) -> Iterator[Entry]:
    """Yield the images that the metadata in ``tables`` names."""
    database.execute("CREATE INDEX names ON files (name, number)")
    database.execute("CREATE TABLE named (name PRIMARY KEY)")
    for locator, stamp, table, _ in tables:
        folder, table_name = posixpath.split(table)
        with open_table(locator, stamp) as lines:
            for name, label, caption in read_descriptions(_limit_records(database, lines, f"{where}/{table}")):
                path = posixpath.join(folder, name)
                database.execute("INSERT OR IGNORE INTO named VALUES (?)", (path,))
                row = database.execute(LAST, (path,)).fetchone() or (json.dumps(MISSING), "")
                if caption is not None:
                    access.captions.count_place(table_name)
                yield Entry(path, row[0], row[1], label, caption, mask=mask_of(database, path, access))
    query = "SELECT DISTINCT name, folder FROM files WHERE mask_of IS NULL AND name NOT IN (SELECT name FROM named)"
    table_names = {table for _, _, table, _ in tables}
    for name, folder in database.execute(query):
        if folder is not None:
            access.captions.ignore(f"image that {table_name} does not name", name)
        elif name not in table_names and not is_hidden(name):
            access.passed_over[posixpath.splitext(name)[1].lower()] += 1


def _list_folder(
    database: sqlite3.Connection,
    where: str,
    open_table: Callable[[str, str], AbstractContextManager[TextIO]],
    read_texts: Callable[[Sequence[Entry]], Iterator[Payload]],
    access: Access,
) -> Iterator[Entry]:
    """Yield all images, with the classes that their folders name and the captions beside them."""
    tally = access.captions
    has_table = access.config.captions in (None, "csv") and _read_caption_table(database, where, open_table, tally)
    (has_files,) = database.execute("SELECT count(*) FROM files WHERE caption_file IS NOT NULL").fetchone()
    if has_files:
        database.execute("CREATE INDEX stems ON files (stem, caption_file)")
    label_query = "SELECT min(folder) != max(folder) AND min(folder) != '' FROM files"
    (has_labels,) = database.execute(label_query).fetchone()
    columns = "name, locator, stamp, folder, stem, caption_file, mask_of"
    files = database.execute(f"SELECT {columns} FROM files ORDER BY number")
    while batch := list(islice(files, BATCH)):
        images = [row for row in batch if row[3] is not None]
        texts = _read_caption_files(database, images, read_texts, tally) if has_files else [None] * len(images)
        for (name, locator, stamp, folder, *_), found in zip(images, texts, strict=True):
            if isinstance(found, str):
                # Without a stamp, as the text may be fixed while the image stays the same.
                yield Entry(name, locator, "", problem=found)
                continue
            label, caption = found or Texts(None, None)
            if has_table and (row := database.execute("SELECT * FROM captions WHERE name = ?", (name,)).fetchone()):
                label, caption = label or row[1], caption or row[2]
                if caption == row[2] is not None:
                    tally.count_place(CAPTION_TABLE)
            folder_texts = _texts_of_folder(folder, access.config.folders, tally)
            if caption is None and folder_texts.caption is not None:
                tally.count_place("folders")
            yield Entry(
                name,
                locator,
                stamp,
                label or (folder_texts.label if has_labels else None),
                caption or folder_texts.caption,
                mask=mask_of(database, name, access),
            )
        for name, _, _, folder, stem, kind, masked in batch:
            if folder is not None or masked is not None or is_hidden(name) or (has_table and name == CAPTION_TABLE):
                continue
            query = "SELECT 1 FROM files WHERE stem = ? AND folder IS NOT NULL"
            if kind is None or not database.execute(query, (stem,)).fetchone():
                access.passed_over[posixpath.splitext(name)[1].lower()] += 1
    if has_table:
        for (name,) in database.execute("SELECT name FROM captions WHERE name NOT IN (SELECT name FROM files)"):
            tally.ignore(f"row of {CAPTION_TABLE} without an image", name)


def _texts_of_folder(folder: str, names: FolderNames | None, tally: CaptionTally) -> Texts:
    """Return the label, or the caption, that a folder gives its images."""
    name = posixpath.basename(folder)
    repeats, word = (None, name) if names == "names" else parse_folder(name)
    if repeats is not None and len(tally.folders) < MAX_FOLDERS:
        tally.folders[folder] = repeats
    if names == "caption":
        return Texts(None, None if repeats is None else word)
    return Texts(word, None)


def class_of_folder(folder: str, names: FolderNames | None) -> str | None:
    """Return the class that a folder gives its images, if there are several; None: none, by ``ingest.folders``."""
    return _texts_of_folder(folder, names, CaptionTally()).label


def parse_folder(name: str) -> tuple[int | None, str]:
    """Return repeats and word of a folder that is called as in sd-scripts, 10_cat; None and the name of any other."""
    match = REPEATED_FOLDER.fullmatch(name)
    return (int(match[1]), match[2].strip()) if match else (None, name)


def _read_caption_table(
    database: sqlite3.Connection,
    where: str,
    open_table: Callable[[str, str], AbstractContextManager[TextIO]],
    tally: CaptionTally,
) -> bool:
    """Read ``captions.csv`` into a table of the database; returns whether there is one with captions."""
    if (row := database.execute(LAST, (CAPTION_TABLE,)).fetchone()) is None:
        return False
    database.execute("CREATE TABLE captions (name PRIMARY KEY, label, caption)")
    database.execute("CREATE INDEX names ON files (name, number)")
    with open_table(row[0], row[1]) as lines:
        for record_place, record in _limit_records(database, lines, f"{where}/{CAPTION_TABLE}"):
            image, text, label = (
                find_column(record, names) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS, LABEL_COLUMNS)
            )
            if image is None or text is None:
                tally.ignore(f"{CAPTION_TABLE} without columns file_name and caption", CAPTION_TABLE)
                return False
            if not record[image]:
                tally.ignore(f"row of {CAPTION_TABLE} without an image", record_place.rpartition(", ")[2])
                continue
            texts = texts_of({"label": record.get(label or ""), "caption": record[text]}, record_place)
            name = PurePosixPath(record[image].replace("\\", "/")).as_posix()
            database.execute("INSERT OR REPLACE INTO captions VALUES (?, ?, ?)", (name, *texts))
    return True


def _read_caption_files(
    database: sqlite3.Connection,
    images: Sequence[tuple[Any, ...]],
    read_texts: Callable[[Sequence[Entry]], Iterator[Payload]],
    tally: CaptionTally,
) -> list[Texts | str | None]:
    """Return label and caption of each of ``images``, or the reason why they cannot be read; None: there are none.

    The first file with a caption counts, in the order of CAPTION_FILES.
    """
    query = (
        "SELECT caption_file, name, locator, stamp, max(number) FROM files WHERE stem = ? AND caption_file IS NOT NULL "
        "GROUP BY caption_file ORDER BY caption_file"
    )
    candidates = [database.execute(query, (stem,)).fetchall() for _, _, _, _, stem, *_ in images]
    found: list[Texts | str | None] = [None] * len(images)
    for turn in range(max(map(len, candidates), default=0)):
        due = [place for place, files in enumerate(candidates) if len(files) > turn]
        for place in [place for place in due if found[place] is not None]:
            kind, name, *_ = candidates[place][turn]
            tally.ignore(f"{CAPTION_FILES[kind].form} beside another file with the caption", name)
        due = [place for place in due if found[place] is None]
        payloads = read_texts([Entry(*candidates[place][turn][1:4]) for place in due])
        for place, payload in zip(due, payloads, strict=True):
            kind, name, *_ = candidates[place][turn]
            form = CAPTION_FILES[kind].form
            try:
                texts = CAPTION_FILES[kind].read(payload)
            except ForeignFileError as error:
                tally.ignore(f"{form} of another kind: {error}", name)
            except ValueError as error:
                found[place] = f"its caption {posixpath.basename(name)} cannot be read: {error}"
            else:
                if texts.label is None and texts.caption is None:
                    tally.ignore(f"{form} that is empty", name)
                    continue
                found[place] = texts
                if texts.caption is not None:
                    tally.count_place(form)
    return found


def _limit_records(database: sqlite3.Connection, lines: TextIO, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and content of each record; raises UserError if there are many more than files."""
    (count,) = database.execute("SELECT count(*) FROM files").fetchone()
    max_records = 10 * count + 1000  # records compress well
    for number, record in enumerate(records(lines, where), start=1):
        if number > max_records:
            raise UserError(f"the metadata of {count} files has over {max_records} records: take those of others out")
        yield f"{where}, record {number}", record


def read_descriptions(
    numbered_records: Iterable[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield path, label and caption of each record; raises UserError for one that names no file in the folder."""
    for place, record in numbered_records:
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{place} has no file_name: give each image's path in it")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            root = posixpath.dirname(place)
            raise UserError(f"{place}: {make_printable(name)} leads out of {root}: use a path inside it")
        if make_printable(name) != name:
            raise UserError(
                f"{place}: {make_printable(name)} is not the name of a file: take its control characters out"
            )
        yield path.as_posix(), *texts_of(record, place)


def texts_of(record: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    """Return label and caption (``text`` or ``caption``) of a record; raises UserError for lists and such."""
    try:
        return to_text(record.get("label")), to_caption(record.get("text") or record.get("caption"))
    except ValueError as error:
        raise UserError(f"{where}: {error}: give one text for the label, and one or a list for the caption") from error


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
    """The images below a folder, as ``list_images`` finds them. Links are followed inside of it."""

    scheme = "folder"
    form = "a folder"

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the folder's order; raises UserError for unreadable metadata."""
        return list_images(self._files(), str(self.path), self._table, self.read_texts, self.access)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes."""
        for entry in entries:
            yield read_file(self.path / json.loads(entry.locator), self.access.config.max_bytes, self.path)

    def _table(self, locator: str, _: str) -> AbstractContextManager[TextIO]:
        return open_text(self.path / json.loads(locator), self.path)

    def _files(self) -> Iterator[tuple[str, str, str]]:
        for name in visible_files(self.path):
            path = self.path / name
            # A copy in place of a link may have the size and time of what it led to.
            stamp = stamp_if_exists(path) if resolve_in(self.path, path) else ""
            yield make_printable(name), json.dumps(name), stamp


def holds_images(root: Path) -> bool:
    """Return whether the folder ``root`` may hold images: a metadata file, or a file with an image's extension."""
    return any(is_image(name) or name in METADATA_FILES for name in map(make_printable, visible_files(root)))


def may_hold_captions(root: Path, config: IngestConfig) -> bool:
    """Return whether the folder ``root`` may hold captions: a caption file, captions.csv, or words of folders."""
    if config.folders == "caption":
        return True
    names = map(make_printable, visible_files(root))
    has_table = config.captions in (None, "csv")
    return any(
        _classify(name, config.captions)[2] is not None or (has_table and name == CAPTION_TABLE) for name in names
    )


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
