"""A trial as its page shows it: of real pictures, some of them noisy or copied, measured by the parts that measure."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap import Figure, Replicates, replicates
from diffusion.evaluation.closest import closest
from diffusion.evaluation.drift import appearance, drift
from diffusion.evaluation.duplicates import duplicates
from diffusion.evaluation.estimate import Estimate, Interval
from diffusion.evaluation.evidence import distance_headline, recall_difference
from diffusion.evaluation.gate import Evidence, GateConfig, decide
from diffusion.evaluation.held_out_loss import HeldOutLoss, LevelLoss
from diffusion.evaluation.memorisation import Memorisation, memorisation
from diffusion.evaluation.per_class import Labelled, PerClass, per_class
from diffusion.evaluation.reader import fit
from diffusion.evaluation.thumbnails import NAME, moved, thumbnails
from diffusion.evaluation.trial_page import Docket, Side
from diffusion.likelihood import noise_levels
from tests.diffusion.degraded import with_copies, with_noise
from tests.diffusion.real_pictures import pictures

COUNT = 240
"""Pictures of each set; of training there are three times as many."""
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
TWICE = [20, 31, 42]
"""Pictures of the challenger that are one."""
GATE = GateConfig(memorised=None, cost=None)


@dataclass(frozen=True)
class Measured:
    """A figure with its interval."""

    value: float
    interval: Interval

    @classmethod
    def of(cls, estimate: Estimate) -> "Measured":
        return cls(estimate.value, estimate.interval(0.95))


def docket(with_champion: bool = True) -> Docket:
    """A noisy champion, and a challenger that draws real pictures and a few of those that it learned from."""
    sets, _ = _sets()
    drawn = {"version 3": sets["challenger"], "version 2": sets["champion"]} if with_champion else {}
    drawn = drawn or {"version 1": sets["challenger"]}
    points = [thumbnails(each) for each in (*drawn.values(), sets["floor"])]
    *found, floor = replicates(points, thumbnails(sets["held out"]), 20)
    sides = [_side(name, each, figures) for (name, each), figures in zip(drawn.items(), found, strict=True)]
    headline = distance_headline(*found, floor, NAME, GATE) if with_champion else None
    evidence = Evidence(
        judged="drawn",
        samples=COUNT,
        reference=COUNT,
        has_champion=with_champion,
        headline=headline,
        recall=recall_difference(*found) if with_champion else None,
    )
    copies, doubles = sides[0].memorisation, sides[0].duplicates
    assert copies is not None
    assert doubles is not None
    worst = sides[0].per_class
    assert worst is not None
    pairs = copies.pairs
    return Docket(
        model="clothes",
        dataset="fashion",
        decision=decide(evidence, GATE),
        challenger=sides[0],
        champion=sides[1] if with_champion else None,
        real=sets["held out"][:64],
        samples=COUNT,
        reference=COUNT,
        floor={f"{name}_{NAME}": each.value for name, each in floor.items()},
        headline=headline,
        delta=GATE.delta,
        confidence=GATE.confidence,
        groups=[sets["challenger"][group.members] for group in doubles.groups],
        classes=_pictured(worst),
        nearest=(sets["challenger"][[p.drawn for p in pairs]], sets["training"][[p.training for p in pairs]]),
        conditions={"seed": "1", "features": "thumbnails of 8×8 pixels", "key": "e" * 64},
    )


def _side(name: str, drawn: Tensor, figures: dict[Figure, Replicates]) -> Side:
    sets, _ = _sets()
    return Side(
        name=name,
        drawn=drawn[:64],
        figures={f"{figure}_{NAME}": Measured.of(each.estimate) for figure, each in figures.items()},
        memorisation=_copies(drawn),
        duplicates=duplicates(moved(drawn), moved(sets["held out"])),
        drift=drift(appearance(drawn), appearance(sets["held out"])),
        per_class=_by_class(drawn),
        held_out_loss=_losses(0.9 if name == "version 2" else 0.8),
        likelihood="bound" if name == "version 2" else "exact",
    )


@cache
def _sets() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pictures, and their classes."""
    shown, classes = pictures(6 * COUNT)
    names = ("training", "held out", "champion", "challenger")
    parts = dict(zip(names, (slice(3 * COUNT), *(slice(n * COUNT, (n + 1) * COUNT) for n in (3, 4, 5))), strict=True))
    sets = {name: shown[part] for name, part in parts.items()}
    sets["floor"] = sets["training"][:COUNT]
    sets["champion"] = with_noise(sets["champion"], 0.3)
    sets["challenger"] = with_copies(sets["challenger"], sets["training"][-12:])
    sets["challenger"][TWICE] = sets["challenger"][TWICE[0]].clone()
    labels = {name: classes[part] for name, part in parts.items()}
    labels["challenger"] = torch.cat([labels["training"][-12:], labels["challenger"][12:]])
    labels["challenger"][TWICE] = labels["challenger"][TWICE[0]].clone()
    return sets, labels


def _copies(drawn: Tensor) -> Memorisation:
    sets, _ = _sets()
    training = thumbnails(sets["training"])
    near, of_real = (closest(moved(each), [training]) for each in (drawn, sets["held out"]))
    return memorisation({NAME: near}, {NAME: of_real})


def _by_class(drawn: Tensor) -> PerClass:
    sets, labels = _sets()
    reader = fit([(thumbnails(sets["training"]), labels["training"])], len(CLASSES))
    whose = "challenger" if drawn is sets["challenger"] else "champion"
    real = Labelled(thumbnails(sets["held out"]), labels["held out"])
    return per_class(Labelled(thumbnails(drawn), labels[whose]), real, reader, CLASSES, NAME)


def _pictured(found: PerClass) -> dict[str, tuple[Tensor, Tensor]]:
    """The first four real and drawn pictures of the two worst classes."""
    sets, labels = _sets()
    numbers = {each.name: CLASSES.index(each.name) for each in found.worst_first[:2]}

    def of(whose: str, number: int) -> Tensor:
        return sets[whose][labels[whose] == number][:4]

    return {name: (of("held out", number), of("challenger", number)) for name, number in numbers.items()}


def _losses(worst: float) -> HeldOutLoss:
    edges = noise_levels().tolist()
    levels = [
        LevelLoss(sigma_low=low, sigma_high=high, loss=worst * (0.1 + 0.05 * n), loss_se=0.01)
        for n, (low, high) in enumerate(pairwise(edges))
    ]
    return HeldOutLoss(
        pictures=COUNT, levels=levels, loss=0.5, loss_se=0.01, bits_per_dim=3 + worst, bits_per_dim_se=0.02
    )
