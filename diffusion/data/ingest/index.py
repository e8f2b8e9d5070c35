"""The index of a data set on disk: a cache of its tables, with groups of near-duplicates, and of stamps."""

import io
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from PIL import Image

from diffusion.common.errors import DarkroomError, TransientError
from diffusion.common.files import canonical_json, digest_of, is_full_disk
from diffusion.data.ingest.chunks import description_digest, perceptual_hash
from diffusion.data.ingest.hash_groups import HashGroups
from diffusion.data.manifest import (
    GIVEN_LABEL,
    LABELLED_BY,
    MASK,
    MASK_SIZE,
    STORED,
    Manifest,
    Part,
    Split,
    digest_of_samples,
    read_records,
    sample_digest,
)
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.tables import explain_query_errors
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
    CREATE TABLE IF NOT EXISTS roots (number INTEGER PRIMARY KEY, hashes BLOB, splits BLOB, keys BLOB);
    CREATE TEMP TABLE wanted (name TEXT, digest BLOB);
    DROP TABLE IF EXISTS bands;
    DROP TABLE IF EXISTS groups;
"""
"""Tables; a row of ``roots`` has the first images of some groups of near-duplicates, one behind the other. The last two
are of earlier code."""
FORMAT = 4
SPLITS, KEY_BYTES = get_args(Split), 32
LOCK_TIMEOUT = 30.0
"""Seconds to wait for a program that has locked a database, such as a backup."""


class Sample(NamedTuple):
    """A kept or dropped image."""

    split: str
    digest: bytes
    digest_as_given: bytes | None
    """The digest that it would have with its source's label; None if no list relabelled it."""
    mask: str | None
    """Digest of its mask."""


class Index:
    """The index at ``path``, updated to the state of ``manifest`` (None: an empty data set).

    What it is queried for is looked up for many rows at once (``look_up``); what is recorded is written by ``flush``.

    ``near``: bits in which the perceptual hashes of a near-duplicate and the first image of its group, its root, may
    differ; None if near-duplicates are not grouped. A chain of images that differ a little is not one group.
    ``store`` has the shards that are not in ``folder``.
    """

    def __init__(
        self, path: Path, folder: Path, manifest: Manifest | None, near: int | None, store: ShardStore | None = None
    ) -> None:
        self.path, self.store = path, store
        try:
            self.database = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            # Damaged. Everything in it can be restored.
            for file in (path, *path.parent.glob(f"{path.name}-*")):
                file.unlink()
            self.database = _open(path)
        self._groups: HashGroups | None = None
        self._forget()
        self._removals = removals(path.parent)
        self.update(folder, manifest, near)

    def update(self, folder: Path, manifest: Manifest | None, near: int | None) -> None:
        """Update the index to the state of ``manifest``, with near-duplicates within ``near`` bits."""
        self.near = near
        self._groups = None
        if self._first("SELECT value FROM meta WHERE name = 'state'") != (self._state(manifest),):
            with self.transaction():
                self.clear()
                for part in manifest.parts if manifest else ():
                    rows = read_records(folder, part).to_pylist()
                    self.add_hashes(folder, part, rows)
                    self.look_up([{"key": root} for row in rows for root in row["near"] or ()])
                    for row in rows:
                        self.record(row)
                    self.flush()
                self.set_version(manifest)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Apply all changes inside, or none."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.flush()
        except BaseException:
            self.database.execute("ROLLBACK")
            self._forget()
            self._groups = None
            raise
        self.database.execute("COMMIT")

    def clear(self) -> None:
        """Delete everything except the stamps and the takedowns known to this machine."""
        for table in ("records", "samples", "relabelled", "dropped", "masks", "removed", "roots"):
            self.database.execute(f"DELETE FROM {table}")
        self._forget()
        self._groups = None
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

    def look_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Read what is known of images with the ``key``, ``source_sha256`` and ``source`` of ``rows``, if given."""
        keys = {key for row in rows if (key := row.get("key"))} - self._samples.keys()
        digests = keys | {digest for row in rows if (digest := row.get("source_sha256"))}
        names = {(row["source"], row["source_sha256"]) for row in rows if "source" in row}
        self._samples |= dict.fromkeys(keys)
        query = """SELECT w.digest, s.split, s.digest, r.digest, m.mask FROM wanted w CROSS JOIN samples s ON
            s.key = w.digest LEFT JOIN relabelled r ON r.key = s.key LEFT JOIN masks m ON m.key = s.key"""
        for key, *fields in self._select(query, [("", key) for key in keys]):
            self._samples[key.hex()] = Sample(*fields)
        self._removed |= dict.fromkeys(digests - self._removed.keys(), False)
        query = "SELECT w.digest FROM wanted w CROSS JOIN removed r ON r.digest = w.digest"
        for (digest,) in self._select(query, [("", digest) for digest in digests]):
            self._removed[digest.hex()] = True
        new_names = names - self._outcomes.keys()
        self._outcomes |= dict.fromkeys(new_names)
        query = """SELECT w.name, w.digest, r.outcome, r.reason FROM wanted w CROSS JOIN records r ON
            r.source = w.name AND r.sha256 = w.digest"""
        for name, digest, *outcome in self._select(query, new_names):
            self._outcomes[name, digest.hex()] = tuple(outcome)

    def _select(self, query: str, wanted: Iterable[tuple[str, str]]) -> Iterator[Any]:
        """Yield the rows of a query that joins the table ``wanted`` of names and hex digests."""
        rows = sorted((name, bytes.fromhex(digest)) for name, digest in wanted)
        self.database.execute("DELETE FROM wanted")
        self.database.executemany("INSERT INTO wanted VALUES (?, ?)", rows)
        yield from self.database.execute(query)

    def flush(self) -> None:
        """Write what was recorded, and forget what was looked up."""
        obsolete = "DELETE FROM records WHERE source = ? AND outcome = 'quarantined'"
        self.database.executemany(obsolete, ((source,) for source in self._records))
        values = (
            (source, bytes.fromhex(digest), *outcome)
            for source, outcomes in self._records.items()
            for digest, outcome in outcomes.items()
        )
        self.database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", values)
        for table, rows in self._rows.items():
            marks = ", ".join("?" * len(rows[0]))
            verb = "INSERT" if table == "samples" else "INSERT OR REPLACE"
            self.database.executemany(f"{verb} INTO {table} VALUES ({marks})", rows)
        if self._roots:
            hashes, splits = zip(*self._roots, strict=True)
            block = (b"".join(hashes), bytes(map(SPLITS.index, splits)), b"".join(self._roots.values()))
            self.database.execute("INSERT INTO roots (hashes, splits, keys) VALUES (?, ?, ?)", block)
        self._forget()

    def _forget(self) -> None:
        """Forget what was looked up, and what was recorded and not written."""
        self._samples: dict[str, Sample | None] = {}
        self._removed: dict[str, bool] = {}
        self._outcomes: dict[tuple[str, str], tuple[str, str | None] | None] = {}
        self._records: dict[str, dict[str, tuple[str, str | None]]] = {}
        self._rows: dict[str, list[tuple[object, ...]]] = defaultdict(list)
        self._roots: dict[tuple[bytes, str], bytes] = {}

    def expect_hashes(self, phashes: Sequence[str]) -> None:
        """Announce the hashes of images that ``groups_near`` will look for, in this order, or some of them."""
        if self._groups is None and self.near is not None and phashes:
            if self._roots:
                self.flush()
            self._groups = HashGroups(self.near, KEY_BYTES)
            for hashes, splits, keys in self.database.execute("SELECT hashes, splits, keys FROM roots ORDER BY number"):
                self._groups.extend(hashes, [SPLITS[split] for split in splits], keys)
        if self._groups is not None:
            self._groups.expect(map(bytes.fromhex, phashes))

    def groups_near(self, phash: str) -> list[tuple[bytes, str]]:
        """Return the key of the root, and the split, of the groups of near-duplicates of an image, nearest first."""
        if self._groups is None:
            self.expect_hashes([phash])
        return [] if self._groups is None else self._groups.find(bytes.fromhex(phash))

    def stamp(self, origin: str, row: dict[str, Any]) -> None:
        """Record the stamp of an entry of ``origin`` after its bytes were read."""
        description = description_digest(row["label"], row["caption"], row["mask_source"])
        entry = (origin, row["source"], row["stamp"], description, bytes.fromhex(row["source_sha256"]))
        self._rows["entries"].append(entry)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row of RECORDS."""
        if row["outcome"] == "removed":
            self.refuse(row["source_sha256"], row["key"])
            return
        # The last record of a name counts: earlier quarantined records of it are obsolete.
        outcomes = self._records.setdefault(row["source"], {})
        for sha256 in [sha256 for sha256, (outcome, _) in outcomes.items() if outcome == "quarantined"]:
            del outcomes[sha256]
        reason = row["reason"] if row["outcome"] == "quarantined" else None
        outcomes[row["source_sha256"]] = row["outcome"], reason
        if row["outcome"] in STORED:
            key, mask = bytes.fromhex(row["key"]), row.get(MASK.name)
            digest, digest_as_given = _digests(row)
            self._samples[row["key"]] = Sample(row["split"], digest, digest_as_given, mask)
            self._rows["samples"].append((key, row["split"], digest))
            if digest_as_given is not None:
                self._rows["relabelled"].append((key, digest_as_given))
            if mask is not None:
                self._rows["masks"].append((key, mask))
            if row["outcome"] == "dropped":
                self._rows["dropped"].append((key,))
            # Without its first image a group goes on with the next one; groups that were compared have their own.
            roots = row["near"] or ()
            if self.near is not None and not ((roots and self._groups) or any(map(self.sample, roots))):
                phash = bytes.fromhex(row["phash"])
                # Thousands of blank images have one hash, and lose their first one together.
                self._roots.setdefault((phash, row["split"]), key)
                if self._groups is not None:
                    self._groups.add(phash, row["split"], key)

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
        digest, digest_as_given = _digests(row)
        self.database.execute("UPDATE samples SET digest = ? WHERE key = ?", (digest, key))
        for table, value in (("relabelled", digest_as_given), ("masks", mask)):
            self.database.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
            if value is not None:
                self.database.execute(f"INSERT INTO {table} VALUES (?, ?)", (key, value))

    @property
    def has_masks(self) -> bool:
        """Whether a stored image has a mask."""
        return "masks" in self._rows or self._first("SELECT 1 FROM masks") is not None

    @property
    def has_new_masks(self) -> bool:
        """Whether an image came again with another mask."""
        return self._first("SELECT 1 FROM new_masks") is not None

    def add_new_mask(self, row: dict[str, Any], shard: str) -> None:
        """Note that a stored image came again with another mask, which lies in ``shard`` where ``row`` says."""
        place = [shard, row["offset"], row["size"], row.get(MASK_SIZE.name)]
        values = (bytes.fromhex(row["key"]), row["source"], row.get(MASK.name), canonical_json(place))
        self._rows["new_masks"].append(values)

    def take_new_mask(self, key: str, source: str) -> tuple[str | None, list[Any]] | None:
        """Return digest and place of the new mask of an image of this name, and forget it; None if there is none."""
        values = (bytes.fromhex(key), source)
        row = self._first("SELECT mask, place FROM new_masks WHERE key = ? AND source = ?", *values)
        self.database.execute("DELETE FROM new_masks WHERE key = ? AND source = ?", values)
        return None if row is None else (row[0], json.loads(row[1]))

    def forget_new_masks(self) -> int:
        """Forget all new masks; returns how many there were."""
        return self.database.execute("DELETE FROM new_masks").rowcount

    def sample(self, key: str) -> Sample | None:
        """Return a kept or dropped image; None if there is none with this key."""
        if key not in self._samples:
            self.look_up([{"key": key}])
        return self._samples[key]

    def is_removed(self, *digests: str | None) -> bool:
        """Return whether an image with one of these keys or digests was taken down."""
        if any(digest and digest not in self._removed for digest in digests):
            self.look_up([{"source_sha256": digest} for digest in digests])
        return any(digest and self._removed[digest] for digest in digests)

    def find_outcome(self, source: str, sha256: str) -> tuple[str, str | None] | None:
        """Return outcome and reason of the bytes of this name; None if they are not recorded."""
        outcomes = self._records.get(source, {})
        if sha256 in outcomes:
            return outcomes[sha256]
        if (source, sha256) not in self._outcomes:
            self.look_up([{"source": source, "source_sha256": sha256}])
        outcome = self._outcomes[source, sha256]
        is_obsolete = outcome is not None and outcome[0] == "quarantined" and source in self._records
        return None if is_obsolete else outcome

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
        self._removed |= dict.fromkeys(filter(None, digests), True)
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


def _digests(row: Mapping[str, Any]) -> tuple[bytes, bytes | None]:
    """Compute the digest of a kept or dropped image, and the one it would have as given if a list relabelled it."""
    label, *rest = (row.get(name) for name in ("label", "caption", MASK.name))
    digest = sample_digest(row["key"], row["split"], label, *rest)
    if not row.get(LABELLED_BY.name):
        return digest, None
    return digest, sample_digest(row["key"], row["split"], row.get(GIVEN_LABEL.name), *rest)


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, LOCK_TIMEOUT, isolation_level=None)
    # A page cache of 16 MiB: memory does not grow with the index.
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "cache_size = -16384", "temp_store = MEMORY"):
        database.execute(f"PRAGMA {pragma}")
    database.executescript(SCHEMA)
    return database


@contextmanager
def explain_database_errors(work: Path) -> Iterator[None]:
    """Context that turns errors of the databases in the folder ``work``, and a full disk, into one-line errors."""
    try:
        with explain_query_errors(work):
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
