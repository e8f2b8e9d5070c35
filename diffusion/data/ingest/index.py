"""The index of a data set on disk: a cache of its tables, with groups of near-duplicates, and of stamps."""

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.common.errors import DarkroomError, TransientError
from diffusion.common.files import canonical_json, digest_of, is_full_disk
from diffusion.data.ingest.chunks import HASH_BITS, description_digest, perceptual_hash
from diffusion.data.manifest import (
    GIVEN_LABEL,
    LABELLED_BY,
    MASK,
    MASK_SIZE,
    STORED,
    Manifest,
    Part,
    digest_of_samples,
    read_records,
    sample_digest,
)
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.versions.takedown_records import removals

SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value);
    CREATE TABLE IF NOT EXISTS entries
        (origin TEXT, source TEXT, stamp TEXT, digest TEXT, sha256 BLOB, PRIMARY KEY (origin, source)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS records
        (source TEXT, sha256 BLOB, outcome TEXT, reason TEXT, PRIMARY KEY (source, sha256)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS samples (key BLOB PRIMARY KEY, split TEXT, digest BLOB) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS relabelled (key BLOB PRIMARY KEY, digest BLOB) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS dropped (key BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS masks (key BLOB PRIMARY KEY, mask TEXT) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS new_masks (key BLOB, source TEXT, mask TEXT, place TEXT, PRIMARY KEY (key, source));
    CREATE TABLE IF NOT EXISTS removed (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""
GROUPS = """
    CREATE TABLE IF NOT EXISTS bands (band INTEGER, value INTEGER, hash BLOB, PRIMARY KEY (band, value, hash))
        WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS groups (hash BLOB, category TEXT, root BLOB NOT NULL, PRIMARY KEY (hash, category))
        WITHOUT ROWID;
"""
FORMAT = 3
LOCK_TIMEOUT = 30.0
"""Seconds to wait for a program that has locked a database, such as a backup."""


class HashGroups:
    """Groups of images whose perceptual hashes differ in at most ``near`` bits from the first one's, the root's.

    Each group is in one category: a split of a data set, or a class.
    """

    def __init__(self, database: sqlite3.Connection, near: int | None) -> None:
        self.database, self.near = database, near
        database.executescript(GROUPS)

    def add_group(self, phash: bytes, category: str, root: bytes) -> None:
        """Begin a group in ``category`` with the image ``root``."""
        self.database.execute("INSERT OR IGNORE INTO groups VALUES (?, ?, ?)", (phash, category, root))
        bands = ((*band, phash) for band in enumerate(self._bands(phash)))
        self.database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?, ?)", bands)

    def groups_near(self, phash: bytes) -> list[tuple[bytes, str]]:
        """Return root and category of the groups of near-duplicates of an image with this hash, the nearest first.

        Hashes are cut into more bands than half of the bits that may differ: near-duplicates have a band that differs
        in one bit at most, and all such values are looked up.
        """
        width = -(-HASH_BITS // self._band_count)
        flips = [0, *(1 << bit for bit in range(width))] if self.near else [0]
        marks = ", ".join("?" * len(flips))
        query = f"SELECT DISTINCT g.* FROM bands JOIN groups g USING (hash) WHERE band = ? AND value IN ({marks})"
        number = int.from_bytes(phash, "big")
        matches = set()
        for band, value in enumerate(self._bands(phash)):
            for other, category, root in self.database.execute(query, (band, *(value ^ flip for flip in flips))):
                distance = (number ^ int.from_bytes(other, "big")).bit_count()
                if distance <= (self.near or 0):
                    matches.add((distance, root, category))
        return [(root, category) for _, root, category in sorted(matches)]

    @property
    def _band_count(self) -> int:
        # At least five, as SQLite's integers have 63 bits besides the sign.
        return max((self.near or 0) // 2 + 1, 5)

    def _bands(self, phash: bytes) -> Iterator[int]:
        """Yield the value of each band of a hash: bits of all frequencies, as smooth images have the same high ones."""
        bits = f"{int.from_bytes(phash, 'big'):0{HASH_BITS}b}"
        yield from (int(bits[band :: self._band_count], 2) for band in range(self._band_count))


class Index(HashGroups):
    """The index at ``path``, updated to the state of ``manifest`` (None: an empty data set).

    ``near``: bits in which the perceptual hashes of a near-duplicate and the first image of its group, its root, may
    differ; None if near-duplicates are not grouped. A chain of images that differ a little is not one group.
    ``store`` has the shards that are not in ``folder``.
    """

    def __init__(
        self, path: Path, folder: Path, manifest: Manifest | None, near: int | None, store: ShardStore | None = None
    ) -> None:
        self.path, self.store = path, store
        try:
            database = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            # Damaged. Everything in it can be restored.
            for file in (path, *path.parent.glob(f"{path.name}-*")):
                file.unlink()
            database = _open(path)
        super().__init__(database, near)
        self._removals = removals(path.parent)
        self.update(folder, manifest, near)

    def update(self, folder: Path, manifest: Manifest | None, near: int | None) -> None:
        """Update the index to the state of ``manifest``, with near-duplicates within ``near`` bits."""
        self.near = near
        if self._first("SELECT value FROM meta WHERE name = 'state'") != (self._state(manifest),):
            with self.transaction():
                self.clear()
                for part in manifest.parts if manifest else ():
                    rows = read_records(folder, part).to_pylist()
                    self.add_hashes(folder, part, rows)
                    for row in rows:
                        self.record(row)
                self.set_version(manifest)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Apply all changes inside, or none."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def clear(self) -> None:
        """Delete everything except the stamps and the takedowns known to this machine."""
        for table in ("records", "samples", "relabelled", "dropped", "masks", "removed", "bands", "groups"):
            self.database.execute(f"DELETE FROM {table}")
        for removal in self._removals:
            self.refuse(*removal.image_keys, *removal.digests)

    def set_version(self, manifest: Manifest | None) -> None:
        """Record the version that the index describes."""
        self.database.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (self._state(manifest),))

    def _state(self, manifest: Manifest | None) -> str:
        names = sorted(removal.name for removal in self._removals)
        return digest_of([FORMAT, manifest.digest if manifest else None, self.near, names])

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def stamp(self, origin: str, row: dict[str, Any]) -> None:
        """Record the stamp of an entry of ``origin`` after its bytes were read."""
        description = description_digest(row["label"], row["caption"], row["mask_source"])
        entry = (origin, row["source"], row["stamp"], description, bytes.fromhex(row["source_sha256"]))
        self.database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", entry)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row of RECORDS."""
        if row["outcome"] == "removed":
            self.refuse(row["source_sha256"], row["key"])
            return
        # The last record of a name counts: earlier quarantined records of it are obsolete.
        self.database.execute("DELETE FROM records WHERE source = ? AND outcome = 'quarantined'", (row["source"],))
        reason = row["reason"] if row["outcome"] == "quarantined" else None
        values = (row["source"], bytes.fromhex(row["source_sha256"]), row["outcome"], reason)
        self.database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", values)
        if row["outcome"] in STORED:
            key = bytes.fromhex(row["key"])
            digest = sample_digest(row["key"], row["split"], row["label"], row["caption"], mask := row.get(MASK.name))
            self.database.execute("INSERT INTO samples VALUES (?, ?, ?)", (key, row["split"], digest))
            self._set_given_label(row)
            if mask is not None:
                self.database.execute("INSERT INTO masks VALUES (?, ?)", (key, mask))
            if row["outcome"] == "dropped":
                self.database.execute("INSERT INTO dropped VALUES (?)", (key,))
            # Without its first image a group goes on with the next one.
            if self.near is not None and not any(self.sample(root) for root in row["near"] or ()):
                self.add_group(bytes.fromhex(row["phash"]), row["split"], key)

    def set_outcome(self, row: dict[str, Any]) -> None:
        """Change the outcome of an image from kept to dropped, or back, as its ``row`` says."""
        key = bytes.fromhex(row["key"])
        self.database.execute("DELETE FROM dropped WHERE key = ?", (key,))
        if row["outcome"] == "dropped":
            self.database.execute("INSERT INTO dropped VALUES (?)", (key,))
        values = (row["outcome"], row["source"], bytes.fromhex(row["source_sha256"]))
        self.database.execute("UPDATE records SET outcome = ? WHERE source = ? AND sha256 = ?", values)

    def describe(self, row: dict[str, Any]) -> None:
        """Replace label, caption and mask of a kept or dropped image by what its row of RECORDS says."""
        key, mask = bytes.fromhex(row["key"]), row.get(MASK.name)
        digest = sample_digest(row["key"], row["split"], row["label"], row["caption"], mask)
        self.database.execute("UPDATE samples SET digest = ? WHERE key = ?", (digest, key))
        self._set_given_label(row)
        self.database.execute("DELETE FROM masks WHERE key = ?", (key,))
        if mask is not None:
            self.database.execute("INSERT INTO masks VALUES (?, ?)", (key, mask))

    def _set_given_label(self, row: dict[str, Any]) -> None:
        key = bytes.fromhex(row["key"])
        self.database.execute("DELETE FROM relabelled WHERE key = ?", (key,))
        if row.get(LABELLED_BY.name):
            mask, label = row.get(MASK.name), row.get(GIVEN_LABEL.name)
            digest = sample_digest(row["key"], row["split"], label, row["caption"], mask)
            self.database.execute("INSERT INTO relabelled VALUES (?, ?)", (key, digest))

    def digest_as_given(self, key: str) -> bytes | None:
        """Return the digest that a stored image would have with its source's label; None if no list relabelled it."""
        row = self._first("SELECT digest FROM relabelled WHERE key = ?", bytes.fromhex(key))
        return None if row is None else bytes(row[0])

    def mask(self, key: str) -> str | None:
        """Return the digest of the mask of a stored image; None if it has none."""
        row = self._first("SELECT mask FROM masks WHERE key = ?", bytes.fromhex(key))
        return None if row is None else str(row[0])

    @property
    def has_masks(self) -> bool:
        """Whether a stored image has a mask."""
        return self._first("SELECT 1 FROM masks") is not None

    @property
    def has_new_masks(self) -> bool:
        """Whether an image came again with another mask."""
        return self._first("SELECT 1 FROM new_masks") is not None

    def add_new_mask(self, row: dict[str, Any], shard: str) -> None:
        """Note that a stored image came again with another mask, which lies in ``shard`` where ``row`` says."""
        place = [shard, row["offset"], row["size"], row.get(MASK_SIZE.name)]
        values = (bytes.fromhex(row["key"]), row["source"], row.get(MASK.name), canonical_json(place))
        self.database.execute("INSERT OR REPLACE INTO new_masks VALUES (?, ?, ?, ?)", values)

    def take_new_mask(self, key: str, source: str) -> tuple[str | None, list[Any]] | None:
        """Return digest and place of the new mask of an image of this name, and forget it; None if there is none."""
        values = (bytes.fromhex(key), source)
        row = self._first("SELECT mask, place FROM new_masks WHERE key = ? AND source = ?", *values)
        self.database.execute("DELETE FROM new_masks WHERE key = ? AND source = ?", values)
        return None if row is None else (row[0], json.loads(row[1]))

    def forget_new_masks(self) -> int:
        """Forget all new masks; returns how many there were."""
        return self.database.execute("DELETE FROM new_masks").rowcount

    def sample(self, key: str) -> tuple[str, bytes] | None:
        """Return split and digest of a kept or dropped image; None if there is none with this key."""
        query = "SELECT split, digest FROM samples WHERE key = ?"
        sample: tuple[str, bytes] | None = self._first(query, bytes.fromhex(key))
        return sample

    def is_removed(self, *digests: str | None) -> bool:
        """Return whether an image with one of these keys or digests was taken down."""
        query = "SELECT 1 FROM removed WHERE digest = ?"
        return any(self._first(query, bytes.fromhex(digest)) for digest in digests if digest)

    def find_outcome(self, source: str, sha256: str) -> tuple[str, str | None] | None:
        """Return outcome and reason of the bytes of this name; None if they are not recorded."""
        query = "SELECT outcome, reason FROM records WHERE source = ? AND sha256 = ?"
        record: tuple[str, str | None] | None = self._first(query, source, bytes.fromhex(sha256))
        return record

    def has_image(self, source: str, sha256: str) -> bool:
        """Return whether the bytes of this name are recorded, and not quarantined."""
        return (self.find_outcome(source, sha256) or ("quarantined",))[0] != "quarantined"

    def count(self, outcome: str) -> int:
        """Return the number of names whose last record has ``outcome``."""
        (count,) = self._first("SELECT count(*) FROM records WHERE outcome = ?", outcome) or (0,)
        return int(count)

    def list_quarantined(self, limit: int) -> list[dict[str, str]]:
        """Return source, reason and digest of the first ``limit`` quarantined entries, by name."""
        rows = self.database.execute(
            "SELECT source, reason, sha256 FROM records WHERE outcome = 'quarantined' ORDER BY source LIMIT ?", (limit,)
        )
        return [{"source": source, "reason": reason, "sha256": sha256.hex()} for source, reason, sha256 in rows]

    def content_digest(self, manifest: Manifest) -> str:
        """Compute the content digest of all kept samples, stored as ``manifest`` says."""
        query = "SELECT digest FROM samples WHERE key NOT IN (SELECT key FROM dropped) ORDER BY key"
        rows = self.database.execute(query)
        return digest_of_samples(manifest.storage, (row[0] for row in rows))

    def refuse(self, *digests: str) -> None:
        """Reject images with one of these keys or digests from now on."""
        rows = [(bytes.fromhex(digest),) for digest in digests if digest]
        self.database.executemany("INSERT OR IGNORE INTO removed VALUES (?)", rows)

    def add_hashes(self, folder: Path, part: Part, rows: list[dict[str, Any]]) -> None:
        """Hash the images in ``rows`` of a part that was written before near-duplicates were configured."""
        missing = [row for row in rows if row["outcome"] in STORED and row["phash"] is None]
        if self.near is not None and part.shard is not None and missing:
            with shard_file(folder, part.shard, self.store) as path, path.open("rb") as shard:
                for row in missing:
                    shard.seek(row["offset"])
                    row["phash"] = perceptual_hash(Image.open(io.BytesIO(shard.read(row["size"])), formats=("PNG",)))

    def _first(self, query: str, *values: object) -> Any:
        """Return the first row of a query; None if it has none."""
        return self.database.execute(query, values).fetchone()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, LOCK_TIMEOUT, isolation_level=None)
    # A page cache of 16 MiB: memory does not grow with the index.
    pragmas = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -16384;"
    database.executescript(pragmas + SCHEMA)
    return database


@contextmanager
def explain_database_errors(work: Path) -> Iterator[None]:
    """Context that turns errors of the databases in the folder ``work``, and a full disk, into one-line errors."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            names = ", ".join(sorted(path.name for path in work.glob("*.sqlite")))
            raise TransientError(
                f"another program has locked a database in {work} ({names}) for {LOCK_TIMEOUT:.0f} s: end the program "
                "that has it open, and give the same command again, which goes on with what is finished"
            ) from error
        if not is_full_disk(error):
            raise
        raise DarkroomError(
            f"the disk that holds {work} is full: free some space and give the same command again, "
            "which goes on with what is finished"
        ) from error
    except sqlite3.DatabaseError as error:
        raise DarkroomError(
            f"{work / 'index.sqlite'} is damaged ({error}): delete it and give the same command again, "
            "which builds it again"
        ) from error
