"""What a data set is: the one file that is read first and written last.

``manifest.json`` names everything else in the data set's folder by content (shards, and two Parquet
tables), so a new version never touches the files of the old one before it is complete.
"""

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from diffusion.config import Config
from diffusion.data.config import IngestConfig
from diffusion.errors import UserError
from diffusion.files import digest_of, write_atomically, write_json

LIMITS = {"source", "shard_bytes", "max_quarantined", "max_pixels", "max_bytes"}
"""Fields of the ingest configuration that cannot change a stored sample, and so stay out of its digest."""

SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("mode", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
    ]
)
"""One row per kept picture, in the order of the shards; ``offset`` and ``size`` are those of its PNG."""

QUARANTINE = pa.schema([("source", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])
"""One row per refused file; ``sha256`` is empty where the file could not be read."""

Split = Literal["train", "held_out"]


class FileEntry(Config):
    """A file of the data set, relative to its folder."""

    name: str
    sha256: str
    bytes: int


class ShardEntry(FileEntry):
    """A WebDataset tar."""

    count: int
    """Pictures inside."""


class Manifest(Config):
    """A version of a data set."""

    format_version: Literal[1] = 1
    name: str
    content_digest: str
    """SHA-256 over the samples, sorted, and the ingest configuration; free of history."""
    layout_digest: str
    """SHA-256 over the shards as they lie."""
    ingest: IngestConfig
    size: int
    """Height and width of every picture, in pixels."""
    channels: Literal[1, 3]
    counts: dict[Split, int]
    labels: list[str]
    """Class names, sorted; empty if the set has none."""
    class_histogram: dict[str, int]
    mean: list[float]
    """Of the training pictures, per channel, in [−1, 1]."""
    std: list[float]
    """Of the training pictures, per channel, in [−1, 1]."""
    sigma_data: float
    """Root of the mean variance over the channels: EDM's σ_data."""
    duplicates: int = Field(ge=0)
    quarantined: int = Field(ge=0)
    shards: list[ShardEntry]
    samples_table: FileEntry
    quarantine_table: FileEntry


def content_digest(samples: list[dict[str, Any]], ingest: IngestConfig) -> str:
    """The digest that drives training order and caches: what is in the set, and how it was made."""
    rows = sorted([row["key"], row["split"], row["label"], row["caption"]] for row in samples)
    return digest_of({"ingest": ingest.model_dump(mode="json", exclude=LIMITS), "samples": rows})


def write_table(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> FileEntry:
    """Write ``rows`` as ``<name>-<digest>.parquet`` in ``folder``."""
    table = pa.Table.from_pylist(rows, schema=schema)
    staged = folder / f".{name}.parquet"
    digest = write_atomically(staged, lambda partial: pq.write_table(table, partial))
    path = folder / f"{name}-{digest[:16]}.parquet"
    staged.replace(path)
    return FileEntry(name=path.name, sha256=digest, bytes=path.stat().st_size)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the data set in ``folder``; raises UserError if there is none or it is damaged."""
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"no data set in {folder}: run `darkroom ingest SOURCE --dataset {folder.name}`") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged ({where}: {first['msg']}): ingest the data set again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make ``manifest`` the current version of the data set in ``folder``."""
    write_json(folder / "manifest.json", json.loads(manifest.model_dump_json()))
