"""Groups of near-copies: pictures whose perceptual hashes differ in a few bits, found without comparing all pairs.

Two 64-bit hashes that differ in at most d bits agree on at least one of any d + 1 bands (Manku, Jain and Das Sarma,
WWW 2007), so only hashes that share a band are compared. The bands lie in the index, on disk.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

BITS = 64
SCHEMA = """
    CREATE TABLE IF NOT EXISTS bands (band INTEGER, value INTEGER, hash INTEGER, PRIMARY KEY (band, value, hash))
        WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS groups (hash INTEGER, split TEXT, root BLOB NOT NULL, PRIMARY KEY (hash, split))
        WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS by_root ON groups (root);
"""


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
        """The groups that hold a near-copy of a picture with this hash, sorted by root."""
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
        """Add a picture to the groups with the roots ``joined``, which become one; without any, to one of its own."""
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
