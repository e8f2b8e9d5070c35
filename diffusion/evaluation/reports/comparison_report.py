"""HTML report on the comparison of a candidate with the champion, self-contained: the verdict and what supports it."""

from pathlib import Path
from typing import Literal

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import make_captioned_grid, make_grid, make_paired_grid, png_bytes
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids
from diffusion.evaluation.estimate import DEVIATIONS, Interval
from diffusion.evaluation.metrics.pixel_metrics import AppearanceShift
from diffusion.evaluation.reports.charts import held_out_loss_chart, lead_chart
from diffusion.evaluation.reports.html import Cell, caption_images, format_interval, format_signed, metric_cell, render
from diffusion.evaluation.results import Evaluation
from diffusion.families.config import FAMILIES

PAGE = "champion_comparison.html"
"""The report, beside ``champion_comparison.json``."""
MEMBERS_SHOWN = 4
"""Images shown of each group of duplicates."""
VERDICT_FIGURES = ("kid", "precision", "recall", "coverage")
"""Metrics beside the verdict in the report of an evaluation."""
BEGIN, END = b"<!-- verdict -->", b"<!-- /verdict -->"
"""What stands around the verdict there."""
CLASSES_SHOWN = 8
"""Classes in the table of the worst ones."""


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
    copies, duplicates = comparison.candidate.memorization.pairs, comparison.candidate.duplicates.groups
    headline = comparison.compared.headline
    page = render(
        PAGE,
        comparison=comparison,
        model=model,
        dataset=dataset,
        candidate=candidate,
        champion=champion if champion in sides else None,
        sides=sides,
        sheets={
            name: (
                len(images),
                png_bytes(make_captioned_grid(images, captions) if captions else make_grid(images)),
                caption_images(images, captions),
            )
            for (name, images), captions in zip(sheets.items(), grids.captions, strict=False)
        },
        real=png_bytes(make_grid(grids.real)),
        lead=headline and lead_chart(headline, comparison.gate.delta, comparison.confidence),
        metrics=dict.fromkeys(name for side in sides.values() for name in side.estimates),
        agreements={
            name: side.text_image_agreement for name, side in sides.items() if side.text_image_agreement is not None
        },
        nearest=[
            (pair, png_bytes(make_grid(images, columns=2)))
            for pair, *images in zip(copies, grids.nearest_generated, grids.nearest_training, strict=True)
        ],
        groups=[
            (group, png_bytes(make_grid(images[:MEMBERS_SHOWN], columns=MEMBERS_SHOWN)))
            for group, images in zip(duplicates, grids.duplicates, strict=True)
        ],
        members_shown=MEMBERS_SHOWN,
        class_samples=[
            (name, png_bytes(make_paired_grid(*images))) for name, images in grids.classes.items() if len(images[0])
        ],
        classes_shown=CLASSES_SHOWN,
        losses=held_out_loss_chart({name: side.held_out_loss for name, side in sides.items()}),
        families=FAMILIES,
        metric_cell=metric_cell,
        shift_cell=shift_cell,
        probability=probability,
    )
    return write_bytes(path, page)


def write_verdict(
    path: Path,
    evaluation: Evaluation,
    comparison: ChampionComparison | None,
    verdict: Literal["promote", "hold", "reject"],
    title: str,
    reason: str,
) -> None:
    """Write the gate's ``verdict`` above the report at ``path`` on ``evaluation``, in the words ``title``: ``reason``.

    It replaces one that stands there. Its figures are those of the ``comparison``, if there was one.
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
        page=PAGE,
    )
    before, _, rest = path.read_bytes().partition(BEGIN)
    write_bytes(path, before + BEGIN + block + END + rest.partition(END)[2])


def probability(p: float) -> str:
    """Format a p-value, never in powers of ten."""
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def shift_cell(shift: AppearanceShift) -> Cell:
    """Return the cell of a shift, in units of the real spread, or of the property if that is 0."""
    unit = shift.real_spread or 1.0
    reach = DEVIATIONS * shift.standard_error / unit
    middle = shift.difference / unit
    interval = format_interval(Interval(low=middle - reach, high=middle + reach, confidence=0.95))
    return Cell(f"{middle:+.3f}".replace("-", "−"), interval)
