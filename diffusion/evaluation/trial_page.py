"""A trial as one HTML page that needs nothing but itself: the verdict, and what there is to be seen for and against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffusion.evaluation.drift import Drift, Shift
from diffusion.evaluation.duplicates import Duplicates
from diffusion.evaluation.estimate import Interval
from diffusion.evaluation.gate import Decision, Headline
from diffusion.evaluation.held_out_loss import HeldOutLoss
from diffusion.evaluation.memorisation import Memorisation
from diffusion.evaluation.pages import between, counted, render, signed, with_error
from diffusion.evaluation.per_class import ClassScores, PerClass
from diffusion.evaluation.trial_charts import lead_chart, losses_chart
from diffusion.files import write_bytes
from diffusion.grids import above, grid, png_bytes

MEMBERS = 4
"""Pictures shown of each group of duplicates."""
CLASSES_SHOWN = 8
"""Classes in the table of the worst ones."""
DEVIATIONS = 1.959964
"""Standard errors to either side that make an interval of 95 %."""


class Bounded(Protocol):
    """A figure, and where the true one lies."""

    @property
    def value(self) -> float:
        """What was measured."""

    @property
    def interval(self) -> Interval:
        """At 95 %."""


@dataclass(frozen=True)
class Side:
    """One of the models; what is None or empty was not measured, and is not shown."""

    name: str
    """Such as ``version 3``."""
    drawn: Tensor
    """The first pictures that it drew, (N, C, H, W) uint8: of equal numbers, from equal noise, for both sides."""
    figures: Mapping[str, Bounded] = field(default_factory=dict)
    """Distances and shares by name, such as kid_efflite0."""
    memorisation: Memorisation | None = None
    duplicates: Duplicates | None = None
    drift: Drift | None = None
    per_class: PerClass | None = None
    held_out_loss: HeldOutLoss | None = None
    likelihood: Literal["bound", "exact"] | None = None
    """Whether its bits per dimension are at most so many, or just so many; None: it gives none."""


@dataclass(frozen=True)
class Docket:
    """All that the page shows of a trial."""

    model: str
    """Name of the registered model."""
    dataset: str
    """Name of the data set."""
    decision: Decision
    challenger: Side
    champion: Side | None
    """None: there was none."""
    real: Tensor
    """Held-out pictures, (N, C, H, W) uint8."""
    samples: int
    """Pictures that each side drew."""
    reference: int
    """Held-out pictures that these were compared with."""
    floor: Mapping[str, float] = field(default_factory=dict)
    """What real pictures get in the place of drawn ones, by the names of the figures."""
    headline: Headline | None = None
    delta: float = 0.0
    """δ of the gate, as a share."""
    confidence: float = 0.95
    """c of the gate, one-sided."""
    nearest: tuple[Tensor, Tensor] | None = None
    """The challenger's pictures that lie nearest to training pictures, and these, (P, C, H, W) uint8 each, in the order
    of its ``memorisation.pairs``."""
    groups: Sequence[Tensor] = ()
    """The challenger's pictures that are duplicates of one another, (G, C, H, W) uint8 each, in the order of its
    ``duplicates.groups``."""
    classes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of the challenger's worst classes, by name: held-out pictures, and as many that it drew, (K, C, H, W) uint8."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """What both sides had in common, by name."""

    @property
    def sides(self) -> list[Side]:
        """The challenger, and the champion if there is one."""
        return [self.challenger] if self.champion is None else [self.challenger, self.champion]


@dataclass(frozen=True)
class Cell:
    """A figure as it is set, and below it where the true one lies; both may be empty."""

    value: str = ""
    interval: str = ""


def write_trial_page(path: Path, docket: Docket) -> str:
    """Write the page to ``path``, whole; returns its SHA-256."""
    sides = docket.sides
    page = render(
        "trial.html",
        docket=docket,
        sides=sides,
        sheets=[png_bytes(grid(side.drawn)) for side in sides],
        real=png_bytes(grid(docket.real)),
        lead=docket.headline and lead_chart(docket.headline, docket.delta, docket.confidence),
        figures=figure_rows(sides, docket.floor),
        copies=copies_rows(sides),
        nearest=nearest_pairs(docket.challenger.memorisation, docket.nearest),
        doubles=doubles_rows(sides),
        groups=groups(docket.challenger.duplicates, docket.groups),
        pictured=[(name, png_bytes(above(*pictures))) for name, pictures in docket.classes.items() if len(pictures[0])],
        classes=class_rows(docket.challenger.per_class, docket.champion.per_class if docket.champion else None),
        losses=losses_chart({side.name: side.held_out_loss for side in sides if side.held_out_loss}),
        bits=bits_row(sides),
        drifts=drift_rows([side.drift for side in sides]),
    )
    return write_bytes(path, page)


def figure_rows(sides: Sequence[Side], floor: Mapping[str, float]) -> list[tuple[str, list[Cell], str]]:
    """Per figure its name, a cell for each side, and the floor."""
    names = list(dict.fromkeys(name for side in sides for name in side.figures))
    return [
        (
            name,
            [_bounded(side.figures.get(name)) for side in sides],
            signed(floor[name]) if name in floor else "",
        )
        for name in names
    ]


def copies_rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Per side its name, the share of copies of training pictures with its interval, what chance makes, and p."""
    return [
        (
            side.name,
            [
                f"{found.copies:,} of {found.drawn:,}",
                f"{found.share:.2%}",
                f"{found.share_low:.2%} … {found.share_high:.2%}",
                f"{found.expected:.2%}",
                probability(found.p_value),
            ],
        )
        for side in sides
        if (found := side.memorisation) is not None
    ]


def nearest_pairs(
    found: Memorisation | None, pictures: tuple[Tensor, Tensor] | None
) -> list[tuple[int, str, bool, bytes]]:
    """Of each drawn picture and the training picture it is nearest to: number, how near, if a copy, and both as PNG."""
    if found is None or pictures is None:
        return []
    return [
        (
            pair.drawn,
            f"{pair.space}: {pair.relative:.2f}",
            pair.is_copy,
            png_bytes(grid(torch.stack([drawn, training]), columns=2)),
        )
        for pair, drawn, training in zip(found.pairs, *pictures, strict=True)
    ]


def doubles_rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The same of pictures that are drawn again and again; last, the size of the largest group."""
    return [
        (
            side.name,
            [
                f"{found.duplicates:,} of {found.pictures:,}",
                f"{found.share:.2%}",
                f"{found.share_low:.2%} … {found.share_high:.2%}",
                f"{found.expected:.2%}",
                probability(found.p_value),
                f"{found.largest:,}" if found.largest else "none",
            ],
        )
        for side in sides
        if (found := side.duplicates) is not None
    ]


def groups(found: Duplicates | None, pictures: Sequence[Tensor]) -> list[tuple[str, bytes]]:
    """Of each group of duplicates the numbers of the first of them, and these as PNG."""
    if found is None:
        return []
    return [
        (
            "no. " + ", ".join(map(str, group.members[:MEMBERS])) + (" …" if group.size > MEMBERS else ""),
            png_bytes(grid(some[:MEMBERS], columns=MEMBERS)),
        )
        for group, some in zip(found.groups, pictures, strict=True)
    ]


def class_rows(challenger: PerClass | None, champion: PerClass | None) -> list[tuple[ClassScores, str, str, Cell, str]]:
    """The challenger's classes, the worst first.

    Of each its scores, the KID of either side, and how often what it draws is taken for that class, and the champion's.
    """
    if challenger is None:
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
        for each in challenger.worst_first[:CLASSES_SHOWN]
    ]


def bits_row(sides: Sequence[Side]) -> list[tuple[str, str]]:
    """Per side that has them, bits per dimension of held-out pictures."""
    return [
        (
            side.name,
            ("at most " if side.likelihood == "bound" else "")
            + f"{with_error(found.bits_per_dim, found.bits_per_dim_se)} on {counted(found.pictures, 'picture')}",
        )
        for side in sides
        if (found := side.held_out_loss) is not None
        and found.bits_per_dim is not None
        and found.bits_per_dim_se is not None
    ]


def drift_rows(drifts: Sequence[Drift | None]) -> list[tuple[str, str, list[Cell]]]:
    """Per figure of how pictures look its name, what real ones have, and how far each side is from that."""
    first = next((each for each in drifts if each is not None), None)
    if first is None:
        return []
    return [
        (
            name.replace("_", "–"),
            f"{shift.real:.3f}",
            [_shifted(each.shifts[name]) if each is not None else Cell() for each in drifts],
        )
        for name, shift in first.shifts.items()
    ]


def probability(p: float) -> str:
    """A p-value, never in powers of ten."""
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def _shifted(shift: Shift) -> Cell:
    """In units of the real spread, or of the figure itself if real pictures do not differ in it."""
    unit = shift.real_spread or 1.0
    reach = DEVIATIONS * shift.standard_error / unit
    middle = shift.difference / unit
    interval = between(Interval(low=middle - reach, high=middle + reach, confidence=0.95))
    return Cell(f"{middle:+.3f}".replace("-", "−"), interval)


def _bounded(figure: Bounded | None) -> Cell:
    return Cell() if figure is None else Cell(signed(figure.value), between(figure.interval))
