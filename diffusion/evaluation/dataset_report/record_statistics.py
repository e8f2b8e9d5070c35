"""Statistics of a data set version, computed from its records one part at a time.

Memory grows with the number of duplicates and near-duplicates, not with the number of images.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffusion.data.dataset import SPLITS
from diffusion.data.manifest import Manifest, Split, read_records
from diffusion.data.quarantine import Quarantine, standing
from diffusion.progress import Progress, silent

BINS = 32
"""Bins of a histogram."""
MEASURES = {"brightness": 256.0, "contrast": 128.0, "red": 256.0, "green": 256.0, "blue": 256.0}
"""Measures of an image and the upper end of each one's range, which starts at 0.

Brightness and colours are means over the pixels, contrast is their standard deviation. Grey images have the first two.
"""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
MOST_DUPLICATED = 6
"""Images listed that came more than once."""
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


class DuplicatedImage(NamedTuple):
    """Kept image, with the sources of its first EXAMPLES duplicates."""

    key: str
    copies: int
    source: str
    copy_sources: list[str]


class ReasonGroup(NamedTuple):
    """Quarantined files whose reasons differ only in paths, digests and numbers, with the first EXAMPLES sources."""

    pattern: str
    files: int
    sources: list[str]


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
    most_duplicated: list[DuplicatedImage] = field(default_factory=list)
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
    leading = counts.sort_by([("count_all", "descending"), ("key", "ascending")]).slice(0, MOST_DUPLICATED).to_pylist()
    nodes = pa.chunked_array([*pairs["key"].chunks, *pairs["near"].chunks], pa.string()).unique()
    sources = _find_sources(folder, manifest, {row["key"] for row in leading}.union(nodes.to_pylist()))
    for key, count in ((row["key"], row["count_all"]) for row in leading if row["key"] in sources):
        examples = copies.filter(pc.field("key") == key)["source"].slice(0, EXAMPLES).to_pylist()
        result.most_duplicated.append(DuplicatedImage(key, count, sources[key], examples))
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


def group_reasons(quarantine: Quarantine) -> list[ReasonGroup]:
    """Group what is in quarantine by its simplified reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for reason in quarantine.reasons:
        counts[simplify_reason(reason.reason)] += reason.count
    sources: dict[str, list[str]] = {}
    for entry in quarantine.samples:
        sources.setdefault(simplify_reason(entry.reason), []).append(entry.source)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [ReasonGroup(pattern, count, sources.get(pattern, [])[:EXAMPLES]) for pattern, count in ordered]


def _measure_images(kept: pa.Table, pixels: int) -> np.ndarray:
    """MEASURES of each image from its sums over ``pixels`` pixels, (n, 5); grey counts for all three channels."""
    moments = []
    for name in ("total", "squares"):
        padded = pc.list_slice(kept[name], 0, 3, return_fixed_size_list=True)
        sums = np.asarray(pc.list_flatten(padded), float).reshape(-1, 3)
        moments.append(np.where(np.isnan(sums), sums[:, :1], sums) / pixels)
    mean, squares = moments
    contrast = np.sqrt(np.maximum(squares - mean**2, 0).mean(1))
    return np.column_stack([mean @ LUMA, contrast, mean])


def _find_sources(folder: Path, manifest: Manifest, keys: Collection[str]) -> dict[str, str]:
    """Sources of the kept images among ``keys``."""
    chosen = (pc.field("outcome") == "kept") & pc.field("key").isin(pa.array(sorted(keys), pa.string()))
    found: dict[str, str] = {}
    for part in manifest.parts if keys else ():
        rows = read_records(folder, part, ("source", "outcome", "key")).filter(chosen)
        found.update(zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True))
    return found
