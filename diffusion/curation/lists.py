"""Lists of other tools: tables that name images to drop or to relabel, and what they decide.

A row names an image by its key, or by the name that it has in its source, or by a path that ends in that name.
"""

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.data.manifest import STORED, ImageList, Manifest, versions
from diffusion.data.sources.base import MAX_CHARACTERS
from diffusion.data.sources.caption_files import to_text
from diffusion.data.sources.conventions import make_printable, records
from diffusion.data.sources.local_files import open_text
from diffusion.data.sources.parquet import read_texts
from diffusion.data.versions.image_lists import ListedImages, read_lists
from diffusion.data.versions.takedown_records import MIN_DIGITS, is_key, rows_of

logger = logging.getLogger(__name__)
NAMES = ("key", "filepath", "image_path", "file_name", "source", "id", "__index_level_0__", "")
"""Columns that name images, the first that a table has; the last two are the index of a table of pandas."""
REASONS = ("reason", "issue", "tags")
"""Columns of reasons, beside cleanvision's columns of booleans, as ``is_dark_issue``."""
COPIES = {"is_exact_duplicates_issue", "is_near_duplicates_issue"}
"""Columns of cleanvision that are true for all images of a group, and do not say which one to keep."""
FALSE, TRUE = ("", "none", "nan", "false", "0", "0.0"), ("true", "1", "1.0")
MAX_ROWS, MAX_REASON = 1_000_000, 200
"""Most rows of a table, and most characters of a reason, which is cut there."""
MAX_EXAMPLES = 5


class ListChange(Config):
    """A change of the lists of a data set."""

    name: PlainName
    kind: Literal["drop", "label"] = "drop"
    table: Path | None
    """Table (.csv, .jsonl, .parquet) to be recorded as the list, instead of an earlier one of its name; None: the list
    is withdrawn."""


class ListOutcome(Config):
    """What became of a list."""

    name: str
    recorded: ImageList | None
    """None: it is withdrawn."""
    column: str | None = None
    """Column that named the images."""
    roots: dict[str, int] = Field(default_factory=dict)
    """Number of images by what came before their names in the table; empty if nothing did."""
    unknown_count: int = 0
    unknown: list[str] = Field(default_factory=list)
    """Number of rows that name no image of the data set, and the first of their names."""
    ambiguous_count: int = 0
    ambiguous: list[str] = Field(default_factory=list)
    """Rows that name several."""

    def lines(self) -> list[str]:
        """Describe it."""
        if self.recorded is None:
            return [f"list       {self.name} is withdrawn"]
        roots = ", ".join(f"{root} ({count:,})" for root, count in self.roots.items())
        groups = (
            ("of no image", self.unknown_count, self.unknown),
            ("of several images", self.ambiguous_count, self.ambiguous),
        )
        return [
            f"list       {self.recorded.line}, by column {self.column or 'without a name'}",
            *([f"  names below {roots}"] if len(self.roots) > 1 else []),
            *(
                f"  {pluralize(count, 'row')} {words}, left out: {', '.join(names)}{' …' if count > len(names) else ''}"
                for words, count, names in groups
                if count
            ),
        ]


class Label(NamedTuple):
    """Label of an image, the list that gave it, None: the source, and then the source's label; columns of records."""

    label: str | None
    labelled_by: str | None
    given_label: str | None


class _Columns(NamedTuple):
    name: str
    texts: tuple[str, ...]
    """Columns of reasons, or the column of labels."""
    issues: tuple[str, ...]
    """Columns of booleans that say whether there is an issue."""


class _Row(NamedTuple):
    name: str
    text: str


def change_lists(folder: Path, manifest: Manifest, change: ListChange) -> tuple[list[ListedImages], ListOutcome]:
    """Return the lists of the data set in ``folder`` after ``change``, unwritten, and what became of that list.

    A list that is recorded again, with the same images, stays as it is.

    Raises UserError for a table that cannot be read, is too large or names no image, and for a list to be withdrawn
    that no version had.
    """
    lists = read_lists(folder, manifest)
    if change.table is None:
        if all(change.name not in [each.name for each in version.lists or ()] for version in versions(folder)):
            known = ", ".join(each.about.name for each in lists) or "none"
            raise UserError(f"data set {folder.name} has no list {change.name}: there is {known}")
        remaining = [each for each in lists if each.about.name != change.name]
        return remaining, ListOutcome(name=change.name, recorded=None)
    column, rows = _read_table(change.table, change.kind)
    found, roots, ambiguous = _find_images(folder, manifest, column, [row.name for row in rows])
    images = _collect(change, rows, found)
    unmatched = [row.name for row, image in zip(rows, found, strict=True) if image is None]
    unknown = [name for name in unmatched if name not in ambiguous]
    if not images:
        rows_here = rows_of(folder, manifest, ("source", "outcome"))
        example = next(row["source"] for _, row in rows_here if row["outcome"] in STORED)
        raise UserError(
            f"{change.table}: none of {pluralize(len(rows), 'row')} names an image of data set {folder.name} by its "
            f"{column or 'first column'} ({', '.join(unmatched[:3])}): its names are like {example!r}"
        )
    listed = ListedImages.make(change.name, change.kind, datetime.now(UTC).date().isoformat(), len(unmatched), images)
    names = [each.about.name for each in lists]
    if change.name not in names:
        lists.append(listed)
    else:
        earlier = lists[place := names.index(change.name)]
        is_same = (earlier.about.kind, earlier.about.table) == (listed.about.kind, listed.about.table)
        lists[place] = listed = earlier if is_same else listed
    return lists, ListOutcome(
        name=change.name,
        recorded=listed.about,
        column=column,
        roots=dict(roots.most_common()),
        unknown_count=len(unknown),
        unknown=unknown[:MAX_EXAMPLES],
        ambiguous_count=len(unmatched) - len(unknown),
        ambiguous=[name for name in unmatched if name in ambiguous][:MAX_EXAMPLES],
    )


def decide_by_lists(images: pa.Table, lists: Sequence[ListedImages]) -> tuple[list[str | None], list[Label]]:
    """Return why lists drop each of ``images``, None: none does, and its label; the last list with a label counts."""
    rows = images.select(["key", "source_sha256", *Label._fields]).to_pylist()
    reasons: list[str | None] = [None] * len(rows)
    labels = [Label(row["given_label"] if row["labelled_by"] else row["label"], None, None) for row in rows]
    for each in lists:
        name, texts = each.about.name, each.texts()
        for place, row in enumerate(rows):
            if (text := texts.get(row["key"], texts.get(row["source_sha256"]))) is None:
                continue
            if each.about.kind == "drop":
                reasons[place] = reasons[place] or f"list {name}: {text}"
            else:
                before = labels[place]
                labels[place] = Label(text, name, before.given_label if before.labelled_by else before.label)
    return reasons, labels


def _read_table(path: Path, kind: str) -> tuple[str, list[_Row]]:
    """Return the column that names images, and the rows of a table that say something of one."""
    if (suffix := path.suffix.lower()) not in (".csv", ".jsonl", ".parquet"):
        raise UserError(f"{path} is not a table of images: give one that ends in .csv, .jsonl or .parquet")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a table with a row for each image")

    @lru_cache(maxsize=1)
    def columns_of(names: tuple[str, ...]) -> _Columns:
        return _choose_columns(names, kind, str(path))

    def choose(names: Sequence[str]) -> Sequence[str]:
        columns = columns_of(tuple(names))
        return (columns.name, *columns.texts, *columns.issues)

    rows, columns, count = list[_Row](), None, 0
    with nullcontext() if suffix == ".parquet" else open_text(path) as lines:
        for count, record in enumerate(read_texts(path, choose) if lines is None else records(lines, str(path)), 1):
            if count > MAX_ROWS:
                raise UserError(f"{path} has more than {MAX_ROWS:,} rows: split it into lists of so many")
            columns = columns_of(tuple(record))
            if (row := _parse_row(record, columns, kind, f"{path}, record {count}")) is not None:
                rows.append(row)
    if columns is not None and (left_out := COPIES.intersection(columns.issues)):
        logger.warning(
            f"{path}: {', '.join(sorted(left_out))} mark every copy of an image and do not count: Darkroom keeps one "
            "of equal images by itself, and curation.near_duplicates one of similar ones"
        )
    if columns is None or not rows:
        what = "has no issue in any row" if count else "has no rows"
        raise UserError(f"{path} {what}: give a table with a row for each image to {kind}")
    return columns.name, rows


def _choose_columns(names: Sequence[str], kind: str, where: str) -> _Columns:
    if (name := next((name for name in NAMES if name in names), None)) is None:
        raise UserError(
            f"{where} has no column that names images among {', '.join(names)}: call it {', '.join(NAMES[:5])} or id"
        )
    if kind == "label" and "label" not in names:
        raise UserError(f"{where} has no column label among {', '.join(names)}: call the column of labels so")
    issues = [each for each in names if each.startswith("is_") and each.endswith("_issue")]
    texts = ["label"] if kind == "label" else [each for each in REASONS if each in names]
    return _Columns(name, tuple(texts), tuple(issues))


def _parse_row(record: Mapping[str, Any], columns: _Columns, kind: str, where: str) -> _Row | None:
    """Parse a row; None if it says that the image has no issue."""
    try:
        name = to_text(record.get(columns.name))
        texts = [
            ", ".join(map(str, text)) if isinstance(text := record.get(each), list) else to_text(text)
            for each in columns.texts
        ]
        flags = {each: str(record.get(each)).strip().lower() for each in columns.issues}
    except ValueError as error:
        raise UserError(f"{where}: {error}: give one text in a cell") from error
    if name is None:
        raise UserError(f"{where} names no image in its column {columns.name}: fill it in, or leave the row out")
    if wrong := [each for each, flag in flags.items() if flag not in (*FALSE, *TRUE)]:
        raise UserError(f"{where}: {wrong[0]} is {flags[wrong[0]]!r}: give True or False")
    true = [each for each in flags if flags[each] in TRUE and each not in COPIES]
    found = [each.removeprefix("is_").removesuffix("_issue").replace("_", " ") for each in true]
    if columns.issues and not found:
        return None
    if kind == "label":
        if texts[0] is None:
            raise UserError(f"{where} has no label: fill it in, or leave the row out")
        if len(texts[0]) > MAX_CHARACTERS["label"]:
            raise UserError(f"{where}: its label has over {MAX_CHARACTERS['label']:,} characters: shorten it")
        return _Row(name, make_printable(texts[0]))
    text = make_printable(" ".join("; ".join(filter(None, [*texts, *found])).split())) or "listed"
    return _Row(name, text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…")


_LONGER = "…/"
"""Root of a name that is the end of the image's longer one."""


class _Names:
    """Names in a table, found by the images' names of which they are, end in, or are the end; memory is linear."""

    def __init__(self, names: Sequence[str]) -> None:
        paths = [name.replace("\\", "/").removeprefix("./") for name in names]
        self._reversed = sorted((path[::-1], number) for number, path in enumerate(paths))
        self._numbers: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            self._numbers.setdefault(path, []).append(number)

    def find(self, source: str) -> Iterator[tuple[int, str]]:
        """Yield the number of each name that fits an image called ``source``, and what comes before that in it."""
        yield from ((number, "") for number in self._numbers.get(source, ()))
        for place, character in enumerate(source):
            if character == "/":
                yield from ((number, _LONGER) for number in self._numbers.get(source[place + 1 :], ()))
        end = f"/{source}"[::-1]
        for place in range(bisect_left(self._reversed, (end, -1)), len(self._reversed)):
            text, number = self._reversed[place]
            if not text.startswith(end):
                break
            yield number, text[len(source) :][::-1]


def _find_images(
    folder: Path, manifest: Manifest, column: str, names: Sequence[str]
) -> tuple[list[tuple[str, str] | None], Counter[str], set[str]]:
    """Find the image of each of ``names``: its key and the digest of its file; None if there is none or several.

    Returns also how many were found below each root, and the ambiguous names. Memory grows with the names alone.
    """
    candidates: list[dict[str, dict[str, str]]] = [{} for _ in names]  # digests by key by root
    wanted, prefixes = _Names(names), dict[str, list[tuple[int, str]]]()
    for number, name in enumerate(names):
        if column == "key" and is_key(name):
            prefixes.setdefault(name.lower()[:MIN_DIGITS], []).append((number, name.lower()))
    for _, row in rows_of(folder, manifest, ("outcome", "key", "source", "source_sha256")):
        if row["outcome"] not in (*STORED, "duplicate"):
            continue
        key, sources = row["key"], {row["source"]}
        if column in ("id", "key"):  # of NeMo Curator and img2dataset it is a name without an extension
            sources.add(re.sub(r"\.[^./]*$", "", row["source"]))
        hits = [(number, "") for number, prefix in prefixes.get(key[:MIN_DIGITS], ()) if key.startswith(prefix)]
        for number, root in (*hits, *chain.from_iterable(map(wanted.find, sources))):
            candidates[number].setdefault(root, {}).setdefault(key, row["source_sha256"])
    return _choose_images(names, candidates)


def _choose_images(
    names: Sequence[str], candidates: Sequence[Mapping[str, Mapping[str, str]]]
) -> tuple[list[tuple[str, str] | None], Counter[str], set[str]]:
    """Choose the whole name, or else the root that other names have in which only one tail is a name."""
    choices = [{"": each[""]} if "" in each else dict(each) for each in candidates]
    for each in choices:
        if len(each) > 1:
            each.pop(_LONGER, None)
    single = [each for each in choices if len(each) == 1]
    roots = {root for each in single for root in each}
    found, counts, ambiguous = list[tuple[str, str] | None](), Counter[str](), set[str]()
    for name, each in zip(names, choices, strict=True):
        below = each if len(each) == 1 else {root: keys for root, keys in each.items() if root in roots}
        images = [(root, *image) for root, keys in below.items() for image in keys.items()]
        if len(images) == 1:
            counts[images[0][0]] += 1
            found.append(images[0][1:])
            continue
        found.append(None)
        if each:
            ambiguous.add(name)
    return found, Counter({root: count for root, count in counts.items() if root not in ("", _LONGER)}), ambiguous


def _collect(
    change: ListChange, rows: Sequence[_Row], found: Sequence[tuple[str, str] | None]
) -> dict[str, tuple[str, str]]:
    """Join the rows of each image; raises UserError if they give it several labels."""
    texts: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    for row, image in zip(rows, found, strict=True):
        if image is None:
            continue
        known = texts.setdefault(image[0], [])
        digests.setdefault(*image)
        if row.text in known:
            continue
        if known and change.kind == "label":
            raise UserError(f"{change.table} labels {row.name} both {known[0]} and {row.text}: leave one of them out")
        known.append(row.text)
    return {key: (digests[key], "; ".join(each)) for key, each in texts.items()}
