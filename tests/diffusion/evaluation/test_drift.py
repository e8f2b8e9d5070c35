"""The test for drift of images: it finds shifts, and raises false alarms no more often than it may."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest, versions
from diffusion.data.versions.versions import find_nothing
from diffusion.evaluation.drift import LOWEST_LEVEL, MAX_COMPARED, compare_features, find_new_images, level_of_test
from tests.builders.built_datasets import BuiltDataset, Record, image_record


def normal(seed: int, count: int, mean: float = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, (count, 4)))


def sides(new: int, old: int) -> np.ndarray:
    return np.repeat([True, False], [new, old])


def test_levels_of_all_tests_sum_to_the_alarm_rate() -> None:
    levels = [level_of_test(newer, 0.05) for newer in range(60)]
    assert 0.049 < sum(levels) < 0.05
    assert levels == sorted(set(levels), reverse=True)
    assert level_of_test(10**6, 0.05) == LOWEST_LEVEL


def kid(features: torch.Tensor, first: Sequence[int]) -> float:
    """KID between rows ``first`` and the other rows, by its definition."""
    sides = [[features[i] for i in first], [features[i] for i in range(len(features)) if i not in first]]
    kernel = lambda x, y: float((x @ y / features.shape[1] + 1) ** 3)  # noqa: E731
    a, b = sides
    within = sum(
        sum(kernel(x, y) for i, x in enumerate(side) for j, y in enumerate(side) if i != j)
        / (len(side) * (len(side) - 1))
        for side in sides
    )
    return within - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8)])
def test_p_value_is_that_of_all_permutations(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.evaluation.drift.MIN_COMPARED", 2)
    both = torch.cat([normal(0, n), normal(1, m, 1.0)])
    kids = np.array([kid(both, rows) for rows in combinations(range(n + m), n)])
    exact = float((kids >= kid(both, range(n)) - 1e-9).mean())
    drift = compare_features(both, sides(n, m), 1e-4)
    assert drift is not None
    assert drift.kid == pytest.approx(kid(both, range(n)))
    # Ten exceedances leave a relative error of about a third.
    assert exact / 3 < drift.p_value < exact * 3


def test_shifted_features_are_found_and_equal_ones_rarely() -> None:
    def p_value(seed: int, count: int, shift: float, level: float) -> float:
        features = torch.cat([normal(2 * seed, count), normal(2 * seed + 1, count, shift)])
        drift = compare_features(features, sides(count, count), level)
        assert drift is not None
        assert drift.differs == (drift.p_value <= level)
        return drift.p_value

    assert p_value(0, 100, 0.7, 1e-3) <= 1e-3
    p_values = [p_value(seed, 50, 0, 0.05) for seed in range(200)]
    # Uniform: 10 of 200 expected, and 20 or more with probability 0.2 %.
    assert sum(p <= 0.05 for p in p_values) < 20
    assert 0.4 < float(np.mean(p_values)) < 0.65


def test_few_images_are_not_compared_and_many_are_cut() -> None:
    assert compare_features(normal(0, 100), sides(9, 91), 0.05) is None
    assert compare_features(normal(0, 100), sides(91, 9), 0.05) is None
    drift = compare_features(normal(0, MAX_COMPARED + 30), sides(20, MAX_COMPARED + 10), 0.05)
    assert drift is not None
    assert drift.compared == (20, MAX_COMPARED)


def test_repeated_monitoring_keeps_the_rate_of_false_alarms() -> None:
    def alarm(seed: int) -> bool:
        features = normal(seed, 250)
        # Each look has more new images than the one before, as the versions of a data set.
        drifts = [
            compare_features(features[: 100 + 50 * newer], ~sides(50, 50 + 50 * newer), level_of_test(newer, 0.05))
            for newer in range(4)
        ]
        return any(drift is not None and drift.differs for drift in drifts)

    # At 5 % more than 10 of 100 have probability 1 %.
    assert sum(map(alarm, range(100))) <= 10


def records(seeds: range) -> list[Record]:
    return [
        image_record(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), f"{seed}") for seed in seeds
    ]


def parent_of(built: BuiltDataset) -> Manifest:
    line = versions(built.folder)
    next(line)
    return next(line)


@pytest.mark.parametrize("rewritten", [False, True])
def test_new_images_are_those_that_the_training_version_lacks(rewritten: bool, tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "noise", size=8)
    built.version(records(range(6)), records(range(6, 10)))
    if rewritten:
        # As a rebuild from a source that has some of the same images would leave it, in another order.
        built.parts = []
        built.version(records(range(3, 8)), records(range(20, 23)), change="rebuild")
    else:
        built.version(records(range(20, 23)))
    dataset = Dataset.open(built.folder)
    seeds = {record["key"]: seed for seed, record in enumerate(records(range(23)))}
    rows = np.arange(len(dataset))[::-1]
    is_new = find_new_images(dataset, rows, parent_of(built), find_nothing)
    assert sorted(seeds[key] for key in dataset.keys(rows[is_new])) == [20, 21, 22]
