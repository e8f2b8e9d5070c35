"""WebDataset pipeline over a data set, for training scripts other than Darkroom's, which uses ``loader``."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Split
from diffusion.data.png import decode_many

Sample = dict[str, Any]


def open_webdataset(folder: Path, split: Split = "train", shuffle: int = 0, seed: int = 0) -> wds.WebDataset:
    """Open one split of the data set in ``folder`` as an iterable of samples, each once per epoch.

    A sample has ``key`` (hex SHA-256 of its pixels), ``image`` (uint8, (C, H, W)), ``label`` (number of its class in
    the manifest's labels, −1 for none) and ``caption`` (str or None). ``torch.utils.data.DataLoader`` takes it with any
    number of workers, which divide the shards among them. Nothing in the shards is unpickled.

    ``shuffle``: size of the shuffle buffer in images; 0 for the stored order of images and shards, which are otherwise
    shuffled by ``seed``. Raises UserError if a shard or table is missing or damaged.
    """
    dataset = Dataset.open(folder, cache_bytes=0)
    manifest = dataset.manifest
    keys = frozenset(dataset.keys(dataset.rows(split)))
    dataset.close()
    pipeline = wds.WebDataset(
        [str(folder / shard.name) for shard in manifest.shards],
        shardshuffle=len(manifest.shards) if shuffle else False,
        seed=seed,
        empty_check=False,
    ).select(partial(_is_one_of, keys))
    if shuffle:
        pipeline = pipeline.shuffle(shuffle)
    numbers = {label: number for number, label in enumerate(manifest.labels)}
    return pipeline.map(partial(_decoded, dataset.shape, numbers))


def _is_one_of(keys: frozenset[str], sample: Sample) -> bool:
    return sample["__key__"] in keys


def _decoded(shape: tuple[int, int, int], numbers: dict[str, int], sample: Sample) -> Sample:
    about = json.loads(sample["json"])
    return {
        "key": sample["__key__"],
        "image": torch.from_numpy(decode_many([sample["png"]], shape)[0].copy()),
        "label": numbers.get(about.get("label"), -1),
        "caption": about.get("caption"),
    }
