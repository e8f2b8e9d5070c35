"""The order of training: a pure function of data, seed and position."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.dataset import ShardSamples
from diffusion.data.loader import BucketedOrder, TrainingOrder, WindowedOrder


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


LAYOUT = np.array([4] * 7 + [0] * 3 + [1] * 11 + [2] + [5] * 6)
"""Which shard each of 28 samples lies in: five shards of very different length, and number 3 has none."""


def windowed(window: int, seed: int = 0, digest: str = "layout", shards: np.ndarray = LAYOUT) -> WindowedOrder:
    return WindowedOrder(digest, seed, window, ShardSamples(np.argsort(shards, kind="stable"), np.bincount(shards)))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(0, 200),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_any_cut_of_the_windowed_sequence_gives_the_same_rows(
    shards: list[int], window: int, start: int, pieces: list[int]
) -> None:
    whole = windowed(window, shards=np.array(shards)).rows(start, sum(pieces))
    cut = windowed(window, shards=np.array(shards))
    positions = start + np.cumsum([0, *pieces])
    parts = [cut.rows(int(at), count) for at, count in zip(positions, pieces, strict=False)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(st.integers(1, 7), st.integers(0, 5))
def test_each_windowed_epoch_shows_every_row_once(window: int, epoch: int) -> None:
    rows = windowed(window).rows(epoch * len(LAYOUT), len(LAYOUT))
    assert sorted(rows.tolist()) == list(range(len(LAYOUT)))


@given(st.integers(1, 7), st.integers(0, 3))
def test_windows_lie_in_their_shards_which_are_named_before(window: int, epoch: int) -> None:
    order, start = windowed(window), epoch * len(LAYOUT)
    shards = LAYOUT[order.rows(start, len(LAYOUT))].tolist()
    shard_names = list(dict.fromkeys(shards))
    windows = [set(shard_names[at : at + window]) for at in range(0, len(shard_names), window)]
    numbers = [next(number for number, each in enumerate(windows) if shard in each) for shard in shards]
    assert numbers == sorted(numbers), "a shard came back when another window had begun"
    for offset, number in enumerate(numbers):
        coming = order.list_upcoming_shards(start + offset)
        assert set(coming[: len(windows[number])]) == windows[number]
        if number + 1 < len(windows):
            assert set(coming) == windows[number] | windows[number + 1]


def test_orders_differ_by_epoch_seed_and_layout() -> None:
    first = windowed(2).rows(0, 28).tolist()
    others = [windowed(2).rows(28, 28), windowed(2, seed=1).rows(0, 28), windowed(2, digest="other").rows(0, 28)]
    assert all(other.tolist() != first for other in others)
    starts = {LAYOUT[windowed(1).rows(28 * epoch, 1)[0]] for epoch in range(30)}
    assert starts == {0, 1, 2, 4, 5}


def test_in_windows_images_of_several_shards_are_mixed() -> None:
    shards = LAYOUT[windowed(5).rows(0, 28)]
    assert np.count_nonzero(np.diff(shards)) > 10


def test_the_order_of_an_epoch_is_this_one() -> None:
    """Written down once: with another order, runs that were begun would not go on to the same weights."""
    assert TrainingOrder("digest", 0, 10).rows(0, 20).tolist() == [
        7,
        8,
        5,
        9,
        3,
        1,
        6,
        2,
        4,
        0,
        4,
        2,
        3,
        1,
        7,
        0,
        5,
        8,
        9,
        6,
    ]
    expected = [3, 5, 4, 9, 0, 8, 1, 6, 7, 2, 9, 0, 2, 1, 5, 8, 7, 4, 6, 3]
    assert windowed(2, shards=np.arange(10) // 3).rows(0, 20).tolist() == expected


def samples_of(counts: list[int]) -> list[np.ndarray]:
    """The samples of each bucket."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    buckets = buckets[np.random.default_rng(0).permutation(len(buckets))]
    return [np.flatnonzero(buckets == bucket) for bucket in range(len(counts))]


def bucketed(counts: list[int], batch: int, seed: int = 0, window: int | None = None) -> BucketedOrder:
    """The order of samples whose buckets are dealt out in turn; with a window in three shards a bucket."""
    numbers = samples_of(counts)
    shards = np.zeros(sum(counts), np.int64)
    for bucket, own in enumerate(numbers):
        shards[own] = np.arange(len(own)) % 3 + 3 * bucket
    by_shard = ShardSamples(np.argsort(shards, kind="stable"), np.bincount(shards, minlength=3 * len(counts)))
    orders = [
        TrainingOrder(f"digest/{bucket}", seed, len(own), own)
        if window is None
        else WindowedOrder(f"layout/{bucket}", seed, window, by_shard, np.arange(3) + 3 * bucket)
        for bucket, own in enumerate(numbers)
    ]
    return BucketedOrder(seed, batch, orders)


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@settings(max_examples=50)
@given(COUNTS, st.integers(1, 9), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 3)))
def test_batches_hold_one_bucket_whose_epochs_are_whole(
    counts: list[int], size: int, seed: int, window: int | None
) -> None:
    order = bucketed(counts, size, seed, window)
    own = {int(sample): bucket for bucket, samples in enumerate(samples_of(counts)) for sample in samples}
    rows_by_bucket: list[list[int]] = [[] for _ in counts]
    for batch in range(4 * sum(counts)):
        rows = order.rows(batch * size, size).tolist()
        (bucket,) = {own[row] for row in rows}
        rows_by_bucket[bucket] += rows
        for each, (number, images) in enumerate(zip(map(len, rows_by_bucket), counts, strict=True)):
            # No bucket is further from its share than there are other buckets, in batches.
            assert abs(number / size - (batch + 1) * images / sum(counts)) < max(len(counts) - 1, 1), each
    for rows, samples in zip(rows_by_bucket, samples_of(counts), strict=True):
        for start in range(0, len(rows) - len(samples) + 1, len(samples)):
            assert sorted(rows[start : start + len(samples)]) == samples.tolist()


@given(COUNTS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**12))
def test_ranks_and_resuming_cut_the_same_batches(counts: list[int], share: int, ranks: int, batch: int) -> None:
    order, size = bucketed(counts, share * ranks), share * ranks
    whole = order.rows(batch * size, size)
    parts = [bucketed(counts, size).rows(batch * size + rank * share, share) for rank in range(ranks)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_the_seed_shifts_the_turns_of_the_buckets() -> None:
    def turns(seed: int) -> list[bool]:
        order = bucketed([30, 70], 5, seed)
        return [order.rows(5 * batch, 1)[0] in samples_of([30, 70])[0] for batch in range(40)]

    assert turns(0) == turns(0)
    assert len({tuple(turns(seed)) for seed in range(6)}) > 1
    assert all(sum(turns(seed)[start : start + 10]) == 3 for seed in range(6) for start in range(30))


@given(COUNTS, st.integers(1, 6), st.integers(1, 3), st.integers(0, 300))
def test_the_shards_of_a_bucketed_batch_are_named_before(counts: list[int], size: int, window: int, batch: int) -> None:
    order = bucketed(counts, size, 0, window)
    # Counts are shares of a batch: one may go beyond two windows of a few images.
    if all(size <= images // 3 for images in counts):
        own = np.empty(sum(counts), int)
        for bucket, samples in enumerate(samples_of(counts)):
            own[samples] = np.arange(len(samples)) % 3 + 3 * bucket
        assert set(own[order.rows(batch * size, size)].tolist()) <= set(order.list_upcoming_shards(batch * size) or ())
    assert bucketed(counts, size).list_upcoming_shards(0) is None
