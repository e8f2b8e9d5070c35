"""Memory needed to decode a column of a Parquet file, computed from page headers before anything is decoded.

A few bytes may stand for any amount of data: pages are compressed, dictionaries repeat a value for one bit per row,
runs repeat a null, and the sizes in the footer need not be true. Arrow allocates what page headers declare, so these
are read here first (parquet-format's ``PageHeader`` in Thrift's compact protocol), without their pages.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.errors import UserError

FOOTER_END = struct.Struct("<I4s")
"""End of a file: the size of its footer, and PAR1."""
LARGEST_FOOTER = 2**23
"""Maximum bytes of a footer; Arrow takes some thirty times as many for it."""
LONGEST_HEADER = 2**20
"""Maximum bytes of a page's header, with its statistics."""
DEEPEST = 8
"""Maximum nesting of structs in a page header; two as of today."""
BYTES_PER_VALUE = 16
"""Bytes that Arrow stores per value of a page besides its content."""
DECODED_AT_ONCE = 2**25
"""Bytes of the rows that are decoded at a time, if no single one is larger."""

ENCODINGS = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 5: "DELTA_BINARY_PACKED", 8: "RLE_DICTIONARY", 9: "SPLIT"}
"""Those in which no value is larger than its page. In DELTA_BYTE_ARRAY each may be all that came before it, and in
DELTA_LENGTH_BYTE_ARRAY a few bytes claim any number of lengths."""
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
DETAILS = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}
"""Field number of the header of each page type."""
ENCODING_FIELD = {DATA_PAGE: 2, DICTIONARY_PAGE: 2, DATA_PAGE_V2: 4}

BOOLEANS, INTEGERS, LISTS = {1: True, 2: False}, {4, 5, 6}, {9, 10}
BYTE, DOUBLE, BINARY, MAP, STRUCT = 3, 7, 8, 11, 12
"""Types of Thrift's compact protocol."""


class PageRefused(ValueError):
    """The column would take too much memory; the message says why."""


def require_small_footer(path: Path) -> None:
    """Raise UserError for a file whose footer is too large."""
    with path.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - FOOTER_END.size))
        size, magic = FOOTER_END.unpack(file.read().rjust(FOOTER_END.size, b"\0"))
    if magic == b"PAR1" and LARGEST_FOOTER < size < length:
        raise UserError(
            f"{path} has a footer of {size} bytes, over the limit of {LARGEST_FOOTER}: write it again with fewer "
            "columns and row groups"
        )


def rows_at_once(
    file: BinaryIO, about: pq.FileMetaData, group: int, column: int, most: int, limit: int, repeats: bool = True
) -> int:
    """How many rows of a column of a row group may be decoded at a time, ``most`` or fewer, so that memory has a bound.

    Args:
        file: The Parquet file.
        about: Its footer.
        group: Number of the row group.
        column: Number of the column among all that hold values.
        most: Rows.
        limit: Bytes of memory that a page may take.
        repeats: Whether each row gets a copy of its value in a dictionary.

    Raises PageRefused for what would take more however it is read, and pyarrow.ArrowInvalid for damaged headers.
    """
    chunk, schema = about.row_group(group).column(column), about.schema.column(column)
    if schema.max_repetition_level:
        raise PageRefused("its rows have lists of values")
    largest = schema.length if schema.physical_type == "FIXED_LEN_BYTE_ARRAY" else 1
    if largest > DECODED_AT_ONCE:
        raise PageRefused(f"each row has {largest} bytes, over the limit of {DECODED_AT_ONCE}")
    place = chunk.data_page_offset
    if chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        kind, size, packed, values, encoding = _page(_Header(file).struct())
        if kind in DETAILS:
            if encoding not in ENCODINGS:
                raise PageRefused(
                    f"its values are encoded in a way ({encoding}) that may unpack to any size: write it again with "
                    "data pages of version 1, as pyarrow.parquet.write_table does"
                )
            if (taken := max(size, packed) + BYTES_PER_VALUE * values) > limit:
                raise PageRefused(
                    f"a page that takes {taken} bytes is over ingest.max_page_bytes = {limit}: raise it, or write the "
                    "file again with fewer rows in a row group"
                )
            if repeats or kind != DICTIONARY_PAGE:
                largest = max(largest, size)
        place = file.tell() + packed
    return max(1, min(most, DECODED_AT_ONCE // largest))


def _page(header: dict[int, Any]) -> list[int]:
    """Return type, unpacked and packed bytes, number of values, and encoding of a page."""
    kind = header.get(1, -1)
    details = header.get(DETAILS[kind]) if kind in DETAILS else {1: 0}
    if isinstance(details, dict):
        encoding = details.get(ENCODING_FIELD.get(kind, 0), 0)
        numbers: list[Any] = [kind, header.get(2), header.get(3), details.get(1), encoding]
        if all(isinstance(each, int) and each >= 0 for each in numbers):
            return numbers
    raise pa.ArrowInvalid("the header of a page is damaged")


class _Header:
    """Parser of one struct of Thrift's compact protocol."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = LONGEST_HEADER

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return its fields by number: integers, structs, and None for all else."""
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._bytes(1)[0]:
            number = number + (byte >> 4) if byte >> 4 else self._zigzag()
            fields[number] = self._value(byte & 15, depth, in_struct=True)
        return fields

    def _value(self, kind: int, depth: int, in_struct: bool = False) -> Any:
        if depth > DEEPEST:
            raise pa.ArrowInvalid("the header of a page is nested too deeply")
        if kind in BOOLEANS:
            return BOOLEANS[kind] if in_struct else self._bytes(1) and None
        if kind in INTEGERS:
            return self._zigzag()
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (BYTE, DOUBLE, BINARY):
            self._bytes({BYTE: 1, DOUBLE: 8}.get(kind) or self._varint())
        elif kind in LISTS:
            byte = self._bytes(1)[0]
            for _ in range(self._varint() if byte >> 4 == 15 else byte >> 4):
                self._value(byte & 15, depth + 1)
        else:  # there is no map in a page's header
            raise pa.ArrowInvalid("the header of a page is damaged")
        return None

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._bytes(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise pa.ArrowInvalid("the header of a page is damaged")

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _bytes(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise pa.ArrowInvalid("the header of a page has no end")
        data = self.file.read(count)
        if len(data) < count:
            raise pa.ArrowInvalid("the file ends in the middle of a page's header")
        return data
