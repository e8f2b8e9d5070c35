"""Groups of near-duplicates by joins against a walk that compares each image with all roots."""

import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion.data.ingest import hash_groups
from diffusion.data.ingest.config import MAX_BITS
from diffusion.data.ingest.hash_groups import HashGroups


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
@given(st.integers(0, MAX_BITS), st.integers(1, 60), st.integers(0, 4), st.booleans(), st.integers(0, 2**32))
@example(MAX_BITS, 60, 4, True, 0)
@example(0, 60, 0, False, 1)
def test_finds_what_comparing_all_finds(near: int, count: int, stored: int, within: bool, seed: int) -> None:
    hashes = related_hashes(count, near, seed)
    categories = [("train", "held_out")[digit] for digit in np.random.default_rng(seed).integers(0, 2, count)]
    expected = walk(hashes, categories, near, within)
    with tempfile.TemporaryDirectory() as folder, closing(HashGroups(Path(folder), near)) as groups:
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


def test_many_equal_images_are_compared_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of a large group, more than memory is meant for, make batches smaller and change no result."""
    monkeypatch.setattr(hash_groups, "MAX_PAIRS", 100)
    hashes = related_hashes(300, 12, 5)
    expected = walk(hashes, ["train"] * 300, 12, False)
    with closing(HashGroups(tmp_path / "scratch", 12)) as groups:
        groups.expect((phash, None) for phash in hashes)
        for number, phash in enumerate(hashes):
            found = groups.find(phash)
            assert found == expected[number]
            if not found:
                groups.add(phash, "train", number.to_bytes(8, "big"))


def test_of_equal_hashes_the_first_is_the_root(tmp_path: Path) -> None:
    with closing(HashGroups(tmp_path / "scratch", 8)) as groups:
        groups.extend(bytes(64), ["train", "train"], [b"b", b"a"])
        groups.add(bytes(32), "train", b"0")
        assert groups.find(bytes(32)) == [(b"b", "train")]
