"""Trainings that differ in a few settings side by side, as one HTML page that needs nothing but itself."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from pydantic import JsonValue

from diffusion.evaluation.charts import Chart, Draw, Paper, chart, legend, over_training, read_losses
from diffusion.evaluation.pages import counted, plain, render, with_error
from diffusion.evaluation.report import interval_of
from diffusion.evaluation.results import Evaluation
from diffusion.files import write_bytes

STYLES = ("-", "--", ":", "-.")
"""Of lines whose colour another one has."""
LOSS = "held_out_loss_ema"
"""The column of losses that is shown: of what none of them learned from, by what becomes the model."""


@dataclass(frozen=True)
class Tried:
    """A training with its evaluation."""

    settings: Mapping[str, JsonValue]
    """In which it differs from the others, by dotted key."""
    evaluation: Evaluation
    losses: Path
    """A CSV of losses by images seen."""
    drawn: bytes
    """PNG of what its best checkpoint draws."""
    run_id: str
    output: str
    """Its folder."""

    @property
    def name(self) -> str:
        """Its settings, in short."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    settings: list[str]
    merit: str
    merit_interval: str
    fd: str
    fd_interval: str
    precision: str
    recall: str
    images: int
    behind: str
    """How surely the best one is better."""
    run_id: str


def ranked(tried: Sequence[Tried]) -> list[Tried]:
    """The best first, by the merit of the best checkpoint of each."""
    return sorted(tried, key=lambda each: -each.evaluation.best.merit.rank)


def write_sweep_page(path: Path, dataset: str, tried: Sequence[Tried]) -> str:
    """Write the page to ``path``; returns its SHA-256. Equal numbers draw equal pictures in all grids."""
    order = ranked(tried)
    best = order[0]
    page = render(
        "sweep.html",
        dataset=dataset,
        keys=list(best.settings),
        command=shlex.join(["darkroom", "retrain", "--dataset", dataset, *_words(best.settings)]),
        best=best,
        order=order,
        rows=[_row(each, best) for each in order],
        merit=best.evaluation.best.merit,
        finding=finding(order),
        charts=_charts(tried),
        conditions=best.evaluation.conditions,
        comparable=len({each.evaluation.eval_key for each in tried}) == 1,
    )
    return write_bytes(path, page)


def _words(settings: Mapping[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def finding(order: Sequence[Tried]) -> str:
    """What the figures say of the first of ``order``, no more strongly than their errors allow."""
    alike = [each for each in order[1:] if _deviations(each, order[0]) <= 2]
    if len(order) == 1:
        return "There is nothing to compare it with."
    if not alike:
        return "It is better than every other by more than two standard errors."
    return (
        f"{counted(len(alike), 'other')} cannot be told from it: within two standard errors. One seed each was tried."
    )


def _deviations(other: Tried, best: Tried) -> float:
    """By how many standard errors of the difference ``best`` is better."""
    ours, theirs = best.evaluation.best.merit, other.evaluation.best.merit
    error = math.hypot(ours.error, theirs.error)
    lead = ours.rank - theirs.rank
    return lead / error if error > 0 else math.inf * lead if lead else 0.0


def _row(each: Tried, best: Tried) -> Row:
    judged, figures = each.evaluation.best, each.evaluation.figures
    return Row(
        settings=[str(value) for value in each.settings.values()],
        merit=with_error(judged.merit.value, judged.merit.error),
        merit_interval=interval_of(figures, judged.merit.name),
        fd=plain(judged.scores.fd),
        fd_interval=interval_of(figures, "fd"),
        precision=f"{judged.scores.precision:.3f}",
        recall=f"{judged.scores.recall:.3f}",
        images=judged.images,
        behind="best" if each is best else f"{_deviations(each, best):.1f} errors behind",
        run_id=each.run_id,
    )


def _charts(tried: Sequence[Tried]) -> list[Chart]:
    """The merit of each checkpoint, and losses, against images seen: a line for each training."""
    merits = [[(each.images, each.merit.value) for each in one.evaluation.checkpoints] for one in tried]
    losses = [read_losses(one.losses).get(LOSS, []) if one.losses.is_file() else [] for one in tried]
    names = [one.name for one in tried]
    found = [chart(tried[0].evaluation.best.merit.name, over_training(_lines(names, merits)))]
    if any(losses):
        found.append(chart("Loss on held-out pictures", over_training(_lines(names, losses))))
    return found


def _lines(names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]]) -> Draw:
    def draw(axes: Axes, paper: Paper) -> None:
        for number, (name, points) in enumerate(zip(names, curves, strict=True)):
            colour, style = paper.series[number % len(paper.series)], STYLES[number // len(paper.series) % len(STYLES)]
            marker = "o" if len(points) <= 12 else ""
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.8, label=name)
        legend(axes, paper)

    return draw
