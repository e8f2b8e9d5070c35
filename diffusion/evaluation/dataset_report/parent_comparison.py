"""Comparison of the images that a data set version adds with those of its parent."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import Manifest, read_records
from diffusion.data.versions import unshared
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features import make_extractor
from diffusion.evaluation.kid import kernel, kid
from diffusion.evaluation.moments import distance, moments
from diffusion.evaluation.pages import counted, signed
from diffusion.progress import Progress, silent
from diffusion.random import generator, permutation

MOST = 1000
"""Images compared on each side, at most."""
FEWEST = 50
"""Images needed on each side for a comparison."""
LEAST_SIMILAR = 16
"""Images listed that are least similar to the parent's."""
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
    """KID (arXiv 1801.01401) of the added images, unbiased; 0 is best, and it may come out slightly negative."""
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


def is_removal(manifest: Manifest) -> bool:
    """Whether this version was made by removing images."""
    return manifest.change.startswith("removal")


def compare_with_parent(dataset: Dataset, parent: Manifest | None, progress: Progress = silent) -> ParentComparison:
    """Compare the images that ``dataset`` adds to ``parent`` with the images of ``parent`` that it still has.

    Raises:
        UserError: If a table or a shard of the current version is missing or damaged.
    """
    manifest = dataset.manifest
    if parent is None:
        return ParentComparison("This is the first version: there is no parent to compare with.")
    if is_removal(manifest):
        return ParentComparison("This version only removed images: there is nothing new to compare.", added=0)
    if any(not (dataset.folder / part.records.name).is_file() for part in unshared(parent, manifest)):
        return ParentComparison("The parent's tables are no longer here, so new images cannot be told from its own.")
    added, others = (
        rows[permutation(0, f"dataset report/{name}", 0, len(rows))]
        for name, rows in zip(("added", "parent"), split_by_parent(dataset, parent), strict=True)
    )
    result = ParentComparison(_explain_too_few(len(added), len(others)), len(added), added, others)
    compared = min(MOST, len(added), len(others) // 2)
    if compared < FEWEST:
        return result
    extractor = make_extractor(EvaluationConfig())
    features: list[Tensor] = []
    for batch in read_batches(dataset, np.concatenate([added[:compared], others[: 2 * compared]])):
        progress("features of new images and of the parent's", sum(len(each) for each in features), 3 * compared)
        features.append(extractor(batch))
    new, reference, rest = torch.split(torch.cat(features), compared)
    drift, permuted_kids = measure_drift(new, reference, rest, extractor.name)
    similarity = (new @ torch.cat([reference, rest]).T).amax(1)
    return replace(
        result,
        verdict=f"The new images {'differ' if drift.differs else 'cannot be told apart'} from the parent's: "
        f"their KID is {signed(drift.kid)}, and chance alone reaches {signed(drift.kid_chance)}.",
        drift=drift,
        permuted_kids=permuted_kids,
        least_similar_rows=added[similarity.argsort(stable=True)[:LEAST_SIMILAR].numpy()],
    )


def split_by_parent(dataset: Dataset, parent: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of images that ``parent`` lacks and of those that it has, each (n,) int64.

    No image is in a data set twice, so only parts that the two versions do not share are compared.
    """
    new_parts = {part.number for part in unshared(dataset.manifest, parent)}
    with_shards = [part.number for part in dataset.manifest.parts if part.shard is not None]
    is_new = np.isin(dataset.shards(range(len(dataset))), np.flatnonzero(np.isin(with_shards, list(new_parts))))
    candidates = np.flatnonzero(is_new)
    keys = pa.array(dataset.keys(candidates), pa.string())
    for part in unshared(parent, dataset.manifest):
        kept = read_records(dataset.folder, part, ("key", "outcome")).filter(pc.field("outcome") == "kept")
        is_new[candidates[np.asarray(pc.is_in(keys, kept["key"].combine_chunks()))]] = False
    return np.flatnonzero(is_new), np.flatnonzero(~is_new)


def read_batches(dataset: Dataset, rows: Rows) -> Iterator[Tensor]:
    """Yield the images in ``rows`` in batches of at most BATCH_BYTES: (n, C, H, W) uint8."""
    step = max(1, BATCH_BYTES // int(np.prod(dataset.shape)))
    for start in range(0, len(rows), step):
        yield dataset.pictures(rows[start : start + step])


def measure_drift(added: Tensor, parent: Tensor, others: Tensor, extractor: str) -> tuple[Drift, np.ndarray]:
    """Compare features of ``added`` images with those of two disjoint samples of the parent's, each (n, D).

    Features have equal length. Also returns the KID of each permutation of ``added`` and ``parent``, (PERMUTATIONS,).
    """
    count, fitted = len(added), moments(parent)
    added, parent, others = added.double(), parent.double(), others.double()
    both, baseline = (torch.cat([each, parent]) for each in (added, others))
    sides = np.tile(np.repeat([1.0, 0.0], count), (PERMUTATIONS, 1))
    first = torch.from_numpy(generator(0, "dataset report/permutations", 0).permuted(sides, axis=1)).T
    pairs = kernel(both, both).fill_diagonal_(0)
    across = ((1 - first) * (pairs @ first)).sum(0)
    permuted_kids = (pairs.sum() - 2 * across) / (count * (count - 1)) - 2 * across / count**2
    drift = Drift(
        extractor=extractor,
        compared=count,
        kid=kid(added, parent).value,
        kid_baseline=kid(others, parent).value,
        kid_chance=float(permuted_kids.quantile(SIGNIFICANCE, interpolation="higher")),
        fd=distance(moments(added), fitted),
        fd_baseline=distance(moments(others), fitted),
        neighbor_accuracy=_neighbor_accuracy(both),
        neighbor_accuracy_baseline=_neighbor_accuracy(baseline),
    )
    return drift, permuted_kids.numpy()


def _neighbor_accuracy(features: Tensor) -> float:
    nearest = (features @ features.T).fill_diagonal_(-math.inf).argmax(1)
    return float(((nearest < len(features) // 2) == (torch.arange(len(features)) < len(features) // 2)).double().mean())


def _explain_too_few(added: int, parent: int) -> str:
    if not added:
        return "No image was added: there is nothing new to compare."
    if added < FEWEST:
        were = "was" if added == 1 else "were"
        return f"Only {counted(added, 'image')} {were} added: too few to tell whether they differ from the parent's."
    return f"The parent had only {counted(parent, 'image')}: too few to tell whether the new ones differ from them."
