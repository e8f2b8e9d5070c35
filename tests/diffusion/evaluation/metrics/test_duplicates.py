"""Duplicates among generated images: few of real ones, all of collapsed modes; and the thresholds of copies."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binomtest
from torch import Tensor

from diffusion.evaluation.estimate import wilson_interval
from diffusion.evaluation.metrics.copies import Duplicates, Threshold, calibrate, detect_duplicates, shifted_thumbnails
from tests.builders.degraded import blurred, with_noise
from tests.builders.real_images import digits

COUNT = 600


@cache
def scans() -> tuple[Tensor, Tensor]:
    first, second = torch.split(digits(2 * COUNT)[0], COUNT)
    return first, second


@cache
def real() -> Tensor:
    return shifted_thumbnails(scans()[1])


def duplicates_of(images: Tensor) -> Duplicates:
    return detect_duplicates(shifted_thumbnails(images), real())


def test_duplicate_rate_of_real_images_matches_the_threshold() -> None:
    halves = [torch.split(digits(600, seed)[0], 300) for seed in range(10)]
    results = [detect_duplicates(shifted_thumbnails(one), shifted_thumbnails(other)) for one, other in halves]
    assert results[0].expected == pytest.approx(0.01, abs=0.001)
    # A share has a deviation of 1.5 %: this is three errors.
    assert np.mean([each.share for each in results]) == pytest.approx(0.01, abs=0.015)
    assert sum(each.p_value < 0.01 for each in results) <= 1
    assert [each.closeness for each in results] == pytest.approx([1] * 10, abs=0.1)


def test_images_generated_twice_are_found_as_pairs() -> None:
    images = scans()[0].clone()
    images[:20] = with_noise(images[100:120], 0.02)
    duplicates = duplicates_of(images)
    assert duplicates.share - duplicates_of(scans()[0]).share == pytest.approx(40 / COUNT, abs=0.015)
    assert duplicates.p_value < 1e-3
    assert {(pair.first, pair.second) for pair in duplicates.twins} <= {(n, n + 100) for n in range(20)}
    assert all(pair.relative < duplicates.threshold for pair in duplicates.twins)


def test_collapsed_modes_are_groups() -> None:
    modes = scans()[0][:5]
    duplicates = duplicates_of(with_noise(modes.repeat(COUNT // 5, 1, 1, 1), 0.03))
    assert duplicates.share == 1
    assert [group.size for group in duplicates.groups] == [COUNT // 5] * 5
    assert duplicates.largest == COUNT // 5
    assert duplicates.groups[0].members[:3] == [0, 5, 10]
    assert duplicates.closeness < 0.2


def test_the_share_grows_as_modes_get_fewer() -> None:
    images = scans()[0]
    shares = [
        duplicates_of(images[:mode_count].repeat(2, 1, 1, 1)[:COUNT]).share for mode_count in (COUNT, 550, 450, 300)
    ]
    assert shares == pytest.approx([0, 1 / 6, 0.5, 1], abs=0.04)


def test_blurred_images_are_more_alike_and_yet_no_duplicates() -> None:
    for sigma in (0.7, 1.0):
        duplicates = duplicates_of(blurred(scans()[0], sigma))
        assert duplicates.closeness < 0.95
        assert duplicates.share < duplicates_of(scans()[0]).share + 0.02


def test_chance_alone_seldom_raises_an_alarm() -> None:
    random = torch.Generator().manual_seed(0)
    results = [detect_duplicates(*(torch.randn(1, 250, 3, generator=random) for _ in range(2))) for _ in range(150)]
    assert np.mean([each.share for each in results]) == pytest.approx(0.01, abs=0.005)
    # Of 150 at 1 %, more than 7 would come once in six thousand times.
    assert sum(each.p_value < 0.01 for each in results) <= 7


def test_duplicate_search_uses_as_many_images_as_real_ones() -> None:
    duplicates = detect_duplicates(shifted_thumbnails(scans()[0]), real()[:, :100])
    assert duplicates.images == 100
    same = detect_duplicates(shifted_thumbnails(scans()[0][:100]), real()[:, :100])
    assert (duplicates.duplicates, duplicates.groups) == (same.duplicates, same.groups)
    assert duplicates.threshold == pytest.approx(same.threshold, rel=1e-4)


def test_none_and_only_duplicates_survive_json() -> None:
    for images in (scans()[0][:1].repeat(COUNT, 1, 1, 1), scans()[0]):
        duplicates = duplicates_of(images)
        assert Duplicates.model_validate_json(duplicates.model_dump_json()) == duplicates
        assert duplicates.metrics()["duplicates_largest_group"] == duplicates.largest


@given(st.integers(1, 300), st.data())
def test_the_chance_is_that_of_the_beta_binomial_distribution(count: int, data: st.DataObject) -> None:
    rank, others = data.draw(st.integers(1, count)), data.draw(st.integers(1, 300))
    below = data.draw(st.integers(0, others))
    expected = betabinom.sf(below - 1, others, rank, count - rank + 1)
    assert Threshold(0.0, rank, count).chance(below, others) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_copy_threshold_is_calibrated_in_rate_and_false_alarms() -> None:
    random = torch.Generator().manual_seed(0)
    shares, alarms = [], 0
    for _ in range(400):
        threshold = calibrate(1 + torch.rand(150, generator=random), 0.02)
        below = int((1 + torch.rand(200, generator=random) < threshold.value).sum())
        shares.append(below / 200)
        alarms += threshold.chance(below, 200) < 0.05
    # The share has a deviation of 1.5 %, so its mean over 400 lies within four errors.
    assert threshold.level == 3 / 151
    assert np.mean(shares) == pytest.approx(threshold.level, abs=4 * np.std(shares) / 20)
    # At 5 %, more than 37 of 400 would come once in seven thousand times.
    assert alarms <= 37


def test_ties_raise_no_alarm() -> None:
    threshold = calibrate(torch.ones(100), 0.05)
    assert int((torch.ones(500) < threshold.value).sum()) == 0
    assert threshold.chance(0, 500) == 1


def test_near_duplicates_have_ranks_but_set_no_threshold() -> None:
    distinct = torch.linspace(0.5, 1, 99)
    alone, among = calibrate(distinct, 0.05), calibrate(torch.cat([torch.full((25,), 0.1), distinct]), 0.05)
    assert (alone.rank, among.rank) == (5, 30)
    assert among.value == alone.value


def test_of_few_real_images_the_least_is_the_threshold() -> None:
    threshold = calibrate(torch.tensor([3.0, 1.0, 2.0]), 0.01)
    assert threshold == Threshold(1.0, rank=1, count=3)
    assert threshold.level == 1 / 4


@given(st.integers(1, 2000), st.data())
def test_the_interval_is_wilsons(whole: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, whole))
    expected = binomtest(part, whole).proportion_ci(0.95, method="wilson")
    assert wilson_interval(part / whole, whole) == pytest.approx((expected.low, expected.high), abs=1e-6)
