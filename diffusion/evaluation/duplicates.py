"""Whether a model draws the same picture again and again, as one does that has lost most of its variety.

A drawn picture counts as a duplicate if its thumbnail lies nearer to another drawn one, for how dense real pictures are
there, than but a few real pictures lie to another real one, out of as many. Features would not do: in the eyes of a
network that knows sharp and clean pictures, blurred or noisy ones are all alike.
"""

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.evaluation.calibration import LEVEL, Threshold, calibrated, interval
from diffusion.evaluation.closest import Closest, closest

LEAST = 0.5
"""Pictures that are blurred or of low contrast lie nearer to one another altogether, and none of them is another's
double. So the threshold shrinks as the median does, but to no less than this: then it is variety that is missing."""
SHOWN = 8
"""Groups named, and pairs."""
MEMBERS = 16
"""Pictures named of each group."""
Edge = tuple[float, int, int]
"""How far two pictures lie apart, relative to how dense it is there, and their numbers, the lesser first."""


class Group(Config):
    """Pictures that are duplicates of one another, each of some other."""

    size: int
    """How many."""
    members: list[int]
    """Numbers of the first of them."""


class Twins(Config):
    """Two pictures that are duplicates."""

    first: int
    """Number of the one."""
    second: int
    """Number of the other."""
    relative: float
    """Their distance over the mean distance to the twenty nearest real pictures."""


class Duplicates(Config):
    """How many of a model's pictures it drew more than once."""

    pictures: int
    """Pictures judged: as many as real ones, the first of them, for the more there are the nearer they lie."""
    duplicates: int
    """How many are."""
    share: float
    """``duplicates`` over ``pictures``."""
    share_low: float
    """Lower end of its interval of 95 %, over other pictures of the same model."""
    share_high: float
    """Upper end."""
    expected: float
    """Share of real pictures."""
    p_value: float
    """How probable so many are of real pictures: see ``Threshold.chance``."""
    threshold: float
    """Of the distance to the nearest other drawn picture over the mean distance to the twenty nearest real ones."""
    closeness: float
    """The median of that over the same of real pictures: below 1 drawn pictures are more alike than real ones."""
    groups: list[Group]
    """The largest."""
    twins: list[Twins]
    """The nearest pairs."""

    @property
    def largest(self) -> int:
        """Pictures in the largest group; 0: there are no duplicates."""
        return self.groups[0].size if self.groups else 0

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        return {
            "duplicates_share": self.share,
            "duplicates_share_low": self.share_low,
            "duplicates_share_high": self.share_high,
            "duplicates_expected": self.expected,
            "duplicates_p_value": self.p_value,
            "duplicates_largest_group": self.largest,
            "duplicates_closeness": self.closeness,
        }


def duplicates(drawn: Tensor, real: Tensor) -> Duplicates:
    """Compare thumbnails of ``drawn`` and of ``real`` pictures in all views, (V, N, D) and (V, M, D), see ``moved``.

    Of the larger set only as many are used as the smaller one has.
    """
    count = min(drawn.shape[1], real.shape[1])
    drawn, real = drawn[:, :count], real[:, :count]
    among_real = closest(real, [real[0]], themselves=True).relative
    among_drawn = closest(drawn, [drawn[0]], themselves=True)
    around = closest(drawn, [real[0]]).distances.mean(1, keepdim=True)
    relative = among_drawn.distances / around.clamp(min=torch.finfo().tiny)
    closeness = (relative[:, 0].median() / among_real.median()).nan_to_num(1.0).item()
    of_real = calibrated(among_real, LEVEL)
    threshold = of_real.value * min(1.0, max(LEAST, closeness))
    near = relative < threshold
    edges = _edges(among_drawn, relative, near)
    found = int(near[:, 0].sum())
    # Two pictures are as near to each other as each is to the other: there are half as many accidents as pictures.
    low, high = interval(found / 2, count / 2)
    halved = Threshold(of_real.value, (of_real.rank + 1) // 2, count // 2)
    return Duplicates(
        pictures=count,
        duplicates=found,
        share=found / count,
        share_low=low,
        share_high=high,
        expected=of_real.level,
        p_value=halved.chance(found // 2, count // 2),
        threshold=threshold,
        closeness=closeness,
        groups=_groups(edges),
        twins=_twins(edges),
    )


def _edges(found: Closest, relative: Tensor, near: Tensor) -> list[Edge]:
    """All pairs that are ``near`` (N, k), once or twice."""
    numbers, places = near.nonzero(as_tuple=True)
    others = found.rows[numbers, places]
    first, second = torch.minimum(numbers, others), torch.maximum(numbers, others)
    return list(zip(relative[numbers, places].tolist(), first.tolist(), second.tolist(), strict=True))


def _groups(edges: list[Edge]) -> list[Group]:
    """The largest sets of pictures that are connected."""
    root: dict[int, int] = {}

    def top(number: int) -> int:
        while (above := root.setdefault(number, number)) != number:
            root[number] = number = root[above]
        return number

    for _, one, other in edges:
        first, second = sorted((top(one), top(other)))
        root[second] = first
    members: dict[int, list[int]] = {}
    for number in sorted(root):
        members.setdefault(top(number), []).append(number)
    largest = sorted(members.values(), key=lambda group: (-len(group), group[0]))[:SHOWN]
    return [Group(size=len(group), members=group[:MEMBERS]) for group in largest]


def _twins(edges: list[Edge]) -> list[Twins]:
    """The nearest pairs, each once."""
    once: dict[tuple[int, int], Twins] = {}
    for relative, first, second in sorted(edges):
        once.setdefault((first, second), Twins(first=first, second=second, relative=relative))
        if len(once) == SHOWN:
            break
    return list(once.values())
