"""Charts of a data set as SVG shapes and lengths, which the page draws in its own colours and type.

Against a plotting library: text stays text, one drawing serves light and dark paper, and a page is made in a fraction
of the time.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion.data.manifest import Split
from diffusion.evaluation.dataset_report.survey import BINS, Tones
from diffusion.evaluation.pages import signed

BARS = 40
"""Classes with a bar of their own."""
CHANCE_BINS = 24
BESIDE = 12
"""Per cent of an axis that the label of a mark needs to itself."""
CELLS = 40
"""Of the chart of sizes, along each side."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    """Per cent of the axis."""
    label: str


@dataclass(frozen=True)
class Histogram:
    """The two splits over each other, in a box of 100 × 100 with its origin at the top left."""

    name: str
    outlines: dict[Split, str]
    """SVG paths from the left end of the bottom to its right end; a split without pictures has none."""
    means: dict[Split, float]
    ticks: list[Tick]


@dataclass(frozen=True)
class Cell:
    """A square of the chart of sizes."""

    x: float
    y: float
    opacity: float


@dataclass(frozen=True)
class SizeChart:
    """Widths and heights on equal logarithmic axes, in a box of 100 × 100 with its origin at the top left."""

    cells: list[Cell]
    side: float
    """Of a cell."""
    ticks: list[Tick]
    """Of both axes."""


@dataclass(frozen=True)
class Sides:
    """The shorter sides of pictures as they came, in pixels."""

    least: int
    median: int
    """Of half of the pictures it is at least so long."""
    most: int
    smaller: int
    """Pictures in which it is shorter than what is stored."""


@dataclass(frozen=True)
class Bar:
    """A class."""

    name: str
    count: int
    train: float
    """Lengths in per cent of the longest bar."""
    held_out: float


@dataclass(frozen=True)
class Bars:
    """Classes, the largest first."""

    shown: list[Bar]
    rest: int
    """How many classes have no bar."""
    rest_count: int
    """Pictures in them."""
    largest: int
    """Pictures in the largest class, and in others."""
    median: int
    """Half of the classes have at least so many."""
    smallest: int
    untrained: int
    """Classes without a picture to train on."""
    unheld: int
    """Classes without a held-out picture."""


@dataclass(frozen=True)
class ChanceChart:
    """What the KID of two sets could be by chance, and what it is, in a box of 100 × 100 with its origin at the top
    left."""

    outline: str
    """Of the histogram of chances: an SVG path."""
    found: float
    """Where the KID lies."""
    ticks: list[Tick]


def histogram(tones: Tones) -> Histogram:
    """Shares of each split's pictures, on one scale."""
    shares = {split: found / found.sum() for split, found in tones.histograms.items() if found.sum()}
    highest = max((float(share.max()) for share in shares.values()), default=1.0)
    means = {split: mean for split in shares if (mean := tones.mean(split)) is not None}
    ticks = [Tick(100 * n / 4, f"{tones.high * n / 4:g}") for n in range(5)]
    edges = np.linspace(0, 100, BINS + 1)
    outlines = {split: _steps(edges, share / highest) for split, share in shares.items()}
    return Histogram(tones.name, outlines, means, ticks)


def chance_chart(chances: np.ndarray, kid: float) -> ChanceChart:
    """``chances``: KIDs of random divisions, (n,); ``kid``: the KID of the division that is looked at."""
    low, high = min(chances.min(), kid), max(chances.max(), kid)
    margin = (high - low) / 25
    low, high = low - margin, high + margin
    # Bins of the chances alone: however far off the KID lies, their hill has a shape.
    counts, edges = np.histogram(chances, CHANCE_BINS)
    places = 100 * (edges - low) / (high - low)
    zero, found = (100 * (value - low) / (high - low) for value in (0.0, kid))
    ticks = [Tick(found, signed(kid))]
    if 0 <= zero <= 100 and abs(zero - found) > BESIDE:
        ticks.append(Tick(zero, "0"))
    return ChanceChart(_steps(places, counts / counts.max()), found, ticks)


def _steps(edges: np.ndarray, heights: np.ndarray) -> str:
    """A path over steps of ``heights``, (n,) from 0 to 1, between ``edges``, (n + 1,) in per cent of the width."""
    steps = (f"V{100 - 98 * height:.2f}H{edge:.4g}" for height, edge in zip(heights, edges[1:], strict=True))
    return f"M{edges[0]:.4g} 100{''.join(steps)}V100"


def size_chart(sizes: Mapping[tuple[int, int], int]) -> SizeChart:
    """Where pictures of width × height pixels lie, the darker the more of them; ``sizes`` must not be empty."""
    lengths = [math.log2(side) for size in sizes for side in size]
    low, high = math.floor(min(lengths) * 2 - 0.2) / 2, math.ceil(max(lengths) * 2 + 0.2) / 2
    cells: Counter[tuple[int, int]] = Counter()
    for (width, height), count in sizes.items():
        across, up = (min(int((math.log2(side) - low) / (high - low) * CELLS), CELLS - 1) for side in (width, height))
        cells[across, CELLS - 1 - up] += count
    most = max(cells.values())
    side = 100 / CELLS
    return SizeChart(
        cells=[Cell(x * side, y * side, 0.15 + 0.85 * math.sqrt(n / most)) for (x, y), n in sorted(cells.items())],
        side=side,
        ticks=_size_ticks(low, high),
    )


def _size_ticks(low: float, high: float) -> list[Tick]:
    """Powers of two, or half-way steps between them where these are fewer than two; at most seven."""
    octaves = range(math.ceil(low), math.floor(high) + 1)
    places: Sequence[float] = octaves if len(octaves) > 1 else [low, (low + high) / 2, high]
    every = -(-len(places) // 7)
    return [Tick(100 * (at - low) / (high - low), f"{2**at:,.0f}") for at in places[::every]]


def shorter_sides(sizes: Mapping[tuple[int, int], int], stored: int) -> Sides:
    """Of pictures of width × height pixels, at least one; ``stored``: the size of the stored ones."""
    sides: Counter[int] = Counter()
    for size, count in sizes.items():
        sides[min(size)] += count
    lengths = sorted(sides)
    above = np.cumsum([sides[length] for length in reversed(lengths)])
    median = lengths[-1 - int(np.searchsorted(2 * above, above[-1]))]
    return Sides(lengths[0], median, lengths[-1], sum(n for length, n in sides.items() if length < stored))


def class_bars(classes: Mapping[str, int], held_out: Mapping[str, int]) -> Bars:
    """``classes``: kept pictures by class, at least one; ``held_out``: those of them that training never sees."""
    ordered = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
    counts = [count for _, count in ordered]

    def bar(name: str, count: int) -> Bar:
        apart = held_out.get(name, 0)
        return Bar(name, count, 100 * (count - apart) / counts[0], 100 * apart / counts[0])

    return Bars(
        shown=[bar(*pair) for pair in ordered[:BARS]],
        rest=len(ordered[BARS:]),
        rest_count=sum(counts[BARS:]),
        largest=counts[0],
        median=counts[(len(counts) - 1) // 2],
        smallest=counts[-1],
        untrained=sum(count == held_out.get(name, 0) for name, count in ordered),
        unheld=sum(not held_out.get(name, 0) for name in classes),
    )
