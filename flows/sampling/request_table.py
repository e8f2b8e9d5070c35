"""Request tables: label, prompt and size of each image of a batch, one row each, stored as Parquet beside the batch."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.shapes import parse_shape
from diffusion.data.manifest import Sha256
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions, check_conditions, is_conditional
from diffusion.generation.generate import check_prompts
from diffusion.process.samplers import SamplingConfig
from flows.sampling.request_rows import COLUMNS, ROWS_AT_ONCE, RequestColumn, RequestRow, read_request_rows
from flows.storage.s3 import Location, Store

SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
REQUESTS = "requests.parquet"  # name of the table inside its batch


class Requests(Config):
    """Reference to a request table: image i is conditioned on row i."""

    digest: Sha256
    """Hex SHA-256 of the rows as JSON lines, independent of the file format."""
    columns: tuple[RequestColumn, ...]
    """Columns with at least one value."""


@dataclass(frozen=True)
class RequestTable:
    """A request table as a Parquet file on this machine."""

    path: Path
    about: Requests

    @classmethod
    def from_file(cls, source: Path, folder: Path) -> "RequestTable":
        """Read the table in ``source`` (.csv, .jsonl, .parquet), and store it in ``folder`` under its digest.

        Columns are label, prompt and size (WIDTHxHEIGHT), or some of them; an empty cell leaves it open. Raises
        UserError for another file.
        """
        return cls._write(read_request_rows(source, source.suffix.lower().removeprefix(".")), folder)

    @classmethod
    def fetch(cls, requests: Requests, store: Store, place: Location, folder: Path) -> "RequestTable":
        """Load a table from ``folder``, or else from the batch at ``place``; raises UserError if the digest differs."""
        path = folder / f"{requests.digest}.parquet"
        if path.is_file():
            return cls(path, requests)
        with TemporaryDirectory() as scratch:
            download = Path(scratch, REQUESTS)
            store.fetch(place.bucket, place.key(REQUESTS), download)
            table = cls._write(read_request_rows(download, "parquet"), folder)
        if table.about != requests:
            raise UserError(f"{place}/{REQUESTS} is not the table that the batch was begun with: put that back")
        return table

    @classmethod
    def _write(cls, rows: Iterable[RequestRow], folder: Path) -> "RequestTable":
        folder.mkdir(parents=True, exist_ok=True)
        partial, digest, flags = folder / f".{uuid.uuid4().hex}.partial", hashlib.sha256(), [False] * len(COLUMNS)
        row_iterator = iter(rows)
        try:
            with pq.ParquetWriter(partial, SCHEMA) as writer:
                while group := list(islice(row_iterator, ROWS_AT_ONCE)):
                    cells = [dict(zip(COLUMNS, row, strict=True)) for row in group]
                    writer.write_table(pa.Table.from_pylist(cells, SCHEMA))
                    # A row without a size has the digest that it had before there were sizes.
                    digest_rows = (row if row[2] is not None else row[:2] for row in group)
                    digest.update("".join(f"{json.dumps(row)}\n" for row in digest_rows).encode())
                    flags = [flag or any(column) for flag, column in zip(flags, zip(*group, strict=True), strict=True)]
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            path = folder / f"{digest.hexdigest()}.parquet"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        columns = tuple(name for name, flag in zip(COLUMNS, flags, strict=True) if flag)
        return cls(path, Requests(digest=digest.hexdigest(), columns=columns))

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(pq.read_metadata(self.path).num_rows)

    @property
    def names_every_size(self) -> bool:
        """Whether each row names a size."""
        return "size" in self.about.columns and pq.read_table(self.path, columns=["size"])["size"].null_count == 0

    def rows(self, numbers: range) -> list[RequestRow]:
        """Rows of these ``numbers``; rows beyond the last one are empty."""
        with pq.ParquetFile(self.path) as file:
            groups = range(numbers.start // ROWS_AT_ONCE, min(-(-numbers.stop // ROWS_AT_ONCE), file.num_row_groups))
            table = file.read_row_groups(list(groups), columns=list(COLUMNS))
        records = table.slice(numbers.start - groups.start * ROWS_AT_ONCE, len(numbers)).to_pylist()
        # A file of an earlier Darkroom has no sizes.
        rows: list[RequestRow] = [(row["label"], row["prompt"], row.get("size")) for row in records]
        return rows + [(None, None, None)] * (len(numbers) - len(records))

    def conditions(self, indices: range, compute_batch: int, others: Conditions = UNCONDITIONAL) -> Conditions:
        """Conditions of images number ``indices`` and of the others in their compute batches.

        ``others`` are the batch's: a negative prompt, and a size for rows without one. ``Conditions`` repeats
        its entries, so they are rotated until each image number finds its own.
        """
        start = indices.start // compute_batch * compute_batch
        stop = -(-indices.stop // compute_batch) * compute_batch
        rows, shift = self.rows(range(start, stop)), -start % (stop - start)
        return self._conditions(rows[shift:] + rows[:shift], others)

    def check(self, model: Model, sampling: SamplingConfig, others: Conditions, source: str) -> None:
        """Raise UserError that names the row of the table ``source`` if ``model`` cannot be conditioned on it."""
        for start in range(0, self.count, ROWS_AT_ONCE):
            rows = self.rows(range(start, min(start + ROWS_AT_ONCE, self.count)))
            for number, row in enumerate(rows, start=start + 1):
                conditions = self._conditions([row], others)
                try:
                    model.with_size(conditions.size(0))  # raises for a size that its network does not take
                    check_conditions(model.classes, model.config.text, sampling, conditions)
                    check_prompts(conditions.model_copy(update={"negative_prompt": None}), model.prompt_length)
                except UserError as error:
                    raise UserError(f"{source}, record {number}: {error}") from error

    def is_conditional(self, classes: Sequence[str]) -> bool:
        """Whether every row of it names a class or a prompt to a model of ``classes``."""
        pieces = (range(start, min(start + ROWS_AT_ONCE, self.count)) for start in range(0, self.count, ROWS_AT_ONCE))
        return all(
            is_conditional(classes, self._conditions([row], UNCONDITIONAL))
            for piece in pieces
            for row in self.rows(piece)
        )

    def _conditions(self, rows: list[RequestRow], others: Conditions) -> Conditions:
        labels, prompts, size_names = zip(*rows, strict=True)
        sizes = tuple(others.size(0) if name is None else parse_shape(name) for name in size_names)
        return Conditions(
            labels=labels if "label" in self.about.columns else (),
            prompts=prompts if "prompt" in self.about.columns else (),
            negative_prompt=others.negative_prompt,
            sizes=sizes if "size" in self.about.columns else others.sizes,
        )
