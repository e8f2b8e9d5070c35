"""Parquet files with images in them, as Hugging Face writes them or in a plain binary column.

The sizes in the footer need not be true, and Arrow allocates what page headers declare, so these are read first
(parquet-format's ``PageHeader`` in Thrift's compact protocol) to compute the memory that a column needs.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffusion.common.errors import UserError
from diffusion.common.parsing import parse_json
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import MAX_CHARACTERS, MISSING, NO_IMAGE, Entry, Payload, Source, too_large_error
from diffusion.data.sources.caption_files import to_caption, to_text
from diffusion.data.sources.conventions import make_printable
from diffusion.data.sources.local_files import changed_file_error, find_files, stamp, stamp_of
from diffusion.data.sources.mask_files import MASK_COLUMN

IMAGES = ("image", "img", "picture", "photo", "bytes", "image_bytes", "png", "jpg", "jpeg", "webp")
TEXTS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer),
    *(pa.types.is_floating, pa.types.is_boolean, pa.types.is_null),
)
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
"""Tests for types of texts, or numbers that can be written as such, and for types of bytes."""

MAX_FOOTER_BYTES = 2**23
"""Maximum bytes of a footer; Arrow takes some thirty times as many for it."""
DECODED_AT_ONCE = 2**25
"""Bytes of the rows that are decoded at a time, if no single one is larger."""

ENCODINGS = {0, 2, 3, 5, 8, 9}
"""Encodings in which no value is larger than its page: PLAIN, PLAIN_DICTIONARY, RLE, DELTA_BINARY_PACKED,
RLE_DICTIONARY, BYTE_STREAM_SPLIT. In DELTA_BYTE_ARRAY each may be all that came before it, and in
DELTA_LENGTH_BYTE_ARRAY a few bytes claim any number of lengths."""
DETAILS = {0: (5, 2), 2: (7, 2), 3: (8, 4)}
"""Field number of the header of each type of page with values, and of the encoding in it; 2: a dictionary."""

BOOLEANS, INTEGERS, BINARY, STRUCT = {1, 2}, {4, 5, 6}, 8, 12
"""Types of Thrift's compact protocol."""


class PageTooLargeError(ValueError):
    """The column would take too much memory; the message says why."""


@dataclass(frozen=True)
class Columns:
    """Columns of image (itself, or the paths of its bytes and path), label, caption and mask, and names of classes."""

    leaves: tuple[str, ...]
    label: str | None
    caption: str | None
    classes: Sequence[str] | None
    mask: str | None


class Parquet(Source):
    """The images in the files of a pattern (a path, a folder, a glob or braces), named ``FILE/ROW``.

    They lie in a column of bytes, or of Hugging Face's ``{bytes, path}``: the one that ``image`` names, the one that
    the file says is an Image, one with a usual name (``image``, ``img``, ``bytes`` …), or the only one. ``label`` and
    ``caption`` name the columns for these, else they are ``label``, and ``text`` or ``caption``. Integer labels are
    the classes that the file names (Hugging Face's ClassLabel; −1 is none), or else stay numbers. ``mask`` names the
    column of masks, else it is ``mask``.
    """

    scheme = "parquet"
    form = "a .parquet file or parquet:FILES"
    suffixes = (".parquet",)
    options = ("image", "label", "caption", "mask")
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """Yield all rows; raises UserError for files that are missing, damaged or have no column of images."""
        for name, path in find_files(self.place, ".parquet"):
            file_stamp = stamp_of(path)
            with _open(path) as file, _explain_errors(path):
                columns = find_columns(file.schema_arrow, self.values, str(path))
                if (rows := file.metadata.num_rows) > (size := path.stat().st_size):
                    raise UserError(f"{path} has {rows} rows in {size} bytes, and images take more: leave it out")
                number = count()
                for group in range(file.num_row_groups):
                    for row, texts in enumerate(self._texts(file, group, columns, path)):
                        locator = json.dumps([str(path), group, row])
                        mask = None
                        if self.access.config.masks == "files" and columns.mask is not None:
                            mask = json.dumps([json.dumps([str(path), group, row, columns.mask]), file_stamp])
                        source = f"{make_printable(name)}/{next(number)}"
                        yield Entry(source, locator, file_stamp, *texts, mask=mask)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if a file has changed since it was listed."""
        locations = ((json.loads(entry.locator), entry.stamp) for entry in entries)
        # A mask's place ends with its column.
        for (place, image, file_stamp), group in groupby(locations, lambda pair: (pair[0][0], pair[0][3:], pair[1])):
            rows = [(number, row) for (_, number, row, *_), _ in group]
            path = Path(place)
            if not path.exists():
                yield from (UnusableEntryError(MISSING) for _ in rows)
                continue
            if stamp(path.stat()) != file_stamp:
                raise changed_file_error(place)
            with _open(path) as file:
                values = dict(self.values) | dict(zip(("image",), image, strict=False))
                columns = find_columns(file.schema_arrow, values, place)
                for number, members in groupby(rows, key=lambda pair: pair[0]):
                    row_numbers = [row for _, row in members]
                    yield from self._images(file, number, row_numbers, columns, path)

    def _texts(
        self, file: pq.ParquetFile, group: int, columns: Columns, path: Path
    ) -> Iterator[tuple[str | None, str | None]]:
        """Yield label and caption of each row of a row group."""
        text_columns = list(dict.fromkeys(name for name in (columns.label, columns.caption) if name))
        if not text_columns:
            yield from ((None, None) for _ in range(file.metadata.row_group(group).num_rows))
            return
        try:
            for batch in _batches(file, group, text_columns, 1024, min(self.access.config.max_page_bytes, 2**26), path):
                values = {name: _values(batch[name]) for name in text_columns} | {None: [None] * len(batch)}
                for label, caption in zip(values[columns.label], values[columns.caption], strict=True):
                    yield _class(label, columns.classes), to_caption(caption)
        except PageTooLargeError as error:
            raise UserError(f"{path}, row group {group}, {' and '.join(text_columns)}: {error}") from error
        except pa.ArrowException:  # some are ValueErrors, too
            raise
        except ValueError as error:
            raise UserError(f"{path}, row group {group}: {error}: choose other columns for them") from error

    def _images(
        self, file: pq.ParquetFile, group: int, rows: list[int], columns: Columns, path: Path
    ) -> Iterator[Payload]:
        """Yield the images in ``rows``, ascending, of a row group."""
        start, values, damage = 0, pa.array([]), None
        batches = None
        for row in rows:
            while row >= start + len(values) and damage is None:
                start += len(values)
                try:
                    limit = self.access.config.max_page_bytes
                    batches = batches or _batches(file, group, columns.leaves, 16, limit, path)
                    values = next(batches).column(0)
                except PageTooLargeError as error:
                    damage = f"not read from the Parquet file: {error}"
                except (pa.ArrowException, OSError, StopIteration) as error:
                    # Damage has no errno; system errors have one, and may be transient.
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    damage = f"damaged in the Parquet file: {error}"
            yield UnusableEntryError(damage) if damage else _image(values[row - start], self.access.config.max_bytes)


def _batches(
    file: pq.ParquetFile, group: int, leaves: Sequence[str], max_rows: int, limit: int, path: Path
) -> Iterator[pa.RecordBatch]:
    """Yield rows of a row group, with the columns at the paths ``leaves``, as many at a time as memory allows."""
    metadata = file.metadata
    columns = [index for index in range(metadata.num_columns) if metadata.schema.column(index).path in leaves]
    if len(columns) != len(leaves):
        raise PageTooLargeError(f"there is not one column {' and one '.join(leaves)}")
    with path.open("rb") as raw:
        max_rows = min(_rows_at_once(raw, metadata, group, column, max_rows, limit) for column in columns)
    return iter(file.iter_batches(max_rows, row_groups=[group], columns=list(leaves), use_threads=False))


def read_texts(path: Path, choose: Callable[[Sequence[str]], Sequence[str]], limit: int = 2**26) -> Iterator[Any]:
    """Yield the rows of a table as dictionaries, with the columns that ``choose`` selects of all their names.

    These hold texts, numbers or booleans; a page takes at most ``limit`` bytes of memory. Raises UserError for others.
    """
    with _open(path) as file, _explain_errors(path):
        names = choose(file.schema_arrow.names)
        if wrong := [name for name in names if not _is_text(file.schema_arrow.field(name).type)]:
            kind = file.schema_arrow.field(wrong[0]).type
            raise UserError(f"{path}, column {wrong[0]}, {kind}, is neither text nor a number: write it as text")
        for group in range(file.num_row_groups):
            try:
                for batch in _batches(file, group, names, 1024, limit, path):
                    columns = [_values(batch[name]) for name in names]
                    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
            except PageTooLargeError as error:
                raise UserError(f"{path}, row group {group}: {error}") from error


def find_columns(schema: pa.Schema, options: Mapping[str, str], where: str) -> Columns:
    """Determine the columns of a file; raises UserError, naming them all, if they are ambiguous."""
    features = _features(schema)
    names = {name.lower(): name for name in reversed(schema.names)}
    for option, column in options.items():
        if column not in schema.names:
            raise UserError(f"{where} has no column {column} for {option}: it has {', '.join(schema.names)}")
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    mask = options.get("mask") or names.get(MASK_COLUMN)
    mask = mask if mask in candidates and len(candidates) > 1 else None
    candidates = [name for name in candidates if name != mask or name == options.get("image")]
    image_features = [name for name in candidates if features.get(name, {}).get("_type") == "Image"]
    usual_names = [names[name] for name in IMAGES if names.get(name) in candidates]
    if "image" in options:
        image_names = [name for name in candidates if name == options["image"]]
    else:
        image_names = image_features if len(image_features) == 1 else usual_names[:1] or candidates
    if len(image_names) != 1:
        raise UserError(
            f"{where} has {'no' if not image_names else 'more than one'} column of images (bytes, or a struct of bytes "
            f"and path) among {', '.join(schema.names)}: name it with ?image=COLUMN"
        )
    image = schema.field(image_names[0])
    leaves: tuple[str, ...] = (image_names[0],)
    if pa.types.is_struct(image.type):
        texts = [field.name for field in image.type if field.name == "path" and _is_text(field.type)]
        leaves = tuple(f"{image_names[0]}.{name}" for name in ("bytes", *texts))
    label = options.get("label") or names.get("label")
    feature = features.get(label, {}) if label else {}
    classes = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    caption = options.get("caption") or names.get("text") or names.get("caption")
    for name in (label, caption):
        if name and not _is_text(kind := schema.field(name).type):
            raise UserError(f"{where}, column {name}, {kind}, is neither text nor a number: choose other columns")
    return Columns(leaves, label, caption, classes, mask)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the features that Hugging Face's ``datasets`` recorded about the columns, if any."""
    try:
        info = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: entry for name, entry in info.items() if isinstance(entry, dict)} if isinstance(info, dict) else {}


def _is_text(kind: pa.DataType) -> bool:
    """Return whether values of this type are texts, or numbers that can be written as such."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in TEXTS)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and not pa.types.is_struct(inner := kind.field(field).type) and _holds_bytes(inner)
    return any(test(kind) for test in BYTES)


def _values(column: pa.Array) -> list[Any]:
    """Return the values in a column of texts or numbers; texts are truncated just beyond the limit."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_slice_codeunits(column, 0, max(MAX_CHARACTERS.values()) + 1)
    return list(column.to_pylist())


def _class(value: object, names: Sequence[str] | None) -> str | None:
    if names is None or not isinstance(value, int):
        return to_text(value)
    if not -1 <= value < len(names):
        raise ValueError(f"label {value} is none of the {len(names)} classes")
    return to_text(names[value]) if value >= 0 else None


def _image(value: Any, limit: int) -> Payload:
    """Return the bytes in a scalar of Arrow."""
    if isinstance(value, pa.StructScalar):
        path = value["path"].as_py() if "path" in value else None
        value = value["bytes"]
        if not value.is_valid and path:
            return UnusableEntryError(
                f"only its path is in the table, not its bytes: {make_printable(str(path)[:200])}"
            )
    if not value.is_valid:
        return UnusableEntryError(NO_IMAGE)
    data = value.as_buffer()
    return too_large_error(data.size, limit) if data.size > limit else data.to_pybytes()


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): it is damaged or not a Parquet file") from error


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file to be read page by page, so that row groups of any size fit."""
    with _explain_errors(path), path.open("rb") as raw:
        length = raw.seek(0, 2)
        raw.seek(max(0, length - 8))
        size, magic = struct.unpack("<I4s", raw.read().rjust(8, b"\0"))
        if magic == b"PAR1" and MAX_FOOTER_BYTES < size < length:
            raise UserError(
                f"{path} has a footer of {size} bytes, over the limit of {MAX_FOOTER_BYTES}: write it again with fewer "
                "columns and row groups"
            )
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
    with file:
        yield file


def _rows_at_once(file: BinaryIO, metadata: pq.FileMetaData, group: int, column: int, max_rows: int, limit: int) -> int:
    """Return how many rows of a column of a row group to decode at a time, at most ``max_rows``, to bound memory."""
    chunk, schema = metadata.row_group(group).column(column), metadata.schema.column(column)
    if schema.max_repetition_level:
        raise PageTooLargeError("its rows have lists of values")
    largest = schema.length if schema.physical_type == "FIXED_LEN_BYTE_ARRAY" else 1
    if largest > DECODED_AT_ONCE:
        raise PageTooLargeError(f"each row has {largest} bytes, over the limit of {DECODED_AT_ONCE}")
    place = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        try:
            file.seek(place)
            header = _read_struct(file, place + 2**20)
            kind, size, packed_size = header[1], header[2], header[3]
            field, encoding = DETAILS.get(kind, (None, 0))
            values, value_encoding = (header[field][1], header[field].get(encoding, 0)) if field else (0, 0)
            if min(kind, size, packed_size, values, value_encoding) < 0:
                raise ValueError
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise pa.ArrowInvalid("the header of a page is damaged") from error
        if field:
            if value_encoding not in ENCODINGS:
                raise PageTooLargeError(
                    f"its values are encoded in a way ({value_encoding}) that may unpack to any size: write it again "
                    "with data pages of version 1, as pyarrow.parquet.write_table does"
                )
            # Besides its content Arrow stores 16 bytes per value.
            if (memory := max(size, packed_size) + 16 * values) > limit:
                raise PageTooLargeError(
                    f"a page that takes {memory} bytes is over ingest.max_page_bytes = {limit}: raise it, or write the "
                    "file again with fewer rows in a row group"
                )
            # Each row gets a copy of its value in a dictionary.
            largest = max(largest, size)
        place = file.tell() + packed_size
    return max(1, min(max_rows, DECODED_AT_ONCE // largest))


def _read_struct(file: BinaryIO, end: int) -> dict[int, Any]:
    """Read a struct of Thrift's compact protocol that ends before ``end``: its integers and structs by field number."""
    fields: dict[int, Any] = {}
    number = 0
    while byte := file.read(1)[0]:
        kind = byte & 15
        number = number + (byte >> 4) if byte >> 4 else _read_integer(file)
        if kind in INTEGERS:
            fields[number] = _read_integer(file)
        elif kind == STRUCT:
            fields[number] = _read_struct(file, end)
        elif kind == BINARY:
            if (length := _read_varint(file)) > end - file.tell():
                raise ValueError(length)
            file.seek(length, os.SEEK_CUR)
        elif kind not in BOOLEANS:
            raise ValueError(kind)
        if file.tell() > end:
            raise ValueError(end)
    return fields


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError(value)


def _read_integer(file: BinaryIO) -> int:
    value = _read_varint(file)
    return value >> 1 ^ -(value & 1)
