"""Drift: do the held-out images that a data set gained since a training differ from those that it had then?

KID in the feature space of the evaluator, and an exact permutation test (Gretton et al., JMLR 13, 2012). The k-th
version of the data set, counted from the training's, is tested at the level α/(k(k + 1)): over all versions the
probability of a false alarm is at most α, and LOWEST_LEVEL more for each version whose level would be lower than that.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.random import generator
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import Manifest
from diffusion.data.versions.versions import Elsewhere, find_records, find_unshared_parts
from diffusion.evaluation.metrics.kid import kid_kernel, kids_of_splits

MIN_COMPARED = 10
"""Images needed on each side for a comparison."""
MAX_COMPARED = 1000
"""Images compared on each side, the first by key."""
LOWEST_LEVEL = 1e-5
"""Lowest significance level of a version, which bounds the number of permutations."""
EXCEEDANCES = 10
"""Permutations with a larger KID after which no more are made, as the images show no difference."""
STEP = 100
"""Permutations made at a time."""


class DataDrift(Config):
    """Comparison of the held-out images that a training's version lacks with those that it has."""

    compared: tuple[int, int]
    """Images that it lacks, and images that it has."""
    kid: float
    """KID (arXiv 1801.01401) between the two, unbiased."""
    p_value: float
    """Probability of a KID at least as large if both come from the same distribution."""
    level: float
    """p-value up to which the difference is significant."""

    @property
    def differs(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value <= self.level

    def __str__(self) -> str:
        return (
            f"{self.compared[0]:,} new held-out images {'differ' if self.differs else 'show no difference'} from "
            f"{self.compared[1]:,} older ones: KID {self.kid:.3g} (p = {self.p_value:.2g} at level {self.level:.2g})"
        )


def level_of_test(newer: int, rate: float) -> float:
    """Return the significance level of a data set version, ``newer`` versions after the training's.

    The levels of all versions add up to ``rate``, the probability of any false alarm, as long as none is LOWEST_LEVEL.
    """
    return max(rate / ((newer + 1) * (newer + 2)), LOWEST_LEVEL)


def find_new_images(dataset: Dataset, rows: Rows, trained: Manifest, elsewhere: Elsewhere) -> np.ndarray:
    """Return for each of ``rows`` whether the version ``trained`` lacks its image, (len(rows),) bool.

    Images are unique in a data set, so only parts that the two versions do not share are compared. Raises UserError if
    one of their tables is neither in the data set's folder nor ``elsewhere``.
    """
    new_parts = [part.number for part in find_unshared_parts(dataset.manifest, trained)]
    shard_parts = [part.number for part in dataset.manifest.parts if part.shard is not None]
    is_new: np.ndarray = np.isin(dataset.shards(rows), np.flatnonzero(np.isin(shard_parts, new_parts)))
    candidates = np.flatnonzero(is_new)
    keys = pa.array(dataset.keys(np.asarray(rows)[candidates]), pa.string())
    for part in find_unshared_parts(trained, dataset.manifest):
        if (table := find_records(dataset.folder, part, ("key", "outcome"), elsewhere)) is None:
            raise UserError(f"{part.records.name} of version {trained.digest[:12]} is gone: see `darkroom data log`")
        kept_rows = table.filter(pc.field("outcome") == "kept")
        is_new[candidates[np.asarray(pc.is_in(keys, kept_rows["key"].combine_chunks()))]] = False
    return is_new


def compare_features(features: Tensor, is_new: np.ndarray, level: float) -> DataDrift | None:
    """Compare the ``features`` (N, D) of images that are new with those of the others.

    Returns None if there are fewer than MIN_COMPARED on either side.
    """
    sides = [np.flatnonzero(is_new == side)[:MAX_COMPARED] for side in (True, False)]
    count, others = map(len, sides)
    if min(count, others) < MIN_COMPARED:
        return None
    sample = features[np.concatenate(sides)].double()
    pairs = kid_kernel(sample, sample).fill_diagonal_(0)
    side = np.repeat([1.0, 0.0], [count, others])
    kid = float(kids_of_splits(pairs, torch.from_numpy(side)[:, None]))
    return DataDrift(
        compared=(count, others), kid=kid, p_value=permutation_p_value(pairs, side, kid, level), level=level
    )


def permutation_p_value(pairs: Tensor, side: np.ndarray, kid: float, level: float) -> float:
    """Compute the p-value of a KID by random permutations of ``side``, (N,) float64, for the kernel ``pairs`` (N, N).

    As many are made as p-values under ``level`` need, or until EXCEEDANCES of them are at least as large (sequential
    Monte Carlo p-values, Besag and Clifford, Biometrika 78, 1991), which keeps the p-value exact.
    """
    count, exceedances, max_count = 0, 0, math.ceil(2 / level)
    while count < max_count:
        sides = generator(0, "drift/permutations", count).permuted(np.tile(side, (STEP, 1)), axis=1)
        indices = np.flatnonzero(kids_of_splits(pairs, torch.from_numpy(sides).T).numpy() >= kid)
        if exceedances + len(indices) >= EXCEEDANCES:
            return EXCEEDANCES / float(count + 1 + indices[EXCEEDANCES - exceedances - 1])
        count, exceedances = count + STEP, exceedances + len(indices)
    return (exceedances + 1) / (count + 1)
