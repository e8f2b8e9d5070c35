"""What a data set version adds to its parent, and whether the new images look different."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator, permutation
from diffusion.common.shapes import Images
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import Manifest
from diffusion.data.versions.versions import Elsewhere, find_nothing, find_records, find_unshared_parts
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import Extractor, make_extractor
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.kid import compute_kid, kid_kernel, kids_of_splits
from diffusion.evaluation.reports.html import format_signed

MAX_COMPARED = 1000
"""Images compared on each side, at most."""
MIN_COMPARED = 50
"""Images needed on each side for a comparison."""
BATCH_BYTES = 2**26
"""Bytes of images at full size in memory at a time."""
PERMUTATIONS = 499
"""Permutations of the two-sample test, whose false alarm rate is 1 % with the quantile SIGNIFICANCE."""
SIGNIFICANCE = 0.99


class Drift(Config):
    """Distances of added images and of other parent images (the baseline) from the same sample of the parent's."""

    extractor: str
    """Name of the features."""
    compared: int
    """Images on each side."""
    kid: float
    """KID (arXiv 1801.01401) of the added images, unbiased; 0 is best, and it may be slightly negative."""
    kid_baseline: float
    kid_chance: float
    """What the KID stays below in 99 of 100 random permutations of the images compared: the two-sample test of Gretton
    et al. (JMLR 13, 2012)."""
    fd: float
    """Fréchet distance (arXiv 1706.08500) of the added images: grows as they get fewer, so compare it with the
    baseline."""
    fd_baseline: float
    neighbor_accuracy: float
    """Share of the images whose nearest neighbour is of their own side, in [0, 1]: the leave-one-out accuracy of a
    nearest-neighbour two-sample test (arXiv 1610.06545); 0.5 if the sides do not differ."""
    neighbor_accuracy_baseline: float

    @property
    def differs(self) -> bool:
        """Whether the added images differ from the parent's by more than chance explains."""
        return self.kid > self.kid_chance


@dataclass(frozen=True)
class ParentComparison:
    """What a version adds to its parent, as rows of the data set in random order, and whether it looks different."""

    verdict: str
    added: int | None = None
    """Images that the parent lacks; None if there is no parent or its tables are gone."""
    added_rows: Rows = ()
    parent_rows: Rows = ()
    """Rows of the images that the parent has as well."""
    least_similar_rows: Rows = ()
    """Rows of the added images whose nearest neighbour among the parent's is farthest."""
    drift: Drift | None = None
    """None if there are too few images to compare."""
    permuted_kids: np.ndarray | None = None
    """KID of each permutation of the images compared, (PERMUTATIONS,) float64."""


def compare_with_parent(
    dataset: Dataset, parent: Manifest | None, progress: Progress = ignore_progress
) -> ParentComparison:
    """Compare the images that ``dataset`` adds to ``parent`` with the images of ``parent`` that it still has.

    Raises UserError if a table or a shard of the current version is missing or damaged.
    """
    manifest = dataset.manifest
    if parent is None:
        return ParentComparison("This is the first version: there is no parent to compare with.")
    if manifest.change.startswith("removal"):
        return ParentComparison("This version only removed images: there is nothing new to compare.", added=0)
    if any(not (dataset.folder / part.records.name).is_file() for part in find_unshared_parts(parent, manifest)):
        return ParentComparison("The parent's tables are no longer here, so new images cannot be told from its own.")
    added_rows, parent_rows = (
        rows[permutation(0, f"dataset report/{name}", 0, len(rows))]
        for name, rows in zip(("added", "parent"), split_by_parent(dataset, parent), strict=True)
    )
    if (sample_count := min(MAX_COMPARED, len(added_rows), len(parent_rows) // 2)) < MIN_COMPARED:
        if not len(added_rows):
            verdict = "No image was added: there is nothing new to compare."
        elif len(added_rows) < MIN_COMPARED:
            added_text = pluralize(len(added_rows), "image was", "images were")
            verdict = f"Only {added_text} added: too few to tell whether they differ from the parent's."
        else:
            parent_text = pluralize(len(parent_rows), "image")
            verdict = f"The parent had only {parent_text}: too few to tell whether the new ones differ from them."
        return ParentComparison(verdict, len(added_rows), added_rows, parent_rows)
    extractor = make_extractor(EvaluationConfig())
    rows = np.concatenate([added_rows[:sample_count], parent_rows[: 2 * sample_count]])
    features = extract_features(dataset, rows, extractor, "features of new images and of the parent's", progress)
    new_features, reference_features, other_features = torch.split(features, sample_count)
    drift, permuted_kids = measure_drift(new_features, reference_features, other_features, extractor.name)
    similarity = (new_features @ torch.cat([reference_features, other_features]).T).amax(1)
    least_similar = added_rows[similarity.argsort(stable=True)[:16].numpy()]
    verdict = (
        f"The new images {'differ' if drift.differs else 'cannot be told apart'} from the parent's: "
        f"their KID is {format_signed(drift.kid)}, and chance alone reaches {format_signed(drift.kid_chance)}."
    )
    return ParentComparison(verdict, len(added_rows), added_rows, parent_rows, least_similar, drift, permuted_kids)


def split_by_parent(
    dataset: Dataset, parent: Manifest, elsewhere: Elsewhere = find_nothing
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of images that ``parent`` lacks and of those that it has, each (n,) int64.

    Images are unique in a data set, so only parts that the two versions do not share are compared. Raises UserError if
    one of their tables is neither in the data set's folder nor ``elsewhere``.
    """
    new_parts = [part.number for part in find_unshared_parts(dataset.manifest, parent)]
    shard_parts = [part.number for part in dataset.manifest.parts if part.shard is not None]
    is_new = np.isin(dataset.shards(range(len(dataset))), np.flatnonzero(np.isin(shard_parts, new_parts)))
    candidates = np.flatnonzero(is_new)
    keys = pa.array(dataset.keys(candidates), pa.string())
    for part in find_unshared_parts(parent, dataset.manifest):
        if (table := find_records(dataset.folder, part, ("key", "outcome"), elsewhere)) is None:
            raise UserError(f"{part.records.name} of version {parent.digest[:12]} is gone: see `darkroom data log`")
        kept_rows = table.filter(pc.field("outcome") == "kept")
        is_new[candidates[np.asarray(pc.is_in(keys, kept_rows["key"].combine_chunks()))]] = False
    return np.flatnonzero(is_new), np.flatnonzero(~is_new)


def read_batches(dataset: Dataset, rows: Rows) -> Iterator[Images]:
    """Yield the images in ``rows``, of any shapes, in batches of about BATCH_BYTES: (C, H, W) uint8 each."""
    step = max(1, BATCH_BYTES // int(np.prod(dataset.shape)))
    for start in range(0, len(rows), step):
        yield dataset.images_in_order(rows[start : start + step])


def extract_features(dataset: Dataset, rows: Rows, extractor: Extractor, what: str, progress: Progress) -> Tensor:
    """Compute features of the images in ``rows``, (len(rows), D); ``progress`` calls them ``what``."""
    features: list[Tensor] = []
    for batch in read_batches(dataset, rows):
        progress(what, sum(map(len, features)), len(rows))
        features.append(extractor(batch))
    return torch.cat(features)


def measure_drift(added: Tensor, parent: Tensor, others: Tensor, extractor: str) -> tuple[Drift, np.ndarray]:
    """Compare features of ``added`` images with two disjoint samples of the parent's, each (n, D).

    Features have equal length. Also returns the KID of each permutation of ``added`` and ``parent``, (PERMUTATIONS,).
    """
    count, parent_moments = len(added), compute_moments(parent)
    added, parent, others = added.double(), parent.double(), others.double()
    features = torch.cat([added, parent])
    sides = np.tile(np.repeat([1.0, 0.0], count), (PERMUTATIONS, 1))
    splits = torch.from_numpy(generator(0, "dataset report/permutations", 0).permuted(sides, axis=1)).T
    permuted_kids = kids_of_splits(kid_kernel(features, features).fill_diagonal_(0), splits)
    drift = Drift(
        extractor=extractor,
        compared=count,
        kid=compute_kid(added, parent)[0],
        kid_baseline=compute_kid(others, parent)[0],
        kid_chance=float(permuted_kids.quantile(SIGNIFICANCE, interpolation="higher")),
        fd=frechet_distance(compute_moments(added), parent_moments),
        fd_baseline=frechet_distance(compute_moments(others), parent_moments),
        neighbor_accuracy=_neighbor_accuracy(features),
        neighbor_accuracy_baseline=_neighbor_accuracy(torch.cat([others, parent])),
    )
    return drift, permuted_kids.numpy()


def _neighbor_accuracy(features: Tensor) -> float:
    nearest = (features @ features.T).fill_diagonal_(-math.inf).argmax(1)
    side = torch.arange(len(features)) < len(features) // 2
    return float((side[nearest] == side).double().mean())
