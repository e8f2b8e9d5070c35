"""Copies of training images (memorization) and images generated more than once (duplicates).

A generated image counts as a copy if it is nearer to a training image, relative to the local density, than all but a
few held-out images, which the model has never seen: that calibrates any distance in any space. Two spaces detect
different copies: pixels after registration those that were moved, turned, blurred or made grainy, features those with
different pixels. Not detected are copies of an image that is in the training set more than twenty times, as then many
are as near as the nearest. Held-out images that are themselves near-duplicates of training images do not set the
threshold, but count among those below it: a model that generates as many is not worse.

A generated image counts as a duplicate if its thumbnail is nearer to another generated one, relative to the local
density of real images, than all but a few of as many real images are to another real one. Features are unsuitable: a
network trained on sharp images maps all blurred or noisy ones to similar features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from diffusion.common.config import Config
from diffusion.common.shapes import Images, map_by_shape
from diffusion.evaluation.estimate import wilson_interval
from diffusion.evaluation.gate_metrics import CopyShare
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, connected_groups, find_nearest

SIDE = 8
"""Height and width of a thumbnail, in pixels, at most the image's own; larger ones miss blurred duplicates."""
PIXELS = "pixels"
"""Name of the space of pixels after registration."""


def shifted_thumbnails(images: Images) -> Tensor:
    """Compute thumbnails of ``images``, each (C, H, W) uint8, unshifted, then shifted by a pixel: (9, N, D) float32."""
    if isinstance(images, list):
        return map_by_shape(images, lambda batch: shifted_thumbnails(batch).transpose(0, 1)).transpose(0, 1)
    height, width = images.shape[-2:]
    padded_images = pad(images.float() / 255, (1, 1, 1, 1), mode="replicate")
    places = sorted(product(range(3), range(3)), key=lambda place: place != (1, 1))
    side = min(SIDE, height, width)
    views = (padded_images[..., top : top + height, left : left + width] for top, left in places)
    return torch.stack([adaptive_avg_pool2d(view, (side, side)).flatten(1) for view in views])


LEVEL = 0.05
"""False alarm rate of copies: share of distinct real images that fall below a threshold, in all spaces together."""
FEATURE_LEVEL = 0.01
"""Its part for each space of features, in which fewer copies stand out."""
DUPLICATE_LEVEL = 0.01
"""False alarm rate of duplicates."""
NEAR_DUPLICATE = 1 / 3
"""Distance to the nearest training image over the mean distance to the twenty nearest below which held-out images are
near-duplicates: in data of five dimensions or more that does not happen by chance."""
SUSPICIOUS = 0.02
"""Share of near-duplicates among held-out images from which reports say so."""


@dataclass(frozen=True)
class Threshold:
    """Threshold at one of the smallest values of real images."""

    value: float
    rank: int
    count: int
    """Rank of the threshold among the values, from 1, and their number."""

    @property
    def level(self) -> float:
        """Return the expected share of further real images below the threshold, over all calibrations."""
        return self.rank / (self.count + 1)

    def chance(self, below: int, others: int) -> float:
        """Return the probability that at least ``below`` of ``others`` lie below it if they are real as well.

        Exact for any distribution: all orders of exchangeable values are equally probable, so the number below is
        beta-binomial (Gumbel and von Schelling, Ann. Math. Statist. 21, 1950). With ties too large, never too small.
        """
        if below <= 0:
            return 1.0
        low, high = self.rank, self.count - self.rank + 1
        k = torch.arange(below, others + 1, dtype=torch.float64)
        ways = math.lgamma(others + 1) - torch.lgamma(k + 1) - torch.lgamma(others - k + 1)
        logs = ways + _log_beta(k + low, others - k + high) - _log_beta(*torch.tensor([low, high]).double())
        return min(1.0, logs.logsumexp(0).exp().item())


def calibrate(values: Tensor, share: float) -> Threshold:
    """Compute the threshold below which at most ``share`` of distinct real images fall, from ``values`` (M,) of some.

    For small M it is their minimum. Values below NEAR_DUPLICATE do not set it, but have a rank.
    """
    near_count = int((values < NEAR_DUPLICATE).sum())
    rank = min(near_count + max(1, math.floor(share * (len(values) - near_count + 1))), len(values))
    return Threshold(values.kthvalue(rank).values.item(), rank, len(values))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


class CopiesInSpace(Config):
    """Copies of training images detected in one space."""

    space: str
    """``pixels``, or the name of the features."""
    threshold: float
    """Threshold of the distance to the nearest training image over the mean distance to the twenty nearest."""
    level: float
    """Share of images never seen in training that fall below it as well."""
    count: int
    """Number of generated images below it."""
    p_value: float
    """Probability of as many if the model copies nothing; exact, see ``Threshold.chance``."""


class NearestPair(Config):
    """A generated image and its nearest training image."""

    generated: int
    """Number of the generated image."""
    training: int
    """Index of the training image among those compared with, from 0."""
    space: str
    """Name of the space in which they are nearest."""
    distance: float
    """Distance in the unit of that space."""
    relative: float
    """Distance over the mean distance to the twenty nearest, 0 to 1."""
    is_copy: bool
    """Whether the relative distance is below the threshold."""


class CopyRate(Config):
    """Share of copies of training images, or of duplicates, among a model's images."""

    share: float
    share_low: float
    share_high: float
    """Ends of its 95 % interval, over other images of the same model."""
    expected: float
    """Expected share for a model that copies nothing, as measured on real images."""
    p_value: float
    """Probability of as many for such a model, see ``Threshold.chance``; for copies the smallest over the spaces, times
    their number."""


class Memorization(CopyRate):
    """Copies of training images among a model's images."""

    generated: int
    """Number of images evaluated."""
    held_out: int
    """Number of images never seen in training, which set the thresholds."""
    spaces: list[CopiesInSpace]
    copies: int
    """Number of images that are copies in any of the spaces."""
    near_duplicates: int
    """Held-out images that are near-duplicates of training images in any space: see NEAR_DUPLICATE."""
    pairs: list[NearestPair]
    """The nearest pairs of all, one per generated image, whether copies or not."""

    @property
    def copy_share(self) -> CopyShare:
        """Return what the gate decides on."""
        return CopyShare(share=self.share, expected=self.expected, p_value=self.p_value)

    @property
    def summary(self) -> str:
        """Return the share of copies beside chance, in words."""
        return self.copy_share.describe(self.generated)

    @property
    def suspicious(self) -> bool:
        """Return whether so many held-out images are near-duplicates that copies are hard to tell."""
        return self.near_duplicates > SUSPICIOUS * self.held_out

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {f"copies_{name}": getattr(self, name) for name in CopyRate.model_fields}


def detect_memorization(
    generated: Mapping[str, NearestNeighbours], held_out: Mapping[str, NearestNeighbours]
) -> Memorization:
    """Compare neighbours of ``generated`` and ``held_out`` images, by space, among the same training images.

    The thresholds divide the false alarm rate LEVEL among the spaces, of which the first gets what the others leave.
    """
    relative = torch.stack([neighbours.relative for neighbours in generated.values()])
    levels = dict.fromkeys(generated, FEATURE_LEVEL)
    levels[next(iter(generated))] = LEVEL - FEATURE_LEVEL * (len(generated) - 1)
    thresholds = [calibrate(held_out[space].relative, level) for space, level in levels.items()]
    values = torch.tensor([threshold.value for threshold in thresholds])[:, None]
    copy_mask = relative < values
    count, copies = relative.shape[1], int(copy_mask.any(0).sum())
    held_out_relative = torch.stack([held_out[space].relative for space in generated])
    near_mask = (held_out_relative < NEAR_DUPLICATE).any(0)
    # Of the union, as a near-duplicate is one in every space.
    expected = int((held_out_relative <= values).any(0).sum()) / (len(near_mask) + 1)
    spaces = [
        CopiesInSpace(
            space=space,
            threshold=threshold.value,
            level=threshold.level,
            count=number,
            p_value=threshold.chance(number, count),
        )
        for space, threshold, number in zip(generated, thresholds, copy_mask.sum(1).tolist(), strict=True)
    ]
    low, high = wilson_interval(copies / count, count)
    # The threshold may be 0, below which there is nothing.
    ratios, space_indices = (relative / values.clamp(min=1e-9)).min(0)
    pairs = []
    for number in ratios.argsort(stable=True)[:16].tolist():
        place = int(space_indices[number])
        neighbours = generated[spaces[place].space]
        pairs.append(
            NearestPair(
                generated=number,
                training=int(neighbours.rows[number, 0]),
                space=spaces[place].space,
                distance=neighbours.distances[number, 0].item(),
                relative=relative[place, number].item(),
                is_copy=bool(copy_mask[place, number]),
            )
        )
    return Memorization(
        generated=count,
        held_out=len(next(iter(held_out.values())).distances),
        spaces=spaces,
        copies=copies,
        share=copies / count,
        share_low=low,
        share_high=high,
        expected=expected,
        near_duplicates=int(near_mask.sum()),
        p_value=min(1.0, len(spaces) * min(space.p_value for space in spaces)),
        pairs=pairs,
    )


MIN_SHRINKAGE = 0.5
"""Smallest factor by which the threshold shrinks with the median distance, as between blurred images."""
GROUPS_SHOWN = 8
"""Number of groups, and of pairs, listed."""


class DuplicateGroup(Config):
    """Group of ``size`` images connected by duplicate pairs, with the numbers of the first ones."""

    size: int
    members: list[int]


class DuplicatePair(Config):
    """Two images, by number, that are duplicates of each other."""

    first: int
    second: int
    relative: float
    """Their distance over the mean distance to the twenty nearest real images."""


class Duplicates(CopyRate):
    """Images that a model generated more than once."""

    images: int
    """Number of images evaluated: the first ones, as many as real ones, because distances shrink with the number."""
    duplicates: int
    """Number of duplicates."""
    threshold: float
    """Threshold of the distance to the nearest other generated image over the mean distance to the twenty nearest real
    ones."""
    closeness: float
    """Median of that ratio over the median for real images: below 1 generated images are more alike than real ones."""
    groups: list[DuplicateGroup]
    """The largest groups."""
    twins: list[DuplicatePair]
    """The nearest pairs."""

    @property
    def largest(self) -> int:
        """Return the size of the largest group, 0 without duplicates."""
        return self.groups[0].size if self.groups else 0

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        metrics = {f"duplicates_{name}": getattr(self, name) for name in CopyRate.model_fields}
        return metrics | {"duplicates_largest_group": self.largest, "duplicates_closeness": self.closeness}


def detect_duplicates(generated: Tensor, real: Tensor) -> Duplicates:
    """Compare ``shifted_thumbnails`` of two sets, (V, N, D) and (V, M, D), of which the larger one is truncated."""
    count = min(generated.shape[1], real.shape[1])
    generated, real = generated[:, :count], real[:, :count]
    among_real = find_nearest(real, [real[0]], themselves=True).relative
    among_generated = find_nearest(generated, [generated[0]], themselves=True)
    cross_distances = find_nearest(generated, [real[0]]).distances.mean(1, keepdim=True)
    relative = among_generated.distances / cross_distances.clamp(min=torch.finfo().tiny)
    closeness = (relative[:, 0].median() / among_real.median()).nan_to_num(1.0).item()
    rank = max(1, math.floor(DUPLICATE_LEVEL * (count + 1)))
    real_threshold = Threshold(among_real.kthvalue(rank).values.item(), rank, count)
    threshold = real_threshold.value * min(1.0, max(MIN_SHRINKAGE, closeness))
    near_mask = relative < threshold
    duplicate_count = int(near_mask[:, 0].sum())
    numbers, places = near_mask.nonzero(as_tuple=True)
    others = among_generated.rows[numbers, places]
    first, second = torch.minimum(numbers, others), torch.maximum(numbers, others)
    twins: dict[tuple[int, int], float] = {}  # a pair may come from either of its images
    for value, i, j in sorted(zip(relative[near_mask].tolist(), first.tolist(), second.tolist(), strict=True)):
        twins.setdefault((i, j), value)
    # Distances are symmetric, so there are half as many chance events as images.
    low, high = wilson_interval(duplicate_count / count, count / 2)
    pair_threshold = Threshold(real_threshold.value, (real_threshold.rank + 1) // 2, count // 2)
    groups = sorted(connected_groups(first.numpy(), second.numpy(), count), key=lambda group: (-len(group), group[0]))
    return Duplicates(
        images=count,
        duplicates=duplicate_count,
        share=duplicate_count / count,
        share_low=low,
        share_high=high,
        expected=real_threshold.level,
        p_value=pair_threshold.chance(duplicate_count // 2, count // 2),
        threshold=threshold,
        closeness=closeness,
        groups=[DuplicateGroup(size=len(group), members=group[:16]) for group in groups[:GROUPS_SHOWN]],
        twins=[DuplicatePair(first=i, second=j, relative=value) for (i, j), value in [*twins.items()][:GROUPS_SHOWN]],
    )
