"""Tests for drift with bounded error: do new images differ from those that a model was trained on?

Three tests compare the new images with the others. All are permutation tests, exact at any number of images:

- ``images``: KID in the feature space of the evaluator (Gretton et al., JMLR 13, 2012).
- ``class_shares``: the largest G statistic of the number of images of any class, new classes and no class included.
- ``images_by_class``: the largest KID of any class, in units of its spread; sides are permuted within classes, so that
  other shares of the classes alone do not count.

The tests of one version share its level, and images without classes have the first test alone. A monitor tests again
and again, so the k-th version of the data set, counted from the training's, is tested at the level α/(k(k + 1)): over
all versions the probability of a false alarm is at most α, and at most LOWEST_LEVEL more for each version whose level
would be lower than that.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator, permutation
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest
from diffusion.data.versions.versions import Elsewhere
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.kid import kid_kernel, kids_of_splits
from diffusion.evaluation.new_images import MAX_COMPARED, MIN_COMPARED, extract_features, split_by_parent

LOWEST_LEVEL = 1e-5
"""Lowest significance level of a version, which bounds the number of permutations."""
EXCEEDANCES = 10
"""Permutations with a larger statistic after which no more are made, as the images show no difference."""
STEP = 100
"""Permutations made at a time."""
MIN_OF_CLASS = 10
"""Images of a class needed on each side for a comparison within it."""

TestName = Literal["images", "class_shares", "images_by_class"]


class DriftTest(Config):
    """One test of new images against those that a model was trained on."""

    name: TestName
    p_value: float
    """Probability of a statistic at least as large if the new images come from the same distribution."""
    level: float
    """p-value up to which the difference is significant."""
    label: str | None = None
    """Class that differs most; None: images without a class, or a test of all images."""
    kid: float | None = None
    """KID (arXiv 1801.01401) between the two sides, unbiased: of all images, or of that class."""
    shares: tuple[float, float] | None = None
    """Share of that class among the new images and among those trained on, in [0, 1]."""

    @property
    def differs(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value <= self.level

    @property
    def description(self) -> str:
        """Describe what is compared, with its figures."""
        name = "images without a class" if self.label is None else f"class {self.label[:40]!r}"
        subject = {
            "images": f"all images, KID {self.kid or 0:.3g}",
            "class_shares": f"shares of classes, most in {name}",
            "images_by_class": f"images within classes, most in {name}, KID {self.kid or 0:.3g}",
        }[self.name]
        shares = self.shares and f", {self.shares[0]:.1%} instead of {self.shares[1]:.1%}"
        return f"{subject}{shares or ''} (p = {self.p_value:.2g} at level {self.level:.2g})"


class DataDrift(Config):
    """Comparison of new images with those that a model was trained on."""

    extractor: str
    """Name of the features."""
    added: int
    """Images that the version which the model was trained on lacks."""
    compared: tuple[int, int]
    """New and other images whose features are compared, sampled at random."""
    tests: tuple[DriftTest, ...]


def level_of_test(newer: int, rate: float) -> float:
    """Return the significance level of all tests of a data set version, ``newer`` versions after the training's.

    The levels of all versions add up to ``rate``, the probability of any false alarm, as long as none is LOWEST_LEVEL.
    """
    return max(rate / ((newer + 1) * (newer + 2)), LOWEST_LEVEL)


def compare_with_training(
    dataset: Dataset,
    trained: Manifest,
    config: EvaluationConfig,
    level: float,
    elsewhere: Elsewhere,
    progress: Progress = ignore_progress,
) -> DataDrift | None:
    """Compare the images that ``dataset`` adds to ``trained`` with the images of ``trained`` that it still has.

    Returns None if there are fewer than MIN_COMPARED on either side. Raises UserError if a table or shard is missing.
    """
    row_sets = split_by_parent(dataset, trained, elsewhere)
    if min(map(len, row_sets)) < MIN_COMPARED:
        return None
    sides = [rows[permutation(0, f"drift/{side}", 0, len(rows))][:MAX_COMPARED] for side, rows in enumerate(row_sets)]
    extractor = make_extractor(config)
    what = "features of new images and of training images"
    features = extract_features(dataset, np.concatenate(sides), extractor, what, progress)
    names = dataset.manifest.labels
    classes, all_classes = ([dataset.classes(rows, names).numpy() for rows in pair] for pair in (sides, row_sets))
    new, other = torch.split(features, [len(rows) for rows in sides])
    counts = np.stack([np.bincount(codes, minlength=len(names) + 1) for codes in all_classes])
    return DataDrift(
        extractor=extractor.name,
        added=len(row_sets[0]),
        compared=(len(new), len(other)),
        tests=run_tests((new, other), (classes[0], classes[1]), counts, [*names, None], level),
    )


def run_tests(
    features: tuple[Tensor, Tensor],
    classes: tuple[np.ndarray, np.ndarray],
    counts: np.ndarray,
    names: Sequence[str | None],
    level: float,
) -> tuple[DriftTest, ...]:
    """Make the tests of one version, which share ``level``.

    Args:
        features: Features of sampled images of the two sides, (n, D) and (m, D): new images, and those trained on.
        classes: Numbers of their classes, (n,) and (m,) int64 below K.
        counts: Number of all images of each class on the two sides, (2, K) int64.
        names: Names of the K classes; None: no class.
        level: Probability that any test finds a difference where there is none.
    """
    # Whether there are classes does not depend on the sides that images are on, which keeps the level.
    has_classes = int((counts.sum(0) > 0).sum()) > 1
    level = level / 3 if has_classes else level
    _, kid, p_value = compare_within([features], level)
    tests = [DriftTest(name="images", p_value=p_value, level=level, kid=kid)]
    if not has_classes:
        return tuple(tests)
    place, p_value = compare_counts(counts[0], counts[1], level)
    new_share, share = (counts[:, place] / counts.sum(1)).tolist()
    tests.append(
        DriftTest(name="class_shares", p_value=p_value, level=level, label=names[place], shares=(new_share, share))
    )
    sampled = np.stack([np.bincount(codes, minlength=len(names)) for codes in classes])
    if len(common := np.flatnonzero(sampled.min(0) >= MIN_OF_CLASS)):
        strata = [(features[0][classes[0] == number], features[1][classes[1] == number]) for number in common]
        place, kid, p_value = compare_within(strata, level)
        label = names[common[place]]
        tests.append(DriftTest(name="images_by_class", p_value=p_value, level=level, label=label, kid=kid))
    return tuple(tests)


def compare_within(strata: Sequence[tuple[Tensor, Tensor]], level: float) -> tuple[int, float, float]:
    """Compare features (n, D) with others (m, D) in each stratum, at least two each, by KID.

    Returns the stratum with the largest KID in units of its spread, that KID, and the p-value of the largest one among
    random permutations of the two sides within the strata.
    """
    kernels, sides, spreads = list[Tensor](), list[np.ndarray](), list[float]()
    for first, second in strata:
        both = torch.cat([first, second]).double()
        pairs = kid_kernel(both, both)
        pairs.fill_diagonal_(0)
        # Of the same order as the standard deviation under permutation, and the same for all of them.
        centred = pairs - pairs.mean(0) - pairs.mean(1, keepdim=True) + pairs.mean()
        spreads.append(max(float(centred.norm()) / (len(first) * len(second)), 1e-300))
        kernels.append(pairs)
        sides.append(np.repeat([1.0, 0.0], [len(first), len(second)]))

    def kids(batch: Sequence[np.ndarray]) -> Tensor:
        """Compute the KID of each stratum for each row of its sides: (S, P)."""
        splits = zip(kernels, batch, strict=True)
        return torch.stack([kids_of_splits(pairs, torch.from_numpy(first).T) for pairs, first in splits])

    scale = torch.tensor(spreads, dtype=torch.float64)[:, None]
    actual = kids([side[None] for side in sides])
    largest, place = (actual / scale)[:, 0].max(0)

    def permute(random: np.random.Generator) -> np.ndarray:
        batch = [random.permuted(np.tile(side, (STEP, 1)), axis=1) for side in sides]
        statistics: np.ndarray = (kids(batch) / scale).amax(0).numpy()
        return statistics

    return int(place), float(actual[place, 0]), monte_carlo_p_value(permute, float(largest), level)


def compare_counts(first: np.ndarray, second: np.ndarray, level: float) -> tuple[int, float]:
    """Compare numbers of images of K classes, (K,) int64 each, by the largest G statistic of a class against the rest.

    Returns that class and the p-value among permutations of the two sides.
    """
    totals, count, rest = first + second, int(first.sum()), int(second.sum())
    expected = torch.from_numpy(np.stack([totals, totals.sum() - totals]).astype(np.float64))
    constants = torch.xlogy(expected, expected).sum(0).numpy()

    def statistics(counts: np.ndarray) -> np.ndarray:
        """Compute what varies of each class's G for numbers of the first side, (P, K): (P, K)."""
        cells = np.stack([counts, totals - counts, count - counts, rest - totals + counts])
        observed = torch.from_numpy(cells.astype(np.float64))
        result: np.ndarray = torch.xlogy(observed, observed).sum(0).numpy() - constants
        return result

    def permute(random: np.random.Generator) -> np.ndarray:
        counts = random.multivariate_hypergeometric(totals, count, STEP, method="marginals")
        largest: np.ndarray = statistics(counts).max(1)
        return largest

    actual = statistics(first[None])[0]
    # Equal tables must not differ by rounding.
    return int(actual.argmax()), monte_carlo_p_value(
        permute, float(actual.max()) - 1e-12 * float(constants.max()), level
    )


def monte_carlo_p_value(permute: Callable[[np.random.Generator], np.ndarray], actual: float, level: float) -> float:
    """Compute the p-value of a statistic by random permutations, of which ``permute`` makes STEP.

    As many are made as p-values under ``level`` need, or until EXCEEDANCES of them are at least as large (sequential
    Monte Carlo p-values, Besag and Clifford, Biometrika 78, 1991), which keeps the p-value exact.
    """
    count, exceedances, max_count = 0, 0, math.ceil(2 / level)
    while count < max_count:
        indices = np.flatnonzero(permute(generator(0, "drift/permutations", count)) >= actual)
        if exceedances + len(indices) >= EXCEEDANCES:
            return EXCEEDANCES / float(count + 1 + indices[EXCEEDANCES - exceedances - 1])
        count, exceedances = count + STEP, exceedances + len(indices)
    return (exceedances + 1) / (count + 1)
