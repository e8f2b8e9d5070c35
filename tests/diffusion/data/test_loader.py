"""Batches: a pure function of position, whoever makes them ready and however they are shared out."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.random import generator
from diffusion.data.dataset import Dataset
from diffusion.data.loader import Batch, Loader, TrainingOrder, WindowedOrder
from diffusion.data.manifest import FileEntry
from diffusion.data.shards import LocalShards, Span
from tests.builders.small_datasets import random_images, write_dataset

COUNT = 90
BATCH = 12


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Dataset]:
    """90 random images in 9 shards, none held out."""
    write_dataset(tmp_path / "set", random_images(COUNT), per_shard=10, held_out_every=0)
    with closing(Dataset.open(tmp_path / "set")) as dataset:
        yield dataset


def order_of(data: Dataset, window: int | None = None) -> TrainingOrder:
    if window is None:
        return TrainingOrder(data.manifest.content_digest, 3, len(data))
    return WindowedOrder(data.manifest.layout_digest, 3, window, data.by_shard())


def batches(data: Dataset, positions: Sequence[int], window: int | None = None, **options: Any) -> list[Batch]:
    with Loader(data, range(len(data)), order_of(data, window), BATCH, flip_seed=5, **options) as loader:
        return [loader.batch(at) for at in positions]


def flipped(images: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """Image by image, what a loader with ``flip_seed`` is to give."""
    mirrored = [generator(seed, "flip", index).random() < 0.5 for index in indices]
    return torch.stack([each.flip(-1) if flip else each for each, flip in zip(images, mirrored, strict=True)])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("options", [{}, {"workers": 1, "prefetch": 1}, {"workers": 5, "prefetch": 7}])
def test_batches_follow_the_order_with_any_loader(data: Dataset, window: int | None, options: dict[str, int]) -> None:
    positions = range(0, 3 * COUNT, BATCH)  # over the ends of epochs, in the middle of batches
    for batch, position in zip(batches(data, positions, window, **options), positions, strict=True):
        rows = order_of(data, window).rows(position, BATCH)
        assert batch.indices == range(position, position + BATCH)
        np.testing.assert_array_equal(batch.rows, rows)
        assert torch.equal(batch.images, flipped(data.images(rows), batch.indices, seed=5))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_equal_shares_of_ranks_make_up_the_batch(data: Dataset, window: int | None, ranks: int) -> None:
    positions = range(0, 2 * COUNT, BATCH)
    whole = batches(data, positions, window)
    shares = [batches(data, positions, window, rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part.indices) for part in parts} == {BATCH // ranks}
        assert [index for part in parts for index in part.indices] == list(batch.indices)
        np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_batch_size_must_be_divisible_by_the_ranks(data: Dataset) -> None:
    with pytest.raises(UserError, match=r"training\.batch_size = 12 .* 5 ranks: make it a multiple of 5"):
        Loader(data, range(COUNT), order_of(data), BATCH, ranks=5)


def test_loader_can_start_and_seek_anywhere(data: Dataset) -> None:
    positions = [10**12, 7, 7 + BATCH, 36, 0, 0, 10**12]
    alone = [batches(data, [at])[0] for at in positions]
    for jumped, fresh in zip(batches(data, positions), alone, strict=True):
        np.testing.assert_array_equal(jumped.rows, fresh.rows)
        assert torch.equal(jumped.images, fresh.images)


def test_without_a_flip_seed_no_image_is_mirrored(data: Dataset) -> None:
    with Loader(data, range(COUNT), order_of(data), BATCH) as loader:
        batch = loader.batch(0)
    assert torch.equal(batch.images, data.images(batch.rows))


class Spy(LocalShards):
    """Remembers when which shards were read and asked for ahead; ``pause``: seconds each reading takes longer."""

    def __init__(self, folder: Path, pause: float = 0.0) -> None:
        super().__init__(folder)
        self.pause = pause
        self.reads = 0
        self.requests: list[list[str]] = []

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> list[memoryview]:
        time.sleep(self.pause)
        self.reads += 1
        return super().read(entry, spans)

    def prefetch(self, entries: Sequence[FileEntry]) -> None:
        self.requests.append([entry.name for entry in entries])
        super().prefetch(entries)


@pytest.fixture
def spied(data: Dataset) -> Iterator[tuple[Dataset, Spy]]:
    """The same images, never remembered."""
    spy = Spy(data.folder)
    with closing(Dataset.open(data.folder, spy, cache_bytes=0)) as dataset:
        yield dataset, spy


def test_next_batches_are_loaded_in_the_background(spied: tuple[Dataset, Spy]) -> None:
    data, spy = spied
    spy.pause = 0.002
    with Loader(data, range(COUNT), order_of(data), BATCH, workers=2, prefetch=3) as loader:
        loader.batch(0)
        waited = loader.waited
        assert waited >= 0.002
        time.sleep(0.3)
        spy.pause = 60.0
        for at in range(BATCH, 4 * BATCH, BATCH):
            loader.batch(at, end=4 * BATCH)
        assert loader.waited - waited < 0.1


def test_no_batch_is_loaded_beyond_the_end(spied: tuple[Dataset, Spy]) -> None:
    data, spy = spied
    with Loader(data, range(COUNT), order_of(data), BATCH, prefetch=4) as loader:
        loader.batch(0, end=2 * BATCH)
        loader.batch(BATCH, end=2 * BATCH)
    shards = [len(set(data.shards(order_of(data).rows(at, BATCH)).tolist())) for at in (0, BATCH)]
    assert spy.reads == sum(shards)


def test_windows_name_shards_before_they_are_needed(spied: tuple[Dataset, Spy]) -> None:
    data, spy = spied
    names = [shard.name for shard in data.manifest.shards]
    with Loader(data, range(COUNT), order_of(data, window=3), 10, prefetch=1, workers=1) as loader:
        for at in range(0, COUNT, 10):
            batch = loader.batch(at)
            needed = {names[number] for number in data.shards(batch.rows)}
            assert needed <= set(spy.requests[-1][:3])
    assert [len(each) for each in spy.requests[:2]] == [6, 6]
    assert {name for names in spy.requests for name in names[:3]} == set(names)


def test_a_damaged_shard_ends_in_an_error_that_names_it(data: Dataset) -> None:
    path = data.folder / data.manifest.shards[4].name
    whole = path.read_bytes()
    path.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with (
        closing(Dataset.open(data.folder)) as broken,
        Loader(broken, range(COUNT), order_of(broken), COUNT) as loader,
        pytest.raises(UserError, match=path.name),
    ):
        loader.batch(0)
