"""What a data set holds, in one digest that knows nothing of how it came about."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from diffusion.data.config import StorageConfig
from diffusion.data.manifest import Part, read_records
from diffusion.files import canonical_json


def sample_digest(key: str, split: str, label: str | None, caption: str | None) -> bytes:
    """SHA-256 of one kept picture and of all that training is told of it, as canonical JSON."""
    return hashlib.sha256(canonical_json([key, split, label, caption]).encode()).digest()


def digest_of_samples(storage: StorageConfig, samples: Iterable[bytes]) -> str:
    """The content digest of the pictures whose ``sample_digest``s come in the order of their keys.

    Hex SHA-256 over the canonical JSON of ``storage`` and the digests behind it.
    """
    digest = hashlib.sha256(canonical_json(storage.model_dump(mode="json")).encode())
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()


def content_digest(folder: Path, parts: Iterable[Part], storage: StorageConfig) -> str:
    """The content digest of what ``parts`` of the data set in ``folder`` keep.

    Sets that keep the same pictures have the same digest, however many ingests, chunks and removals made them.
    Memory does not grow with the set: it is sorted on disk.

    Raises UserError if a records table is missing or damaged.
    """
    # A database without a name lies in a temporary file that the system deletes with this process.
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE kept (key TEXT, digest BLOB)")
        for part in parts:
            database.executemany("INSERT INTO kept VALUES (?, ?)", _samples(folder, part))
        return digest_of_samples(storage, (row[0] for row in database.execute("SELECT digest FROM kept ORDER BY key")))


def _samples(folder: Path, part: Part) -> Iterator[tuple[str, bytes]]:
    for row in read_records(folder, part, ("outcome", "key", "split", "label", "caption")).to_pylist():
        if row["outcome"] == "kept":
            yield row["key"], sample_digest(row["key"], row["split"], row["label"], row["caption"])
