"""What images look like as a whole: against definitions written out, and changes of a known size."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from torch import Tensor

from diffusion.evaluation.metrics.pixel_metrics import AppearanceDrift, compare_appearance, measure_appearance


def images(count: int, seed: int, channels: int = 3) -> Tensor:
    """Smooth colours of many brightnesses, (count, channels, 8, 8) uint8."""
    random = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, channels, 1, 1, generator=random) * 120 + 40
    return (tint + torch.rand(count, channels, 8, 8, generator=random) * 60).to(torch.uint8)


def test_appearance_metrics_match_their_names() -> None:
    image = images(1, 0)
    appearance = {name: value.item() for name, value in measure_appearance(image).items()}
    pixels = image[0].permute(1, 2, 0).reshape(-1, 3).numpy() / 255
    lumas = [colorsys.rgb_to_yiq(*pixel)[0] for pixel in pixels]
    assert appearance["brightness"] == pytest.approx(np.mean(lumas), abs=0.005)
    assert appearance["contrast"] == pytest.approx(np.std(lumas), abs=0.005)
    chroma = [saturation * value for _, saturation, value in (colorsys.rgb_to_hsv(*pixel) for pixel in pixels)]
    assert appearance["saturation"] == pytest.approx(np.mean(chroma))
    red, green, blue = pixels.mean(0)
    assert appearance["red_green"] == pytest.approx(red - green)
    assert appearance["yellow_blue"] == pytest.approx((red + green) / 2 - blue)


def test_grey_images_have_no_colours_in_rgb_either() -> None:
    grey = images(5, 0, channels=1)
    appearance, in_rgb = measure_appearance(grey), measure_appearance(grey.repeat(1, 3, 1, 1))
    assert appearance.keys() == {"brightness", "contrast"}
    for name, values in in_rgb.items():
        torch.testing.assert_close(values, appearance.get(name, torch.zeros(5).double()))


@pytest.mark.parametrize(
    ("change", "name", "size"),
    [
        (lambda x: x + torch.tensor([25.5] * 3).view(3, 1, 1), "brightness", 0.1),
        (lambda x: x + torch.tensor([25.5, 0, 0]).view(3, 1, 1), "red_green", 0.1),
        (lambda x: x + torch.tensor([0, 0, 25.5]).view(3, 1, 1), "yellow_blue", -0.1),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), "saturation", None),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), "contrast", None),
    ],
)
def test_a_change_is_seen_in_its_figure_with_its_size(
    change: Callable[[Tensor], Tensor], name: str, size: float | None
) -> None:
    real = images(400, 1)
    changed_images = change(images(400, 0).float()).round().to(torch.uint8)
    shift = compare_appearance(measure_appearance(changed_images), measure_appearance(real)).shifts[name]
    expected = -shift.real if size is None else size
    assert shift.difference == pytest.approx(expected, abs=4 * shift.standard_error + 0.01)
    assert abs(shift.difference) > 5 * shift.standard_error
    assert shift.spreads == pytest.approx(shift.difference / measure_appearance(real)[name].std().item())


def test_the_error_is_welchs() -> None:
    first, second = measure_appearance(images(30, 0)), measure_appearance(images(70, 1))
    for name, shift in compare_appearance(first, second).shifts.items():
        expected = ttest_ind(first[name], second[name], equal_var=False).statistic
        assert shift.difference / shift.standard_error == pytest.approx(expected)
        assert shift.generated_spread == pytest.approx(np.std(first[name].numpy(), ddof=1))


def test_real_images_seldom_differ_by_three_errors() -> None:
    drift = [
        compare_appearance(measure_appearance(images(50, n)), measure_appearance(images(50, 1000 + n)))
        for n in range(60)
    ]
    beyond = sum(abs(s.difference) > 3 * s.standard_error for each in drift for s in each.shifts.values())
    # Of 300 at 0.4 % each (Student's t), more than 8 would come once in a hundred thousand times.
    assert beyond <= 8


def test_where_real_images_do_not_differ_there_is_no_unit() -> None:
    same = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
    drift = compare_appearance(measure_appearance(images(4, 0, channels=1)), measure_appearance(same))
    assert drift.shifts["brightness"].spreads is None
    assert drift.metrics() == {}
    assert AppearanceDrift.model_validate_json(drift.model_dump_json()) == drift


def test_differences_are_named_in_spreads() -> None:
    drift = compare_appearance(measure_appearance(images(40, 0)), measure_appearance(images(40, 1)))
    assert drift.metrics().keys() == {
        f"drift_{name}" for name in ("brightness", "contrast", "red_green", "yellow_blue", "saturation")
    }
    assert all(math.isfinite(value) for value in drift.metrics().values())
