"""Groups of images by their perceptual hashes: each group's first image, its root, is near all others.

Of images in order, one that is near no root becomes one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from diffusion.data.ingest.hash_table import WORDS, HashTable

BATCH = 2**12
"""Images compared with the index of roots at a time, and roots that are outside it."""


class HashGroups:
    """Groups of images whose hashes of 256 bits differ in at most ``near`` bits from their root's, each in a category.

    Roots are ``root_bytes`` long. Each takes about 200 bytes of memory.
    """

    def __init__(self, near: int, root_bytes: int) -> None:
        self._table, self._roots, self._root_bytes = HashTable(near), bytearray(), root_bytes
        self._names, self._categories = dict[str, str](), list[str]()
        self._expected: Iterator[tuple[bytes, str | None]] = iter(())
        # Of images of a batch: numbers of roots of the index near each, and their distances.
        self._batch: dict[tuple[bytes, str | None], list[tuple[int, int]]] = {}

    def add(self, phash: bytes, category: str, root: bytes) -> None:
        """Begin a group in ``category`` with the image ``root``, unless one has the same hash there."""
        self.extend(phash, [category], root)

    def extend(self, hashes: bytes, categories: Sequence[str], roots: bytes) -> None:
        """Begin groups with n images, as ``add`` does, whose hashes and roots are one behind the other."""
        # One text for all groups of a category.
        self._categories += [self._names.setdefault(category, category) for category in categories]
        self._roots += roots
        self._table.add(_words(hashes))

    def expect(self, images: Iterable[tuple[bytes, str | None]]) -> None:
        """Announce hashes and categories of images that ``find`` will look for, in this order, or some of them."""
        self._expected, self._batch = iter(images), {}

    def find(self, phash: bytes, category: str | None = None) -> list[tuple[bytes, str]]:
        """Return root and category of the groups near an image, in ``category`` if it is given, nearest first."""
        if (phash, category) not in self._batch:
            self._compare_batch(phash, category)
        matches: dict[tuple[bytes, str], tuple[int, bytes, str]] = {}
        others = self._table.find_others(_words(phash)).tolist()
        for number, distance in (*self._batch[phash, category], *others):
            name = self._categories[number]
            if category in (None, name):
                root = bytes(self._roots[number * self._root_bytes : (number + 1) * self._root_bytes])
                # Of equal hashes in a category the first one is the root.
                matches.setdefault((self._table.hashes[:, number].tobytes(), name), (distance, root, name))
        return [(root, name) for _, root, name in sorted(matches.values())]

    def _compare_batch(self, phash: bytes, category: str | None) -> None:
        """Compare the next batch of expected images, which begins with this one, with the roots of the index."""
        image = (phash, category)
        rest = (each for each in self._expected if each == image)
        images = list(dict.fromkeys([next(rest, image), *islice(self._expected, BATCH - 1)]))
        if self._table.count > BATCH:
            self._table.index()
        self._batch = {image: [] for image in images}
        for place, *match in self._table.find_pairs(_words(b"".join(phash for phash, _ in images))).tolist():
            self._batch[images[place]].append(tuple(match))


def _words(hashes: bytes) -> np.ndarray:
    return np.frombuffer(hashes, ">u8").reshape(-1, WORDS).T.astype(np.uint64)
