"""HTML report on the comparison of a candidate with the champion, self-contained: the verdict and what supports it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import above, grid, png_bytes
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids
from diffusion.evaluation.estimate import DEVIATIONS, Interval
from diffusion.evaluation.metrics.copies import Duplicates, Memorization
from diffusion.evaluation.metrics.per_class import ClassScores, PerClass
from diffusion.evaluation.metrics.pixel_metrics import AppearanceShift
from diffusion.evaluation.reports.charts import held_out_loss_chart, lead_chart
from diffusion.evaluation.reports.html import Cell, between, counted, metric_cell, render, signed, with_error
from diffusion.evaluation.results import ModelEvaluation, RealBaseline
from diffusion.models.config import FAMILIES

PAGE = "champion_comparison.html"
"""The report, beside ``champion_comparison.json``."""
MEMBERS_SHOWN = 4
"""Images shown of each group of duplicates."""
CLASSES_SHOWN = 8
"""Classes in the table of the worst ones."""
Sides = Mapping[str, ModelEvaluation]
"""The candidate and, if there is one, the champion, by name."""


def write_comparison_report(
    path: Path,
    comparison: ChampionComparison,
    grids: SampleGrids,
    model: str,
    dataset: str,
    candidate: str,
    champion: str | None = None,
) -> str:
    """Write the report to ``path``, whole; returns its SHA-256.

    Args:
        path: The file.
        comparison: The result of ``compare_with_champion``.
        grids: The images that belong to it.
        model: Name of the registered model.
        dataset: Name of the data set.
        candidate: Name of the candidate, such as ``version 3``.
        champion: Name of the champion; None if there is none.
    """
    sides, sheets = {candidate: comparison.candidate}, {candidate: grids.candidate}
    if champion is not None and comparison.champion is not None and grids.champion is not None:
        sides[champion], sheets[champion] = comparison.champion, grids.champion
    first, conditions, headline = comparison.candidate, comparison.conditions, comparison.compared.headline
    losses = {name: side.held_out_loss for name, side in sides.items()}
    page = render(
        "champion_comparison.html",
        comparison=comparison,
        model=model,
        dataset=dataset,
        candidate=candidate,
        champion=champion if champion in sides else None,
        sides=list(sides),
        sheets={name: (len(images), png_bytes(grid(images))) for name, images in sheets.items()},
        real=png_bytes(grid(grids.real)),
        lead=headline and lead_chart(headline, comparison.gate.delta, comparison.gate.confidence),
        metrics=metric_rows(sides, comparison.real_baseline),
        copies=copies_rows(sides),
        nearest=nearest_pairs(first.memorization, grids),
        duplicates=duplicates_rows(sides),
        groups=duplicate_groups(first.duplicates, grids),
        class_samples=[(name, png_bytes(above(*images))) for name, images in grids.classes.items() if len(images[0])],
        classes=class_rows(first.per_class, comparison.champion.per_class if comparison.champion else None),
        losses=held_out_loss_chart(losses),
        bits=bits_rows(sides),
        drifts=drift_rows(sides),
        conditions={
            "data set version": conditions.content_digest[:12],
            "features": f"{conditions.extractor}, {conditions.preprocessing}",
            "seed": str(conditions.evaluation.seed),
            "sampler": f"{conditions.sampling.sampler}, {conditions.sampling.steps} steps",
            "key": comparison.key,
        },
    )
    return write_bytes(path, page)


def metric_rows(sides: Sides, real_baseline: RealBaseline) -> list[tuple[str, list[Cell], str]]:
    """Return name, cell of each side, and real baseline of each metric that has an interval."""
    baseline = real_baseline.estimates
    return [
        (
            name,
            [metric_cell(side.estimates.get(name)) for side in sides.values()],
            signed(baseline[name].value) if name in baseline else "",
        )
        for name in dict.fromkeys(name for side in sides.values() for name in side.estimates)
    ]


def copies_rows(sides: Sides) -> list[tuple[str, list[str]]]:
    """Return the copies of each side: count, share with its interval, share by chance, p-value."""
    return [
        (
            name,
            [
                f"{found.copies:,} of {found.generated:,}",
                f"{found.share:.2%}",
                f"{found.share_low:.2%} … {found.share_high:.2%}",
                f"{found.expected:.2%}",
                probability(found.p_value),
            ],
        )
        for name, found in ((name, side.memorization) for name, side in sides.items())
    ]


def nearest_pairs(found: Memorization, grids: SampleGrids) -> list[tuple[int, str, bool, bytes]]:
    """Return number, distance, whether it is a copy, and PNG of each generated image and its nearest training image."""
    return [
        (
            pair.generated,
            f"{pair.space}: {pair.relative:.2f}",
            pair.is_copy,
            png_bytes(grid(torch.stack([generated, training]), columns=2)),
        )
        for pair, generated, training in zip(found.pairs, grids.nearest_generated, grids.nearest_training, strict=True)
    ]


def duplicates_rows(sides: Sides) -> list[tuple[str, list[str]]]:
    """Return duplicates of each side: count, share with its interval, share of real images, p-value, largest group."""
    return [
        (
            name,
            [
                f"{found.duplicates:,} of {found.images:,}",
                f"{found.share:.2%}",
                f"{found.share_low:.2%} … {found.share_high:.2%}",
                f"{found.expected:.2%}",
                probability(found.p_value),
                f"{found.largest:,}" if found.largest else "none",
            ],
        )
        for name, found in ((name, side.duplicates) for name, side in sides.items())
    ]


def duplicate_groups(found: Duplicates, grids: SampleGrids) -> list[tuple[str, bytes]]:
    """Return image numbers and PNG of the first images of each group of duplicates."""
    return [
        (
            "no. " + ", ".join(map(str, group.members[:MEMBERS_SHOWN])) + (" …" if group.size > MEMBERS_SHOWN else ""),
            png_bytes(grid(images[:MEMBERS_SHOWN], columns=MEMBERS_SHOWN)),
        )
        for group, images in zip(found.groups, grids.duplicates, strict=True)
    ]


def class_rows(candidate: PerClass | None, champion: PerClass | None) -> list[tuple[ClassScores, str, str, Cell, str]]:
    """Return scores of the candidate's worst classes, KID of either side, and recognized images of each side."""
    if candidate is None:
        return []
    theirs = {each.name: each for each in champion.classes} if champion else {}
    return [
        (
            each,
            with_error(each.kid, each.kid_se).replace("-", "−"),
            with_error(other.kid, other.kid_se).replace("-", "−") if (other := theirs.get(each.name)) else "",
            Cell(f"{each.agreement:.1%}", f"{each.agreement_low:.1%} … {each.agreement_high:.1%}"),
            f"{other.agreement:.1%}" if other else "",
        )
        for each in candidate.worst_first[:CLASSES_SHOWN]
    ]


def bits_rows(sides: Sides) -> list[tuple[str, str]]:
    """Return bits per dimension of held-out images for each side that has them."""
    return [
        (
            name,
            ("at most " if FAMILIES[side.family].likelihood == "bound" else "")
            + f"{with_error(found.bits_per_dim, found.bits_per_dim_se)} on {counted(found.images, 'image')}",
        )
        for name, side in sides.items()
        if (found := side.held_out_loss).bits_per_dim is not None and found.bits_per_dim_se is not None
    ]


def drift_rows(sides: Sides) -> list[tuple[str, str, list[Cell]]]:
    """Return name, mean of real images, and difference of each side for each property of appearance."""
    drifts = [side.drift for side in sides.values()]
    return [
        (name.replace("_", "–"), f"{shift.real:.3f}", [_shift_cell(each.shifts[name]) for each in drifts])
        for name, shift in drifts[0].shifts.items()
    ]


def probability(p: float) -> str:
    """Format a p-value, never in powers of ten."""
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def _shift_cell(shift: AppearanceShift) -> Cell:
    """Return the cell of a shift, in units of the real spread, or of the property if that is 0."""
    unit = shift.real_spread or 1.0
    reach = DEVIATIONS * shift.standard_error / unit
    middle = shift.difference / unit
    interval = between(Interval(low=middle - reach, high=middle + reach, confidence=0.95))
    return Cell(f"{middle:+.3f}".replace("-", "−"), interval)
