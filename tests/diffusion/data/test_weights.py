"""Weights of images by their names in the source: how often an epoch shows each."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.loader import Loader, count_repeats, make_order
from tests.builders.shapes import blob

WEIGHTS = {"10_cat/*": 10, "5_dog/*": 5}


@pytest.fixture(params=["crop", "bucket"])
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Dataset]:
    """Images in two folders of sd-scripts and one without repeats, in one bucket or several."""
    for number in range(30):
        folder = tmp_path / "set" / ("10_cat", "5_dog", "other")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image = blob(number, 16)
        (image if number % 2 else image.resize((32, 16))).save(folder / f"{number}.png")
    config = IngestConfig(source=str(tmp_path / "set"), size=16, fit=request.param, held_out=0.2, enlarge=True)
    ingest(tmp_path / "data" / "set", config)
    with closing(Dataset.open(tmp_path / "data" / "set")) as dataset:
        yield dataset


@pytest.mark.parametrize("window", [None, 1, 3])
def test_an_epoch_shows_each_image_as_often_as_its_weight(data: Dataset, window: int | None) -> None:
    rows = data.rows("train")
    order = make_order(data, 3, 4, window, WEIGHTS)
    expected = {
        row: 10 if name.startswith("10_cat/") else 5 if name.startswith("5_dog/") else 1
        for row, name in zip(rows.tolist(), data.sources(rows), strict=True)
    }
    assert order.length == sum(expected.values())
    if len(data.shapes) == 1:
        assert Counter(rows[order.rows(order.length, order.length)].tolist()) == expected
    else:
        # Buckets take turns batch by batch: over many epochs each image has its share.
        seen = Counter(rows[order.rows(0, 400 * order.length)].tolist())
        assert all(seen[row] / 400 == pytest.approx(count, rel=0.02) for row, count in expected.items())


def test_only_ratios_matter_and_the_first_pattern_counts(data: Dataset) -> None:
    names = data.sources(data.rows("train"))
    whole = count_repeats(data, {"other/*": 2, "*": 3})
    assert whole.tolist() == count_repeats(data, {"other/*": 0.5, "*": 0.75}).tolist()
    assert whole.tolist() == [2 if name.startswith("other/") else 3 for name in names]
    assert set(count_repeats(data, {"*.png": 7}).tolist()) == {1}


def test_a_pattern_that_fits_nothing_is_an_error(data: Dataset) -> None:
    with pytest.raises(UserError, match=r"training\.weights has '10_cow/\*'"):
        make_order(data, 0, 4, None, {"10_cow/*": 10})


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_with_any_number_of_workers(data: Dataset, workers: int) -> None:
    order, rows = make_order(data, 3, 4, None, WEIGHTS), data.rows("train")
    with Loader(data, rows, order, 4, workers=workers, prefetch=4) as loader:
        for position in range(0, 40, 4):
            np.testing.assert_array_equal(loader.batch(position).rows, rows[order.rows(position, 4)])


def test_folders_of_sd_scripts_are_classes_without_their_repeats(data: Dataset) -> None:
    assert data.manifest.labels == ["cat", "dog", "other"]
