"""Records of a batch, compared with each other: ``batch.json``, the parts of the manifest, its Parquet, ``_SUCCESS``.

``_SUCCESS`` holds the SHA-256 of every other record, so that whoever alters one of them has to alter two.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from diffusion.config import Config
from diffusion.data.manifest import Sha256
from diffusion.data.shards import BLOCK
from diffusion.errors import UserError
from diffusion.files import canonical_json, sha256_bytes, sha256_file
from flows import prints
from flows.prints import Batch, Row
from flows.request_table import KEPT, LARGEST_GROUP
from flows.s3 import Location, Store
from flows.s3_errors import Missing

BATCH, MANIFEST, SUCCESS = "batch.json", "manifest.parquet", "_SUCCESS"
MOST_NAMED = 20
LARGEST_SUCCESS = 16 * 2**20
"""Bytes that ``_SUCCESS`` may have: a hundred for each chunk."""
LARGEST_TABLE = 64 * 2**30
"""Bytes that ``manifest.parquet`` and ``requests.parquet`` may have: a hundred million rows."""
LARGEST_ABOUT = 2**18
"""Bytes that the JSON beside an image in a tar may have."""


class Success(Config):
    """Content of ``_SUCCESS``."""

    format_version: Literal[1] = 1
    sha256: dict[str, Sha256]
    """Of every other record of the batch, by its name there."""

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return canonical_json(self.model_dump(mode="json")).encode()


def success_of(store: Store, batch: Batch, place: Location, parts: dict[str, str]) -> Success:
    """What ``_SUCCESS`` is to say of a batch whose other records are there; ``parts`` are the digests of its parts."""
    names = [MANIFEST] if batch.requests is None else [MANIFEST, KEPT]
    others = {name: store.sha256(place.bucket, place.key(name)) for name in names}
    return Success(sha256={BATCH: sha256_bytes(batch.json_bytes()), **others, **parts})


def disagreements(store: Store, batch: Batch, place: Location, index: int | None) -> list[str]:
    """Where the records of a batch do not agree, in words: those about image number ``index``, or all of them.

    The first MOST_NAMED are named, and the others counted.
    """
    chunks = range(len(batch.chunks())) if index is None else [index // batch.chunk_size]
    with TemporaryDirectory() as scratch:
        found = _Records(store, batch, place, Path(scratch)).compare(chunks, index)
        named = list(islice(found, MOST_NAMED))
        more = sum(1 for _ in found)
    return [*named, *([f"and {more} more disagreements of the records in {place}"] if more else [])]


class _Records:
    """The records of one batch, each read once."""

    def __init__(self, store: Store, batch: Batch, place: Location, scratch: Path) -> None:
        self.store = store
        self.batch = batch
        self.place = place
        self.scratch = scratch

    def compare(self, chunks: Iterable[int], index: int | None) -> Iterator[str]:
        """Every disagreement of the records about ``chunks``; of rows, if ``index`` is one, that one alone."""
        success, finished, words = self._success()
        yield from filter(None, [words])
        yield from self._file(BATCH, success)
        if self.batch.requests is not None:
            yield from self._file(KEPT, success)
        if finished:
            yield from self._file(MANIFEST, success)
        table, words = self._table()
        yield from filter(None, [words])
        for chunk in chunks:
            yield from self._chunk(chunk, success, finished, table, index)

    def _success(self) -> tuple[Success | None, bool, str | None]:
        """``_SUCCESS``, whether it is there, and what is wrong with it."""
        try:
            found = Success.model_validate_json(self._get(SUCCESS, LARGEST_SUCCESS))
        except Missing:
            return None, False, None
        except (ValidationError, UserError):
            words = "holds no digests of the batch's records: it was altered, or an older Darkroom wrote it"
            return None, True, f"{self._uri(SUCCESS)} {words}"
        names = {BATCH, MANIFEST, *map(prints.part_key, range(len(self.batch.chunks())))}
        if self.batch.requests is not None:
            names.add(KEPT)
        if odd := sorted(names ^ found.sha256.keys()):
            some = ", ".join(odd[:3]) + (" …" if len(odd) > 3 else "")
            return (
                found,
                True,
                f"{self._uri(SUCCESS)} and {self._uri(BATCH)} disagree on which records there are: {some}",
            )
        return found, True, None

    def _file(self, name: str, success: Success | None) -> Iterator[str]:
        """Fetch a record, and compare it with ``success``."""
        path = self.scratch / name
        try:
            self.store.fetch(self.place.bucket, self.place.key(name), path, LARGEST_TABLE)
        except Missing:
            yield f"{self._uri(name)} is gone"
            return
        except UserError as error:
            yield str(error)
            return
        yield from self._digest(name, sha256_file(path), success)

    def _digest(self, name: str, digest: str, success: Success | None) -> Iterator[str]:
        if success is not None and success.sha256.get(name, digest) != digest:
            yield f"{self._uri(name)} is not what {self._uri(SUCCESS)} says: one of the two was altered"

    def _table(self) -> tuple[pq.ParquetFile | None, str | None]:
        """The manifest as Parquet, opened, and what is wrong with it."""
        path = self.scratch / MANIFEST
        if not path.is_file():
            return None, None
        names = prints.schema_of(self.batch).names
        try:
            file = pq.ParquetFile(path, read_dictionary=names)
            if file.schema_arrow.names != names or file.num_row_groups != len(self.batch.chunks()):
                raise UserError("it has other columns or row groups")
        except (pa.ArrowException, OSError, UserError) as error:
            return None, f"{self._uri(MANIFEST)} is not the manifest of this batch: {' '.join(str(error).split())}"
        return file, None

    def _chunk(
        self, chunk: int, success: Success | None, finished: bool, table: pq.ParquetFile | None, index: int | None
    ) -> Iterator[str]:
        name, indices = prints.part_key(chunk), self.batch.chunks()[chunk]
        rows: list[Row] | None = None
        try:
            data = self._get(name, prints.LARGEST_PART)
            yield from self._digest(name, sha256_bytes(data), success)
            rows = prints.part_rows(data, self._uri(name))
        except Missing:
            if finished:
                yield f"{self._uri(name)} is gone"
        except UserError as error:
            yield str(error)
        if rows is not None and len(rows) != len(indices):
            yield f"{self._uri(name)} has {len(rows)} rows, and {self._uri(BATCH)} {len(indices)} images for them"
            rows = None
        others: list[Row] | None = None
        if table is not None:
            try:
                others = _row_group(table, chunk, len(indices))
            except (pa.ArrowException, OSError, UserError) as error:
                yield f"{self._uri(MANIFEST)} cannot be read: {' '.join(str(error).split())}"
        for number, image in enumerate(indices):
            if index is not None and index != image:
                continue
            row = None if rows is None else rows[number]
            other = None if others is None else others[number]
            if row is not None and (odd := prints.conflicts(self.batch, image, row)):
                yield self._differ(name, BATCH, image, odd)
            if row is not None and other is not None and (odd := _differences(row, other)):
                yield self._differ(name, MANIFEST, image, odd)
            if index is not None and row is not None and self.batch.format == "tar" and "tar" in row:
                yield from self._about(row)
            if row is None and other is not None and (odd := prints.conflicts(self.batch, image, other)):
                yield self._differ(MANIFEST, BATCH, image, odd)

    def _about(self, row: Row) -> Iterator[str]:
        """Compare the JSON beside an image in a tar with its ``row``, and its place with that of the image."""
        name = f"{row['tar']}/{row['index']:08d}.json"
        try:
            same = _read_about(self.store, self.place, row) == canonical_json(prints.shard_json(row)).encode()
        except (KeyError, Missing, UserError):
            same = False
        if not same:
            part = prints.part_key(row["index"] // self.batch.chunk_size)
            yield self._differ(name, part, row["index"], ["what is said of it"])

    def _differ(self, one: str, other: str, image: int, fields: list[str]) -> str:
        return f"{self._uri(one)} and {self._uri(other)} disagree on image {image}: {', '.join(fields)}"

    def _get(self, name: str, most: int) -> bytes:
        return self.store.get(self.place.bucket, self.place.key(name), most)

    def _uri(self, name: str) -> str:
        return f"{self.place}/{name}"


def _differences(row: Row, other: Row) -> list[str]:
    return sorted(name for name in {*row, *other} if row.get(name) != other.get(name))


def _row_group(file: pq.ParquetFile, number: int, rows: int) -> list[Row]:
    """The rows of a row group; texts that repeat are held once, however often a hostile file repeats them."""
    about = file.metadata.row_group(number)
    if about.num_rows != rows or about.total_byte_size > LARGEST_GROUP:
        raise UserError(f"row group {number} has {about.num_rows} rows and {about.total_byte_size} bytes")
    table = file.read_row_group(number)
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    found: list[Any] = []
    for array in column.chunks:
        if isinstance(array, pa.DictionaryArray):
            texts = array.dictionary.to_pylist()
            found += [None if at is None else texts[at] for at in array.indices.to_pylist()]
        else:
            found += array.to_pylist()
    return found


def _read_about(store: Store, place: Location, row: Row) -> bytes:
    """The JSON beside an image in a tar, at the place that ``row`` gives; raises UserError if there is none."""
    start = row["offset"] + -(-row["size"] // BLOCK) * BLOCK
    header = store.get_span(place.bucket, place.key(row["tar"]), start, BLOCK)
    try:
        size = int(header[124:135], 8)
    except ValueError:
        size = 0
    if not 0 < size <= LARGEST_ABOUT:
        raise UserError(f"{place}/{row['tar']} has no JSON beside image {row['index']}")
    return store.get_span(place.bucket, place.key(row["tar"]), start + BLOCK, size)


def read_parts(store: Store, batch: Batch, place: Location) -> Iterator[tuple[str, str, list[Row]]]:
    """Name, SHA-256 and rows of each part of the manifest; raises UserError if one is not of ``batch``."""
    for chunk, indices in enumerate(batch.chunks()):
        name = prints.part_key(chunk)
        data = store.get(place.bucket, place.key(name), prints.LARGEST_PART)
        rows = prints.part_rows(data, f"{place}/{name}")
        if len(rows) != len(indices) or any(prints.conflicts(batch, *each) for each in zip(indices, rows, strict=True)):
            raise UserError(
                f"{place}/{name} is not of this batch: delete it, and give the same `darkroom sample` again, which "
                "makes its images anew"
            )
        yield name, sha256_bytes(data), rows
