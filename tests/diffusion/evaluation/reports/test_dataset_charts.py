"""Charts of a data set: marks lie where the numbers are."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion.evaluation.reports.charts import LIGHT
from diffusion.evaluation.reports.dataset_report import draw_sizes, write_dataset_report
from tests.builders.built_datasets import BuiltDataset, Record, image_record
from tests.builders.html_pages import Page


def grey_images(count: int, first: int, **labels: object) -> list[Record]:
    """``count`` different images of 8×8 pixels, numbered from ``first``."""
    return [
        image_record(np.full((8, 8), number, np.uint8), f"{number}", **labels)  # type: ignore[arg-type]
        for number in range(first, first + count)
    ]


def test_bars_are_as_long_as_classes_are_large(tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "built", size=8)
    trained, held_out = {"a": 10, "b": 30, "c": 20}, {"b": 10, "d": 20}
    rows: list[Record] = []
    for split, classes in (("train", trained), ("held_out", held_out)):
        for name, count in classes.items():
            rows += grey_images(count, len(rows), label=name, split=split)
    built.version(rows)
    write_dataset_report(built.folder, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    names = [attributes["title"] for _, attributes in page.tags if attributes.get("class") == "name"]
    lengths = [
        float(match[1])
        for _, attributes in page.tags
        if (match := re.match(r"width:([\d.]+)%", attributes.get("style", "")))
    ]
    assert names == ["b", "c", "d", "a"]
    assert lengths[:8] == [75, 25, 50, 0, 0, 50, 25, 0]
    assert "4 classes 40 images in the largest, 20 in the median one, 10 in the smallest" in page.text
    assert "1 class has no image for training. 2 classes have no held-out image." in page.text


def test_sizes_lie_where_their_widths_and_heights_are() -> None:
    sizes = {(64, 64): 9, (512, 64): 1, (64, 512): 4}
    axes = Figure().subplots()
    draw_sizes(axes, LIGHT, sizes)
    [mesh] = axes.collections
    # (rows, columns, 2): corners of the cells, x and y.
    corners, counts = mesh.get_coordinates(), np.ma.filled(mesh.get_array(), 0)
    counts_by_size = {}
    for row, column in zip(*np.nonzero(counts), strict=True):
        (left, bottom), (right, top) = corners[row, column], corners[row + 1, column + 1]
        (size,) = (size for size in sizes if left <= size[0] < right and bottom <= size[1] < top)
        counts_by_size[size] = counts[row, column]
    assert counts_by_size == sizes
    assert {"64", "512"} <= {label.get_text() for label in axes.get_xticklabels()}


@pytest.mark.parametrize("sizes", [{(500, 500): 1, (501, 500): 1}, {(1, 1): 1, (10_000, 3): 2}])
def test_sizes_close_together_and_far_apart_have_a_chart(sizes: dict[tuple[int, int], int]) -> None:
    axes = Figure().subplots()
    draw_sizes(axes, LIGHT, sizes)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    low, high = axes.get_xlim()
    assert 2 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 7


@pytest.mark.parametrize("seed", range(2))
def test_half_of_the_shorter_sides_are_at_least_their_median(seed: int, tmp_path: Path) -> None:
    sizes = np.random.default_rng(seed).integers(5, 40, (101, 2))
    rows = grey_images(101, 0)
    built = BuiltDataset(tmp_path / "built", size=8)
    built.version([row | {"width": int(w), "height": int(h)} for row, (w, h) in zip(rows, sizes, strict=True)])
    write_dataset_report(built.folder, tmp_path / "page.html")
    sides, text = sizes.min(1), Page((tmp_path / "page.html").read_text()).text
    range_and_median = f"shorter sides of {sides.min()} to {sides.max()} pixels, half of them at least"
    assert f"{range_and_median} {np.median(sides):.0f};" in text
