"""The order of training at 10⁹ images: nothing is enumerated, and exact at small sizes by enumeration."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.common import random
from diffusion.common.random import WHOLE, Permutation, permutation
from diffusion.data.dataset import ShardSamples
from diffusion.data.loader import TrainingOrder, WindowedOrder

BILLION = 10**9
U64 = 2**64


def mixed(value: int) -> int:
    """The finalizer of SplitMix64, in integers of Python."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % U64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % U64
    return value ^ (value >> 31)


def place_of(element: int, number: Permutation) -> int:
    """The place of an element: the Feistel network backwards, in integers of Python."""
    value = element
    while True:
        left, right = divmod(value, number.side)
        for key in reversed(number.keys.tolist()):
            left, right = (right - mixed(left ^ key)) % number.side, left
        value = left * number.side + right
        if value < number.length:
            return value


@pytest.mark.parametrize("length", [*range(1, 40), 99, 100, 101, 1024, 5000])
def test_a_network_of_any_small_length_is_a_permutation(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "WHOLE", 0)
    for index in range(3):
        elements = Permutation(5, "stream", index, length)[np.arange(length)]
        assert sorted(elements.tolist()) == list(range(length))


def test_up_to_the_threshold_it_is_the_permutation_of_numpy() -> None:
    np.testing.assert_array_equal(Permutation(1, "stream", 2, 1000)[np.arange(1000)], permutation(1, "stream", 2, 1000))
    assert Permutation(1, "stream", 2, WHOLE + 1).whole is None


@given(st.integers(WHOLE + 1, 4 * BILLION), st.integers(0, 2**63), st.integers(0, 10**6), st.data())
def test_long_permutations_can_be_inverted(length: int, seed: int, index: int, data: st.DataObject) -> None:
    permutation = Permutation(seed, "stream", index, length)
    places = np.array([*data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20)), 0, length - 1])
    elements = permutation[places]
    assert ((elements >= 0) & (elements < length)).all()
    assert [place_of(element, permutation) for element in elements.tolist()] == places.tolist()


def test_long_permutations_spread_elements_evenly_and_independently() -> None:
    places = np.arange(BILLION // 3, BILLION // 3 + 200_000)
    shares = Permutation(3, "stream", 0, BILLION)[places] / BILLION
    other = Permutation(3, "stream", 1, BILLION)[places] / BILLION
    for values in (shares, (shares[1:] - shares[:-1]) % 1, (shares - other) % 1, (shares - places / BILLION) % 1):
        counts = np.histogram(values, 100, (0, 1))[0]
        chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert chi2 < 99 + 5 * np.sqrt(2 * 99)
    assert len(np.unique(shares)) == len(shares)


@settings(max_examples=50)
@given(
    st.integers(WHOLE + 1, 2 * BILLION),
    st.integers(0, 5 * BILLION),
    st.sampled_from([1, 2, 8, 64, 4096]),
    st.integers(1, 8),
)
def test_shares_of_ranks_make_up_batches_without_repeats(length: int, start: int, ranks: int, share: int) -> None:
    order, batch = TrainingOrder("digest", 7, length), ranks * share
    whole = order.rows(start, batch)
    some = sorted({0, ranks // 2, ranks - 1})
    for rank in some:
        part = TrainingOrder("digest", 7, length).rows(start + rank * share, share)
        np.testing.assert_array_equal(part, whole[rank * share : (rank + 1) * share])
    for position, row in list(zip(range(start, start + batch), whole.tolist(), strict=True))[:: max(1, batch // 16)]:
        epoch, place = divmod(position, length)
        assert place_of(row, Permutation(7, "order/digest", epoch, length)) == place


def test_batches_of_a_billion_images_take_little_memory() -> None:
    tracemalloc.start()
    TrainingOrder("digest", 0, BILLION).rows(BILLION - 1000, 2048)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_order_of_a_billion_images_is_this_one() -> None:
    """Written down once: with another order, runs that were begun would not go on to the same weights."""
    expected = [528099372, 611119983, 651137974, 12105741, 635005980, 147295376, 778756727, 36538179]
    assert TrainingOrder("digest", 0, BILLION).rows(BILLION - 4, 8).tolist() == expected


class Counted:
    """The samples 0, 1, 2 … of a billion, which lie in their order in the shards; none is stored."""

    def __len__(self) -> int:
        return BILLION

    def __getitem__(self, places: slice) -> np.ndarray:
        return np.arange(places.start, places.stop)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 300), st.integers(0, 3), st.data())
def test_a_window_of_a_billion_shows_each_image_once(window: int, epoch: int, data: st.DataObject) -> None:
    counts = np.full(BILLION // 8000, 8000)
    counts[::2] -= 17
    counts[1::2] += 17
    ends = np.cumsum(counts)
    order = WindowedOrder("layout", 0, window, ShardSamples(Counted(), counts))  # type: ignore[arg-type]
    at = epoch * BILLION + data.draw(st.integers(0, BILLION - 1))
    shards = np.array(order.list_upcoming_shards(at)[:window])
    # The window begins where its shards were first among those to come.
    rows = order.rows(at, 1)
    assert np.searchsorted(ends, rows[0], side="right") in shards
    first, last = at, at
    size = int(counts[shards].sum())
    low, high = max(epoch * BILLION, at - size), at
    while low < high:  # the first position with these shards
        middle = (low + high) // 2
        low, high = (
            (low, middle) if set(order.list_upcoming_shards(middle)[:window]) == set(shards) else (middle + 1, high)
        )
    first = low
    last = first + size
    if (
        last > (epoch + 1) * BILLION
    ):  # the last window of an epoch is shorter, and the next ones follow in ``list_upcoming_shards``
        return
    expected = np.concatenate([np.arange(ends[shard] - counts[shard], ends[shard]) for shard in shards])
    np.testing.assert_array_equal(np.sort(order.rows(first, size)), np.sort(expected))


def test_windows_of_a_billion_images_hold_every_shard_once() -> None:
    counts = np.full(BILLION // 8000, 8000)
    order = WindowedOrder("layout", 0, 64, ShardSamples(Counted(), counts))  # type: ignore[arg-type]
    shards = [shard for at in range(0, BILLION, 64 * 8000) for shard in order.list_upcoming_shards(at)[:64]][
        : len(counts)
    ]
    assert sorted(shards) == list(range(len(counts)))
