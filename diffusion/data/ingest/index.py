"""The index of a data set: its records by key and by source, and groups of near-duplicates, on disk.

It is a cache. What the tables of the data set say can always be read from them again; what only this machine knows,
the stamps by which unread files are recognised, costs no more than reading those files once more. Near-duplicates are
images whose perceptual hashes differ in a few bits, found without comparing all pairs.
"""

import io
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.common.files import digest_of
from diffusion.data.ingest.chunks import perceptual_hash, told_of
from diffusion.data.manifest import Manifest, Part, digest_of_samples, read_records, sample_digest
from diffusion.data.versions.takedown_records import removals

SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value);
    CREATE TABLE IF NOT EXISTS seen
        (origin TEXT, source TEXT, stamp TEXT, told TEXT, sha256 BLOB, PRIMARY KEY (origin, source)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS records
        (source TEXT, sha256 BLOB, outcome TEXT, reason TEXT, PRIMARY KEY (source, sha256)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS samples (key BLOB PRIMARY KEY, split TEXT, digest BLOB) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS removed (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""
NEAR_SCHEMA = """
    CREATE TABLE IF NOT EXISTS bands (band INTEGER, value INTEGER, hash INTEGER, PRIMARY KEY (band, value, hash))
        WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS groups (hash INTEGER, split TEXT, root BLOB NOT NULL, PRIMARY KEY (hash, split))
        WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS by_root ON groups (root);
"""
FROM_THE_TABLES = ("records", "samples", "removed", "bands", "groups")
CACHE_KIB = 16 * 1024
"""Of SQLite's pages, so that memory does not grow with the index."""
FORMAT = 1
BITS = 64


class Index:
    """The index at ``path``, brought to the state of ``manifest`` (None: of a data set that has nothing yet)."""

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None, near: int | None) -> None:
        self.path = path
        self.near_distance = near
        try:
            self.database = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            # Damaged. All that is in it can be had again.
            for each in (path, *path.parent.glob(f"{path.name}-*")):
                each.unlink()
            self.database = _open(path)
        self.near = NearCopies(self.database, near) if near is not None else None
        self._removals = removals(path.parent)
        if self.database.execute("SELECT value FROM meta WHERE name = 'state'").fetchone() != (self._state(manifest),):
            with self.transaction():
                self.clear()
                for part in manifest.parts if manifest else ():
                    self._read(folder, part)
                self.stands_for(manifest)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside, or none."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def clear(self) -> None:
        """Forget all but the stamps, and what this machine knows to have been taken down."""
        for table in FROM_THE_TABLES:
            self.database.execute(f"DELETE FROM {table}")
        for removal in self._removals:
            self.refuse(*removal.image_keys, *removal.digests)

    def stands_for(self, manifest: Manifest | None) -> None:
        """Say of which version this is the index."""
        self.database.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (self._state(manifest),))

    def _state(self, manifest: Manifest | None) -> str:
        known = sorted(removal.name for removal in self._removals)
        return digest_of([FORMAT, manifest.digest if manifest else None, self.near_distance, known])

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def stamp(self, origin: str, row: dict[str, Any]) -> None:
        """What an entry of ``origin`` looks like from outside, now that its bytes are known."""
        told = told_of(row["label"], row["caption"])
        seen = (origin, row["source"], row["stamp"], told, bytes.fromhex(row["source_sha256"]))
        self.database.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?)", seen)

    def record(self, row: dict[str, Any]) -> None:
        """Take in a row of RECORDS."""
        sha256 = bytes.fromhex(row["source_sha256"])
        if row["outcome"] == "removed":
            self.refuse(row["source_sha256"], row["key"])
            return
        # The last that is heard of a name counts: what was refused under it is done with.
        self.database.execute("DELETE FROM records WHERE source = ? AND outcome = 'quarantined'", (row["source"],))
        self.database.execute(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)",
            (row["source"], sha256, row["outcome"], row["reason"] if row["outcome"] == "quarantined" else None),
        )
        if row["outcome"] == "kept":
            key = bytes.fromhex(row["key"])
            digest = sample_digest(row["key"], row["split"], row["label"], row["caption"])
            self.database.execute("INSERT INTO samples VALUES (?, ?, ?)", (key, row["split"], digest))
            if self.near is not None:
                self.near.add(row["phash"], key, row["split"], [bytes.fromhex(root) for root in row["near"] or ()])

    def sample(self, key: str) -> tuple[str, bytes] | None:
        """Split and digest of a kept image; None if there is none of this key."""
        found = self.database.execute(
            "SELECT split, digest FROM samples WHERE key = ?", (bytes.fromhex(key),)
        ).fetchone()
        return None if found is None else (found[0], found[1])

    def is_removed(self, *digests: str) -> bool:
        """Whether an image with one of these keys or digests was taken down."""
        return any(
            self.database.execute("SELECT 1 FROM removed WHERE digest = ?", (bytes.fromhex(digest),)).fetchone()
            for digest in digests
            if digest
        )

    def is_removed_by_all(self, *digests: str | None) -> bool:
        """Whether each of these keys and digests, as far as there are any, is one that was taken down."""
        return all(self.is_removed(digest) for digest in digests if digest)

    def refusal(self, source: str, sha256: str) -> str | None:
        """Why the bytes of this name were refused; None if they were not."""
        found = self.database.execute(
            "SELECT reason FROM records WHERE source = ? AND sha256 = ? AND outcome = 'quarantined'",
            (source, bytes.fromhex(sha256)),
        ).fetchone()
        return None if found is None else str(found[0])

    def has(self, source: str, sha256: str) -> bool:
        """Whether the bytes of this name were taken in, as an image or as a copy of one."""
        found = self.database.execute(
            "SELECT 1 FROM records WHERE source = ? AND sha256 = ? AND outcome IN ('kept', 'duplicate')",
            (source, bytes.fromhex(sha256)),
        ).fetchone()
        return found is not None

    def count(self, outcome: str) -> int:
        """How many names ended as ``outcome`` at last."""
        (count,) = self.database.execute("SELECT count(*) FROM records WHERE outcome = ?", (outcome,)).fetchone()
        return int(count)

    def quarantined(self, limit: int) -> list[dict[str, str]]:
        """Source, reason and digest of the first ``limit`` that stand refused, by name."""
        rows = self.database.execute(
            "SELECT source, reason, sha256 FROM records WHERE outcome = 'quarantined' ORDER BY source LIMIT ?", (limit,)
        )
        return [{"source": source, "reason": reason, "sha256": sha256.hex()} for source, reason, sha256 in rows]

    def content_digest(self, manifest: Manifest) -> str:
        """The content digest of all samples, stored as ``manifest`` says."""
        rows = self.database.execute("SELECT digest FROM samples ORDER BY key")
        return digest_of_samples(manifest.storage, (row[0] for row in rows))

    def refuse(self, *digests: str) -> None:
        """Take no image with one of these keys or digests any more."""
        found = [(bytes.fromhex(digest),) for digest in digests if digest]
        self.database.executemany("INSERT OR IGNORE INTO removed VALUES (?)", found)

    def _read(self, folder: Path, part: Part) -> None:
        rows = read_records(folder, part).to_pylist()
        if self.near is not None and any(row["outcome"] == "kept" and row["phash"] is None for row in rows):
            add_hashes(folder, part, rows)
        for row in rows:
            self.record(row)


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    pragmas = f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -{CACHE_KIB};"
    database.executescript(pragmas + SCHEMA + NEAR_SCHEMA)
    return database


def add_hashes(folder: Path, part: Part, rows: list[dict[str, Any]]) -> None:
    """Hash the images of a part that was made before near-copies were asked for."""
    assert part.shard is not None
    with (folder / part.shard.name).open("rb") as shard:
        for row in rows:
            if row["outcome"] == "kept" and row["phash"] is None:
                shard.seek(row["offset"])
                row["phash"] = perceptual_hash(Image.open(io.BytesIO(shard.read(row["size"])), formats=("PNG",)))


@dataclass(frozen=True)
class Group:
    """Near-copies of one another, named after the least key that founded one of the groups it grew from."""

    root: bytes
    split: str


class NearCopies:
    """The groups, in the tables of the index ``database``; ``distance`` is the largest number of differing bits."""

    def __init__(self, database: sqlite3.Connection, distance: int) -> None:
        self.database = database
        self.distance = distance
        edges = [BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]

    def around(self, phash: int) -> list[Group]:
        """The groups that hold a near-copy of an image with this hash, sorted by root."""
        query = (
            "SELECT g.hash, g.root, g.split FROM bands b JOIN groups g USING (hash) WHERE b.band = ? AND b.value = ?"
        )
        groups = {
            Group(root, split)
            for band_and_value in enumerate(self._values(phash))
            for other, root, split in self.database.execute(query, band_and_value)
            if ((phash ^ other) % 2**BITS).bit_count() <= self.distance
        }
        return sorted(groups, key=lambda group: group.root)

    def add(self, phash: int, key: bytes, split: str, joined: Iterable[bytes]) -> None:
        """Add an image to the groups with the roots ``joined``, which become one; without any, to one of its own."""
        roots = sorted(joined)
        root = roots[0] if roots else key
        self.database.executemany("UPDATE groups SET root = ? WHERE root = ?", ((root, other) for other in roots[1:]))
        self.database.execute("INSERT OR IGNORE INTO groups VALUES (?, ?, ?)", (phash, split, root))
        self.database.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?, ?)",
            ((band, value, phash) for band, value in enumerate(self._values(phash))),
        )

    def _values(self, phash: int) -> Iterator[int]:
        unsigned = phash % 2**BITS
        # SQLite's integers are signed.
        return ((unsigned >> low & mask) - 2 ** (BITS - 1) for low, mask in self._bands)
