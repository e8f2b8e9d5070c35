"""Charts of the HTML reports, each rendered for a light and a dark page."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from diffusion.common.image_grids import figure_png
from diffusion.evaluation.gate import Headline
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation


@dataclass(frozen=True)
class Paper:
    """Colours of a chart."""

    background: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]


LIGHT = Paper("#ffffff", "#1c1f23", "#6b7280", "#e5e7eb", ("#2563eb", "#c2410c", "#0f766e", "#7c3aed"))
DARK = Paper("#191c20", "#e6e8eb", "#9aa3ad", "#30353b", ("#82aaff", "#fb9a5b", "#4fd1c0", "#c4a5ff"))


@dataclass(frozen=True)
class Chart:
    """A chart as PNG files."""

    title: str
    light: bytes
    dark: bytes


OLDER, NEWER = ("precision", "recall"), ("density", "coverage")
Draw = Callable[[Axes, Paper], None]
Points = Sequence[tuple[float, float]]
"""A curve, such as a metric against images seen."""
STYLES = ("-", "--", ":", "-.")
"""Line styles for lines of the same colour."""


def charts(evaluation: Evaluation, losses: Path | None) -> list[Chart]:
    """Plot scores against images seen, each with its real baseline; and the losses, if there is a CSV of them."""
    several: list[tuple[str, Draw]] = [
        ("KID, with 95 % intervals (lower is better)", lambda axes, paper: _kid(axes, paper, evaluation)),
        ("Fréchet distance (lower is better)", lambda axes, paper: _fd(axes, paper, evaluation)),
        ("Precision and recall (higher is better)", lambda axes, paper: _fractions(axes, paper, evaluation, OLDER)),
        ("Density and coverage (higher is better)", lambda axes, paper: _fractions(axes, paper, evaluation, NEWER)),
    ]
    if losses is not None and (columns := read_losses(losses)):
        several.append(("Loss on fixed images", lambda axes, paper: _losses(axes, paper, columns)))
    return [chart(title, over_training(draw)) for title, draw in several]


def chart(title: str, draw: Draw, size: tuple[float, float] = (5.6, 3.3)) -> Chart:
    """Render what ``draw`` draws, ``size`` inches wide and high, for light and for dark pages."""
    return Chart(title, _render(draw, LIGHT, size), _render(draw, DARK, size))


def read_losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the finite values of each column of a CSV as (images, value); empty columns are omitted."""
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    names = [name for name in (rows[0] if rows else {}) if name != "images"]
    columns = {name: [(row["images"], row[name]) for row in rows if math.isfinite(row[name])] for name in names}
    return {name: points for name, points in columns.items() if points}


def _render(draw: Draw, paper: Paper, size: tuple[float, float]) -> bytes:
    figure = Figure(figsize=size, layout="constrained", facecolor=paper.background)
    axes = figure.subplots()
    axes.set_facecolor(paper.background)
    draw(axes, paper)
    axes.tick_params(colors=paper.muted, labelsize=10, length=0)
    axes.xaxis.label.set(color=paper.muted, fontsize=10)
    axes.yaxis.label.set(color=paper.muted, fontsize=10)
    axes.grid(axis="y", color=paper.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(paper.rule)
    return figure_png(figure)


def over_training(draw: Draw) -> Draw:
    """Wrap ``draw`` with an axis of images seen."""

    def draw_over_images(axes: Axes, paper: Paper) -> None:
        draw(axes, paper)
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: _short(images)))

    return draw_over_images


def curves(by_name: Mapping[str, Points]) -> Draw:
    """Draw a line for each of ``by_name``."""

    def draw(axes: Axes, paper: Paper) -> None:
        for number, (name, points) in enumerate(by_name.items()):
            colour, style = paper.series[number % len(paper.series)], STYLES[number // len(paper.series) % len(STYLES)]
            marker = "o" if len(points) <= 12 else ""
            xs, ys = _transposed(points)
            axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.8, label=name)
        legend(axes, paper)

    return draw


def _kid(axes: Axes, paper: Paper, evaluation: Evaluation) -> None:
    baseline, scores = evaluation.real_baseline.scores, [each.scores for each in evaluation.checkpoints]
    images = [each.images for each in evaluation.checkpoints]
    axes.axhspan(
        baseline.kid - 1.96 * baseline.kid_se,
        baseline.kid + 1.96 * baseline.kid_se,
        color=paper.muted,
        alpha=0.18,
        lw=0,
    )
    _baseline_line(axes, paper, baseline.kid)
    errors = [1.96 * each.kid_se for each in scores]
    kids = [each.kid for each in scores]
    axes.errorbar(images, kids, errors, color=paper.series[0], marker="o", markersize=5, linewidth=1.8, capsize=3)
    if evaluation.preliminary:
        _preliminary(axes, paper, evaluation.preliminary)
    best = evaluation.best
    axes.plot(best.images, best.scores.kid, "o", markersize=11, mfc="none", mec=paper.series[0], mew=1.5)


def _preliminary(axes: Axes, paper: Paper, evaluated: Sequence[CheckpointEvaluation]) -> None:
    """Draw scores of eliminated checkpoints, measured on fewer images, as points off the curve."""
    images, kids = [each.images for each in evaluated], [each.scores.kid for each in evaluated]
    errors = [1.96 * each.scores.kid_se for each in evaluated]
    label = "not evaluated in full"
    axes.errorbar(images, kids, errors, color=paper.muted, fmt="o", mfc="none", markersize=5, linewidth=1, label=label)
    legend(axes, paper)


def _fd(axes: Axes, paper: Paper, evaluation: Evaluation) -> None:
    _baseline_line(axes, paper, evaluation.real_baseline.scores.fd)
    points = [(each.images, each.scores.fd) for each in evaluation.checkpoints]
    axes.plot(*_transposed(points), color=paper.series[0], marker="o", markersize=5, linewidth=1.8)
    axes.set_ylim(bottom=0)


def _fractions(axes: Axes, paper: Paper, evaluation: Evaluation, names: Sequence[str]) -> None:
    for name, colour in zip(names, paper.series, strict=False):
        points = [(each.images, getattr(each.scores, name)) for each in evaluation.checkpoints]
        axes.plot(*_transposed(points), color=colour, marker="o", markersize=5, linewidth=1.8, label=name)
        axes.axhline(getattr(evaluation.real_baseline.scores, name), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(1.02, axes.get_ylim()[1]))
    axes.plot([], [], color=paper.muted, linewidth=1.2, linestyle=(0, (4, 3)), label="real baselines")
    legend(axes, paper)


def _losses(axes: Axes, paper: Paper, columns: dict[str, list[tuple[float, float]]]) -> None:
    for number, (name, points) in enumerate(columns.items()):
        colour = paper.series[number % len(paper.series)]
        axes.plot(*_transposed(points), color=colour, linewidth=1.8, label=name.replace("_", " "))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    legend(axes, paper)


def _baseline_line(axes: Axes, paper: Paper, value: float) -> None:
    axes.axhline(value, color=paper.muted, linewidth=1.2, linestyle=(0, (4, 3)), label="real baseline")
    legend(axes, paper)


def legend(axes: Axes, paper: Paper) -> None:
    """Draw the legend, with text in the colour of the ink."""
    axes.legend(frameon=False, fontsize=10, labelcolor=paper.ink)


def _transposed(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(images: float) -> str:
    if images >= 1e6:
        return f"{images / 1e6:g} M"
    return f"{images / 1e3:g} k" if images >= 1e3 else f"{images:g}"


def lead_chart(headline: Headline, delta: float, confidence: float) -> Chart:
    """Plot the interval of the candidate's lead beside 0 and the smallest lead that counts."""
    lead, smallest = headline.lead, headline.smallest(delta)
    reach = lead.reach(confidence)

    def draw(axes: Axes, paper: Paper) -> None:
        axes.axvline(0, color=paper.muted, linewidth=1.2, label="as good as the champion")
        style = (0, (4, 3))
        axes.axvline(smallest, color=paper.series[1], linewidth=1.4, linestyle=style, label="better by δ")
        axes.errorbar(
            [lead.value], [0], xerr=[reach], color=paper.series[0], marker="o", markersize=8, linewidth=2.4, capsize=6
        )
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.set_xlabel(f"how much better in {headline.name}")
        legend(axes, paper)

    return chart(f"The lead, and where it lies with confidence {confidence:g} to either side", draw, (7.4, 1.9))


def held_out_loss_chart(losses: Mapping[str, HeldOutLoss]) -> Chart | None:
    """Plot the loss on held-out images by noise level for each model; None if no model has any."""
    by_name = {name: found.levels for name, found in losses.items() if found.levels}
    if not by_name:
        return None

    def draw(axes: Axes, paper: Paper) -> None:
        for (name, levels), colour in zip(by_name.items(), paper.series, strict=False):
            sigmas = [math.sqrt(each.sigma_low * each.sigma_high) for each in levels]
            means, errors = [each.loss for each in levels], [1.96 * each.loss_se for each in levels]
            axes.errorbar(
                sigmas, means, errors, color=colour, marker="o", markersize=4, linewidth=1.6, capsize=2, label=name
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("noise level σ")
        legend(axes, paper)

    return chart("Loss on held-out images by noise level, with 95 % intervals (lower is better)", draw, (7.4, 3.3))
