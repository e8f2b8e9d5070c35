"""Pictures that show what a trial was about: those drawn, those that look copied or drawn twice, the worst classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.evaluation.portrait import Portrayed
from diffusion.evaluation.real import Real

SHOWN = 64
"""Pictures of each set to be looked at."""
WORST = 4
"""Classes of which pictures are shown."""
OF_CLASS = 8
"""Pictures of each, real and drawn."""


@dataclass(frozen=True)
class Exhibits:
    """Each (N, C, H, W) uint8."""

    real: Tensor
    """Held-out ones; of models that enlarge, those that they were shown small."""
    challenger: Tensor
    """The first that it drew."""
    champion: Tensor | None
    """The same picture numbers of the champion."""
    drawn: Tensor
    """Those of the challenger that lie closest to training pictures, in the order of ``memorisation.pairs``."""
    training: Tensor
    """The training pictures that they lie closest to."""
    groups: list[Tensor] = field(default_factory=list)
    """Those of the challenger that are duplicates of one another, in the order of ``duplicates.groups``."""
    classes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of the challenger's worst classes, the worst first: held-out pictures, and as many that it drew."""


def exhibits(ours: Portrayed, theirs: Portrayed | None, real: Real) -> Exhibits:
    """Those of a trial of ``ours``, the challenger, beside the champion."""
    portrait = ours.portrait
    pairs = portrait.memorisation.pairs
    return Exhibits(
        real=real.dataset.pictures((real.shown if len(real.shown) else real.held_out)[:SHOWN]),
        challenger=ours.pictures[:SHOWN],
        champion=None if theirs is None else theirs.pictures[:SHOWN],
        drawn=ours.pictures[[pair.drawn for pair in pairs]],
        training=real.dataset.pictures(real.train[[pair.training for pair in pairs]]),
        groups=[ours.pictures[group.members] for group in portrait.duplicates.groups],
        classes=_worst_classes(ours, real),
    )


def _worst_classes(ours: Portrayed, real: Real) -> dict[str, tuple[Tensor, Tensor]]:
    if ours.portrait.per_class is None or ours.labels is None:
        return {}
    labels, names = real.labelled(ours.classes).labels, [each.name for each in ours.portrait.per_class.worst_first]
    found = {}
    for name in names[:WORST]:
        number = ours.classes.index(name)
        of_class = torch.nonzero(labels == number)[:OF_CLASS, 0], torch.nonzero(ours.labels == number)[:OF_CLASS, 0]
        count = min(map(len, of_class))
        held_out, drawn = (numbers[:count] for numbers in of_class)
        found[name] = real.dataset.pictures(real.compared[held_out.numpy()]), ours.pictures[drawn]
    return found
