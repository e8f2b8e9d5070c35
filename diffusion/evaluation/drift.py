"""Tests for drift with bounded error: do new images differ from those that a model was trained on?

All images are compared in the feature space of the evaluator by the two-sample permutation test of KID (Gretton et al.,
JMLR 13, 2012), which is exact at any number of images. A monitor tests again and again, so the k-th version of the data
set, from that of the training on, is tested at the level α/(k(k + 1)): over all versions the probability of a false
alarm is at most α, and at most LOWEST_LEVEL more for each version whose level would be lower than that.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator, permutation
from diffusion.common.shapes import map_by_shape
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest
from diffusion.data.versions.versions import Elsewhere
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.distances import kid_kernel
from diffusion.evaluation.reports.dataset_report import FEWEST, MOST, kids_of_splits, read_batches, split_by_parent

LOWEST_LEVEL = 1e-5
"""Lowest significance level of a test, which bounds the number of permutations."""
EXCEEDANCES = 10
"""Permutations with a larger KID after which no more are made, as the images show no difference."""
STEP = 500
"""Permutations made at a time."""


class DataDrift(Config):
    """Comparison of new images with those that a model was trained on."""

    extractor: str
    """Name of the features."""
    added: int
    """Images that the version which the model was trained on lacks."""
    compared: int
    """Images on each side, sampled at random."""
    kid: float
    """KID (arXiv 1801.01401) between the two sides, unbiased."""
    p_value: float
    """Probability of a KID at least as large if the new images come from the same distribution."""


def level_of_test(newer: int, rate: float) -> float:
    """Return the significance level of the test of a data set version, ``newer`` versions after that of the training.

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
    """Compare the images that ``dataset`` adds to ``trained`` with those of ``trained`` that it still has.

    Returns None if there are fewer than FEWEST on either side. Raises UserError if a table or shard is missing.
    """
    row_sets = split_by_parent(dataset, trained, elsewhere)
    if (count := min(MOST, *map(len, row_sets))) < FEWEST:
        return None
    sides = [rows[permutation(0, f"drift/{side}", 0, len(rows))][:count] for side, rows in enumerate(row_sets)]
    extractor = make_extractor(config)
    features: list[Tensor] = []
    for batch in read_batches(dataset, np.concatenate(sides)):
        progress("features of new images and of those trained on", sum(map(len, features)), 2 * count)
        features.append(map_by_shape(batch, extractor))
    new, old = torch.split(torch.cat(features), count)
    kid, p_value = permutation_test(new, old, level)
    return DataDrift(extractor=extractor.name, added=len(row_sets[0]), compared=count, kid=kid, p_value=p_value)


def permutation_test(first: Tensor, second: Tensor, level: float) -> tuple[float, float]:
    """Compute KID between features (n, D) and (n, D), and its p-value among random permutations of the two sides.

    As many permutations are made as p-values under ``level`` need, or until EXCEEDANCES of them have a larger KID
    (sequential Monte Carlo p-values, Besag and Clifford, Biometrika 78, 1991), which keeps the p-value exact.
    """
    pairs = kid_kernel(*[torch.cat([first, second]).double()] * 2).fill_diagonal_(0)
    sides = np.repeat([1.0, 0.0], len(first))
    kid = kids_of_splits(pairs, torch.from_numpy(sides[:, None]))[0]
    count, exceedances, max_count = 0, 0, math.ceil(2 / level)
    while count < max_count:
        permutations = generator(0, "drift/permutations", count).permuted(np.tile(sides, (STEP, 1)), axis=1)
        exceedance_indices = np.flatnonzero((kids_of_splits(pairs, torch.from_numpy(permutations).T) >= kid).numpy())
        if exceedances + len(exceedance_indices) >= EXCEEDANCES:
            return float(kid), EXCEEDANCES / float(count + 1 + exceedance_indices[EXCEEDANCES - exceedances - 1])
        count, exceedances = count + STEP, exceedances + len(exceedance_indices)
    return float(kid), (exceedances + 1) / (count + 1)
