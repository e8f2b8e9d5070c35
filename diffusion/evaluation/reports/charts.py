"""Charts of the HTML reports, each rendered for a light and a dark page."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from diffusion.common.image_grids import figure_png
from diffusion.evaluation.gate_metrics import Headline
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss
from diffusion.evaluation.reports.html import format_signed
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


Draw = Callable[[Axes, Paper], None]
STYLES = ("-", "--", ":", "-.")
"""Line styles for lines of the same colour."""
DASHED = (0, (4, 3))


def charts(evaluation: Evaluation, losses: Path | None) -> list[Chart]:
    """Plot scores against images seen, each with its real baseline; and the losses, if there is a CSV of them.

    Scores that depend on the number of images have a chart where several checkpoints were evaluated in full.
    """
    draw_functions: dict[str, Draw] = {
        "KID, with 95 % intervals (lower is better)": partial(_draw_kid, evaluation=evaluation)
    }
    if len(evaluation.checkpoints) > 1:
        title = "Fréchet distance (lower is better)"
        draw_functions[title] = partial(_draw_scores, evaluation=evaluation, names=["fd"])
        for names in (("precision", "recall"), ("density", "coverage")):
            title = f"{' and '.join(names).capitalize()} (higher is better)"
            draw_functions[title] = partial(_draw_scores, evaluation=evaluation, names=names, top=1.02)
    if losses is not None and (columns := read_losses(losses)):
        by_name = {name.replace("_", " "): points for name, points in columns.items()}
        draw_functions["Loss on fixed images"] = plot_curves(by_name, logarithmic=True)
    return [chart(title, plot_over_training(draw)) for title, draw in draw_functions.items()]


def chart(title: str, draw: Draw, size: tuple[float, float] = (5.6, 3.3)) -> Chart:
    """Render what ``draw`` draws, ``size`` inches wide and high, for light and for dark pages."""
    pages = []
    for paper in (LIGHT, DARK):
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
        pages.append(figure_png(figure))
    return Chart(title, *pages)


def read_losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the finite values of each column of a CSV as (images, value); empty columns are omitted."""
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    names = [name for name in (rows[0] if rows else {}) if name != "images"]
    columns = {name: [(row["images"], row[name]) for row in rows if math.isfinite(row[name])] for name in names}
    return {name: points for name, points in columns.items() if points}


def plot_over_training(draw: Draw) -> Draw:
    """Wrap ``draw`` with an axis of images seen."""

    def draw_over_images(axes: Axes, paper: Paper) -> None:
        draw(axes, paper)
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())

    return draw_over_images


def plot_curves(by_name: Mapping[str, Sequence[tuple[float, float]]], logarithmic: bool = False) -> Draw:
    """Make the function that draws a line through the points of each of ``by_name``.

    ``logarithmic``: whether the vertical axis is.
    """

    def draw(axes: Axes, paper: Paper) -> None:
        for number, (name, points) in enumerate(by_name.items()):
            colour, style = paper.series[number % len(paper.series)], STYLES[number // len(paper.series) % len(STYLES)]
            marker = "o" if len(points) <= 12 else ""
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.8, label=name)
        if logarithmic:
            axes.set_yscale("log")
            label_decades(axes.yaxis, (1, 2, 5))
        legend(axes, paper)

    return draw


def label_decades(axis: Axis, multiples: Sequence[float]) -> None:
    """Label a logarithmic ``axis`` at these multiples of powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _draw_kid(axes: Axes, paper: Paper, evaluation: Evaluation) -> None:
    baseline, best = evaluation.real_baseline.scores, evaluation.best
    low, high = (baseline.kid + deviations * baseline.kid_se for deviations in (-1.96, 1.96))
    axes.axhspan(low, high, color=paper.muted, alpha=0.18, lw=0)
    axes.axhline(baseline.kid, color=paper.muted, linewidth=1.2, linestyle=DASHED, label="real-vs-real baseline")

    def plot(checkpoints: Sequence[CheckpointEvaluation], **style: Any) -> None:
        kids = [model.scores.kid for model in checkpoints]
        errors = [1.96 * model.scores.kid_se for model in checkpoints]
        axes.errorbar([model.images for model in checkpoints], kids, errors, markersize=5, **style)

    plot(evaluation.checkpoints, color=paper.series[0], fmt="o-", linewidth=1.8, capsize=3)
    if evaluation.preliminary:  # measured on fewer images, so points off the curve
        plot(evaluation.preliminary, color=paper.muted, fmt="o", mfc="none", linewidth=1, label="not evaluated in full")
    axes.plot(best.images, best.scores.kid, "o", markersize=11, mfc="none", mec=paper.series[0], mew=1.5)
    legend(axes, paper)


def _draw_scores(axes: Axes, paper: Paper, evaluation: Evaluation, names: Sequence[str], top: float = 0) -> None:
    """Draw the scores of these ``names`` from 0 to ``top`` or more, each with its real baseline."""
    for name, colour in zip(names, paper.series, strict=False):
        images, values = zip(
            *((model.images, model.scores.get_metric(name)) for model in evaluation.checkpoints), strict=True
        )
        axes.plot(images, values, color=colour, marker="o", markersize=5, linewidth=1.8, label=name)
        axes.axhline(evaluation.real_baseline.scores.get_metric(name), color=colour, linewidth=1.2, linestyle=DASHED)
    axes.set_ylim(0, max(top, axes.get_ylim()[1]))
    axes.plot([], [], color=paper.muted, linewidth=1.2, linestyle=DASHED, label="real-vs-real baseline")
    legend(axes, paper)


def legend(axes: Axes, paper: Paper) -> None:
    """Draw the legend, with text in the colour of the ink."""
    axes.legend(frameon=False, fontsize=10, labelcolor=paper.ink)


def lead_chart(headline: Headline, delta: float, promotion: float, confidence: float) -> Chart:
    """Plot the candidate's lead beside 0 and the smallest lead that counts, between the bounds of the gate's verdict.

    Each is one-sided: the lower one, which promotes, has the confidence ``promotion``, and the upper one, which holds
    or rejects, ``confidence``.
    """
    lead, smallest = headline.lead, headline.required_lead(delta)
    reach = [[lead.error_bound(promotion)], [lead.error_bound(confidence)]]
    low, high = (format_signed(bound) for bound in (lead.lower_bound(promotion), lead.upper_bound(confidence)))

    def draw(axes: Axes, paper: Paper) -> None:
        axes.axvline(0, color=paper.muted, linewidth=1.2, label="as good as the champion")
        axes.axvline(smallest, color=paper.series[1], linewidth=1.4, linestyle=DASHED, label="better by δ")
        axes.errorbar(
            [lead.value], [0], xerr=reach, color=paper.series[0], marker="o", markersize=8, linewidth=2.4, capsize=6
        )
        axes.set(ylim=(-1, 1), yticks=[], xlabel=f"how much better in {headline.name}")
        legend(axes, paper)

    bounds = f"at least {low} with confidence {promotion:.4g}, at most {high} with {confidence:g}"
    return chart(f"The lead: {bounds}", draw, (7.4, 1.9))


def held_out_loss_chart(losses: Mapping[str, HeldOutLoss]) -> Chart | None:
    """Plot the loss on held-out images by noise level for each model; None if no model has any."""
    if not (by_name := {name: loss.levels for name, loss in losses.items() if loss.levels}):
        return None

    def draw(axes: Axes, paper: Paper) -> None:
        for (name, levels), colour in zip(by_name.items(), paper.series, strict=False):
            sigmas = [math.sqrt(level.sigma_low * level.sigma_high) for level in levels]
            means, errors = [level.loss for level in levels], [1.96 * level.loss_se for level in levels]
            axes.errorbar(sigmas, means, errors, color=colour, fmt="o-", markersize=4, capsize=2, label=name)
        axes.set(xscale="log", ylim=(0, None), xlabel="noise level σ")
        label_decades(axes.xaxis, (1,))
        legend(axes, paper)

    return chart("Loss on held-out images by noise level, with 95 % intervals (lower is better)", draw, (7.4, 3.3))
