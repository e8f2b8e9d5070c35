"""A comparison of families as one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from humanize import metric
from matplotlib.axes import Axes

from diffusion.evaluation.charts import Chart, Paper, chart
from diffusion.evaluation.comparison import Comparison, Entrant, Sheets
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.pages import between, count, plain, render, signed, with_error
from diffusion.evaluation.results import CONFIDENCE, Floor, Measured
from diffusion.files import write_bytes
from diffusion.grids import grid, png_bytes

PAGE = "comparison.html"
"""The page, beside ``comparison.json``."""
COLUMNS = 8
"""Pictures in a row."""
FIGURES = {
    "kid": ("KID", "lower is better; unbiased at any number of pictures"),
    "fd": ("Fréchet distance", "lower is better; grows as pictures get fewer"),
    "precision": ("precision", "share of drawn pictures among real ones"),
    "recall": ("recall", "share of real pictures among drawn ones"),
    "density": ("density", "how many real ones a drawn one lies among"),
    "coverage": ("coverage", "share of real pictures with a drawn one near"),
}
"""By name, its title and how to read it."""


@dataclass(frozen=True)
class Cell:
    """A figure as it is set, and below it where the true one lies; either may be empty."""

    value: str = ""
    interval: str = ""


def write_comparison_page(path: Path, comparison: Comparison, sheets: Sheets) -> str:
    """Write the page to ``path``, whole; returns its SHA-256."""
    page = render(
        "comparison.html",
        comparison=comparison,
        findings=findings(comparison),
        rows=figure_rows(comparison) + rows_of_each(comparison.entrants),
        chart=distances_chart(comparison),
        sheets={name: png_bytes(grid(drawn, COLUMNS)) for name, drawn in sheets.drawn.items()},
        real=png_bytes(grid(sheets.real, COLUMNS)),
    )
    return write_bytes(path, page)


def findings(comparison: Comparison) -> list[str]:
    """What the distances say, in words no stronger than their errors allow."""
    if not comparison.leads:
        return ["There are too few pictures to tell one from another."]
    said = []
    for lead in comparison.leads:
        distance = between(lead.difference.interval(CONFIDENCE))
        if lead.sure(CONFIDENCE):
            said.append(f"{lead.better} is nearer to real pictures than {lead.worse}: by {distance} in KID.")
        else:
            said.append(f"{lead.better} and {lead.worse} cannot be told apart: {distance} in KID lie between them.")
    named = comparison.headline.split("_")[0]
    return [words.replace("in KID", f"in {FIGURES[named][0]}") for words in said]


def figure_rows(comparison: Comparison) -> list[tuple[str, str, list[Cell]]]:
    """Per distance and share its title, how to read it, and a cell for each model and for real pictures."""
    sides: list[Entrant | Floor] = [*comparison.entrants, comparison.floor]
    return [
        (title, meaning, [_cell(name, side.scores, side.figures) for side in sides])
        for name, (title, meaning) in FIGURES.items()
    ]


def rows_of_each(entrants: Sequence[Entrant]) -> list[tuple[str, str, list[Cell]]]:
    """The same of what is to be said of models alone."""
    real = Cell()
    return [
        (
            "bits per dimension",
            "of held-out pictures, lower is better; after ≤ stands what it takes at most",
            [*(_bits(each) for each in entrants), real],
        ),
        (
            "drawn in a second",
            "pictures, on the machine that compared",
            [*(Cell(plain(each.pictures_per_second)) for each in entrants), real],
        ),
        ("work", "to draw a picture", [*(Cell(f"{plain(each.gflop)} GFLOP") for each in entrants), real]),
        ("parameters", "of the model", [*(Cell(metric(each.parameters, precision=3)) for each in entrants), real]),
        ("seen in training", "pictures", [*(Cell(count(each.images)) for each in entrants), real]),
    ]


def distances_chart(comparison: Comparison) -> Chart | None:
    """The leading distance of each with its interval, beside the floor; None: there are no intervals."""
    name = comparison.headline
    if not comparison.leads:
        return None

    def draw(axes: Axes, paper: Paper) -> None:
        floor = comparison.floor.figures[name].value
        axes.axvline(floor, color=paper.muted, linewidth=1.2)
        for row, each in enumerate(reversed(comparison.entrants)):
            found = each.figures[name]
            low, high = found.value - found.interval.low, found.interval.high - found.value
            axes.errorbar(
                [found.value], [row], xerr=[[low], [high]], color=paper.series[0], marker="o", linewidth=2, capsize=5
            )
        axes.set_yticks(range(len(comparison.entrants)), [each.name for each in reversed(comparison.entrants)])
        axes.set_xlabel(f"{name}; the line is what real pictures get")

    height = 0.9 + 0.4 * len(comparison.entrants)
    return chart("Distance to real pictures, with 95 % intervals (lower is better)", draw, (7.4, height))


def _cell(name: str, scores: Scores, figures: dict[str, Measured]) -> Cell:
    found = figures.get(f"{name}_{scores.extractor}")
    if found is not None:
        value = f"{found.value:.3f}" if name not in ("kid", "fd") else signed(found.value)
        return Cell(value, between(found.interval))
    value = getattr(scores, name)
    if name == "kid":
        return Cell(with_error(scores.kid, scores.kid_se))
    return Cell("" if value is None else signed(value))


def _bits(entrant: Entrant) -> Cell:
    loss = entrant.held_out_loss
    if loss.bits_per_dim is None or loss.bits_per_dim_se is None:
        return Cell("none")
    return Cell(
        ("≤ " if entrant.likelihood == "bound" else "") + with_error(loss.bits_per_dim, loss.bits_per_dim_se),
    )
