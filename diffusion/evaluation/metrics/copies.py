"""Copies of training images (memorization) and images generated more than once (duplicates).

A generated image counts as a copy if it lies nearer to a training image, for how dense it is there, than all but a few
held-out images do, which the model has never seen: that calibrates any distance in any space. (The test of arXiv
2202.02514 asks the same of all generated images at once, and so misses a few copies among many others.) Two spaces see
different copies: thumbnails those that were compressed, grainy or shifted by a pixel, features those that no pixels
tell. Not seen are copies of an image that the training set itself has more than twenty times, as then many are as near
as the nearest. And as no image is in a data set twice, held-out images are never exact copies: where the world repeats
itself, as simple drawings do, a perfect model has a few.

A generated image counts as a duplicate if its thumbnail lies nearer to another generated one, for how dense real images
are there, than all but a few real images lie to another real one, out of as many. Features would not do: to a network
that knows sharp and clean images, blurred or noisy ones are all alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from diffusion.common.config import Config
from diffusion.evaluation.estimate import wilson_interval
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest

SIDE = 8
"""Height and width of a thumbnail, in pixels; of smaller images their own. Measured on 28×28 scans and photographs of
clothes: larger ones find no more copies, and fewer that were blurred."""
SHIFTS = range(3)
"""Places at which the image is cut out of one that is a pixel larger on each side."""
PIXELS = "pixels"
"""Of the space that they lie in."""


def make_thumbnails(images: Tensor) -> Tensor:
    """``images``, (N, C, H, W) uint8, averaged to SIDE × SIDE or less: (N, D) float32 in [0, 1]."""
    return _small(images.float() / 255)


def shifted_thumbnails(images: Tensor, mirrored: bool = False) -> Tensor:
    """Thumbnails of ``images``, (N, C, H, W) uint8, as they are and moved by a pixel to all sides: (V, N, D) float32.

    The first view is the image as it is. Edges are repeated. ``mirrored``: the same of the mirrored ones, for models
    that were trained on those as well.
    """
    height, width = images.shape[-2:]
    larger = pad(images.float() / 255, (1, 1, 1, 1), mode="replicate")
    places = sorted(((top, left) for top in SHIFTS for left in SHIFTS), key=lambda place: place != (1, 1))
    views = [_small(larger[..., top : top + height, left : left + width]) for top, left in places]
    if mirrored:
        views += list(shifted_thumbnails(images.flip(3)))
    return torch.stack(views)


def _small(images: Tensor) -> Tensor:
    side = min(SIDE, *images.shape[-2:])
    return adaptive_avg_pool2d(images, (side, side)).flatten(1)


LEVEL = 0.01
"""Share of real images that may fall below a threshold, in all spaces together: the rate of false alarms."""


@dataclass(frozen=True)
class Threshold:
    """One of the smallest of the values that real images have."""

    value: float
    rank: int
    """Its place among them, from 1 on."""
    count: int
    """How many of them there are."""

    @property
    def level(self) -> float:
        """Share of further real images that fall below it, in the mean over all calibrations."""
        return self.rank / (self.count + 1)

    def chance(self, below: int, others: int) -> float:
        """How probable it is that of so many ``others`` at least ``below`` lie below it, if they too are real.

        That is exact, whatever the distribution, and knows that the threshold itself is generated: all orders of
        exchangeable values are equally probable, so the number below is beta-binomial (the exceedance test of Gumbel
        and von Schelling, Ann. Math. Statist. 21, 1950). Among ties it is too large, never too small.
        """
        if below <= 0:
            return 1.0
        low, high = self.rank, self.count - self.rank + 1
        k = torch.arange(below, others + 1, dtype=torch.float64)
        ways = math.lgamma(others + 1) - torch.lgamma(k + 1) - torch.lgamma(others - k + 1)
        logs = ways + _log_beta(k + low, others - k + high) - _log_beta(torch.tensor(low), torch.tensor(high))
        return min(1.0, logs.logsumexp(0).exp().item())


def calibrate(values: Tensor, share: float) -> Threshold:
    """The threshold below which at most ``share`` of real images fall, by the ``values`` (M,) of some.

    Where these are too few to tell it is the least of them, below which one in M + 1 falls.
    """
    rank = max(1, math.floor(share * (len(values) + 1)))
    return Threshold(values.kthvalue(rank).values.item(), rank, len(values))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


PAIRS_SHOWN = 16
"""Pairs named."""


class CopiesInSpace(Config):
    """Generated images that lie next to a training image in one space."""

    space: str
    """``pixels``, or the name of the features."""
    threshold: float
    """Of the distance to the nearest training image over the mean distance to the twenty nearest."""
    level: float
    """Share of images which were never seen that fall below it as well."""
    count: int
    """How many generated ones do."""
    p_value: float
    """How probable so many are if the model copies nothing; exact, see ``Threshold.chance``."""


class NearestPair(Config):
    """A generated image and the training image that it is nearest to."""

    generated: int
    """Number of the generated one."""
    training: int
    """Which of the training images compared with, counted from 0."""
    space: str
    """Where they are so near."""
    distance: float
    """How near, in that space's own unit."""
    relative: float
    """The same over the mean distance to the twenty nearest, 0 to 1."""
    is_copy: bool
    """Whether that is below the threshold."""


class Memorization(Config):
    """How many of a model's images are copies, and how sure that is."""

    generated: int
    """Images evaluated."""
    held_out: int
    """Images that were never seen, which set the thresholds."""
    spaces: list[CopiesInSpace]
    copies: int
    """Images that are copies in any of the spaces."""
    share: float
    """``copies`` over ``generated``."""
    share_low: float
    """Lower end of its interval of 95 %, over other images of the same model."""
    share_high: float
    """Upper end."""
    expected: float
    """Share of a model that copies nothing, at most."""
    p_value: float
    """How probable so many are for such a model, at most: the least of the spaces', times how many there are."""
    pairs: list[NearestPair]
    """The nearest of all, one for each generated image, whether copies or not."""

    @property
    def excess(self) -> float:
        """Share of copies beyond what chance alone makes, at least 0."""
        return max(0.0, (self.share - self.expected) / (1 - self.expected))

    def metrics(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        return {
            "copies_share": self.share,
            "copies_share_low": self.share_low,
            "copies_share_high": self.share_high,
            "copies_expected": self.expected,
            "copies_p_value": self.p_value,
        }


def detect_memorization(
    generated: Mapping[str, NearestNeighbours], held_out: Mapping[str, NearestNeighbours]
) -> Memorization:
    """Compare the neighbours of ``generated`` and of ``held_out`` images among the same training images.

    Both by the name of each space. Where the model was trained on mirrored images, both were looked for in both
    views. The thresholds share out a rate of false alarms of LEVEL.
    """
    relative = torch.stack([each.relative for each in generated.values()])
    thresholds = [calibrate(held_out[space].relative, LEVEL / len(generated)) for space in generated]
    values = torch.tensor([threshold.value for threshold in thresholds])[:, None]
    below = relative < values
    count, copies = relative.shape[1], int(below.any(0).sum())
    found = zip(generated, thresholds, below.sum(1).tolist(), strict=True)
    spaces = [_copies_in(space, threshold, number, count) for space, threshold, number in found]
    low, high = wilson_interval(copies / count, count)
    return Memorization(
        generated=count,
        held_out=len(next(iter(held_out.values())).distances),
        spaces=spaces,
        copies=copies,
        share=copies / count,
        share_low=low,
        share_high=high,
        expected=sum(threshold.level for threshold in thresholds),
        p_value=min(1.0, len(spaces) * min(space.p_value for space in spaces)),
        pairs=_nearest_pairs(generated, relative, values),
    )


def _copies_in(space: str, threshold: Threshold, count: int, generated: int) -> CopiesInSpace:
    return CopiesInSpace(
        space=space,
        threshold=threshold.value,
        level=threshold.level,
        count=count,
        p_value=threshold.chance(count, generated),
    )


def _nearest_pairs(
    generated: Mapping[str, NearestNeighbours], relative: Tensor, thresholds: Tensor
) -> list[NearestPair]:
    """The images that are nearest for the ``thresholds`` (S, 1) of their spaces, by ``relative`` distances (S, N)."""
    names = list(generated)
    # Real images may leave a threshold of 0, below which nothing is.
    least, where = (relative / thresholds.clamp(min=1e-9)).min(0)
    pairs = []
    for number in least.argsort(stable=True)[:PAIRS_SHOWN].tolist():
        place = int(where[number])
        found = generated[names[place]]
        pairs.append(
            NearestPair(
                generated=number,
                training=int(found.rows[number, 0]),
                space=names[place],
                distance=found.distances[number, 0].item(),
                relative=relative[place, number].item(),
                is_copy=bool(relative[place, number] < thresholds[place, 0]),
            )
        )
    return pairs


LEAST = 0.5
"""Images that are blurred or of low contrast lie nearer to one another altogether, and none of them is another's
double. So the threshold shrinks as the median does, but to no less than this: then it is variety that is missing."""
GROUPS_SHOWN = 8
"""Groups named, and pairs."""
MEMBERS = 16
"""Images named of each group."""
Edge = tuple[float, int, int]
"""How far two images lie apart, relative to how dense it is there, and their numbers, the lesser first."""


class DuplicateGroup(Config):
    """Images that are duplicates of one another, each of some other."""

    size: int
    """How many."""
    members: list[int]
    """Numbers of the first of them."""


class DuplicatePair(Config):
    """Two images that are duplicates."""

    first: int
    """Number of the one."""
    second: int
    """Number of the other."""
    relative: float
    """Their distance over the mean distance to the twenty nearest real images."""


class Duplicates(Config):
    """How many of a model's images it generated more than once."""

    images: int
    """Images evaluated: as many as real ones, the first of them, for the more there are the nearer they lie."""
    duplicates: int
    """How many are."""
    share: float
    """``detect_duplicates`` over ``images``."""
    share_low: float
    """Lower end of its interval of 95 %, over other images of the same model."""
    share_high: float
    """Upper end."""
    expected: float
    """Share of real images."""
    p_value: float
    """How probable so many are of real images: see ``Threshold.chance``."""
    threshold: float
    """Of the distance to the nearest other generated image over the mean distance to the twenty nearest real ones."""
    closeness: float
    """The median of that over the same of real images: below 1 generated images are more alike than real ones."""
    groups: list[DuplicateGroup]
    """The largest."""
    twins: list[DuplicatePair]
    """The nearest pairs."""

    @property
    def largest(self) -> int:
        """Images in the largest group; 0: there are no duplicates."""
        return self.groups[0].size if self.groups else 0

    def metrics(self) -> dict[str, float]:
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


def detect_duplicates(generated: Tensor, real: Tensor) -> Duplicates:
    """Compare ``shifted_thumbnails`` of ``generated`` and of ``real`` images, (V, N, D) and (V, M, D).

    Of the larger set only as many are used as the smaller one has.
    """
    count = min(generated.shape[1], real.shape[1])
    generated, real = generated[:, :count], real[:, :count]
    among_real = find_nearest(real, [real[0]], themselves=True).relative
    among_generated = find_nearest(generated, [generated[0]], themselves=True)
    around = find_nearest(generated, [real[0]]).distances.mean(1, keepdim=True)
    relative = among_generated.distances / around.clamp(min=torch.finfo().tiny)
    closeness = (relative[:, 0].median() / among_real.median()).nan_to_num(1.0).item()
    of_real = calibrate(among_real, LEVEL)
    threshold = of_real.value * min(1.0, max(LEAST, closeness))
    near = relative < threshold
    edges = _edges(among_generated, relative, near)
    found = int(near[:, 0].sum())
    # Two images are as near to each other as each is to the other: there are half as many accidents as images.
    low, high = wilson_interval(found / count, count / 2)
    halved = Threshold(of_real.value, (of_real.rank + 1) // 2, count // 2)
    return Duplicates(
        images=count,
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


def _edges(found: NearestNeighbours, relative: Tensor, near: Tensor) -> list[Edge]:
    """All pairs that are ``near`` (N, k), once or twice."""
    numbers, places = near.nonzero(as_tuple=True)
    others = found.rows[numbers, places]
    first, second = torch.minimum(numbers, others), torch.maximum(numbers, others)
    return list(zip(relative[numbers, places].tolist(), first.tolist(), second.tolist(), strict=True))


def _groups(edges: list[Edge]) -> list[DuplicateGroup]:
    """The largest sets of images that are connected."""
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
    largest = sorted(members.values(), key=lambda group: (-len(group), group[0]))[:GROUPS_SHOWN]
    return [DuplicateGroup(size=len(group), members=group[:MEMBERS]) for group in largest]


def _twins(edges: list[Edge]) -> list[DuplicatePair]:
    """The nearest pairs, each once."""
    once: dict[tuple[int, int], DuplicatePair] = {}
    for relative, first, second in sorted(edges):
        once.setdefault((first, second), DuplicatePair(first=first, second=second, relative=relative))
        if len(once) == GROUPS_SHOWN:
            break
    return list(once.values())
