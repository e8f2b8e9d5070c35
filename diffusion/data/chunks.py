"""One chunk of an ingest: pictures read, decoded and written into a shard of their own, whoever runs it.

A chunk is a pure function of its entries and the configuration, so it may run in any thread, process or machine that
sees the work folder, and a chunk that was finished before a kill is not done again.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from diffusion.data.config import IngestConfig
from diffusion.data.manifest import RECORDS
from diffusion.data.pictures import Refused, StoredPicture, prepare
from diffusion.data.plan import Planned, read_plan, text_lengths
from diffusion.data.shards import TarWriter
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, ObjectStore, Payload
from diffusion.files import canonical_json, digest_of, sha256_bytes, sha256_file, sync_file, sync_folder

COLUMNS = (*RECORDS.names, "end", "stamp")
"""What is known of an entry: what will be its record, without verdicts on what only the whole set can tell. ``outcome``
is ``quarantined``, ``duplicate`` (within the chunk), ``known`` (read before) or null; ``end`` is that of the sample."""
NOT_OF_A_CHUNK = {"source", "licence", "max_quarantined", "shard_bytes", "runner", "workers", "held_out"}
"""Fields of the configuration that cannot change what a chunk becomes."""
FORMAT = 3
"""Goes up when the same pictures would become something else, so that what older code left is not taken up."""
TEXT_OF_A_CHUNK = 2**23
"""Characters of names, labels and captions in a chunk, about; its memory grows with them."""


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` … ``last`` of the plan in the folder ``work``."""

    work: Path
    uri: str
    config: IngestConfig
    objects: ObjectStore | None
    first: int
    last: int


@dataclass(frozen=True)
class PreparedChunk:
    """A finished chunk: a shard of its own, and a table, in which each line is JSON."""

    table: Path
    shard: Path

    def read(self) -> tuple[str, list[dict[str, Any]]]:
        """The SHA-256 of the shard, and a row of COLUMNS for each entry, in the order of the plan."""
        with self.table.open() as lines:
            shard_sha256, *rows = map(json.loads, lines)
        return shard_sha256, rows


def chunk_size(pictures: int, config: IngestConfig) -> int:
    """How many of ``pictures`` make a chunk: about ``config.shard_bytes``, but small sets get at least eight."""
    # Photographs as PNG take about two thirds of their pixels; headers and JSON about 2 KiB.
    about = 2 * config.size**2 + 2048
    most = min(max(config.shard_bytes // about, 1), 8192)
    return min(most, max(-(-pictures // 8), 512))


def prepare_chunk(chunk: Chunk) -> PreparedChunk:
    """Read and prepare the pictures of ``chunk``, unless that is done; raises what may pass, such as a full disk."""
    planned = read_plan(chunk.work / "plan.sqlite", chunk.first, chunk.last)
    settings = chunk.config.model_dump(mode="json", exclude=NOT_OF_A_CHUNK)
    listing = [[*_listed(each), sorted(each.known)] for each in planned]
    name = digest_of({"format": FORMAT, "uri": chunk.uri, "config": settings, "entries": listing})
    folder = chunk.work / "chunks"
    table, shard = folder / f"{name}.jsonl", folder / f"{name}.tar"
    if not table.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Not a fixed name: a worker whose parent was killed may still be at it.
        partial = folder / f".{name}.{uuid.uuid4().hex}.partial"
        with partial.open("wb") as tar:
            rows = _prepare(chunk, planned, TarWriter(tar))
        shard_sha256 = sha256_file(partial)
        _finish(partial, shard)
        with partial.open("w") as lines:
            lines.writelines(f"{json.dumps(line)}\n" for line in (shard_sha256, *rows))
        _finish(partial, table)
    return PreparedChunk(table, shard)


def _finish(partial: Path, path: Path) -> None:
    sync_file(partial)
    partial.replace(path)
    # Before the next is written: a table tells that its shard is there.
    sync_folder(path.parent)


def _listed(planned: Planned) -> list[str | None]:
    entry = planned.entry
    return [entry.source, entry.stamp, entry.label, entry.caption]


def _prepare(chunk: Chunk, planned: list[Planned], writer: TarWriter) -> list[dict[str, Any]]:
    """Write what can be used with ``writer``; returns a row of COLUMNS for each of ``planned``."""
    source = open_source(chunk.uri, Access(chunk.config, chunk.work / "scratch", chunk.objects))
    payloads = source.read([each.entry for each in planned])
    seen: set[str] = set()
    rows = []
    for each, payload in zip(planned, payloads, strict=True):
        row = dict.fromkeys(COLUMNS) | _about(each, payload)
        rows.append(row)
        if isinstance(payload, Refused) or row["outcome"] == "known":
            continue
        try:
            picture = prepare(payload, chunk.config)
        except Refused as refused:
            row |= {"outcome": "quarantined", "reason": str(refused)}
            continue
        row |= _described(picture, chunk.config)
        if picture.key in seen:
            row["outcome"] = "duplicate"
            continue
        seen.add(picture.key)
        told = {name: row[name] for name in ("label", "caption", "source")} | {"sha256": row["source_sha256"]}
        extent = writer.add(picture.key, picture.png, told)
        row |= {"offset": extent.start, "size": extent.png, "end": extent.end}
    writer.close()
    return rows


def _about(planned: Planned, payload: Payload) -> dict[str, Any]:
    entry = planned.entry
    about: dict[str, Any] = {"source": entry.source, "stamp": entry.stamp, "source_sha256": ""}
    if isinstance(payload, Refused):
        about |= {"outcome": "quarantined", "reason": str(payload)}
    else:
        about["source_sha256"] = _digest(payload)
        if about["source_sha256"] in planned.known:
            about["outcome"] = "known"
    return about | {"label": entry.label, "caption": entry.caption}


def _digest(payload: bytes | Image.Image) -> str:
    if isinstance(payload, bytes):
        return sha256_bytes(payload)
    header = canonical_json([payload.mode, *payload.size])
    return hashlib.sha256(header.encode() + payload.tobytes()).hexdigest()


def _described(picture: StoredPicture, config: IngestConfig) -> dict[str, Any]:
    pixels = picture.pixels.reshape(-1, picture.pixels.shape[2] if picture.pixels.ndim == 3 else 1)
    # Exact, as these are integers below 2**53, and six times as fast as numpy is on integers.
    values = np.ascontiguousarray(pixels.T).astype(np.float64)
    described = {
        "key": picture.key,
        "mode": picture.mode,
        "width": picture.source_size[0],
        "height": picture.source_size[1],
        "total": [int(total) for total in values.sum(1)],
        "squares": [int(squares) for squares in np.einsum("cn,cn->c", values, values)],
    }
    if config.near_duplicates is not None:
        described["phash"] = perceptual_hash(Image.fromarray(picture.pixels))
    return described


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit perceptual hash (DCT of a 32×32 reduction, signs against the median) as a signed integer."""
    return int.from_bytes(np.packbits(imagehash.phash(picture).hash).tobytes(), "big", signed=True)


def chunks_of(work: Path, config: IngestConfig, objects: ObjectStore | None, pictures: int) -> Iterator[Chunk]:
    """The chunks into which a plan of ``pictures`` rows falls: as many rows in each, or fewer where texts are long."""
    size = chunk_size(pictures, config)
    first, text = 1, 0
    for number, length in text_lengths(work / "plan.sqlite"):
        text += length
        if number - first + 1 == size or text >= TEXT_OF_A_CHUNK or number == pictures:
            yield Chunk(work, config.source, config, objects, first, number)
            first, text = number + 1, 0
