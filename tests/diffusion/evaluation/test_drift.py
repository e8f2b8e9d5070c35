"""The test for drift of images: it finds shifts, and raises false alarms no more often than it may."""

from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.versions import find_nothing
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.drift import LOWEST_LEVEL, compare_with_training, level_of_test, permutation_test
from tests.builders.shapes import disc


def normal(seed: int, count: int, mean: float = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, (count, 4)))


def test_levels_of_all_tests_sum_to_the_rate_of_false_alarms() -> None:
    levels = [level_of_test(newer, 0.05) for newer in range(60)]
    assert 0.049 < sum(levels) < 0.05
    assert levels == sorted(set(levels), reverse=True)
    assert level_of_test(10**6, 0.05) == LOWEST_LEVEL


def test_p_value_is_that_of_all_permutations() -> None:
    first, second = normal(0, 5), normal(1, 5, 1.0)
    both = torch.cat([first, second])

    def kid(rows: tuple[int, ...]) -> float:
        kernel = lambda x, y: float((x @ y / 4 + 1) ** 3)  # noqa: E731
        a = [both[i] for i in rows]
        b = [both[i] for i in range(10) if i not in rows]
        within = sum(kernel(x, y) for s in (a, b) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / 20
        return within - 2 * sum(kernel(x, y) for x in a for y in b) / 25

    kids = np.array([kid(rows) for rows in combinations(range(10), 5)])
    exact = float((kids >= kid((0, 1, 2, 3, 4)) - 1e-9).mean())
    statistic, p_value = permutation_test(first, second, 1e-4)
    assert statistic == pytest.approx(kid((0, 1, 2, 3, 4)))
    # Ten exceedances leave a relative error of about a third.
    assert exact / 3 < p_value < exact * 3


def test_shifted_features_are_found_at_any_level_and_equal_ones_rarely() -> None:
    assert permutation_test(normal(0, 100), normal(1, 100, 0.7), 1e-3)[1] <= 1e-3
    p_values = [permutation_test(normal(2 * seed, 50), normal(2 * seed + 1, 50), 0.05)[1] for seed in range(200)]
    # Uniform: 10 of 200 expected, and 20 or more with probability 0.2 %.
    assert sum(p <= 0.05 for p in p_values) < 20
    assert 0.4 < float(np.mean(p_values)) < 0.65


def test_monitoring_a_champion_again_and_again_keeps_its_rate_of_false_alarms() -> None:
    def alarms() -> Iterator[bool]:
        for seed in range(100):
            old, new = normal(2 * seed, 50), normal(2 * seed + 1, 200)
            # Each look has more new images than the one before, as the versions of a data set.
            looks = ((newer, new[torch.randperm(50 * (newer + 1))[:50]]) for newer in range(4))
            yield any(
                permutation_test(each, old, level_of_test(n, 0.05))[1] <= level_of_test(n, 0.05) for n, each in looks
            )

    torch.manual_seed(0)
    # At 5 % more than 10 of 100 have probability 1 %.
    assert sum(alarms()) <= 10


def test_new_images_are_compared_with_those_of_the_training_version(tmp_path: Path) -> None:
    data, images = tmp_path / "data" / "blobs", tmp_path / "images"

    def add(numbers: range, shift: int) -> None:
        images.mkdir(exist_ok=True)
        for number in numbers:
            pixels = np.asarray(disc(number), np.uint8)
            Image.fromarray(np.clip(pixels.astype(int) + shift, 0, 255).astype(np.uint8)).save(images / f"{number}.png")
        ingest(data, IngestConfig(source=str(images), size=8, held_out=0.33))

    config = EvaluationConfig(extractor_size=32)
    add(range(120), 0)
    trained = read_manifest(data)
    drifts = []
    for numbers, shift in ((range(120, 150), 0), (range(150, 240), 0), (range(240, 400), 90)):
        add(numbers, shift)
        with closing(Dataset.open(data)) as dataset:
            drifts.append(compare_with_training(dataset, trained, config, 0.0125, find_nothing))
    few, same, shifted = drifts
    assert few is None
    assert same is not None
    assert shifted is not None
    assert same.p_value > 0.0125
    assert shifted.p_value <= 0.0125
    assert same.compared <= same.added
    assert shifted.kid > same.kid
