"""Consistency checks of a sampling batch: its records must say the same, and no object in it may be foreign."""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes, sha256_file
from diffusion.data.shards import BLOCK
from flows.sampling import batch_format
from flows.sampling.batch_format import BATCH, MANIFEST, SUCCESS, Row, SamplingBatch, Success
from flows.sampling.request_rows import MAX_GROUP_BYTES
from flows.sampling.request_table import REQUESTS
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError

MAX_NAMED = 20
MAX_SUCCESS_BYTES, MAX_TABLE_BYTES, MAX_ABOUT_BYTES = 16 * 2**20, 5 * 2**30, 2**18
"""Maximum sizes of ``_SUCCESS``, of the tables, and of the JSON beside an image in a tar."""


def find_disagreements(store: Store, batch: SamplingBatch, place: Location, index: int | None) -> list[str]:
    """Describe disagreements of the records of a batch, about one image or all: the first MAX_NAMED, then a number."""
    with TemporaryDirectory() as scratch:
        conflicts = _Records(store, batch, place, Path(scratch)).compare(index)
        first_conflicts = list(islice(conflicts, MAX_NAMED))
        more = sum(1 for _ in conflicts)
    return [*first_conflicts, *([f"and {more} more disagreements of the records in {place}"] if more else [])]


class _Records:
    """Records of the batch at ``place``, each of which is read once, into the folder ``scratch`` if it is large."""

    def __init__(self, store: Store, batch: SamplingBatch, place: Location, scratch: Path) -> None:
        self.store, self.batch, self.place, self.scratch = store, batch, place, scratch
        self.names = [BATCH] if batch.requests is None else [BATCH, REQUESTS]
        self.is_finished, self.digests = True, dict[str, str]()

    def compare(self, index: int | None) -> Iterator[str]:
        """Yield every disagreement, or only those about image ``index``."""
        yield from self._read_success()
        for name in (*self.names, *([MANIFEST] if self.is_finished else [])):
            try:
                self.store.fetch(self.place.bucket, self.place.key(name), self.scratch / name, MAX_TABLE_BYTES)
                yield from self._check_digest(name, sha256_file(self.scratch / name))
            except MissingObjectError:
                yield f"{self.place}/{name} is gone"
            except UserError as error:
                yield str(error)
        table = yield from self._open_manifest()
        chunk_count = len(self.batch.chunks())
        for chunk in range(chunk_count) if index is None else [index // self.batch.chunk_size]:
            yield from self._compare_chunk(chunk, table, index)
        if index is None:
            yield from self._compare_listing()

    def _read_success(self) -> Iterator[str]:
        batch, place = self.batch, self.place
        try:
            data = self.store.get(place.bucket, place.key(SUCCESS), MAX_SUCCESS_BYTES)
            self.digests = Success.model_validate_json(data).sha256
        except MissingObjectError:
            self.is_finished = False
        except (UserError, ValidationError):
            yield f"{place}/{SUCCESS} holds no digests of the batch's records: it was altered"
        else:
            names = {MANIFEST, *self.names, *map(batch_format.part_key, range(len(batch.chunks())))}
            if differences := sorted(names ^ self.digests.keys()):
                name_text = ", ".join(differences[:3]) + (" …" if len(differences) > 3 else "")
                yield f"{place}/{SUCCESS} and {place}/{BATCH} disagree on which records there are: {name_text}"

    def _check_digest(self, name: str, digest: str) -> Iterator[str]:
        if self.digests.get(name, digest) != digest:
            yield f"{self.place}/{name} is not what {self.place}/{SUCCESS} says: one of the two was altered"

    def _open_manifest(self) -> Generator[str, None, pq.ParquetFile | None]:
        columns = batch_format.make_schema(self.batch).names
        try:
            if (path := self.scratch / MANIFEST).is_file():
                table = pq.ParquetFile(path, read_dictionary=columns)
                if table.schema_arrow.names == columns and table.num_row_groups == len(self.batch.chunks()):
                    return table
                raise UserError("it has other columns or row groups")
        except (pa.ArrowException, OSError, UserError) as error:
            yield f"{self.place}/{MANIFEST} is not the manifest of this batch: {' '.join(str(error).split())}"
        return None

    def _compare_chunk(self, chunk: int, table: pq.ParquetFile | None, index: int | None) -> Iterator[str]:
        name, indices = batch_format.part_key(chunk), self.batch.chunks()[chunk]
        rows = yield from self._read_part(name, len(indices))
        manifest_rows = list[Row]()
        try:
            manifest_rows = _row_group(table, chunk, len(indices)) if table else []
        except (pa.ArrowException, OSError, UserError) as error:
            yield f"{self.place}/{MANIFEST} cannot be read: {' '.join(str(error).split())}"
        for image, row, manifest_row in zip_longest(indices, rows, manifest_rows):
            if index is None or index == image:
                yield from self._compare_rows(name, image, row, manifest_row)
                if index is not None and row and "tar" in row and not self._has_metadata(row):
                    yield self._differ(f"{row['tar']}/{image:08d}.json", name, image, ["what is said of it"])

    def _read_part(self, name: str, count: int) -> Generator[str, None, list[Row]]:
        place = self.place
        try:
            data = self.store.get(place.bucket, place.key(name), batch_format.MAX_PART_BYTES)
            yield from self._check_digest(name, sha256_bytes(data))
            rows = batch_format.part_rows(data, f"{place}/{name}")
            if len(rows) == count:
                return rows
            yield f"{place}/{name} has {len(rows)} rows, and {place}/{BATCH} {count} images for them"
        except MissingObjectError:
            if self.is_finished:
                yield f"{place}/{name} is gone"
        except UserError as error:
            yield str(error)
        return []

    def _compare_rows(self, name: str, image: int, row: Row | None, manifest_row: Row | None) -> Iterator[str]:
        """Compare the rows of an image in its part, ``name``, and in the manifest, as far as there are any."""
        if row and (fields := batch_format.find_conflicts(self.batch, image, row)):
            yield self._differ(name, BATCH, image, fields)
        if row and manifest_row:
            fields = sorted(field for field in {*row, *manifest_row} if row.get(field) != manifest_row.get(field))
            if fields:
                yield self._differ(name, MANIFEST, image, fields)
        elif manifest_row and (fields := batch_format.find_conflicts(self.batch, image, manifest_row)):
            yield self._differ(MANIFEST, BATCH, image, fields)

    def _differ(self, one: str, other: str, image: int, fields: Sequence[str]) -> str:
        return f"{self.place}/{one} and {self.place}/{other} disagree on image {image}: {', '.join(fields)}"

    def _compare_listing(self) -> Iterator[str]:
        """Yield each object that does not belong to the batch, and how many of a finished one are gone."""
        prefix, kind, missing = self.place.key(""), "images", self.batch.count
        if self.batch.format == "tar":
            kind, missing = "tars", len(self.batch.chunks())
        for key in self.store.list_keys(self.place.bucket, prefix):
            name = key.removeprefix(prefix)
            if batch_format.find_chunk(self.batch, name) is not None:
                missing -= not name.startswith("manifest/")
            elif name not in (*self.names, MANIFEST, SUCCESS):
                yield f"{self.place}/{name} is not of this batch: it was added"
        if self.is_finished and missing:
            yield f"{missing} {kind} of {self.place} are gone"

    def _has_metadata(self, row: Row) -> bool:
        """Whether the JSON beside an image in a tar, which its ``row`` locates, says the same as the row."""
        bucket, tar = self.place.bucket, self.place.key(row["tar"])
        try:
            start = row["offset"] + -(-row["size"] // BLOCK) * BLOCK
            size = int(self.store.get_span(bucket, tar, start, BLOCK)[124:135], 8)
            if not 0 < size <= MAX_ABOUT_BYTES:
                return False
            text = self.store.get_span(bucket, tar, start + BLOCK, size)
        except (KeyError, TypeError, ValueError, UserError):
            return False
        return text == canonical_json(batch_format.shard_json(row)).encode()


def _row_group(file: pq.ParquetFile, number: int, rows: int) -> list[Row]:
    """Rows of a row group; repeated texts are held once, so that a hostile file cannot exhaust memory."""
    metadata = file.metadata.row_group(number)
    if metadata.num_rows != rows or metadata.total_byte_size > MAX_GROUP_BYTES:
        raise UserError(f"row group {number} has {metadata.num_rows} rows and {metadata.total_byte_size} bytes")
    table = file.read_row_group(number)
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = []
    for array in column.chunks:
        if isinstance(array, pa.DictionaryArray):
            texts = array.dictionary.to_pylist()
            values += [None if index is None else texts[index] for index in array.indices.to_pylist()]
        else:
            values += array.to_pylist()
    return values
