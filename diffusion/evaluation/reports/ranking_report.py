"""HTML report on a ranking of models, self-contained: a sweep's runs, or families after the same training."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from humanize import metric as si
from matplotlib.axes import Axes

from diffusion.common.escaping import pluralize
from diffusion.common.files import write_bytes
from diffusion.evaluation.metrics import load_figures
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement
from diffusion.evaluation.ranking import RankedModel, Ranking
from diffusion.evaluation.reports.charts import Chart, Paper, chart, plot_curves, plot_over_training, read_losses
from diffusion.evaluation.reports.evaluation_report import score_cell
from diffusion.evaluation.reports.html import (
    Cell,
    Sections,
    format_count,
    format_interval,
    format_plain,
    format_signed,
    format_with_error,
    render_page,
)
from diffusion.evaluation.results import Evaluation, RealBaseline

RANKING_PAGE = "comparison.html"
"""The report on families, beside ``comparison.json``."""
MAX_NAMED = 5
"""Largest number of models beside the best one that get a sentence each; more are summarized."""
COSTS = (
    ("bits per dimension", "of held-out images, lower is better; ≤ marks an upper bound"),
    ("images per second", "generated on the machine that compared"),
    ("work", "GFLOP to generate an image"),
    ("parameters", "of the model"),
    ("images seen", "in training"),
    ("run", "in MLflow"),
)
"""Title and explanation of each column on training, size and cost."""
Column = tuple[str, str, list[Cell]]
"""Title, explanation, and a cell for each model; metrics have one more for real images."""


@dataclass(frozen=True)
class RankingPage:
    """What the report shows."""

    ranking: Ranking
    images: Mapping[str, bytes]
    """A PNG of the first images of each model by name."""
    real: bytes
    """A PNG of held-out images."""
    charts: Sequence[Chart] = ()
    options: Sequence[str] = ()
    """Options of the command line that all models have in common, for the suggested command."""

    def write(self, path: Path) -> str:
        """Write the report to ``path``, whole; returns its SHA-256."""
        best, findings = self.ranking.models[0], describe_ranking(self.ranking)
        content = {"best": best, "keys": list(best.settings), "findings": findings}
        return write_bytes(path, render_page("ranking", SECTIONS, self, **content))


def _images(page: RankingPage) -> dict[str, object]:
    names = [model.name for model in page.ranking.models]
    note = f"the first of seed {page.ranking.conditions.evaluation.seed}, not selected"
    sheets = [{"title": name, "note": note, "png": page.images[name], "samples": []} for name in names]
    return {"heading": "Images", "sheets": sheets, "images_note": None}


def _command(page: RankingPage) -> dict[str, object] | None:
    """Suggest to train with the best settings, if models differ in settings."""
    settings = page.ranking.models[0].settings
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = ["darkroom", "retrain", "--dataset", page.ranking.dataset, *page.options, *words]
    return {"command": shlex.join(command)} if words else None


SECTIONS: Sections[RankingPage] = {
    "metrics": lambda page: {"columns": metric_columns(page.ranking), "overview": metrics_chart(page.ranking)},
    "costs": lambda page: {"columns": cost_columns(page.ranking.models)},
    "over_training": lambda page: {} if page.charts else None,
    "images": _images,
    "command": _command,
    "conditions": lambda page: {},
}
"""Sections in order, each with a template in ``templates/ranking``, or in ``templates``."""


def describe_ranking(ranking: Ranking) -> list[str]:
    """Describe the ranking in sentences no stronger than its errors allow."""
    best, figure = ranking.models[0].name, ranking.metric.split("_")[0]
    if len(ranking.models) == 1:
        return ["There is nothing to compare it with."]
    if not ranking.comparable and not ranking.leads:
        return ["They were not evaluated under equal conditions, so that their metrics do not compare."]
    if not ranking.leads:
        return ["There are too few images to tell one from another."]
    if len(ranking.leads) > MAX_NAMED:
        if not (ties := [lead for lead in ranking.leads if not lead.is_sure]):
            return ["It is better than every other, with 95 % confidence."]
        verb = "is" if len(ties) == 1 else "are"
        return [f"{pluralize(len(ties), 'other')} {verb} not distinguishable from the best, with 95 % confidence."]
    figures = load_figures()
    title = figures[figure].title if figure in figures else ranking.metric
    sentences = []
    for lead in ranking.leads:
        distance = f"{format_with_error(lead.difference.value, lead.difference.error)} in {title}"
        if lead.is_sure:
            sentences.append(f"{best} is better than {lead.worse}: by {distance}.")
        else:
            sentences.append(f"{lead.worse} is not distinguishable from the best, {best}: {distance} lie between them.")
    return sentences


def metric_columns(ranking: Ranking) -> list[Column]:
    """Return the columns of the ranking's metric, the distance to the best, and the other metrics."""
    models, leading = ranking.models, ranking.metric.removesuffix(f"_{ranking.conditions.extractor}")
    sides: list[RankedModel | RealBaseline] = [*models, ranking.real_baseline]
    columns = {
        name: (figure.title, figure.column_note, [score_cell(side.scores, name, side.estimates) for side in sides])
        for name, figure in load_figures().items()
        if figure.reading is not None and all(side.scores.find(name) is not None for side in sides)
    }
    values = [*(Cell(format_with_error(model.value, model.error)) for model in models), Cell()]
    metric_column = columns.pop(leading, (ranking.metric, "higher is better", values))
    leads = [lead.difference for lead in ranking.leads]
    distances = [
        Cell("best"),
        *(Cell(format_signed(lead.value), format_interval(lead.interval(ranking.confidence))) for lead in leads),
    ]
    distances += [Cell()] * (len(sides) - len(distances))
    meaning = f"difference in {metric_column[0]}; all intervals hold together"
    other_columns = [("behind the best", meaning, distances), *columns.values()]
    if any(model.text_image_agreement is not None for model in models):
        cells = [_agreement(model.text_image_agreement) for model in models]
        other_columns.append(("text-image agreement", "cosine of image and prompt, higher is better", [*cells, Cell()]))
    return [metric_column, *other_columns]


def _agreement(agreement: TextImageAgreement | str | None) -> Cell:
    if isinstance(agreement, TextImageAgreement):
        return Cell(f"{agreement.agreement.value:.3f}", format_interval(agreement.agreement.interval))
    return Cell("no captions" if agreement is None else "not measured", agreement or "")


def cost_columns(models: Sequence[RankedModel]) -> list[Column]:
    """Return the columns on training, size and cost that have anything in them."""
    cells = zip(*map(_costs, models), strict=True)
    return [(*title, list(map(Cell, texts))) for title, texts in zip(COSTS, cells, strict=True) if any(texts)]


def _costs(model: RankedModel) -> tuple[str, ...]:
    """Return the texts of the columns COSTS; empty if not measured."""
    bits, loss = "", model.held_out_loss
    if loss is not None:
        bits = "none"
        if loss.bits_per_dim is not None and loss.bits_per_dim_se is not None:
            bits = ("≤ " if model.likelihood == "bound" else "") + format_with_error(
                loss.bits_per_dim, loss.bits_per_dim_se
            )
    return (
        bits,
        "" if model.images_per_second is None else format_plain(model.images_per_second),
        "" if model.gflop is None else format_plain(model.gflop),
        "" if model.parameters is None else si(model.parameters, precision=3),
        format_count(model.images),
        model.run_id or "",
    )


def metrics_chart(ranking: Ranking) -> Chart | None:
    """Plot the ranking's metric of each model with its interval, beside the real baseline; None without intervals."""
    name, models = ranking.metric, list(reversed(ranking.models))
    if not ranking.leads:
        return None

    def draw(axes: Axes, paper: Paper) -> None:
        if (baseline := ranking.real_baseline.metrics().get(name)) is not None:
            axes.axvline(baseline, color=paper.muted, linewidth=1.2)
        for row, model in enumerate(models):
            reach = [[1.96 * model.error]] * 2
            if (estimate := model.estimates.get(name)) is not None:
                ends = model.value - estimate.interval.low, estimate.interval.high - model.value
                reach = [[max(end, 0)] for end in ends]
            axes.errorbar([model.value], [row], xerr=reach, color=paper.series[0], marker="o", linewidth=2, capsize=5)
        axes.set_yticks(range(len(models)), [model.name for model in models])
        axes.set_xlabel(name + ("; the line is the real-vs-real baseline" if baseline is not None else ""))

    direction = "higher" if ranking.higher_is_better else "lower"
    return chart(f"{name} with 95 % intervals ({direction} is better)", draw, (7.4, 0.9 + 0.4 * len(models)))


def training_charts(names: Sequence[str], evaluations: Sequence[Evaluation], losses: Sequence[Path]) -> list[Chart]:
    """Plot selection metrics of checkpoints, and held-out losses of CSV files, if there are any, for each run."""
    metrics = [[(model.images, model.selection_metric.value) for model in run.checkpoints] for run in evaluations]
    name = evaluations[0].best.selection_metric.name
    charts = [chart(name, plot_over_training(plot_curves(dict(zip(names, metrics, strict=True)))))]
    columns = [read_losses(path).get("held_out_loss_ema", []) if path.is_file() else [] for path in losses]
    if any(columns):
        charts.append(
            chart("Loss on held-out images", plot_over_training(plot_curves(dict(zip(names, columns, strict=True)))))
        )
    return charts
