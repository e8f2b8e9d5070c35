"""Copies among drawn images: found where they were planted, and nowhere else."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.copies import (
    PIXELS,
    Memorization,
    detect_memorization,
    make_thumbnails,
    shifted_thumbnails,
)
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from tests.builders.degraded import averaged, blurred, compressed, shifted, with_copies, with_noise
from tests.builders.real_images import digits

TRAINING, HELD_OUT, DRAWN = 2000, 800, 800
PLANTED = 40
"""One in twenty."""


@cache
def scans() -> tuple[Tensor, Tensor, Tensor]:
    """Training images, held-out ones, and others that stand for what a perfect model draws."""
    training, held_out, drawn = torch.split(digits(TRAINING + HELD_OUT + DRAWN)[0], [TRAINING, HELD_OUT, DRAWN])
    return training, held_out, drawn


@cache
def training_thumbnails() -> Tensor:
    return make_thumbnails(scans()[0])


@cache
def of_held_out() -> dict[str, NearestNeighbours]:
    return in_pixels(scans()[1])


def in_pixels(images: Tensor, mirrored: bool = False) -> dict[str, NearestNeighbours]:
    return {PIXELS: find_nearest(shifted_thumbnails(images, mirrored), torch.split(training_thumbnails(), 700))}


def judged(drawn: Tensor) -> Memorization:
    return detect_memorization(in_pixels(drawn), of_held_out())


def test_unseen_images_count_as_copies_at_the_calibrated_rate() -> None:
    found = judged(scans()[2])
    assert found.expected == pytest.approx(0.01, abs=1e-4)
    assert found.share_low < found.expected < found.share_high
    assert found.p_value > 0.05
    assert found.share_low <= found.expected
    assert (found.generated, found.held_out) == (DRAWN, HELD_OUT)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda copies: copies,
        partial(compressed, quality=30),
        partial(with_noise, deviation=0.04),
        partial(shifted, down=1, right=1),
        partial(blurred, sigma=0.5),
    ],
    ids=["exact", "jpeg", "noise", "shifted", "blurred"],
)
def test_one_copy_in_twenty_is_found(spoil: Callable[[Tensor], Tensor]) -> None:
    training, _, real = scans()
    found = judged(with_copies(real, spoil(training[100 : 100 + PLANTED])))
    assert found.share == pytest.approx(0.05, abs=0.015)
    assert found.share_low > found.expected
    assert found.p_value < 1e-6
    first = [pair for pair in found.pairs if pair.generated < PLANTED]
    assert len(first) >= 15
    assert [pair.training for pair in first] == [100 + pair.generated for pair in first]
    assert all(pair.is_copy for pair in first)


def test_the_share_grows_with_the_copies() -> None:
    training, _, real = scans()
    shares = [judged(with_copies(real, training[:count])).excess for count in (0, 40, 200, 600)]
    assert shares == pytest.approx([0, 0.05, 0.25, 0.75], abs=0.015)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(lambda: averaged(scans()[0][:DRAWN], 8), id="averages of eight"),
        pytest.param(lambda: blurred(scans()[2], 1.5), id="blurred"),
        pytest.param(lambda: with_noise(scans()[2], 0.2), id="noisy"),
    ],
)
def test_bad_images_are_no_copies(images: Callable[[], Tensor]) -> None:
    assert judged(images()).share < 0.015


def test_mirrored_copies_are_found_if_training_mirrored() -> None:
    training, held_out, real = scans()
    drawn = with_copies(real, training[:PLANTED].flip(3))
    assert judged(drawn).share < 0.03
    both = detect_memorization(in_pixels(drawn, True), in_pixels(held_out, True))
    assert both.share == pytest.approx(0.05, abs=0.02)


def test_features_find_what_pixels_do_not_and_a_copy_in_both_counts_once() -> None:
    training, held_out, real = (each[:400] for each in scans())
    extractor = EfficientNetLite0(32)
    theirs = {PIXELS: make_thumbnails(training), extractor.name: extractor(training)}

    def found(images: Tensor) -> dict[str, NearestNeighbours]:
        ours = {PIXELS: shifted_thumbnails(images), extractor.name: extractor(images)}
        return {space: find_nearest(each, [theirs[space]]) for space, each in ours.items()}

    exact = detect_memorization(found(with_copies(real, training[:20])), found(held_out))
    counts = {space.space: space.count for space in exact.spaces}
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= exact.copies < sum(counts.values())
    assert exact.expected == pytest.approx(2 * 2 / 401)  # the second of 400, in two spaces
    assert exact.share == pytest.approx(0.05, abs=0.02)


def test_the_threshold_is_exact_in_any_space() -> None:
    """The rate of false alarms at 1 % over 300 data sets of points that copy nothing."""
    random = torch.Generator().manual_seed(0)
    alarms, shares = 0, 0.0
    for _ in range(300):
        training, held_out, drawn = (torch.randn(count, 3, generator=random) for count in (200, 199, 100))
        found = detect_memorization({"x": find_nearest(drawn, [training])}, {"x": find_nearest(held_out, [training])})
        alarms += found.p_value < 0.01
        shares += found.share / 300
    # Of 300 at 1 %, more than 10 would come once in three thousand times.
    assert alarms <= 10
    assert shares == pytest.approx(0.01, abs=0.0035)  # four errors: each share has a deviation of 1.4 %


def test_nothing_is_nearer_than_real_images_that_repeat_those_of_training() -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    same = {"x": find_nearest(points, [points])}
    found = detect_memorization(same, same)
    assert (found.copies, found.p_value) == (0, 1)
    assert Memorization.model_validate_json(found.model_dump_json()) == found


def test_figures_are_named() -> None:
    found = judged(scans()[2])
    assert found.metrics()["copies_share"] == found.share
    assert found.metrics().keys() == {
        "copies_share",
        "copies_share_low",
        "copies_share_high",
        "copies_expected",
        "copies_p_value",
    }
