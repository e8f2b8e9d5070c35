"""How good a model's pictures are class by class, for one that is told classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.evaluation.calibration import interval
from diffusion.evaluation.kid import kid
from diffusion.evaluation.reader import Reader

FEWEST = 20
"""Pictures of a class, drawn and real, without which its distance means nothing."""


@dataclass(frozen=True)
class Labelled:
    """Pictures of known classes."""

    features: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64, numbers of classes; any other number: of none."""

    def of(self, label: int) -> Tensor:
        """The features of one class."""
        return self.features[self.labels == label]


class ClassScores(Config):
    """One class."""

    name: str
    samples: int
    """Pictures that were drawn of it."""
    reference: int
    """Real pictures of it that they were compared with."""
    kid: float
    """KID of the drawn against the real pictures of the class: 0 is best. Not to be compared with that of all classes,
    as pictures of one class are more alike."""
    kid_se: float
    """Its standard error."""
    agreement: float
    """Share of the drawn pictures that a classifier takes for this class."""
    agreement_low: float
    """Lower end of its interval of 95 %."""
    agreement_high: float
    """Upper end."""
    agreement_real: float
    """The same share of the real pictures: what can be hoped for."""
    taken_for: str | None
    """The class that most others are taken for; None: all are taken for this one."""


class Unjudged(Config):
    """A class of which there are too few pictures."""

    name: str
    samples: int
    """Drawn."""
    reference: int
    """Real."""


class PerClass(Config):
    """How a model does class by class."""

    extractor: str
    """Name of the features."""
    classes: list[ClassScores]
    """Those with enough pictures, in the order of the model's classes."""
    not_judged: list[Unjudged]
    """The others."""
    agreement: float | None
    """Share of all drawn pictures of a class that are taken for it; None: none is of a class."""
    agreement_real: float | None
    """The same of real ones."""

    @property
    def worst(self) -> ClassScores | None:
        """The class of the largest KID, which of many is large by chance too; None: none was judged."""
        return max(self.classes, key=lambda each: each.kid, default=None)

    @property
    def worst_first(self) -> list[ClassScores]:
        """The classes by falling KID."""
        return sorted(self.classes, key=lambda each: -each.kid)

    @property
    def least_recognised(self) -> ClassScores | None:
        """The class whose agreement falls furthest behind that of its real pictures; None: none was judged."""
        return min(self.classes, key=lambda each: each.agreement - each.agreement_real, default=None)

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        figures = {"class_agreement": self.agreement, "class_agreement_real": self.agreement_real}
        if self.worst is not None:
            figures[f"kid_worst_class_{self.extractor}"] = self.worst.kid
            figures[f"kid_worst_class_se_{self.extractor}"] = self.worst.kid_se
        return {name: value for name, value in figures.items() if value is not None}


def per_class(drawn: Labelled, real: Labelled, reader: Reader, names: Sequence[str], extractor: str) -> PerClass:
    """Compare ``drawn`` with ``real`` pictures that nothing was fitted to, class by class.

    ``reader`` was fitted to other real pictures; ``names`` are of the classes 0, 1 …
    """
    read, read_real = reader(drawn.features), reader(real.features)
    judged, others = [], []
    for label, name in enumerate(names):
        ours, theirs = drawn.of(label), real.of(label)
        if min(len(ours), len(theirs)) < FEWEST:
            others.append(Unjudged(name=name, samples=len(ours), reference=len(theirs)))
            continue
        distance = kid(ours, theirs)
        counts = torch.bincount(read[drawn.labels == label], minlength=len(names))
        right = int(counts[label])
        counts[label] = 0
        low, high = interval(right, len(ours))
        judged.append(
            ClassScores(
                name=name,
                samples=len(ours),
                reference=len(theirs),
                kid=distance.value,
                kid_se=distance.error,
                agreement=right / len(ours),
                agreement_low=low,
                agreement_high=high,
                agreement_real=(read_real[real.labels == label] == label).double().mean().item(),
                taken_for=names[int(counts.argmax())] if counts.any() else None,
            )
        )
    return PerClass(
        extractor=extractor,
        classes=judged,
        not_judged=others,
        agreement=_agreement(read, drawn.labels, len(names)),
        agreement_real=_agreement(read_real, real.labels, len(names)),
    )


def _agreement(read: Tensor, labels: Tensor, classes: int) -> float | None:
    known = (labels >= 0) & (labels < classes)
    return (read[known] == labels[known]).double().mean().item() if known.any() else None
