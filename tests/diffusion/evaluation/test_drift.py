"""The test for drift of images: it finds shifts, and raises false alarms no more often than it may."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, multivariate_hypergeom

from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.versions import find_nothing
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.drift import (
    LOWEST_LEVEL,
    DriftTest,
    compare_counts,
    compare_with_training,
    compare_within,
    level_of_test,
    run_tests,
)
from tests.builders.shapes import disc


def normal(seed: int, count: int, mean: float = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, (count, 4)))


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
def test_p_value_is_that_of_all_permutations(n: int, m: int) -> None:
    first, second = normal(0, n), normal(1, m, 1.0)
    both = torch.cat([first, second])
    kids = np.array([kid(both, rows) for rows in combinations(range(n + m), n)])
    exact = float((kids >= kid(both, range(n)) - 1e-9).mean())
    place, statistic, p_value = compare_within([(first, second)], 1e-4)
    assert (place, statistic) == (0, pytest.approx(kid(both, range(n))))
    # Ten exceedances leave a relative error of about a third.
    assert exact / 3 < p_value < exact * 3


def test_p_value_within_classes_equals_all_permutations_within_them() -> None:
    strata = [(normal(seed, 3), normal(seed + 10, 4, shift)) for seed, shift in enumerate((0.0, 1.0, 0.2))]
    every: list[np.ndarray] = []
    for first, second in strata:
        both = torch.cat([first, second])
        kernel = ((both @ both.T / 4 + 1) ** 3).fill_diagonal_(0).numpy()
        centre = np.eye(7) - 1 / 7
        # Splits in their order, the actual one first.
        every.append(
            np.array([kid(both, rows) for rows in combinations(range(7), 3)]) / np.linalg.norm(centre @ kernel @ centre)
        )
    largest = np.max(np.meshgrid(*every), axis=0)
    exact = float((largest >= max(kids[0] for kids in every) - 1e-9).mean())
    place, _, p_value = compare_within(strata, 1e-4)
    assert place == int(np.argmax([kids[0] for kids in every]))
    assert exact / 3 < p_value < exact * 3


@pytest.mark.parametrize(
    ("new", "old"),
    [((9, 2, 1), (10, 12, 11)), ((0, 3, 0, 4), (6, 0, 1, 9)), ((2, 2, 2), (20, 20, 20)), ((0, 0, 3), (30, 30, 0))],
)
def test_p_value_of_class_shares_is_that_of_all_tables(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    totals = np.add(new, old)

    def g(counts: tuple[int, ...]) -> float:
        tables = [[[a, sum(new) - a], [t - a, sum(old) - t + a]] for a, t in zip(counts, totals, strict=True)]
        return max(float(chi2_contingency(x, correction=False, lambda_="log-likelihood").statistic) for x in tables)

    tables = [counts for counts in product(*(range(total + 1) for total in totals)) if sum(counts) == sum(new)]
    chances = multivariate_hypergeom.pmf(tables, totals, sum(new))
    exact = float(chances[[g(counts) >= g(new) - 1e-9 for counts in tables]].sum())
    _, p_value = compare_counts(np.array(new), np.array(old), 1e-5)
    assert exact * 0.4 < p_value < max(exact * 2.5, 2e-5)


def simulate(
    seed: int, shares: tuple[np.ndarray, np.ndarray], counts: tuple[int, int], shift: float = 0, level: float = 0.0125
) -> dict[str, DriftTest]:
    """Tests on two sides of given class shares, whose features are normal around their class; the last class moves."""
    random = np.random.default_rng(seed)
    classes = tuple(random.choice(len(share), count, p=share) for share, count in zip(shares, counts, strict=True))
    features = [
        torch.from_numpy(
            np.eye(10)[of] * 2 + (side == 0) * shift * (of == 9)[:, None] + random.normal(size=(len(of), 10))
        )
        for side, of in enumerate(classes)
    ]
    table = np.stack([np.bincount(of, minlength=10) for of in classes])
    names = [*"abcdefghi", None]
    found = run_tests((features[0], features[1]), (classes[0], classes[1]), table, names, level)
    return {test.name: test for test in found}


EQUAL = np.full(10, 0.1)


def test_twenty_points_more_of_one_class_are_found_and_named() -> None:
    more = EQUAL - 0.2 / 9
    more[3] = 0.3
    found = [simulate(seed, (more, EQUAL), (200, 600))["class_shares"] for seed in range(20)]
    assert sum(test.differs for test in found) >= 18
    assert {test.label for test in found if test.differs} == {"d"}
    assert all("'d'" in test.description for test in found if test.differs)


def test_moved_images_of_one_class_are_found_within_it_alone() -> None:
    found = [simulate(seed, (EQUAL, EQUAL), (150, 400), shift=0.8) for seed in range(10)]
    assert sum(tests["images_by_class"].differs for tests in found) >= 9
    assert {tests["images_by_class"].label for tests in found} == {None}
    assert not any(tests["class_shares"].differs for tests in found)
    # Other shares alone are no difference within classes.
    unequal = np.array([0.46, *[0.06] * 9])
    shares = [simulate(seed, (unequal, EQUAL), (300, 400)) for seed in range(10)]
    assert all(tests["class_shares"].differs for tests in shares)
    assert sum(tests["images_by_class"].differs for tests in shares) <= 1


def test_tests_of_a_version_share_its_level() -> None:
    tests = simulate(0, (EQUAL, EQUAL), (150, 400), level=0.03)
    assert {test.level for test in tests.values()} == {0.01}
    one = np.eye(10)[4]
    assert [(test.name, test.level) for test in simulate(0, (one, one), (60, 60), level=0.03).values()] == [
        ("images", 0.03)
    ]


def test_shifted_features_are_found_and_equal_ones_rarely() -> None:
    assert compare_within([(normal(0, 100), normal(1, 100, 0.7))], 1e-3)[2] <= 1e-3
    p_values = [compare_within([(normal(2 * seed, 50), normal(2 * seed + 1, 50))], 0.05)[2] for seed in range(200)]
    # Uniform: 10 of 200 expected, and 20 or more with probability 0.2 %.
    assert sum(p <= 0.05 for p in p_values) < 20
    assert 0.4 < float(np.mean(p_values)) < 0.65


def test_repeated_monitoring_keeps_the_rate_of_false_alarms() -> None:
    def alarms() -> Iterator[bool]:
        for seed in range(100):
            random = np.random.default_rng(seed)
            codes = random.integers(0, 3, 250)
            features = torch.from_numpy(random.normal(size=(250, 4)) + codes[:, None])
            old, looks = np.arange(50), [np.arange(50, 100 + 50 * newer) for newer in range(4)]
            # Each look has more new images than the one before, as the versions of a data set.
            yield any(
                test.differs
                for newer, new in enumerate(looks)
                for test in run_tests(
                    (features[new[-50:]], features[old]),
                    (codes[new[-50:]], codes[old]),
                    np.stack([np.bincount(codes[rows], minlength=4) for rows in (new, old)]),
                    [*"abc", None],
                    level_of_test(newer, 0.05),
                )
            )

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
    assert [test.differs for test in same.tests] == [False]
    assert [test.differs for test in shifted.tests] == [True]
    assert (same.added, same.compared) == (120, (120, 120))
