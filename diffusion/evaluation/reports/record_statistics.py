"""Statistics of the records of a data set version: pixels, sizes, duplicates and quarantine."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import SPLITS
from diffusion.data.manifest import Manifest, read_records
from diffusion.data.versions.versions import list_quarantine_reasons
from diffusion.evaluation.metrics.neighbours import connected_groups
from diffusion.evaluation.metrics.pixel_metrics import LUMA

MAX_HASHES = 100_000
"""Hashes that copies are compared with, at most."""
BINS = 32
"""Bins of a histogram."""
MEASURES = {"brightness": 256.0, "contrast": 128.0, "red": 256.0, "green": 256.0, "blue": 256.0}
"""Measures of an image and the upper end of each one's range, which starts at 0.

Brightness and colours are means over the pixels, contrast is their standard deviation. Grey images have the first two.
"""
EXAMPLES = 2
"""Sources given as examples."""
COLUMNS = (
    *("source", "outcome", "reason", "key", "split", "caption"),
    *("width", "height", "total", "squares", "phash", "near"),
)
VARIABLE = re.compile(r"(?<!\S)\S*[/\\]\S*|0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:[.,]\d+)*", re.IGNORECASE)
"""Paths, digests and numbers: what differs between two messages about the same problem."""


@dataclass
class RecordStatistics:
    """Statistics of the records of one version."""

    quarantine: dict[str, str]
    """Reasons of the files in quarantine by name."""
    histograms: np.ndarray
    """Kept images per split, measure and bin: (len(SPLITS), len(MEASURES), BINS) int64."""
    sums: np.ndarray
    """Sum of each measure over the kept images of each split: (len(SPLITS), len(MEASURES)) float64."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Kept images by width and height before they were resized."""
    captioned: int = 0
    hashed: int = 0
    """Kept images that were searched for near-duplicates."""
    hashes: list[str] = field(default_factory=list)
    """Perceptual hashes of the first MAX_HASHES of them."""
    contradicted: int = 0
    """Duplicates with another label or caption than the kept image."""
    most_duplicated: list[tuple[str, int, str, list[str]]] = field(default_factory=list)
    """Key, number of duplicates, source and first EXAMPLES sources of duplicates of the images with most of them."""
    near_duplicates: list[list[str]] = field(default_factory=list)
    """Groups of keys of near-duplicates, the largest group first."""


def collect_statistics(folder: Path, manifest: Manifest, progress: Progress = ignore_progress) -> RecordStatistics:
    """Compute the statistics of ``manifest``, a version of the data set in ``folder``; raises UserError if damaged."""
    (quarantine,) = list_quarantine_reasons([manifest], lambda part, columns: read_records(folder, part, columns))
    assert quarantine is not None  # read_records raises UserError where a table is missing
    shape = len(SPLITS), len(MEASURES)
    result = RecordStatistics(quarantine, np.zeros((*shape, BINS), np.int64), np.zeros(shape))
    duplicates, edges = [], []
    for number, part in enumerate(manifest.parts):
        progress("records read", number, len(manifest.parts))
        table = read_records(folder, part, COLUMNS)
        copies = table.filter(pc.field("outcome") == "duplicate")
        duplicates.append(copies.select(["key", "source"]))
        result.contradicted += len(copies) - copies["reason"].null_count
        rows = table.filter(pc.field("outcome") == "kept").combine_chunks()
        ends = rows["near"]
        edges.append(pa.table({"key": rows["key"].take(pc.list_parent_indices(ends)), "near": pc.list_flatten(ends)}))
        sizes = rows.group_by(["width", "height"]).aggregate([([], "count_all")]).to_pylist()
        result.sizes.update({(row["width"], row["height"]): row["count_all"] for row in sizes})
        result.captioned += pc.sum(pc.greater(pc.utf8_length(rows["caption"]), 0)).as_py() or 0
        result.hashed += len(rows) - rows["phash"].null_count
        result.hashes += rows["phash"].drop_null().slice(0, MAX_HASHES - len(result.hashes)).to_pylist()
        pixels = math.prod(part.shape or (manifest.size, manifest.size))
        measures, splits = _measure_images(rows, pixels), np.asarray(rows["split"])
        for number, split in enumerate(SPLITS):
            values = measures[splits == split]
            columns = zip(values.T, MEASURES.values(), strict=True)
            result.histograms[number] += [np.histogram(column, BINS, (0, high))[0] for column, high in columns]
            result.sums[number] += values.sum(0)
    copies, pairs = pa.concat_tables(duplicates), pa.concat_tables(edges)
    counts = copies.group_by("key").aggregate([([], "count_all")])
    leading = counts.sort_by([("count_all", "descending"), ("key", "ascending")]).slice(0, 6).to_pylist()
    nodes = pa.chunked_array([*pairs["key"].chunks, *pairs["near"].chunks], pa.string()).unique()
    keys = pa.array(sorted({row["key"] for row in leading}.union(nodes.to_pylist())), pa.string())
    row_filter = (pc.field("outcome") == "kept") & pc.field("key").isin(keys)
    sources: dict[str, str] = {}
    for part in manifest.parts if len(keys) else ():
        rows = read_records(folder, part, ("source", "outcome", "key")).filter(row_filter)
        sources |= zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True)
    for row in leading:
        if (key := row["key"]) in sources:
            examples = copies.filter(pc.field("key") == key)["source"].slice(0, EXAMPLES).to_pylist()
            result.most_duplicated.append((key, row["count_all"], sources[key], examples))
    first, second = (np.asarray(pc.index_in(pairs[name], nodes)) for name in ("key", "near"))
    groups = (nodes.take(group).to_pylist() for group in connected_groups(first, second, len(nodes)))
    standing_groups = (sorted(key for key in group if key in sources) for group in groups)
    several = (keys for keys in standing_groups if len(keys) > 1)
    result.near_duplicates = sorted(several, key=lambda keys: (-len(keys), keys[0]))
    progress("records read", len(manifest.parts), len(manifest.parts))
    return result


def group_reasons(quarantine: dict[str, str]) -> list[tuple[str, int, list[str]]]:
    """Group quarantined files by reason without what varies, most frequent first: reason, number, EXAMPLES sources."""
    sources: dict[str, list[str]] = {}
    for source, reason in quarantine.items():
        sources.setdefault(VARIABLE.sub("…", reason), []).append(source)
    groups = sorted(sources.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(pattern, len(names), names[:EXAMPLES]) for pattern, names in groups]


def _measure_images(rows: pa.Table, pixels: int) -> np.ndarray:
    """Compute MEASURES of each image from its sums over ``pixels`` pixels, (n, 5); grey counts for all channels."""
    moments = []
    for name in ("total", "squares"):
        padded_lists = pc.list_slice(rows[name], 0, 3, return_fixed_size_list=True)
        sums = np.asarray(pc.list_flatten(padded_lists), float).reshape(-1, 3)
        moments.append(np.where(np.isnan(sums), sums[:, :1], sums) / pixels)
    mean, squares = moments
    return np.column_stack([mean @ LUMA, np.sqrt(np.maximum(squares - mean**2, 0).mean(1)), mean])
