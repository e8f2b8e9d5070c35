"""Thresholds against simulations, and against scipy's distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binomtest

from diffusion.evaluation.estimate import wilson_interval
from diffusion.evaluation.metrics.copies import Threshold, calibrate


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
