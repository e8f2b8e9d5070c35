"""Whether a model draws copies of its training pictures.

A drawn picture counts as a copy if it lies nearer to a training picture, for how dense it is there, than but a few
held-out pictures do, which the model has never seen: that calibrates any distance in any space (the test of arXiv
2202.02514 asks the same of all drawn pictures at once, and so sees no few copies among many others). Two spaces see
different copies: thumbnails those that were compressed, grainy or shifted by a pixel, and features those that no pixels
tell.

What it cannot see: copies of a picture that the training set itself has more than twenty times, as then many are as
near as the nearest. And as no picture is in a data set twice, held-out ones are never exact copies: where the world
repeats itself, as simple drawings do, a perfect model has a few.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.evaluation.calibration import LEVEL, Threshold, calibrated, interval
from diffusion.evaluation.closest import Closest

SHOWN = 16
"""Pairs named."""


class CopiesIn(Config):
    """Drawn pictures that lie next to a training picture in one space."""

    space: str
    """``pixels``, or the name of the features."""
    threshold: float
    """Of the distance to the nearest training picture over the mean distance to the twenty nearest."""
    level: float
    """Share of pictures which were never seen that fall below it as well."""
    count: int
    """How many drawn ones do."""
    p_value: float
    """How probable so many are if the model copies nothing; exact, see ``Threshold.chance``."""


class Pair(Config):
    """A drawn picture and the training picture that it is nearest to."""

    drawn: int
    """Number of the drawn one."""
    training: int
    """Which of the training pictures compared with, counted from 0."""
    space: str
    """Where they are so near."""
    distance: float
    """How near, in that space's own unit."""
    relative: float
    """The same over the mean distance to the twenty nearest, 0 to 1."""
    is_copy: bool
    """Whether that is below the threshold."""


class Memorisation(Config):
    """How many of a model's pictures are copies, and how sure that is."""

    drawn: int
    """Pictures judged."""
    held_out: int
    """Pictures that were never seen, which set the thresholds."""
    spaces: list[CopiesIn]
    copies: int
    """Pictures that are copies in any of the spaces."""
    share: float
    """``copies`` over ``drawn``."""
    share_low: float
    """Lower end of its interval of 95 %, over other pictures of the same model."""
    share_high: float
    """Upper end."""
    expected: float
    """Share of a model that copies nothing, at most."""
    p_value: float
    """How probable so many are for such a model, at most: the least of the spaces', times how many there are."""
    pairs: list[Pair]
    """The nearest of all, one for each drawn picture, whether copies or not."""

    @property
    def excess(self) -> float:
        """Share of copies beyond what chance alone makes, at least 0."""
        return max(0.0, (self.share - self.expected) / (1 - self.expected))

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        return {
            "copies_share": self.share,
            "copies_share_low": self.share_low,
            "copies_share_high": self.share_high,
            "copies_expected": self.expected,
            "copies_p_value": self.p_value,
        }


def memorisation(drawn: Mapping[str, Closest], held_out: Mapping[str, Closest]) -> Memorisation:
    """Judge by the neighbours of ``drawn`` and of ``held_out`` pictures among the same training pictures.

    Both by the name of each space. Where the model was trained on mirrored pictures, both were looked for in both
    views. The thresholds share out a rate of false alarms of LEVEL.
    """
    relative = torch.stack([each.relative for each in drawn.values()])
    thresholds = [calibrated(held_out[space].relative, LEVEL / len(drawn)) for space in drawn]
    values = torch.tensor([threshold.value for threshold in thresholds])[:, None]
    below = relative < values
    count, copies = relative.shape[1], int(below.any(0).sum())
    found = zip(drawn, thresholds, below.sum(1).tolist(), strict=True)
    spaces = [_in(space, threshold, number, count) for space, threshold, number in found]
    low, high = interval(copies, count)
    return Memorisation(
        drawn=count,
        held_out=len(next(iter(held_out.values())).distances),
        spaces=spaces,
        copies=copies,
        share=copies / count,
        share_low=low,
        share_high=high,
        expected=sum(threshold.level for threshold in thresholds),
        p_value=min(1.0, len(spaces) * min(space.p_value for space in spaces)),
        pairs=_closest(drawn, relative, values),
    )


def _in(space: str, threshold: Threshold, count: int, drawn: int) -> CopiesIn:
    return CopiesIn(
        space=space,
        threshold=threshold.value,
        level=threshold.level,
        count=count,
        p_value=threshold.chance(count, drawn),
    )


def _closest(drawn: Mapping[str, Closest], relative: Tensor, thresholds: Tensor) -> list[Pair]:
    """The pictures that are nearest for the ``thresholds`` (S, 1) of their spaces, by ``relative`` distances (S, N)."""
    names = list(drawn)
    # Real pictures may leave a threshold of 0, below which nothing is.
    least, where = (relative / thresholds.clamp(min=1e-9)).min(0)
    pairs = []
    for number in least.argsort(stable=True)[:SHOWN].tolist():
        place = int(where[number])
        found = drawn[names[place]]
        pairs.append(
            Pair(
                drawn=number,
                training=int(found.rows[number, 0]),
                space=names[place],
                distance=found.distances[number, 0].item(),
                relative=relative[place, number].item(),
                is_copy=bool(relative[place, number] < thresholds[place, 0]),
            )
        )
    return pairs
