"""HTML report on the comparison of a candidate with the champion, self-contained: the verdict and what supports it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import make_captioned_grid, make_grid, make_paired_grid, png_bytes
from diffusion.common.shapes import Images
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids
from diffusion.evaluation.reports.charts import held_out_loss_chart, lead_chart
from diffusion.evaluation.reports.html import (
    Cell,
    Sections,
    caption_images,
    format_signed,
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
    """What the sections of the report show."""

    comparison: ChampionComparison
    grids: SampleGrids
    model: str
    dataset: str
    candidate: str
    champion: str | None
    """Names of the two, such as ``version 3``; None without a champion."""
    sides: dict[str, ModelEvaluation]
    """Evaluation of each by its name."""
    sheets: dict[str, Images]
    """The first images of each by its name."""


def write_comparison_report(
    path: Path,
    comparison: ChampionComparison,
    grids: SampleGrids,
    model: str,
    dataset: str,
    candidate: str,
    champion: str | None = None,
) -> str:
    """Write the report on ``comparison`` to ``path``, whole; returns its SHA-256.

    ``candidate`` and ``champion`` are names, such as ``version 3``; without a champion None.
    """
    sides, sheets = {candidate: comparison.candidate}, {candidate: grids.candidate}
    if champion is not None and comparison.champion is not None and grids.champion is not None:
        sides[champion], sheets[champion] = comparison.champion, grids.champion
    shown_champion = champion if champion in sides else None
    page = ComparisonPage(comparison, grids, model, dataset, candidate, shown_champion, sides, sheets)
    return write_bytes(path, render_page("champion_comparison", SECTIONS, page))


def _samples(page: ComparisonPage) -> dict[str, object]:
    sheets = {}
    for (name, images), captions in zip(page.sheets.items(), page.grids.captions, strict=False):
        grid = make_captioned_grid(images, captions) if captions else make_grid(images)
        sheets[name] = len(images), png_bytes(grid), caption_images(images, captions)
    return {"sheets": sheets, "real": png_bytes(make_grid(page.grids.real))}


def _metrics(page: ComparisonPage) -> dict[str, object] | None:
    comparison, headline = page.comparison, page.comparison.compared.headline
    lead = headline and lead_chart(headline, comparison.gate.delta, comparison.confidence)
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


def _classes(page: ComparisonPage) -> dict[str, object] | None:
    """Show the worst classes; None for models without classes."""
    if page.comparison.candidate.per_class is None:
        return None
    samples = [
        (name, png_bytes(make_paired_grid(*images))) for name, images in page.grids.classes.items() if len(images[0])
    ]
    return {"class_samples": samples, "classes_shown": CLASSES_SHOWN}


def _held_out(page: ComparisonPage) -> dict[str, object] | None:
    """Show losses by noise level, and bits per dimension; None if no model has either."""
    losses = {name: side.held_out_loss for name, side in page.sides.items()}
    loss_chart = held_out_loss_chart(losses)
    if loss_chart is None and all(loss.bits_per_dim is None for loss in losses.values()):
        return None
    return {"losses": loss_chart, "families": FAMILIES}


SECTIONS: Sections[ComparisonPage] = {
    "gate": lambda page: {},
    "samples": _samples,
    "metrics": _metrics,
    "agreement": _agreement,
    "copies": _copies,
    "duplicates": _duplicates,
    "shapes": lambda page: {} if page.comparison.candidate.per_shape else None,
    "classes": _classes,
    "held_out": _held_out,
    "appearance": lambda page: {},
    "conditions": lambda page: {},
}
"""Sections in order, each with a template in ``templates/champion_comparison``."""


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
