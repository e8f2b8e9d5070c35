"""Rows of request tables, read from files without a model: label, prompt and size of each image."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.errors import UserError
from diffusion.common.shapes import parse_size, shape_name
from diffusion.data.sources.caption_files import to_text
from diffusion.data.sources.conventions import records
from diffusion.data.sources.local_files import open_text

RequestColumn = Literal["label", "prompt", "size"]
COLUMNS: tuple[RequestColumn, ...] = get_args(RequestColumn)
KINDS = ("csv", "jsonl", "parquet")
ROWS_AT_ONCE = 1024
"""Rows per row group, and rows held in memory at a time."""
MAX_TEXT, MAX_GROUP_BYTES = 10_000, 256 * 2**20
"""Maximum characters in a cell, and uncompressed bytes in a row group."""

RequestRow = tuple[str | None, str | None, str | None]
"""Label, prompt and WIDTHxHEIGHT; None leaves one open."""


def read_request_rows(source: Path, kind: str) -> Iterator[RequestRow]:
    """Yield the rows of a table of that ``kind``: csv, jsonl or parquet."""
    if kind not in KINDS:
        raise UserError(f"{source} is not a table of requests: give one that ends in .csv, .jsonl or .parquet")
    if not source.is_file():
        raise UserError(f"{source} is not a file: give a table of requests, with a row for each image")
    has_value = False
    with nullcontext() if kind == "parquet" else open_text(source) as lines:
        entries = _parquet(source) if lines is None else records(lines, str(source))
        for number, record in enumerate(entries, start=1):
            _require_columns(record, f"{source}, record {number}")
            row = (
                _cell(record, "label", source, number),
                _cell(record, "prompt", source, number),
                _size(record, source, number),
            )
            has_value = has_value or any(row)
            yield row
    if not has_value:
        raise UserError(f"{source} asks for nothing, in no row: use --count, or fill in {', '.join(COLUMNS)}")


def _require_columns(names: Iterable[str], place: str) -> None:
    if unknown_names := sorted(set(map(str, names)) - set(COLUMNS)):
        raise UserError(
            f"{place}: {unknown_names[0]!r} is not a column of a request table: the columns are {', '.join(COLUMNS)}, "
            "or some of these"
        )


def _cell(record: dict[str, Any], name: RequestColumn, source: Path, number: int) -> str | None:
    try:
        text = to_text(record.get(name))
    except ValueError as error:
        raise UserError(f"{source}, record {number}: {error}: give one text for {name}") from error
    if text is not None and len(text) > MAX_TEXT:
        raise UserError(f"{source}, record {number}: its {name} has over {MAX_TEXT:,} characters: shorten it")
    return text


def _size(record: dict[str, Any], source: Path, number: int) -> str | None:
    if (text := _cell(record, "size", source, number)) is None:
        return None
    try:
        return shape_name(parse_size(text))
    except UserError as error:
        raise UserError(f"{source}, record {number}: {error}") from error


def _parquet(source: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(source) as file:
            _require_columns(file.schema_arrow.names, str(source))
            groups = range(file.num_row_groups)
            if any(file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES for group in groups):
                raise UserError(f"{source} has row groups of over {MAX_GROUP_BYTES} bytes: write it with smaller ones")
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} cannot be read as Parquet ({' '.join(str(error).split())}): mend it") from error
