"""Groups of images by their perceptual hashes: each group's first image, its root, is near all others.

Of images in order, one that is near no root becomes one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from diffusion.data.ingest.hash_table import WORDS, HashTable

BATCH = 2**12
"""Images compared with the index of roots at a time, and roots that are outside it."""

Comparison = dict[bytes, list[tuple[int, int]]]
"""Numbers of the roots of the index near each hash, and their distances."""


class HashGroups:
    """Groups of images whose hashes of 256 bits differ in at most ``near`` bits from their root's, each in a category.

    Roots are ``root_bytes`` long. Each takes about 200 bytes of memory.
    """

    def __init__(self, near: int, root_bytes: int) -> None:
        self._table, self._roots, self._root_bytes = HashTable(near), bytearray(), root_bytes
        self._names, self._categories = dict[str, str](), list[str]()
        self._comparisons: Iterator[Comparison] = iter(())
        self._compared: Comparison = {}

    def add(self, phash: bytes, category: str, root: bytes) -> None:
        """Begin a group in ``category`` with the image ``root``, unless one has the same hash there."""
        self.extend(phash, [category], root)

    def extend(self, hashes: bytes, categories: Sequence[str], roots: bytes) -> None:
        """Begin groups with n images, as ``add`` does, whose hashes and roots are one behind the other."""
        # One text for all groups of a category.
        self._categories += [self._names.setdefault(category, category) for category in categories]
        self._roots += roots
        self._table.add(_words(hashes))

    def expect(self, hashes: Iterable[bytes]) -> None:
        """Announce the hashes of images that ``find`` will look for, in this order, or some of them."""
        self._comparisons, self._compared = self._compare(iter(hashes)), {}

    def find(self, phash: bytes) -> list[tuple[bytes, str]]:
        """Return root and category of the groups near an image, nearest first."""
        while phash not in self._compared:
            if (comparison := next(self._comparisons, None)) is None:
                self.expect([phash])
            else:
                self._compared = comparison
        matches: dict[tuple[bytes, str], tuple[int, bytes, str]] = {}
        others = self._table.find_others(_words(phash)).tolist()
        for number, distance in (*self._compared[phash], *others):
            category = self._categories[number]
            root = bytes(self._roots[number * self._root_bytes : (number + 1) * self._root_bytes])
            # Of equal hashes in a category the first one is the root.
            matches.setdefault((self._table.hashes[:, number].tobytes(), category), (distance, root, category))
        return [(root, category) for _, root, category in sorted(matches.values())]

    def _compare(self, images: Iterator[bytes]) -> Iterator[Comparison]:
        """Compare ``images`` with the roots of the index, a batch at a time, or the parts of one with many pairs."""
        while batch := list(islice(images, BATCH)):
            if self._table.count > BATCH:
                self._table.index()
            parts = [batch]
            while parts:
                part = parts.pop()
                hashes = list(dict.fromkeys(part))
                if (pairs := self._table.find_pairs(_words(b"".join(hashes)))) is None:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
                    continue
                comparison: Comparison = {phash: [] for phash in hashes}
                for place, number, distance in pairs.tolist():
                    comparison[hashes[place]].append((number, distance))
                yield comparison


def _words(hashes: bytes) -> np.ndarray:
    return np.frombuffer(hashes, ">u8").reshape(-1, WORDS).T.astype(np.uint64)
