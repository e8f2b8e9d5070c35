"""Estimates: intervals that hold what they promise, and differences that count nothing twice."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from diffusion.evaluation.estimate import Estimate, NonNegative, Share, paired_difference


def test_intervals_are_students() -> None:
    difference = Estimate(value=2.0, error=0.5, freedom=9).interval(0.95)
    low, high = stats.t.interval(0.95, 9, loc=2.0, scale=0.5)
    assert (difference.low, difference.high, difference.confidence) == (pytest.approx(low), pytest.approx(high), 0.95)
    bound = Estimate(value=2.0, error=0.5, freedom=9).lower_bound(0.975)
    assert bound == pytest.approx(low)
    assert Estimate(value=2.0, error=0.5, freedom=9).upper_bound(0.975) == pytest.approx(high)


@given(st.integers(1, 500), st.data())
def test_intervals_of_shares_are_wilsons_for_independent_images(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    share = hits / count
    error = math.sqrt(share * (1 - share) / count)
    interval = Share(value=share, error=error, freedom=10**9, count=count).interval(0.95)
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert (interval.low, interval.high) == (
        pytest.approx(expected.low, abs=1e-6),
        pytest.approx(expected.high, abs=1e-6),
    )


def test_intervals_of_non_negative_figures_start_at_0() -> None:
    usual, cut = (kind(value=0.1, error=0.2, freedom=9).interval(0.95) for kind in (Estimate, NonNegative))
    assert (cut.low, cut.high) == (0, usual.high)
    assert usual.low < 0


def test_correlated_images_widen_the_interval_of_a_share() -> None:
    independent, together = (Share(value=0.9, error=error, freedom=100, count=900) for error in (0.01, 0.03))
    narrow, wide = independent.interval(0.95), together.interval(0.95)
    assert wide.low < narrow.low < 0.9 < narrow.high < wide.high < 1


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=30))
def test_the_paired_difference_is_that_of_the_t_test(pairs: list[tuple[float, float]]) -> None:
    first, second = (list(each) for each in zip(*pairs, strict=True))
    difference = paired_difference(first, second)
    differences = np.subtract(first, second)
    assert difference.value == pytest.approx(np.mean(differences), abs=1e-9)
    assert difference.error == pytest.approx(stats.sem(differences), abs=1e-9)
    assert difference.freedom == len(pairs) - 1


def test_paired_difference_removes_common_variation() -> None:
    random = np.random.default_rng(0)
    difficulty = random.normal(30, 5, 200)
    first, second = difficulty + random.normal(0.2, 0.1, 200), difficulty
    difference = paired_difference(first.tolist(), second.tolist())
    unpaired = math.hypot(stats.sem(first), stats.sem(second))
    assert difference.error < unpaired / 20
    assert difference.lower_bound(0.99) > 0


def test_images_of_unlike_number_are_not_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_errors_of_independent_figures_add_up_in_squares() -> None:
    difference = Estimate(value=5, error=3, freedom=10).subtract(Estimate(value=1, error=4, freedom=7))
    assert difference == Estimate(value=4, error=5, freedom=7)
    assert difference.subtract(1.5).multiply(-2) == Estimate(value=-5, error=10, freedom=7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_give_no_estimate(value: float) -> None:
    with pytest.raises(ValidationError):
        Estimate(value=value, error=1)
    with pytest.raises(ValidationError):
        Estimate(value=1, error=value)
