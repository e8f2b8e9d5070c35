"""Charts of a data set: marks lie where the numbers are."""

import re

import numpy as np
import pytest

from diffusion.evaluation.dataset_report.charts import chance_chart, class_bars, shorter_sides, size_chart


def test_bars_are_as_long_as_classes_are_large() -> None:
    found = class_bars({"a": 10, "b": 40, "c": 20, "d": 20}, {"b": 10, "d": 20})
    assert [(bar.name, bar.count, bar.train, bar.held_out) for bar in found.shown] == [
        ("b", 40, 75, 25),
        ("c", 20, 50, 0),
        ("d", 20, 0, 50),
        ("a", 10, 25, 0),
    ]
    assert (found.largest, found.median, found.smallest, found.untrained, found.unheld) == (40, 20, 10, 1, 2)


def test_sizes_lie_where_their_widths_and_heights_are() -> None:
    found = size_chart({(64, 64): 9, (512, 64): 1, (64, 512): 4})
    places = {(cell.x, cell.y) for cell in found.cells}
    (low, high) = sorted({x for x, _ in places})
    top, bottom = (100 - found.side - x for x in (high, low))
    assert places == {(low, bottom), (high, bottom), (low, top)}
    ticks = {tick.label: tick.at for tick in found.ticks}
    assert low <= ticks["64"] <= low + found.side
    assert high <= ticks["512"] <= high + found.side
    assert max(found.cells, key=lambda cell: cell.opacity).y == bottom


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_shorter_sides_are_at_least_their_median(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(5, 40, (101, 2))
    counted = {
        (int(w), int(h)): int(n) for (w, h), n in zip(*np.unique(sizes, axis=0, return_counts=True), strict=True)
    }
    found = shorter_sides(counted, 12)
    sides = sizes.min(1)
    assert (found.least, found.median, found.most) == (sides.min(), np.median(sides), sides.max())
    assert found.smaller == (sides < 12).sum()


@pytest.mark.parametrize("kid", [-0.002, 0.0005, 0.02, 1.4])
def test_the_mark_of_a_kid_lies_among_the_chances_as_it_does_in_fact(kid: float) -> None:
    chances = np.random.default_rng(0).normal(0, 0.002, 499)
    found = chance_chart(chances, kid)
    edges = [float(edge) for edge in re.findall(r"[MH]([\d.]+)", found.outline)]
    per_cent = (edges[-1] - edges[0]) / (chances.max() - chances.min())
    assert 0 <= min(edges[0], found.found) < max(edges[-1], found.found) <= 100
    assert found.found - edges[0] == pytest.approx((kid - chances.min()) * per_cent, abs=0.6)
    assert found.ticks[0].at == found.found
