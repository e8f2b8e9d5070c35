"""HTML report on the comparison of a candidate with the champion, self-contained: the verdict and what supports it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import make_grid, make_paired_grid, png_bytes
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids
from diffusion.evaluation.model_metrics import load_model_metrics
from diffusion.evaluation.reports.charts import held_out_loss_chart, lead_chart
from diffusion.evaluation.reports.html import (
    Cell,
    Sections,
    format_signed,
    make_sheet,
    metric_cell,
    render,
    render_page,
)
from diffusion.evaluation.results import Evaluation, ModelEvaluation
from diffusion.families.config import FAMILIES

COMPARISON_PAGE = "champion_comparison.html"
"""The report, beside ``champion_comparison.json``."""
MEMBERS_SHOWN = 4
"""Images shown of each group of duplicates."""
VERDICT_FIGURES = ("kid", "precision", "recall", "coverage")
"""Metrics beside the verdict in the report of an evaluation."""
BEGIN, END = b"<!-- verdict -->", b"<!-- /verdict -->"
"""What stands around the verdict there."""
CLASSES_SHOWN = 8
"""Classes in the table of the worst ones."""


@dataclass(frozen=True)
class ComparisonPage:
    """What the report shows."""

    comparison: ChampionComparison
    grids: SampleGrids
    model: str
    dataset: str
    candidate: str
    champion: str | None = None
    """Names of the two, such as ``version 3``; None without a champion."""

    @property
    def sides(self) -> dict[str, ModelEvaluation]:
        """Return the evaluation of each by its name."""
        comparison = self.comparison
        pairs = (self.candidate, comparison.candidate), (self.champion, comparison.champion)
        return {name: side for name, side in pairs if name is not None and side is not None}

    def write(self, path: Path) -> str:
        """Write the report to ``path``, whole; returns its SHA-256."""
        content = {"sides": self.sides, "champion": self.champion if self.champion in self.sides else None}
        return write_bytes(path, render_page("champion_comparison", SECTIONS, self, **content))


def _images(page: ComparisonPage) -> dict[str, object]:
    grids, sheets = page.grids, []
    for name, images, captions in zip(page.sides, (grids.candidate, grids.champion), grids.captions, strict=False):
        assert images is not None
        sheets.append(make_sheet(name, f"the first {len(images)}, not selected", images, captions))
    note = "Images in the same place began as the same noise: both sides generated the same numbers of one seed."
    real = png_bytes(make_grid(grids.real))
    return {"heading": "Side by side", "sheets": sheets, "real": real, "images_note": sheets[1:] and note}


def _metrics(page: ComparisonPage) -> dict[str, object] | None:
    comparison, headline, gate = page.comparison, page.comparison.compared.headline, page.comparison.gate
    lead = headline and lead_chart(headline, gate.delta, comparison.confidence, gate.confidence)
    metrics = dict.fromkeys(name for side in page.sides.values() for name in side.estimates)
    return {"lead": lead, "metrics": metrics} if metrics or lead else None


def _agreement(page: ComparisonPage) -> dict[str, object] | None:
    agreements = {name: side.text_image_agreement for name, side in page.sides.items() if side.text_image_agreement}
    return {"agreements": agreements} if agreements else None


def _copies(page: ComparisonPage) -> dict[str, object]:
    """Show the nearest pairs of generated and training images."""
    grids = page.grids
    sides = zip(
        page.comparison.candidate.memorization.pairs, grids.nearest_generated, grids.nearest_training, strict=True
    )
    return {"nearest": [(pair, png_bytes(make_grid(images, columns=2))) for pair, *images in sides]}


def _duplicates(page: ComparisonPage) -> dict[str, object]:
    groups = zip(page.comparison.candidate.duplicates.groups, page.grids.duplicates, strict=True)
    sheets = [(group, png_bytes(make_grid(images[:MEMBERS_SHOWN], columns=MEMBERS_SHOWN))) for group, images in groups]
    return {"groups": sheets, "members_shown": MEMBERS_SHOWN}


def _shapes(page: ComparisonPage) -> dict[str, object] | None:
    candidate, *others = [side.per_shape.shapes if side.per_shape else [] for side in page.sides.values()]
    return {"shapes": candidate, "champion_shapes": others[0] if others else []} if candidate else None


def _classes(page: ComparisonPage) -> dict[str, object] | None:
    """Show the worst classes; None for models without classes."""
    if page.comparison.candidate.per_class is None:
        return None
    samples = [
        (name, png_bytes(make_paired_grid(*images))) for name, images in page.grids.classes.items() if len(images[0])
    ]
    return {"class_samples": samples, "classes_shown": CLASSES_SHOWN}


def _others(page: ComparisonPage) -> dict[str, object] | None:
    """Show the figures of metrics of models that other packages add."""
    sides = [side.metrics() for side in page.sides.values()]
    figures = [figure for metric in load_model_metrics().values() for figure in metric.figures]
    return {"others": [(each, [side.get(each.name) for side in sides]) for each in figures]} if figures else None


def _held_out(page: ComparisonPage) -> dict[str, object] | None:
    """Show losses by noise level, and bits per dimension; None if no model has either."""
    losses = {name: side.held_out_loss for name, side in page.sides.items()}
    loss_chart = held_out_loss_chart(losses)
    if loss_chart is None and all(loss.bits_per_dim is None for loss in losses.values()):
        return None
    return {"losses": loss_chart, "families": FAMILIES}


SECTIONS: Sections[ComparisonPage] = {
    "gate": lambda page: {},
    "images": _images,
    "metrics": _metrics,
    "agreement": _agreement,
    "copies": _copies,
    "duplicates": _duplicates,
    "shapes": _shapes,
    "classes": _classes,
    "held_out": _held_out,
    "appearance": lambda page: {},
    "others": _others,
    "conditions": lambda page: {},
}
"""Sections in order, each with a template in ``templates/champion_comparison``, or in ``templates``."""


def write_verdict(
    path: Path,
    evaluation: Evaluation,
    comparison: ChampionComparison | None,
    verdict: Literal["promote", "hold", "reject"],
    title: str,
    reason: str,
) -> None:
    """Write the gate's ``verdict`` above the report at ``path`` on ``evaluation``, in the words ``title``: ``reason``.

    It replaces one that stands there. Its figures come from the ``comparison``, if there was one.
    """
    figures = []
    if comparison is not None and comparison.compared.basis == "generated":
        sides, extractor = (comparison.candidate, comparison.real_baseline), comparison.candidate.scores.extractor
        for name in VERDICT_FIGURES:
            cells = [
                metric_cell(side.estimates[f"{name}_{extractor}"])
                if f"{name}_{extractor}" in side.estimates
                else Cell(format_signed(side.scores.get_metric(name)))
                for side in sides
            ]
            figures.append((name, *cells))
    block = render(
        "verdict.html",
        verdict=verdict,
        title=title,
        reason=reason,
        comparison=comparison,
        figures=figures,
        unguided=evaluation.guidance is not None and evaluation.sampling.is_guided,
        page=COMPARISON_PAGE,
    )
    before, _, rest = path.read_bytes().partition(BEGIN)
    write_bytes(path, before + BEGIN + block + END + rest.partition(END)[2])
