"""External sort by key: sorted runs of rows on disk, of which any range of keys can be read by itself.

Keys are SHA-256 digests, so equal ranges of keys hold about equally many rows, and each is the work of one worker.
"""

import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffusion.common.files import make_folder, write_atomically

RANGE = 2**20
"""Approximate rows of a run and of a range: what one worker has in memory at a time."""


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Context with an empty ``folder``, which is deleted at its end, or at its next beginning if it was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def range_count(rows: int) -> int:
    """Return the number of ranges for ``rows`` in all, of about RANGE each."""
    return max(1, -(-rows // RANGE))


def write_run(path: Path, rows: np.ndarray) -> Path:
    """Write ``rows``, whose first field is their ``key`` (S32), sorted by it; equal keys stay in their order."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, rows[np.argsort(rows["key"], kind="stable")])

    write_atomically(path, write)
    return path


def read_range(runs: Sequence[Path], number: int, count: int) -> np.ndarray:
    """Return the rows of ``runs`` with keys in range ``number`` of ``count``, sorted; equal keys in order of runs."""
    # NumPy drops the zeros at the end of bytes, which leaves their order as it is.
    first, last = ((-(-bound * 2**64 // count)).to_bytes(9, "big")[1:].rstrip(b"\0") for bound in (number, number + 1))
    pieces = []
    for path in runs:
        run = np.load(path, mmap_mode="r")
        end = len(run) if number + 1 == count else bisect_left(run["key"], last)
        pieces.append(run[bisect_left(run["key"], first) : end])
    rows = np.concatenate(pieces)
    sorted_rows: np.ndarray = rows[np.argsort(rows["key"], kind="stable")]
    return sorted_rows
