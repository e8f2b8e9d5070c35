"""The plan of an ingest and its chunks: images are read, decoded and written into a shard per chunk and bucket.

A chunk is a pure function of its entries and the configuration: any machine may run it, and none repeats it.
"""

import hashlib
import json
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.common.errors import ConflictError
from diffusion.common.files import canonical_json, digest_of, sha256_bytes, sha256_file
from diffusion.common.progress import Progress
from diffusion.common.shapes import shape_name
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import StoredImage, UnusableEntryError, ignore_pillow_warnings, prepare
from diffusion.data.ingest.staging import (
    PREPARED,
    ChunkStore,
    Digests,
    Workspace,
    is_prepared,
    shard_name,
    table_name,
    write_table,
)
from diffusion.data.manifest import MASK, MASK_SIZE
from diffusion.data.shards import TarWriter
from diffusion.data.sources import open_source, reader_of
from diffusion.data.sources.base import Access, Entry, ObjectStore, Source, limit_texts
from diffusion.data.sources.caption_files import complete_caption

ENTRY = "source, locator, stamp, label, caption, problem, mask"
"""Fields of an entry, in their order."""
SCHEMA = f"""
    CREATE TABLE listing (number INTEGER PRIMARY KEY, {ENTRY}, digest, UNIQUE (source));
    CREATE TABLE plan (number INTEGER PRIMARY KEY, {ENTRY}, known);
"""
STAMPED = """
    SELECT 1 FROM stored.entries s
    WHERE s.origin = :origin AND s.source = l.source AND s.stamp = l.stamp AND s.stamp != '' AND s.digest = l.digest
        AND (EXISTS (SELECT 1 FROM stored.records r WHERE r.source = s.source AND r.sha256 = s.sha256)
            OR EXISTS (SELECT 1 FROM stored.removed d WHERE d.digest = s.sha256))
"""
"""Query: the entry was read before with the same stamp, and its outcome is recorded in this version."""
QUARANTINED = "SELECT 1 FROM stored.records r WHERE r.source = l.source AND r.outcome = 'quarantined'"
KNOWN = "SELECT group_concat(hex(r.sha256)) FROM stored.records r WHERE r.source = l.source"
CORRECTED = "SELECT 1 FROM stored.entries s WHERE s.origin = :origin AND s.source = l.source AND s.digest != l.digest"
"""Query: the source describes the entry in another way than before, so it is read again, even with equal bytes."""
HASH_BITS = 256
"""Bits of a perceptual hash."""
NOT_OF_A_CHUNK = {
    *("source", "captions", "default_caption", "trigger", "folders", "licence", "captioner", "max_quarantined"),
    *("shard_bytes", "runner", "workers", "held_out"),
}
"""Fields of the configuration that cannot change what a chunk becomes."""
FORMAT = 9
"""Incremented when the same images would be stored in another way, so that chunks of older code are not reused."""
MAX_CHUNK_IMAGES = 8192
TEXT_OF_A_CHUNK = 2**23
"""Approximate characters of names, labels and captions per chunk; its memory grows with them."""


def make_plan(
    path: Path, source: Source, origin: str, index: Path, requeue: bool, rebuilding: bool, progress: Progress
) -> tuple[int, int]:
    """Write the plan to ``path``; returns the number of entries that ``source`` lists, and of those to read.

    Entries with an unchanged stamp under the same ``origin`` in the index database ``index`` are omitted, except
    quarantined ones if ``requeue``. Nothing is omitted if the data set is rebuilt (``rebuilding``).
    """
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        # An incomplete plan is useless: after a crash it is written again.
        database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA}")
        database.execute("ATTACH ? AS stored", (str(index),))
        database.execute("BEGIN")

        def rows() -> Iterator[tuple[str | None, ...]]:
            for number, listed in enumerate(source.entries(), start=1):
                entry = limit_texts(_complete(listed, source.access.config))
                if entry.problem is None:
                    source.access.captions.add(entry.source, listed.caption)
                if number % 10_000 == 0:
                    progress("images listed", number, None)
                yield (*entry, description_digest(entry.label, entry.caption, entry.mask))

        marks = ", ".join("?" * (len(Entry._fields) + 1))
        database.executemany(f"INSERT OR REPLACE INTO listing ({ENTRY}, digest) VALUES ({marks})", rows())
        known_column, condition = KNOWN, f"NOT EXISTS ({STAMPED})"
        if requeue:
            known_column = f"{KNOWN} AND r.outcome != 'quarantined'"
            condition = f"{condition} OR EXISTS ({QUARANTINED})"
        if rebuilding:
            known_column, condition = "NULL", "TRUE"
        order = "l.number" if source.in_order else "l.source"
        database.execute(
            f"""INSERT INTO plan ({ENTRY}, known)
                SELECT {ENTRY}, CASE WHEN EXISTS ({CORRECTED}) THEN NULL ELSE ({known_column}) END FROM listing l
                WHERE {condition} ORDER BY {order}""",
            {"origin": origin},
        )
        (listed_count,) = database.execute("SELECT count(*) FROM listing").fetchone()
        (planned_count,) = database.execute("SELECT count(*) FROM plan").fetchone()
        database.execute("COMMIT")
        return listed_count, planned_count


def _complete(entry: Entry, config: IngestConfig) -> Entry:
    """Complete the caption of an entry; a missing one that a captioner will write stays so."""
    if config.masks == "alpha":
        entry = entry._replace(mask=json.dumps(["", config.masks]))
    if entry.problem is not None or (entry.caption is None and config.captioner is not None):
        return entry
    return entry._replace(caption=complete_caption(entry.caption, config.default_caption, config.trigger))


def description_digest(label: str | None, caption: str | None, mask: str | None) -> str:
    """Digest what a source says about an image, to detect changes; of its mask the stamp."""
    return digest_of([label, caption] + ([] if mask is None else [json.loads(mask)[1]]))[:16]


@dataclass(frozen=True)
class Chunk:
    """Rows of a plan, from number ``first`` on."""

    first: int
    rows: list[tuple[Any, ...]]
    """Fields of the entry and, separated by commas, the hex SHA-256 of all bytes read under its name before."""
    config: IngestConfig
    objects: ObjectStore | None
    store: ChunkStore


def chunk_size(images: int, config: IngestConfig) -> int:
    """Return the images per chunk: about ``config.shard_bytes``, but small sets get at least eight chunks."""
    # Photographs as PNG take about two thirds of their pixels; headers and JSON about 2 KiB.
    image_bytes = 2 * config.size**2 + 2048
    max_images = min(max(config.shard_bytes // image_bytes, 1), MAX_CHUNK_IMAGES)
    return min(max_images, max(-(-images // 8), 512))


def prepare_chunk(chunk: Chunk) -> str:
    """Prepare the images of ``chunk``, unless done already; raises transient errors, such as a full disk.

    Returns its name in ``chunk.store``, a digest of everything that determines the result.
    """
    ignore_pillow_warnings()
    # Bytes read under a name before are not new.
    entries = [(Entry(*row[:-1]), frozenset((row[-1] or "").lower().split(",")) - {""}) for row in chunk.rows]
    settings = chunk.config.model_dump(mode="json", exclude=NOT_OF_A_CHUNK)
    # Hashes do not depend on the threshold, which a repeated ingest may calibrate by other images.
    settings["near_duplicates"] = chunk.config.near_duplicates is not None
    listing = [
        [entry.source, entry.stamp, entry.label, entry.caption, sorted(digests), *filter(None, [entry.mask])]
        for entry, digests in entries
    ]
    content = {"uri": chunk.config.source, "reader": reader_of(chunk.config.source), "config": settings}
    name = digest_of({"format": FORMAT, "entries": listing} | content)
    if not is_prepared(chunk.store, name):
        chunk.store.delete(table_name(name))
        with chunk.store.workspace() as workspace:
            with ExitStack() as files:
                rows, writers = _prepare(chunk, entries, workspace, files)
                ends = {bucket: writer.position for bucket, writer in writers.items()}
                for writer in writers.values():
                    writer.close()
            # Before the table is stored: a table implies that its shards exist.
            shards = {
                bucket: (_add_shard(chunk.store, name, workspace.folder / bucket), ends[bucket])
                for bucket in map(shape_name, chunk.config.shapes)
                if bucket in writers
            }
            table = workspace.folder / "table"
            write_table(table, rows, shards)
            # The table of another worker is as good, even if the source gave it other bytes.
            with suppress(ConflictError):
                chunk.store.add(table_name(name), table)
    return name


def _add_shard(store: ChunkStore, chunk: str, path: Path) -> Digests:
    return store.add(shard_name(chunk, path.name, sha256_file(path)), path)


def _prepare(
    chunk: Chunk,
    entries: list[tuple[Entry, frozenset[str]]],
    workspace: Workspace,
    files: ExitStack,
) -> tuple[list[dict[str, Any]], dict[str, TarWriter]]:
    """Write the usable images to a file per bucket in ``folder``, which ``files`` closes.

    Returns a row of PREPARED for each of ``entries``, and the writer of each bucket.
    """
    writers: dict[str, TarWriter] = {}
    source = open_source(chunk.config.source, Access(chunk.config, workspace.scratch, chunk.objects))
    readable = [entry for entry, _ in entries if entry.problem is None]
    payloads = source.read(readable)
    masks = source.read_masks(readable) if chunk.config.masks == "files" else repeat(None)
    keys: set[str] = set()
    places: dict[tuple[str, str | None], dict[str, Any]] = {}
    rows = []
    for entry, known_digests in entries:
        row: dict[str, Any] = dict.fromkeys(PREPARED.names)
        row |= {name: getattr(entry, name) for name in ("source", "stamp", "label", "caption")}
        row |= {"source_sha256": "", "mask_source": entry.mask}
        rows.append(row)
        try:
            if entry.problem is not None:
                raise UnusableEntryError(entry.problem)
            payload, mask = next(payloads), next(masks)
            if isinstance(payload, UnusableEntryError):
                raise payload
            row["source_sha256"] = digest_payload(payload)
            # Its mask may be another one.
            if row["source_sha256"] in known_digests and entry.mask is None:
                row["outcome"] = "known"
                continue
            image = prepare(payload, chunk.config, mask)
        except UnusableEntryError as error:
            row |= {"outcome": "quarantined", "reason": str(error)}
            continue
        row |= _describe(image, chunk.config)
        if image.key in keys:
            row["outcome"] = "duplicate"
        keys.add(image.key)
        digest, mask_png = image.mask or (None, b"")
        if (image.key, digest) not in places:
            if (bucket := row["bucket"]) not in writers:
                writers[bucket] = TarWriter(files.enter_context((workspace.folder / bucket).open("wb")))
            metadata = {name: row[name] for name in ("label", "caption", "source")} | {"sha256": row["source_sha256"]}
            offset = writers[bucket].add(image.key, image.png, metadata, mask_png)
            place = {"offset": offset, "size": len(image.png), MASK.name: digest, MASK_SIZE.name: len(mask_png) or None}
            places[image.key, digest] = place
        row |= places[image.key, digest]
    if isinstance(payloads, Generator):
        payloads.close()  # what it holds open may belong to this thread
    return rows, writers


def digest_payload(payload: bytes | Image.Image) -> str:
    """Compute the hex SHA-256 of a file's bytes, or of the pixels of an image that its source has decoded."""
    if isinstance(payload, bytes):
        return sha256_bytes(payload)
    header = canonical_json([payload.mode, *payload.size])
    return hashlib.sha256(header.encode() + payload.tobytes()).hexdigest()


def _describe(image: StoredImage, config: IngestConfig) -> dict[str, Any]:
    pixels = image.pixels.reshape(-1, image.pixels.shape[2] if image.pixels.ndim == 3 else 1)
    # Exact, as these are integers below 2**53, and six times as fast as numpy is on integers.
    values = np.ascontiguousarray(pixels.T).astype(np.float64)
    fields = {
        "key": image.key,
        "mode": image.mode,
        "bucket": shape_name((image.pixels.shape[0], image.pixels.shape[1])),
        "width": image.source_size[0],
        "height": image.source_size[1],
        "total": [int(total) for total in values.sum(1)],
        "squares": [int(squares) for squares in np.einsum("cn,cn->c", values, values)],
    }
    if config.near_duplicates is not None:
        fields["phash"] = perceptual_hash(Image.fromarray(image.pixels))
    return fields


def perceptual_hash(image: Image.Image) -> str:
    """Compute the perceptual hash: 256 signs of the lowest frequencies of a 32×32 reduction to grey, as hex digits.

    Of 2,500 digits, photographs of clothes or emoji, copies by JPEG of quality 80, twice the size or noise of 4 levels
    differ in at most 24 bits in 99 %, other digits and clothes in 0.1 %; with the usual 64 bits a tenth of all digits.
    """
    # Imported here: scipy.fft takes longer to load than all else, and near-duplicates are rarely asked for.
    from scipy.fft import dctn

    grey = reduce_to_grey(image)
    rows, columns = np.indices(grey.shape)
    order = np.lexsort((rows.ravel(), (rows + columns).ravel()))[1 : HASH_BITS + 1]  # without the brightness
    # Above 4 levels, so that frequencies which an image does not have are not decided by its noise.
    return np.packbits(dctn(grey, norm="ortho").ravel()[order] > 4).tobytes().hex()


def reduce_to_grey(image: Image.Image) -> np.ndarray:
    """Reduce an image to the grey values that are hashed: (32, 32) float64 in [0, 255]."""
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)


def chunks_of(
    plan: Path, config: IngestConfig, objects: ObjectStore | None, images: int, store: ChunkStore
) -> Iterator[Chunk]:
    """Split a plan of ``images`` rows into chunks of equally many rows, or fewer where texts are long."""
    size = chunk_size(images, config)
    rows, text = list[tuple[Any, ...]](), 0
    with closing(sqlite3.connect(plan)) as database:
        query = f"SELECT number, {ENTRY}, known FROM plan ORDER BY number"
        for number, *row in database.execute(query):
            entry = Entry(*row[:-1])
            text += sum(len(part or "") for part in (entry.source, entry.label, entry.caption))
            rows.append(tuple(row))
            if len(rows) == size or text >= TEXT_OF_A_CHUNK or number == images:
                yield Chunk(number - len(rows) + 1, rows, config, objects, store)
                rows, text = [], 0
