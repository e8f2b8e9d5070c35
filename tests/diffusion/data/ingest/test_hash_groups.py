"""Groups of near-duplicates by an index against a walk that compares each image with all roots."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion.data.ingest import hash_groups
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


def walk(hashes: list[bytes], categories: list[str], near: int, within: bool) -> list[list[tuple[bytes, str]]]:
    """Groups near each image, by comparison with all roots; ``within`` its category only."""
    roots: list[tuple[int, bytes, str]] = []
    found = []
    for number, (phash, category) in enumerate(zip(hashes, categories, strict=True)):
        value = int.from_bytes(phash, "big")
        matches = sorted(
            (distance, root, each)
            for other, root, each in roots
            if (distance := (value ^ other).bit_count()) <= near and (not within or each == category)
        )
        found.append([(root, each) for _, root, each in matches])
        if not matches:
            roots.append((value, number.to_bytes(8, "big"), category))
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, MAX_BITS), st.integers(1, 60), st.integers(0, 4), st.booleans(), st.integers(1, 9), st.integers(0)
)
@example(MAX_BITS, 60, 4, True, 7, 0)
@example(0, 60, 0, False, 1, 1)
@example(24, 60, 0, False, 8, 2)
def test_finds_what_comparing_all_finds(
    near: int, count: int, stored: int, within: bool, batch: int, seed: int
) -> None:
    hashes = related_hashes(count, near, seed)
    categories = [("train", "held_out")[digit] for digit in np.random.default_rng(seed).integers(0, 2, count)]
    expected = walk(hashes, categories, near, within)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_groups, "BATCH", batch)
        groups = HashGroups(near, 8)
        wanted = [category if within else None for category in categories]
        # Some are announced in advance, and the others one by one.
        groups.expect(zip(hashes[stored:], wanted[stored:], strict=True))
        for number, phash in enumerate(hashes):
            if number == stored:
                groups.expect(zip(hashes[stored:], wanted[stored:], strict=True))
            found = groups.find(phash, wanted[number])
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
    np.testing.assert_array_equal(table.find_pairs(hashes[:, :50]), expected)


def test_of_equal_hashes_the_first_is_the_root() -> None:
    groups = HashGroups(8, 1)
    groups.extend(bytes(64), ["train", "train"], b"ba")
    groups.add(bytes(32), "train", b"0")
    assert groups.find(bytes(32)) == [(b"b", "train")]
