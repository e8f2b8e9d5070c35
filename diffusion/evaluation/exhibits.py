"""Pictures that show what a trial was about: those drawn, those that look copied or drawn twice, the worst classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.evaluation.evaluator import ModelEvaluator
from diffusion.evaluation.real import SHOWN
from diffusion.evaluation.results import ModelEvaluation
from diffusion.evaluation.trial_results import Trial

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


def exhibits(ours: ModelEvaluator, theirs: ModelEvaluator | None, found: Trial) -> Exhibits:
    """Those of the trial ``found`` of ``ours``, the candidate, beside the champion."""
    real, evaluation = ours.real, found.challenger.evaluation
    pairs = evaluation.memorisation.pairs
    return Exhibits(
        real=real.shown_images,
        challenger=ours.images[:SHOWN],
        champion=None if theirs is None else theirs.images[:SHOWN],
        drawn=ours.images[[pair.drawn for pair in pairs]],
        training=real.dataset.pictures(real.train[[pair.training for pair in pairs]]),
        groups=[ours.images[group.members] for group in evaluation.duplicates.groups],
        classes=_worst_classes(ours, evaluation),
    )


def _worst_classes(ours: ModelEvaluator, evaluation: ModelEvaluation) -> dict[str, tuple[Tensor, Tensor]]:
    if evaluation.per_class is None or ours.labels is None:
        return {}
    real, classes = ours.real, ours.model.classes
    labels = real.labelled(classes).labels
    found = {}
    for name in [each.name for each in evaluation.per_class.worst_first][:WORST]:
        number = classes.index(name)
        of_class = torch.nonzero(labels == number)[:OF_CLASS, 0], torch.nonzero(ours.labels == number)[:OF_CLASS, 0]
        count = min(map(len, of_class))
        held_out, drawn = (numbers[:count] for numbers in of_class)
        found[name] = real.dataset.pictures(real.compared[held_out.numpy()]), ours.images[drawn]
    return found
