"""What scores are compared with is kept under all that it depends on, and is right or computed again."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.common.fingerprint import fingerprint
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import Dataset
from diffusion.evaluation import real_images
from diffusion.evaluation.cache import pieces_folder
from diffusion.evaluation.metrics import precision_recall
from diffusion.evaluation.metrics.scores import PreparedReference, prepare_reference
from diffusion.evaluation.real_images import RealImages
from diffusion.generation.super_resolution import GenerationTask
from tests.builders.small_datasets import random_images, write_dataset

ROWS = np.arange(30)


@dataclass(frozen=True)
class Pixels:
    """Pixels as features, times a factor that stands for all that a network may do otherwise."""

    factor: float = 1.0
    name: str = "pixels"
    digest: str = "a" * 64
    preprocessing: str = "none"
    about: str = "pixels"
    calls: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return images.flatten(1).float() * self.factor


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_dataset(tmp_path / "set", random_images(40, size=8), per_shard=20)
    return Dataset.open(tmp_path / "set")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def same(first: PreparedReference, second: PreparedReference) -> bool:
    pairs = [(first.features, second.features)]
    pairs += [
        (tensor, second.statistics[metric][name])
        for metric, tensors in first.statistics.items()
        for name, tensor in tensors.items()
    ]
    return all(torch.equal(*pair) for pair in pairs)


def pixels_of(dataset: Dataset, rows: np.ndarray = ROWS, factor: float = 1.0) -> PreparedReference:
    return prepare_reference(dataset.images(rows).flatten(1).float() * factor)


def real_images_of(
    cache: Path, dataset: Dataset, rows: np.ndarray, extractor: Pixels, progress: Progress = ignore_progress
) -> RealImages:
    """The real images of ``dataset``, of which those in ``rows`` are the reference."""
    real = RealImages(dataset, extractor, 10, 10, cache, GenerationTask(), progress)
    real.compared = rows
    return real


def cached_features(cache: Path, dataset: Dataset, rows: np.ndarray, extractor: Pixels) -> Tensor:
    return real_images_of(cache, dataset, rows, extractor).features(rows)


def cached_reference(
    cache: Path, dataset: Dataset, rows: np.ndarray, extractor: Pixels, progress: Progress = ignore_progress
) -> PreparedReference:
    return real_images_of(cache, dataset, rows, extractor, progress).reference


def test_cached_features_equal_computed_ones_bit_for_bit(dataset: Dataset, cache: Path) -> None:
    for _ in range(2):
        assert same(cached_reference(cache, dataset, ROWS, Pixels()), pixels_of(dataset))


def test_nothing_is_computed_twice(dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Pixels()
    cached_features(cache, dataset, ROWS, extractor)
    cached_reference(cache, dataset, ROWS, extractor)
    monkeypatch.setattr(precision_recall, "nearest_distances", None)
    cached_reference(cache, dataset, ROWS, extractor)
    assert extractor.calls == [30]


OTHER: list[dict[str, Any]] = [
    {"rows": np.arange(1, 31)},
    {"rows": ROWS[::-1].copy()},
    {"rows": ROWS[:20]},
    {"extractor": Pixels(2.0, name="other")},
    {"extractor": Pixels(2.0, digest="b" * 64)},
    {"extractor": Pixels(2.0, preprocessing="twice as large")},
]


@pytest.mark.parametrize("other", OTHER, ids=["rows", "order", "count", "name", "digest", "preprocessing"])
def test_other_rows_or_another_extractor_have_another_reference(
    other: dict[str, Any], dataset: Dataset, cache: Path
) -> None:
    cached_reference(cache, dataset, ROWS, Pixels())
    extractor, rows = other.get("extractor", Pixels()), other.get("rows", ROWS)
    assert same(cached_reference(cache, dataset, rows, extractor), pixels_of(dataset, rows, extractor.factor))


def test_another_data_set_has_another_reference(dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    cached_reference(cache, dataset, ROWS, Pixels())
    write_dataset(tmp_path / "other", random_images(40, size=8, seed=1), per_shard=20)
    other = Dataset.open(tmp_path / "other")
    assert same(cached_reference(cache, other, ROWS, Pixels()), pixels_of(other))


def test_another_machine_computes_its_own(dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Pixels()
    cached_features(cache, dataset, ROWS, extractor)
    here = fingerprint(100, "fp32", "cpu")
    for change in ({"torch": "99.0"}, {"device": "a 6502"}):
        there = here.model_copy(update=change)
        monkeypatch.setattr(real_images, "fingerprint", lambda *_, there=there: there)
        cached_features(cache, dataset, ROWS, extractor)
    assert extractor.calls == [30, 30, 30]


def test_every_part_of_a_key_is_in_its_digest(dataset: Dataset, cache: Path) -> None:
    key = real_images_of(cache, dataset, ROWS, Pixels()).key(ROWS)
    assert {"content_digest", "rows", "count", "extractor", "extractor_digest", "preprocessing"} < key.keys()
    keys = [key, *(key | {name: 0} for name in key), {"features": key}, *({"features": key | {n: 0}} for n in key)]
    assert len({pieces_folder(Path(), each) for each in keys}) == len(keys)


def cached_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def flipped(data: bytes, place: float) -> bytes:
    damaged_bytes = bytearray(data)
    damaged_bytes[round(place * (len(data) - 1))] ^= 1
    return bytes(damaged_bytes)


DAMAGES = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer by a byte": lambda data: data + b"\0",
    "empty": lambda data: b"",
    **{f"a bit flipped at {place:.0%}": lambda data, place=place: flipped(data, place) for place in (0, 0.1, 0.5, 1)},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_feature_cache_file_is_recomputed(damage: str, suffix: str, dataset: Dataset, cache: Path) -> None:
    cached_reference(cache, dataset, ROWS, Pixels())
    before = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(cached_files(cache)) == 2
    for path in cached_files(cache):
        damaged_file = path.with_suffix(suffix)
        damaged_file.write_bytes(DAMAGES[damage](damaged_file.read_bytes()))
    assert same(cached_reference(cache, dataset, ROWS, Pixels()), pixels_of(dataset))
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
def test_feature_cache_file_without_its_counterpart_is_recomputed(suffix: str, dataset: Dataset, cache: Path) -> None:
    cached_reference(cache, dataset, ROWS, Pixels())
    for path in cached_files(cache):
        path.with_suffix(suffix).unlink()
    assert same(cached_reference(cache, dataset, ROWS, Pixels()), pixels_of(dataset))


def test_a_file_moved_under_another_key_is_computed_again(dataset: Dataset, cache: Path) -> None:
    cached_features(cache, dataset, ROWS, Pixels())
    (mine,) = cached_files(cache)
    cached_features(cache, dataset, ROWS, Pixels(2.0, digest="b" * 64))
    (other,) = set(cached_files(cache)) - {mine}
    for suffix in (".safetensors", ".sha256"):
        other.with_suffix(suffix).replace(mine.with_suffix(suffix))
    assert torch.equal(cached_features(cache, dataset, ROWS, Pixels()), pixels_of(dataset).features)


def test_concurrent_processes_compute_reference_features_once(dataset: Dataset, cache: Path) -> None:
    extractor, together = Pixels(), threading.Barrier(2)
    results: list[PreparedReference] = []

    def work() -> None:
        together.wait()
        results.append(cached_reference(cache, dataset, ROWS, extractor))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert extractor.calls == [30]
    assert same(*results)


def test_work_that_was_broken_off_leaves_nothing_behind(dataset: Dataset, cache: Path) -> None:
    def stop(what: str, done: int, total: int | None, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_reference(cache, dataset, ROWS, Pixels(), stop)
    assert cached_files(cache) == []
    assert same(cached_reference(cache, dataset, ROWS, Pixels()), pixels_of(dataset))


def test_features_come_in_the_order_of_the_rows(dataset: Dataset, cache: Path) -> None:
    backwards = cached_features(cache, dataset, ROWS[::-1], Pixels())
    assert torch.equal(backwards, pixels_of(dataset).features.flip(0))
