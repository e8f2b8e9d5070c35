"""Captions and latents have the same bytes whatever encodes them, by a network that each process loads once."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.data.caption_embeddings import encode_texts
from diffusion.data.dataset import Dataset
from diffusion.data.encoding import NetworkWork
from diffusion.data.fan_out import FanOut, make_fan_out
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.latents import LatentCache
from diffusion.families.text_encoder import CaptionEncoder, Encoding
from tests.builders.small_datasets import random_images, write_dataset


def load_autoencoder(folder: Path, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Note the process in ``folder``; each image depends on the others in its batch."""
    (folder / f"{os.getpid()}").touch(exist_ok=False)
    return lambda images: torch.conv2d(images, weights, stride=2) + images.mean()


def load_text_encoder() -> Callable[[str], Encoding]:
    return lambda text: {"text": torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)}


def encode(folder: Path, fan_out: FanOut) -> tuple[dict[str, bytes], set[int]]:
    """The files of latents and captions of a set in ``folder``, and the processes that loaded networks."""
    write_dataset(folder / "data", random_images(70, 3, 8), 35)
    dataset, weights = Dataset.open(folder / "data"), torch.arange(24.0).view(2, 3, 2, 2) / 24
    (folder / "loaded").mkdir()
    network = NetworkWork.here(partial(load_autoencoder, folder / "loaded", weights), "cpu")
    LatentCache(dataset, "digest", network, True, fan_out)
    text_encoder = CaptionEncoder("0" * 64, load_text_encoder, {"text": torch.zeros(32, dtype=torch.uint8)})
    encode_texts(dataset, [f"text {number}" for number in range(150)], fan_out, encoding=text_encoder)
    processes = {int(path.name) for path in (folder / "loaded").iterdir()}
    return {path.name: path.read_bytes() for path in encodings_folder(dataset.folder).iterdir()}, processes


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["processes", pytest.param("ray", marks=pytest.mark.long)])
def test_other_processes_encode_the_same_bytes(tmp_path: Path, runner: str) -> None:
    if runner == "ray":
        pytest.importorskip("ray")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    expected, here = encode(tmp_path / "here", make_fan_out(IngestConfig(workers=3)))
    assert (len(expected), here) == (2 * (2 + 1), {os.getpid()})
    files, there = encode(
        tmp_path / "there", make_fan_out(IngestConfig.model_validate({"runner": runner, "workers": 2}))
    )
    assert files == expected
    assert os.getpid() not in there
    assert 1 <= len(there) <= 2


def test_latents_do_not_depend_on_the_shards_that_images_are_in(tmp_path: Path) -> None:
    latents = []
    for per_shard in (40, 19):
        write_dataset(tmp_path / f"{per_shard}", random_images(40, 3, 8), per_shard)
        dataset = Dataset.open(tmp_path / f"{per_shard}")
        cache = LatentCache(dataset, "digest", lambda images: images.sum(1, keepdim=True) * len(images), True, map)
        latents.append(cache.select_rows(np.argsort(dataset.keys(np.arange(40))), np.arange(40) % 2 == 0))
    assert torch.equal(*latents)


def test_latents_stay_readable_if_a_takedown_deletes_them_meanwhile(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", random_images(70, 3, 8), 35)
    dataset, rows = Dataset.open(tmp_path / "data"), np.arange(70)

    def fan_out(work: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 4:  # the second one of the second shard
                forget_encodings(dataset.folder)
            yield work(item)

    latents = LatentCache(dataset, "digest", lambda images: images.sum(1, keepdim=True), False, fan_out)
    expected = torch.cat([(dataset.images(rows[place : place + 1]) / 127.5 - 1).sum(1, keepdim=True) for place in rows])
    torch.testing.assert_close(latents.select_rows(rows), expected)


def test_a_worker_with_other_hardware_is_an_error() -> None:
    work = NetworkWork(lambda: abs, "cpu", "another processor")
    with pytest.raises(UserError, match="other bits"):
        work(1)
