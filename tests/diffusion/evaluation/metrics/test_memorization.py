"""Copies among generated images: found where they were planted, however they were changed, and nowhere else."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, affine

from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.copies import PIXELS, Memorization, detect_memorization
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from diffusion.evaluation.metrics.registration import SIDE, STARTS, describe_images, find_registered, register
from tests.builders.degraded import averaged, blurred, compressed, with_copies, with_noise
from tests.builders.real_images import digits, images

TRAINING, HELD_OUT, GENERATED = 2000, 400, 400
PLANTED = 40
"""One in ten."""


@cache
def scans() -> tuple[Tensor, Tensor, Tensor]:
    """Training images, held-out ones, and others that stand for those of a perfect model."""
    training, held_out, generated = torch.split(digits(TRAINING + HELD_OUT + GENERATED)[0], [2000, 400, 400])
    return training, held_out, generated


def in_pixels(some: Tensor, training: Tensor) -> dict[str, NearestNeighbours]:
    thumbnails = map(describe_images, torch.split(training, 700))
    return {PIXELS: find_registered([some], thumbnails, lambda rows: training[rows])}


@cache
def of_held_out() -> dict[str, NearestNeighbours]:
    return in_pixels(scans()[1], scans()[0])


def memorization(generated: Tensor) -> Memorization:
    return detect_memorization(in_pixels(generated, scans()[0]), of_held_out())


def moved(some: Tensor, turn: float = 0.0, scale: float = 1.0, right: int = 0, down: int = 0) -> Tensor:
    """Turned, scaled and shifted, with the edge repeated."""
    padded = torch.nn.functional.pad(some.float(), (8, 8, 8, 8), mode="replicate")
    image = affine(padded, turn, [right, down], scale, [0, 0], InterpolationMode.BILINEAR)
    return image[..., 8:-8, 8:-8].round().clamp(0, 255).to(torch.uint8)


def contrasted(some: Tensor, factor: float) -> Tensor:
    return ((some.float() - 128) * factor + 128).round().clamp(0, 255).to(torch.uint8)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda copies: copies,
    "jpeg": partial(compressed, quality=30),
    "noise 10": partial(with_noise, deviation=10 / 255),
    "noise 30": partial(with_noise, deviation=30 / 255),
    "shifted": partial(moved, right=2),
    "turned": partial(moved, turn=10),
    "turned and shifted": partial(moved, turn=-7, right=1, down=-1),
    "smaller": partial(moved, scale=0.9),
    "larger": partial(moved, scale=1.1),
    "mirrored": lambda copies: copies.flip(3),
    "blurred": partial(blurred, sigma=1.2),
    "less contrast": partial(contrasted, factor=0.7),
    "more contrast": partial(contrasted, factor=1.3),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
FAST = ("exact", "noise 30", "turned and shifted", "mirrored", "blurred")
"""Changes that the fast tests try."""


@pytest.mark.slow
def test_unseen_images_count_as_copies_at_the_calibrated_rate() -> None:
    detection = memorization(scans()[2])
    assert detection.expected == pytest.approx(0.05, abs=3e-3)
    assert detection.share == pytest.approx(0.05, abs=0.03)
    assert detection.p_value > 0.05
    assert (detection.generated, detection.held_out, detection.suspicious) == (GENERATED, HELD_OUT, False)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=[] if name in FAST else [pytest.mark.slow, pytest.mark.long])
        for name, change in CHANGES.items()
    ],
)
def test_copies_are_found_however_they_were_changed(change: Callable[[Tensor], Tensor]) -> None:
    training, _, real = scans()
    detection = memorization(with_copies(real, change(training[100 : 100 + PLANTED])))
    assert detection.expected < 0.06
    # Of the images that were planted; as many of the others as chance alone explains.
    of_planted = in_pixels(change(training[100 : 100 + PLANTED]), training)[PIXELS]
    assert (of_planted.relative < detection.spaces[0].threshold).float().mean() >= 0.9
    assert (of_planted.rows[:, 0] == 100 + torch.arange(PLANTED)).float().mean() >= 0.9
    assert detection.p_value < 1e-3


@pytest.mark.parametrize(
    "name", ["noise 30", "shifted", *(pytest.param(name, marks=pytest.mark.slow) for name in ("noise 10", "turned"))]
)
def test_near_duplicates_among_held_out_images_do_not_hide_copies(name: str) -> None:
    training, held_out, _ = scans()
    contaminated = with_copies(held_out, with_noise(training[-8:], 3 / 255))  # 2 %
    calibration = in_pixels(contaminated, training)
    copies = in_pixels(CHANGES[name](training[:200]), training)
    detection = detect_memorization(copies, calibration)
    assert detection.share >= 0.9
    assert detection.p_value < 1e-6
    assert detection.near_duplicates == 8
    assert not detection.suspicious
    few = {PIXELS: NearestNeighbours(calibration[PIXELS].distances[:100], calibration[PIXELS].rows[:100])}
    assert detect_memorization(copies, few).suspicious


@pytest.mark.slow
def test_the_share_grows_with_the_copies() -> None:
    training, _, real = scans()
    shares = [memorization(with_copies(real, training[:count])).copy_share.excess for count in (0, 40, 200)]
    assert shares == pytest.approx([0, 0.1, 0.5], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "some",
    [
        pytest.param(lambda: averaged(scans()[0][:GENERATED], 8), id="averages of eight"),
        pytest.param(lambda: blurred(scans()[2], 1.5), id="blurred"),
        pytest.param(lambda: with_noise(scans()[2], 0.2), id="noisy"),
    ],
)
def test_bad_images_are_no_copies(some: Callable[[], Tensor]) -> None:
    assert memorization(some()).p_value > 0.01


@pytest.mark.slow
def test_a_copy_found_in_both_spaces_counts_once() -> None:
    training, held_out, real = (each[:400] for each in scans())
    extractor = EfficientNetLite0(32)

    def find_in_both(some: Tensor) -> dict[str, NearestNeighbours]:
        return in_pixels(some, training) | {extractor.name: find_nearest(extractor(some), [extractor(training)])}

    exact = detect_memorization(find_in_both(with_copies(real, training[:20])), find_in_both(held_out))
    counts = {space.space: space.count for space in exact.spaces}
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= exact.copies < sum(counts.values())
    assert exact.expected == pytest.approx(0.05, abs=0.01)


def test_the_threshold_is_exact_in_any_space() -> None:
    """The rate of false alarms at 1 % over 300 data sets of points that copy nothing."""
    random = torch.Generator().manual_seed(0)
    alarms, shares, expected = 0, 0.0, 0.0
    for _ in range(300):
        training, held_out, generated = (torch.randn(count, 12, generator=random) for count in (200, 199, 100))
        near = ({"x": find_nearest(some, [training])} for some in (generated, held_out))
        detection = detect_memorization(*near)
        alarms += detection.p_value < 0.01
        shares, expected = shares + detection.share / 300, expected + detection.expected / 300
    # Of 300 at 1 %, more than 10 would come once in three thousand times.
    assert alarms <= 10
    assert expected == pytest.approx(0.05, abs=1e-3)
    assert shares == pytest.approx(expected, abs=0.007)


def test_repeating_near_duplicates_like_real_images_is_not_worse() -> None:
    """Three in ten held-out images are near-duplicates of training images, and so are as many generated ones."""
    random = torch.Generator().manual_seed(0)
    training, held_out, generated = (torch.randn(count, 12, generator=random) for count in (500, 400, 400))
    for some in (held_out, generated):
        some[:120] = training[torch.randint(500, (120,), generator=random)] + 0.05 * torch.randn(
            120, 12, generator=random
        )
    detection = detect_memorization(*({"x": find_nearest(some, [training])} for some in (generated, held_out)))
    assert detection.suspicious
    assert detection.copy_share.excess < 0.05
    copies = training[:400] + 0.05
    worse = detect_memorization({"x": find_nearest(copies, [training])}, {"x": find_nearest(held_out, [training])})
    assert worse.copy_share.excess > 0.9


def test_real_images_that_repeat_training_images_are_nearest() -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    same = {"x": find_nearest(points, [points])}
    detection = detect_memorization(same, same)
    assert detection.p_value > 0.5
    assert detection.copy_share.excess == 0
    assert Memorization.model_validate_json(detection.model_dump_json()) == detection


def test_neighbours_found_in_pieces_are_those_found_at_once() -> None:
    training, _, real = scans()
    once = in_pixels(real[:30], training)[PIXELS]
    thumbnails = map(describe_images, torch.split(training, 300))
    pieces = find_registered(torch.split(real[:30], 7), thumbnails, lambda rows: training[rows])
    torch.testing.assert_close(pieces.distances, once.distances, atol=1e-4, rtol=0)
    assert (pieces.rows == once.rows).float().mean() > 0.98


@cache
def photographs() -> tuple[Tensor, Callable[[Tensor], dict[str, NearestNeighbours]], dict[str, NearestNeighbours]]:
    """Training images, a search among them in pixels and features, and what it finds for held-out ones."""
    training, held_out, _ = torch.split(images(4400)[0], [3600, 400, 400])
    extractor = EfficientNetLite0(32)
    of_training = extractor(training)

    def find_in_both(some: Tensor) -> dict[str, NearestNeighbours]:
        return in_pixels(some, training) | {extractor.name: find_nearest(extractor(some), [of_training])}

    return training, find_in_both, find_in_both(held_out)


@pytest.mark.slow
@changes
def test_copies_of_photographs_are_found_however_they_were_changed(change: Callable[[Tensor], Tensor]) -> None:
    """In pixels or in features, at 5 % false alarms in all."""
    training, detect, real = photographs()
    copied = detect_memorization(detect(change(training[:100])), real)
    assert copied.expected <= 0.06
    assert copied.share >= (0.7 if change is CHANGES["noise 30"] else 0.9)


def test_figures_are_named() -> None:
    detection = memorization(scans()[2])
    assert detection.metrics()["copies_share"] == detection.share
    assert detection.metrics().keys() == {
        "copies_share",
        "copies_share_low",
        "copies_share_high",
        "copies_expected",
        "copies_p_value",
    }


def test_white_images_with_a_trace_of_noise_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    onto = torch.rand(64, 3, SIDE, SIDE, generator=generator)
    white = 1 - 6e-8 * (torch.rand(onto.shape, generator=generator) < 0.3)  # singular in single precision
    assert (register(white, onto, STARTS[:64]) > 0.99).all()
