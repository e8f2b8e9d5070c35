"""Groups of near-duplicates by an index against a walk that compares each image with all roots."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion.data.ingest import hash_groups, hash_table
from diffusion.data.ingest.config import MAX_BITS
from diffusion.data.ingest.hash_groups import HashGroups
from diffusion.data.ingest.hash_table import HashTable


def related_hashes(count: int, near: int, seed: int) -> list[bytes]:
    """Hashes of which many are about ``near`` bits from each other, and some equal."""
    random = np.random.default_rng(seed)
    bits = random.random((4, 256)) < 0.5
    rows = []
    for centre in random.integers(0, 4, count):
        flipped = random.permutation(256)[: random.integers(0, near + 3)]
        rows.append(bits[centre].copy())
        rows[-1][flipped[: len(flipped) // int(random.integers(1, 4))]] ^= True
    return [np.packbits(row).tobytes() for row in rows]


def walk(hashes: list[bytes], categories: list[str], near: int) -> list[list[tuple[bytes, str]]]:
    """Groups near each image, by comparison with all roots."""
    roots: list[tuple[int, bytes, str]] = []
    found = []
    for number, (phash, category) in enumerate(zip(hashes, categories, strict=True)):
        value = int.from_bytes(phash, "big")
        matches = sorted(
            (distance, root, each) for other, root, each in roots if (distance := (value ^ other).bit_count()) <= near
        )
        found.append([(root, each) for _, root, each in matches])
        if not matches:
            roots.append((value, number.to_bytes(8, "big"), category))
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, MAX_BITS),
    st.integers(1, 60),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(0),
)
@example(MAX_BITS, 60, 4, 7, 9, 0)
@example(0, 60, 0, 1, 0, 1)
@example(24, 60, 0, 8, 1, 2)
def test_finds_what_comparing_all_finds(
    near: int, count: int, stored: int, batch: int, max_pairs: int, seed: int
) -> None:
    hashes = related_hashes(count, near, seed)
    categories = [("train", "held_out")[digit] for digit in np.random.default_rng(seed).integers(0, 2, count)]
    expected = walk(hashes, categories, near)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_groups, "BATCH", batch)
        patch.setattr(hash_table, "MAX_PAIRS", max_pairs)
        groups = HashGroups(near, 8)
        # Some are announced in advance, and the others one by one.
        groups.expect(hashes[stored:])
        for number, phash in enumerate(hashes):
            if number == stored:
                groups.expect(hashes[stored:])
            found = groups.find(phash)
            assert found == expected[number]
            if not found:
                groups.add(phash, categories[number], number.to_bytes(8, "big"))


@pytest.mark.parametrize("near", [0, 8, 24, MAX_BITS])
def test_index_finds_all_near_hashes(near: int) -> None:
    hashes = np.frombuffer(b"".join(related_hashes(600, near, 5)), ">u8").reshape(-1, 4).T.astype(np.uint64)
    table = HashTable(near)
    for start in range(0, 600, 200):
        table.add(hashes[:, start : start + 200])
        table.index()
    distances = np.bitwise_count(hashes[:, :50, None] ^ hashes[:, None]).sum(0, np.int64)
    rows, numbers = np.nonzero(distances <= near)
    expected = np.stack([rows, numbers, distances[rows, numbers]], 1)
    found = table.find_pairs(hashes[:, :50])
    assert found is not None
    np.testing.assert_array_equal(found, expected)


def test_many_near_images_are_compared_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs would take 75 MB."""
    monkeypatch.setattr(hash_groups, "BATCH", 495)
    monkeypatch.setattr(hash_table, "MAX_PAIRS", 2**13)
    hashes = [(1 << one | 1 << other).to_bytes(32, "big") for one, other in combinations(range(32), 2)]
    groups = HashGroups(4, 2)
    groups.extend(b"".join(hashes), ["train"] * 496, b"".join(number.to_bytes(2, "big") for number in range(496)))
    groups.expect(hashes)
    tracemalloc.start()
    assert [len(groups.find(phash)) for phash in hashes[:2]] == [496] * 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_of_equal_hashes_the_first_is_the_root() -> None:
    groups = HashGroups(8, 1)
    groups.extend(bytes(64), ["train", "train"], b"ba")
    groups.add(bytes(32), "train", b"0")
    assert groups.find(bytes(32)) == [(b"b", "train")]
