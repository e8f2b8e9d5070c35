"""Hashes by the values of their bands, so that those near others are found without a comparison with each of them.

Multi-index hashing (arXiv 1307.2982): hashes that differ in few bits differ in fewer still in one of b bands, and all
values of this band that do are looked up.
"""

from itertools import combinations

import numpy as np

WORDS = 4
"""Words of 64 bits of a hash, of ever higher frequencies."""
MIN_BANDS, MAX_FLIPS = 9, 2
"""Bands, of which there are more only if otherwise one would have to differ in more bits than MAX_FLIPS: more bits take
far more look-ups, narrower bands far more comparisons. With 24 bits and 10⁷ hashes these are few of both."""
MAX_BITS = 28
"""Bits of a band that are looked up."""
SPARE_BITS = 4
"""Bits of a value beyond those that number the hashes: of values at random, one in 16 or fewer belong to one."""
PROBES, BLOCK = 2**17, 2**18
"""Values looked up at a time, which fit the processor's cache, and hashes indexed at a time."""
MAX_PAIRS = 2**18
"""Pairs of several hashes in memory."""


class HashTable:
    """Hashes of 256 bits, (WORDS, n) uint64, of which those within ``near`` bits of others are found.

    It takes 100 to 200 bytes of memory for each.
    """

    def __init__(self, near: int) -> None:
        self.count = self.indexed = 0
        """Numbers of hashes, and of those in the index, the first ones."""
        self.hashes = np.empty((WORDS, 0), np.uint64)
        """The hashes, and room for more."""
        self._near, self._bands = near, list[_Band]()

    def add(self, hashes: np.ndarray) -> None:
        """Add ``hashes``, which get the next numbers and are not in the index yet."""
        count = self.count + hashes.shape[1]
        if count > self.hashes.shape[1]:
            grown = np.empty((WORDS, 2 * count), np.uint64)
            grown[:, : self.count] = self.hashes[:, : self.count]
            self.hashes = grown
        self.hashes[:, self.count : count] = hashes
        self.count = count

    def index(self) -> None:
        """Put all hashes into the index."""
        if not self._bands or self.count > self._bands[0].capacity:
            self.indexed = 0
            self._bands = _make_bands(self._near, self.count.bit_length())
        for start in range(self.indexed, self.count, BLOCK):
            for band in self._bands:
                band.add(start, self.hashes[:, start : min(start + BLOCK, self.count)])
        self.indexed = self.count

    def find_pairs(self, queries: np.ndarray) -> np.ndarray | None:
        """Find the hashes of the index near each of ``queries``, (WORDS, n) uint64.

        Returns (P, 3) int64: numbers of query and hash, and their distance; sorted. None if the bands of several
        queries have more than MAX_PAIRS.
        """
        pieces, count = [np.empty((0, 3), np.int64)], 0
        for band in self._bands:
            rows, numbers = band.look_up(queries)
            while len(rows):
                # Most differ too much in the first word already.
                places = np.flatnonzero(np.bitwise_count(queries[0, rows] ^ self.hashes[0, numbers]) <= self._near)
                pairs = rows[places], numbers[places]
                distances = _count_bits(queries[:, pairs[0]] ^ self.hashes[:, pairs[1]])
                pieces.append(np.stack([*pairs, distances], 1)[distances <= self._near])
                count += len(pieces[-1])
                if count > MAX_PAIRS and queries.shape[1] > 1:
                    return None
                numbers = band.previous[numbers]
                rows, numbers = rows[numbers >= 0], numbers[numbers >= 0]
        return np.unique(np.concatenate(pieces), axis=0)

    def find_others(self, query: np.ndarray) -> np.ndarray:
        """Find the hashes outside the index near ``query``, (WORDS, 1) uint64: (P, 2) int64, numbers and distances."""
        distances = _count_bits(self.hashes[:, self.indexed : self.count] ^ query)
        places = np.flatnonzero(distances <= self._near)
        return np.stack([self.indexed + places, distances[places]], 1)


class _Band:
    """Index of up to 2**``bits`` hashes by the value of a band, in chains of those of some values each.

    Its value is made of ``width`` bits from ``shift`` of each word, so that it has some of all frequencies: smooth
    images have the same high ones. Values that differ in up to ``flips`` bits are looked up.
    """

    def __init__(self, bits: int, shift: int, width: int, flips: int) -> None:
        self._bits, self._shift, self._width = bits, shift, width
        places = [1 << bit for bit in range(WORDS * width)]
        masks = [sum(flipped) for size in range(flips + 1) for flipped in combinations(places, size)]
        # Sorted: values that differ in their last bits alone lie in one line of the cache.
        self._masks = np.sort(np.array(masks, np.int64))
        # Whether a hash has a value, one bit for each.
        self._known = np.zeros(-(-(2 ** (WORDS * width)) // 8), np.uint8)
        self._last = np.full(2**bits, -1, np.int32)
        self.previous = np.empty(2**bits, np.int32)
        """Number of the hash before each in its chain, −1 for none."""

    @property
    def capacity(self) -> int:
        """Number of hashes for which there is room."""
        return len(self.previous)

    def add(self, first: int, hashes: np.ndarray) -> None:
        """Add ``hashes``, numbered from ``first``."""
        values = self._values(hashes)
        np.bitwise_or.at(self._known, values >> 3, np.uint8(1) << (values & 7).astype(np.uint8))
        chains = self._chains(values)
        order = np.argsort(chains)
        chains, numbers = chains[order], (first + order).astype(np.int32)
        is_first = np.diff(chains, prepend=-1) != 0
        self.previous[numbers] = np.where(is_first, self._last[chains], np.roll(numbers, 1))
        is_last = np.roll(is_first, -1)
        self._last[chains[is_last]] = numbers[is_last]

    def look_up(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of queries and, for each, of the last hash of a chain that may have some with a near value."""
        values, hits = self._values(queries)[:, None], []
        step = max(PROBES // len(self._masks), 1)
        for start in range(0, len(values), step):
            some = values[start : start + step]
            known = self._known[some >> 3 ^ self._masks >> 3]
            known >>= (some & 7).astype(np.uint8) ^ (self._masks & 7).astype(np.uint8)
            hits.append(np.flatnonzero(known & 1) + start * len(self._masks))
        rows, masks = np.divmod(np.concatenate(hits), len(self._masks))
        return rows, self._last[self._chains(values[rows, 0] ^ self._masks[masks])]

    def _values(self, hashes: np.ndarray) -> np.ndarray:
        pieces = hashes >> np.uint64(self._shift) & np.uint64(2**self._width - 1)
        places = (np.arange(WORDS) * self._width).astype(np.uint64)[:, None]
        values: np.ndarray = np.bitwise_or.reduce(pieces << places).astype(np.int64)
        return values

    def _chains(self, values: np.ndarray) -> np.ndarray:
        # Fibonacci hashing spreads them over 32 bits.
        return (values * 0x9E3779B1 & 0xFFFFFFFF) >> (32 - self._bits)


def _make_bands(near: int, bits: int) -> list[_Band]:
    """Make an index for up to 2**``bits`` hashes."""
    count = max(min(near + 1, MIN_BANDS), -(-(near + 1) // (MAX_FLIPS + 1)))
    bands = []
    for band in range(count):
        first, end = (64 * edge // count for edge in (band, band + 1))
        width = min(end - first, -(-min(bits + SPARE_BITS, MAX_BITS) // WORDS))
        # Hashes with more flips in each band differ in more than ``near`` bits.
        bands.append(_Band(bits, end - width, width, (near + 1 + band) // count - 1))
    return bands


def _count_bits(differences: np.ndarray) -> np.ndarray:
    """Count the bits of hashes: (n,) uint16."""
    counts: np.ndarray = np.bitwise_count(differences).sum(0, np.uint16)
    return counts
