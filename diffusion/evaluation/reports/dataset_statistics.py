"""Statistics of a data set version from its records, and comparison of the images that it adds with its parent's."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.progress import Progress, silent
from diffusion.common.random import generator, permutation
from diffusion.data.dataset import SPLITS, Dataset, Rows
from diffusion.data.manifest import Manifest, Split, read_records
from diffusion.data.versions.versions import Quarantine, standing, unshared
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.distances import compute_kid, compute_moments, frechet_distance, kid_kernel
from diffusion.evaluation.reports.html import counted, signed

BINS = 32
"""Bins of a histogram."""
MEASURES = {"brightness": 256.0, "contrast": 128.0, "red": 256.0, "green": 256.0, "blue": 256.0}
"""Measures of an image and the upper end of each one's range, which starts at 0.

Brightness and colours are means over the pixels, contrast is their standard deviation. Grey images have the first two.
"""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
QUARANTINED = 500
"""Quarantined files listed one by one."""
EXAMPLES = 2
"""Sources given as examples."""
COLUMNS = (
    *("source", "outcome", "reason", "key", "split", "caption"),
    *("width", "height", "total", "squares", "phash", "near"),
)
VARIABLE = re.compile(r"\S*[/\\]\S*|0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:[.,]\d+)*", re.IGNORECASE)
"""Paths, digests and numbers: what differs between two messages about the same problem."""


@dataclass
class RecordStatistics:
    """Statistics of the records of one version."""

    quarantine: Quarantine
    """Files in quarantine, the first QUARANTINED of them by name."""
    histograms: dict[Split, np.ndarray]
    """Kept images per bin of each measure: (len(MEASURES), BINS) int64."""
    sums: dict[Split, np.ndarray]
    """Sum of each measure over the kept images: (len(MEASURES),) float64."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Kept images by width and height before they were resized."""
    captioned: int = 0
    hashed: int = 0
    """Kept images that were searched for near-duplicates."""
    contradicted: int = 0
    """Duplicates whose label or caption differs from that of the kept image."""
    most_duplicated: list[tuple[str, int, str, list[str]]] = field(default_factory=list)
    """Key, number of duplicates, source and first EXAMPLES sources of duplicates of the images with most of them."""
    near_duplicates: list[list[str]] = field(default_factory=list)
    """Groups of keys of near-duplicates, the largest group first."""


def collect_statistics(folder: Path, manifest: Manifest, progress: Progress = silent) -> RecordStatistics:
    """Compute the statistics of ``manifest``, a version of the data set in ``folder``.

    Raises:
        UserError: If a table of records is missing or damaged.
    """
    (quarantine,) = standing([manifest], lambda part, columns: read_records(folder, part, columns), QUARANTINED)
    assert quarantine is not None  # read_records raises UserError where a table is missing
    histograms = {split: np.zeros((len(MEASURES), BINS), np.int64) for split in SPLITS}
    result = RecordStatistics(quarantine, histograms, {split: np.zeros(len(MEASURES)) for split in SPLITS})
    duplicates, edges = [], []
    for number, part in enumerate(manifest.parts):
        progress("records read", number, len(manifest.parts))
        table = read_records(folder, part, COLUMNS)
        copies = table.filter(pc.field("outcome") == "duplicate")
        duplicates.append(copies.select(["key", "source"]))
        result.contradicted += len(copies) - copies["reason"].null_count
        kept = table.filter(pc.field("outcome") == "kept").combine_chunks()
        near = kept["near"]
        edges.append(pa.table({"key": kept["key"].take(pc.list_parent_indices(near)), "near": pc.list_flatten(near)}))
        sizes = kept.group_by(["width", "height"]).aggregate([([], "count_all")]).to_pylist()
        result.sizes.update({(row["width"], row["height"]): row["count_all"] for row in sizes})
        result.captioned += pc.sum(pc.greater(pc.utf8_length(kept["caption"]), 0)).as_py() or 0
        result.hashed += len(kept) - kept["phash"].null_count
        measures, splits = _measure_images(kept, manifest.size**2), np.asarray(kept["split"])
        for split in SPLITS:
            values = measures[splits == split]
            columns = zip(values.T, MEASURES.values(), strict=True)
            result.histograms[split] += [np.histogram(column, BINS, (0, high))[0] for column, high in columns]
            result.sums[split] += values.sum(0)
    copies, pairs = pa.concat_tables(duplicates), pa.concat_tables(edges)
    counts = copies.group_by("key").aggregate([([], "count_all")])
    leading = counts.sort_by([("count_all", "descending"), ("key", "ascending")]).slice(0, 6).to_pylist()
    nodes = pa.chunked_array([*pairs["key"].chunks, *pairs["near"].chunks], pa.string()).unique()
    sources = _find_sources(folder, manifest, {row["key"] for row in leading}.union(nodes.to_pylist()))
    for key, count in ((row["key"], row["count_all"]) for row in leading if row["key"] in sources):
        examples = copies.filter(pc.field("key") == key)["source"].slice(0, EXAMPLES).to_pylist()
        result.most_duplicated.append((key, count, sources[key], examples))
    ends = [np.asarray(pc.index_in(pairs[name], nodes)) for name in ("key", "near")]
    graph = coo_array((np.ones(len(pairs)), ends), (len(nodes), len(nodes)))
    groups: dict[int, list[str]] = {}
    for key, group in zip(nodes.to_pylist(), connected_components(graph, directed=False)[1].tolist(), strict=True):
        if key in sources:
            groups.setdefault(group, []).append(key)
    several = (sorted(keys) for keys in groups.values() if len(keys) > 1)
    result.near_duplicates = sorted(several, key=lambda keys: (-len(keys), keys[0]))
    progress("records read", len(manifest.parts), len(manifest.parts))
    return result


def simplify_reason(reason: str) -> str:
    """Replace every path, digest and number in ``reason`` by an ellipsis."""
    return VARIABLE.sub("…", reason)


def group_reasons(quarantine: Quarantine) -> list[tuple[str, int, list[str]]]:
    """Group quarantined files by simplified reason, the most frequent first: reason, number, first EXAMPLES sources."""
    counts: Counter[str] = Counter()
    for reason in quarantine.reasons:
        counts[simplify_reason(reason.reason)] += reason.count
    sources: dict[str, list[str]] = {}
    for entry in quarantine.samples:
        sources.setdefault(simplify_reason(entry.reason), []).append(entry.source)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(pattern, count, sources.get(pattern, [])[:EXAMPLES]) for pattern, count in ordered]


def _measure_images(kept: pa.Table, pixels: int) -> np.ndarray:
    """Compute MEASURES of each image from its sums over ``pixels`` pixels, (n, 5); grey counts for all channels."""
    moments = []
    for name in ("total", "squares"):
        padded = pc.list_slice(kept[name], 0, 3, return_fixed_size_list=True)
        sums = np.asarray(pc.list_flatten(padded), float).reshape(-1, 3)
        moments.append(np.where(np.isnan(sums), sums[:, :1], sums) / pixels)
    mean, squares = moments
    contrast = np.sqrt(np.maximum(squares - mean**2, 0).mean(1))
    return np.column_stack([mean @ LUMA, contrast, mean])


def _find_sources(folder: Path, manifest: Manifest, keys: Collection[str]) -> dict[str, str]:
    """Return the sources of the kept images among ``keys``."""
    chosen = (pc.field("outcome") == "kept") & pc.field("key").isin(pa.array(sorted(keys), pa.string()))
    found: dict[str, str] = {}
    for part in manifest.parts if keys else ():
        rows = read_records(folder, part, ("source", "outcome", "key")).filter(chosen)
        found.update(zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True))
    return found


MOST = 1000
"""Images compared on each side, at most."""
FEWEST = 50
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
        least_similar_rows=added[similarity.argsort(stable=True)[:16].numpy()],
    )


def split_by_parent(dataset: Dataset, parent: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of images that ``parent`` lacks and of those that it has, each (n,) int64.

    Images are unique in a data set, so only parts that the two versions do not share are compared.
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
        yield dataset.images(rows[start : start + step])


def measure_drift(added: Tensor, parent: Tensor, others: Tensor, extractor: str) -> tuple[Drift, np.ndarray]:
    """Compare features of ``added`` images with those of two disjoint samples of the parent's, each (n, D).

    Features have equal length. Also returns the KID of each permutation of ``added`` and ``parent``, (PERMUTATIONS,).
    """
    count, fitted = len(added), compute_moments(parent)
    added, parent, others = added.double(), parent.double(), others.double()
    both, baseline = (torch.cat([each, parent]) for each in (added, others))
    sides = np.tile(np.repeat([1.0, 0.0], count), (PERMUTATIONS, 1))
    first = torch.from_numpy(generator(0, "dataset report/permutations", 0).permuted(sides, axis=1)).T
    pairs = kid_kernel(both, both).fill_diagonal_(0)
    across = ((1 - first) * (pairs @ first)).sum(0)
    permuted_kids = (pairs.sum() - 2 * across) / (count * (count - 1)) - 2 * across / count**2
    drift = Drift(
        extractor=extractor,
        compared=count,
        kid=compute_kid(added, parent)[0],
        kid_baseline=compute_kid(others, parent)[0],
        kid_chance=float(permuted_kids.quantile(SIGNIFICANCE, interpolation="higher")),
        fd=frechet_distance(compute_moments(added), fitted),
        fd_baseline=frechet_distance(compute_moments(others), fitted),
        neighbor_accuracy=_neighbor_accuracy(both),
        neighbor_accuracy_baseline=_neighbor_accuracy(baseline),
    )
    return drift, permuted_kids.numpy()


def _neighbor_accuracy(features: Tensor) -> float:
    nearest = (features @ features.T).fill_diagonal_(-math.inf).argmax(1)
    side = torch.arange(len(features)) < len(features) // 2
    return float((side[nearest] == side).double().mean())


def _explain_too_few(added: int, parent: int) -> str:
    if not added:
        return "No image was added: there is nothing new to compare."
    if added < FEWEST:
        were = "was" if added == 1 else "were"
        return f"Only {counted(added, 'image')} {were} added: too few to tell whether they differ from the parent's."
    return f"The parent had only {counted(parent, 'image')}: too few to tell whether the new ones differ from them."
