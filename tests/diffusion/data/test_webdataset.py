"""The WebDataset pipeline for other training scripts gives the images of one split, each once."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from diffusion.common.errors import UserError
from diffusion.data.dataset import SPLITS, Dataset, open_webdataset
from diffusion.data.manifest import Split


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_split_come_once_with_their_class(dataset: Path, split: Split, workers: int) -> None:
    expected = Dataset.open(dataset)
    rows = expected.rows(split)
    classes = expected.classes(rows, expected.manifest.labels)
    images = dict(zip(expected.keys(rows), zip(expected.images(rows), classes, strict=True), strict=True))
    loader = DataLoader(open_webdataset(dataset, split, shuffle=16), batch_size=None, num_workers=workers)
    samples = {sample["key"]: sample for sample in loader}
    assert samples.keys() == images.keys()
    for key, (image, label) in images.items():
        assert torch.equal(samples[key]["image"], image)
        assert samples[key]["label"] == label


def test_a_missing_shard_is_named(dataset: Path) -> None:
    shard = next((dataset / "shards").iterdir())
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        open_webdataset(dataset)
