"""The order of training: a pure function of data, seed and position."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffusion.data.order import TrainingOrder


@given(st.integers(1, 50), st.integers(0, 200), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut_of_the_sequence_gives_the_same_rows(length: int, start: int, pieces: list[int]) -> None:
    whole = TrainingOrder("digest", 0, length).rows(start, sum(pieces))
    cut = TrainingOrder("digest", 0, length)
    positions = start + np.cumsum([0, *pieces])
    parts = [cut.rows(int(at), count) for at, count in zip(positions, pieces, strict=False)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(st.integers(1, 60), st.integers(0, 5))
def test_each_epoch_shows_every_row_once(length: int, epoch: int) -> None:
    rows = TrainingOrder("digest", 3, length).rows(epoch * length, length)
    assert sorted(rows.tolist()) == list(range(length))


def test_seed_data_and_epoch_change_the_order() -> None:
    first = TrainingOrder("a", 0, 100).rows(0, 100).tolist()
    assert TrainingOrder("a", 1, 100).rows(0, 100).tolist() != first
    assert TrainingOrder("b", 0, 100).rows(0, 100).tolist() != first
    assert TrainingOrder("a", 0, 100).rows(100, 100).tolist() != first
