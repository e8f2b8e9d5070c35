"""Groups of images by their perceptual hashes: each group's first image, its root, is near all others.

Of images in order, one that is near no root becomes one. So only pairs of near hashes matter, which a join over bands
of the hashes finds for many images at a time; bands, as in arXiv 1307.2982, are such that it misses no pair.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from diffusion.data.tables import open_database

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

WORDS = ("w0", "w1", "w2", "w3")
"""Columns of a hash: 64 bits each, of ever higher frequencies."""
MIN_BATCH, MAX_BATCH = 2**13, 2**19
"""Hashes compared at a time: about as many as there are roots, so that each root is read a few times only."""
MAX_PAIRS = 2**20
"""Pairs in memory, above which a batch is halved."""
MAX_OF_ONE_FLIP = 32
"""Bits up to which bands that may differ in one bit are faster than wider ones that may differ in two."""
FEW = 16
"""Hashes that are compared with all others, which then need no bands."""


class HashGroups:
    """Groups of images whose hashes of 256 bits differ in at most ``near`` bits from their root's, each in a category.

    Tables larger than memory go to files in ``scratch``, which is deleted by ``close``, and here if that was killed.
    """

    def __init__(self, scratch: Path, near: int) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        self._files = ExitStack()
        self._files.callback(shutil.rmtree, scratch)
        self._database, self._near = self._files.enter_context(open_database(scratch)), near
        self._expected: Iterator[tuple[bytes, str | None]] = iter(())
        self._batch: dict[tuple[bytes, str | None], int] = {}
        # Of an image of the batch, by its number: roots before it, and hashes of others that may become roots.
        self._stored: dict[int, list[tuple[int, bytes, str]]] = {}
        self._others: dict[int, list[tuple[int, bytes]]] = {}
        self._new: dict[bytes, dict[str, bytes]] = {}
        self._count = 0
        self._database.execute(_table("roots", "root BLOB"))

    def close(self) -> None:
        """Delete all groups."""
        self._files.close()

    def add(self, phash: bytes, category: str, root: bytes) -> None:
        """Begin a group in ``category`` with the image ``root``, unless one has the same hash there."""
        self._new.setdefault(phash, {}).setdefault(category, root)

    def extend(self, hashes: bytes, categories: Sequence[str], roots: Sequence[bytes]) -> None:
        """Begin groups with n images, as ``add`` does; ``hashes`` are n × 32 bytes."""
        self._insert("roots", hashes, categories, roots, self._count)
        self._count += len(roots)

    def expect(self, images: Iterable[tuple[bytes, str | None]]) -> None:
        """Announce hashes and categories of images that ``find`` will look for, in this order, or some of them."""
        self._expected, self._batch = iter(images), {}

    def find(self, phash: bytes, category: str | None = None) -> list[tuple[bytes, str]]:
        """Return root and category of the groups near an image, in ``category`` if it is given, nearest first."""
        if (phash, category) not in self._batch:
            self._compare(phash, category)
        number = self._batch[phash, category]
        matches = set(self._stored.get(number, ()))
        for distance, other in ((0, phash), *self._others.get(number, ())):
            groups = self._new.get(other, {}).items()
            matches.update((distance, root, each) for each, root in groups if category in (None, each))
        return [(root, each) for _, root, each in sorted(matches)]

    def _compare(self, phash: bytes, category: str | None) -> None:
        """Compare the next batch of expected images, which begins with this one, with all roots and with itself."""
        self.extend(
            b"".join(hash_ for hash_, groups in self._new.items() for _ in groups),
            [each for groups in self._new.values() for each in groups],
            [root for groups in self._new.values() for root in groups.values()],
        )
        self._new = {}
        size, image = min(max(self._count, MIN_BATCH), MAX_BATCH), (phash, category)
        rest = (each for each in self._expected if each == image)
        images = [next(rest, image), *islice(self._expected, size - 1)]
        while not self._compare_batch(images[:size]):
            size = len(images[:size]) // 2
        self._expected = chain(images[size:], self._expected)

    def _compare_batch(self, images: list[tuple[bytes, str | None]]) -> bool:
        """Compare images with all roots and with each other; returns whether there are few enough pairs, or images."""
        by_number = list(dict.fromkeys(images))
        self._batch = {image: number for number, image in enumerate(by_number)}
        self._database.execute(_table("batch"))
        self._insert("batch", b"".join(phash for phash, _ in by_number), [category for _, category in by_number])
        stored = self._find_pairs("roots")
        # Images that have a root already will not be one.
        open_numbers = np.setdiff1d(np.arange(len(by_number)), stored[:, 0])
        self._select(
            "CREATE OR REPLACE TABLE candidates AS SELECT * FROM batch JOIN numbers USING (number)", open_numbers
        )
        others = self._find_pairs("candidates")
        if max(len(stored), len(others)) > MAX_PAIRS and len(by_number) > 1:
            return False
        # Of equal hashes in a category the first one is the root.
        query = f"""SELECT min(number), arg_min(root, number), category FROM roots JOIN numbers USING (number)
            GROUP BY category, {", ".join(WORDS)}"""
        roots = {number: root for number, *root in self._select(query, np.unique(stored[:, 1])).fetchall()}
        self._stored, self._others = defaultdict(list), defaultdict(list)
        for number, root, distance in stored.tolist():
            if root in roots:
                self._stored[number].append((distance, *roots[root]))
        for number, other, distance in others.tolist():
            if number != other:
                self._others[number].append((distance, by_number[other][0]))
        return True

    def _find_pairs(self, table: str) -> np.ndarray:
        """Find images of the batch near those of ``table``: (P, 3) int64, of both numbers and the distance.

        More than MAX_PAIRS may not be all. Hashes are cut into more bands than half, or a third, of the bits that may
        differ: near ones have a band that differs in one bit at most, or two, and all such values are looked up. Two
        make bands wide enough to tell images apart. Each word has bits in each band, as smooth images have the same
        high frequencies.
        """
        flips = min(self._near, 1 if self._near <= MAX_OF_ONE_FLIP else 2)
        count = max(self._near // (flips + 1) + 1, 5)
        bands: Sequence[int | None] = [None] if len(self._batch) <= FEW else range(count)
        distance = " + ".join(f"bit_count(xor(b.{word}, o.{word}))::BIGINT" for word in WORDS)
        pieces = [np.empty((0, 3), np.int64)]
        for band in bands:
            batch, others, condition = "batch", table, "TRUE"
            if band is not None:
                first, last = (64 * edge // count for edge in (band, band + 1))
                width = last - first
                value = " | ".join(
                    f"((({word} >> {first}) & {2**width - 1}) << {width * place})" for place, word in enumerate(WORDS)
                )
                bits = [1 << bit for bit in range(width * len(WORDS))]
                masks = [sum(some) for size in range(flips + 1) for some in combinations(bits, size)]
                batch = f"(SELECT *, xor({value}, mask) AS value FROM batch, unnest({masks}) m(mask))"
                others, condition = f"(SELECT *, {value} AS value FROM {table})", "b.value = o.value"
            query = f"""SELECT b.number, o.number AS other, {distance} AS distance FROM {batch} b, {others} o
                WHERE {condition} AND distance <= {self._near} AND (b.category IS NULL OR b.category = o.category)
                LIMIT {MAX_PAIRS + 1}"""
            columns = self._database.execute(query).fetchnumpy()
            pieces.append(np.stack([columns[name] for name in ("number", "other", "distance")], 1))
            if len(pieces[-1]) > MAX_PAIRS:
                break
        return np.unique(np.concatenate(pieces), axis=0)

    def _insert(
        self,
        table: str,
        hashes: bytes,
        categories: Sequence[str | None],
        roots: Sequence[bytes] | None = None,
        first: int = 0,
    ) -> None:
        words = np.frombuffer(hashes, ">i8").reshape(-1, len(WORDS)).astype(np.int64)
        columns = {"number": np.arange(first, first + len(words)), "category": pa.array(categories, pa.string())}
        columns |= dict(zip(WORDS, words.T, strict=True))
        columns |= {} if roots is None else {"root": pa.array(roots, pa.binary())}
        self._database.register("rows", pa.table(columns))
        self._database.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows")

    def _select(self, query: str, numbers: np.ndarray) -> "DuckDBPyConnection":
        self._database.register("numbers", pa.table({"number": numbers}))
        return self._database.execute(query)


def _table(name: str, *more: str) -> str:
    columns = ("number BIGINT", "category VARCHAR", *(f"{word} BIGINT" for word in WORDS), *more)
    return f"CREATE OR REPLACE TABLE {name} ({', '.join(columns)})"
