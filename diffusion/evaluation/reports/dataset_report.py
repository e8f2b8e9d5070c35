"""Self-contained HTML page on a data set version: sample images, charts, tables and key figures.

Statistics come from the version's records; the images that it adds are compared with its parent's.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.ticker import NullLocator
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown, pluralize
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import make_grid, png_bytes, to_pil_image
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator, permutation
from diffusion.common.shapes import Images, Shape, height_and_width, map_by_shape, shape_name, stack_images
from diffusion.data.dataset import SPLITS, Dataset, Rows
from diffusion.data.ingest.calibration import HashThreshold, calibrate_thresholds
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import Manifest, Outcome, Split, read_records, versions
from diffusion.data.versions.versions import (
    Elsewhere,
    find_nothing,
    find_records,
    find_unshared_parts,
    list_quarantine_reasons,
    log,
    show,
)
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.kid import compute_kid, kid_kernel, kids_of_splits
from diffusion.evaluation.metrics.neighbours import connected_groups
from diffusion.evaluation.metrics.pixel_metrics import LUMA
from diffusion.evaluation.reports.charts import DASHED, Chart, Paper, chart
from diffusion.evaluation.reports.html import (
    format_count,
    format_plain,
    format_share,
    format_signed,
    format_size,
    render,
)

CALIBRATED, HASHES = 300, 100_000
"""Images whose copies calibrate the search for near-duplicates, and images that they are compared with at most."""
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
    """Perceptual hashes of the first HASHES of them."""
    contradicted: int = 0
    """Duplicates whose label or caption differs from that of the kept image."""
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
        result.hashes += rows["phash"].drop_null().slice(0, HASHES - len(result.hashes)).to_pylist()
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
    features: list[Tensor] = []
    for batch in read_batches(dataset, np.concatenate([added_rows[:sample_count], parent_rows[: 2 * sample_count]])):
        progress("features of new images and of the parent's", sum(len(piece) for piece in features), 3 * sample_count)
        features.append(map_by_shape(batch, extractor))
    new_features, reference_features, other_features = torch.split(torch.cat(features), sample_count)
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
    a table of theirs is neither in the data set's folder nor ``elsewhere``.
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
        images: dict[int, Tensor] = {}
        for bucket_rows in dataset.split_by_bucket(rows[start : start + step]):
            images |= zip(bucket_rows.tolist(), dataset.images(bucket_rows), strict=True)
        yield stack_images([images[int(row)] for row in rows[start : start + step]])


def measure_drift(added: Tensor, parent: Tensor, others: Tensor, extractor: str) -> tuple[Drift, np.ndarray]:
    """Compare features of ``added`` images with those of two disjoint samples of the parent's, each (n, D).

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


SIDE = 64
"""Longer side to which larger images are reduced, in pixels."""
AVERAGED = 2000
"""Images averaged for a mean image, at most; a tenth of it for the mean image of a class."""
CLASS_NAMES = 8
"""Classes named in a sentence."""
VERSIONS = 30
"""Versions listed."""


class DatasetSummary(Config):
    """Key figures of a data set version."""

    name: str
    digest: str
    """Digest of the manifest, the name of the version."""
    content_digest: str
    parent: str | None
    """Digest of the parent version; None for the first."""
    change: str
    """What created this version from its parent."""
    kept: int
    train: int
    held_out: int
    added: int | None
    """Kept images that the parent lacks; None if there is no parent or its tables are gone."""
    lost: int | None
    """Images of the parent that are no longer kept; None as above."""
    duplicates: int
    contradicted: int
    """Duplicates whose label or caption differs from that of the kept image."""
    quarantined: int
    removed: int
    """Images taken down, in this version and before."""
    dropped: int | None = Field(None, exclude_if=is_unset)
    """Images that the rules of curation leave out; None if there are none."""
    near_duplicate_groups: int | None
    """None if near-duplicates were not searched for."""
    near_duplicates: int | None
    classes: int
    captioned: int
    channels: int
    size: int
    """Height and width of the stored images, in pixels; with buckets, of the square of about as many pixels."""
    buckets: dict[str, int] | None = Field(None, exclude_if=is_unset)
    """Number of images of each shape, as WIDTHxHEIGHT; None: all are square."""
    storage: StorageConfig
    shards: int
    bytes: int
    """Size of all files of this version but its manifest."""
    verdict: str
    """Whether the added images differ from the parent's, in a sentence."""
    drift: Drift | None
    """None if there are too few images to compare."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers as flat metrics."""
        numbers = self.model_dump(exclude={"storage", "drift"})
        metrics = {f"dataset_{name}": float(value) for name, value in numbers.items() if isinstance(value, int)}
        if self.drift is not None:
            figures = self.drift.model_dump(exclude={"extractor", "compared"})
            metrics |= {f"drift_{name}_{self.drift.extractor}": value for name, value in figures.items()}
            metrics["drift_compared"] = float(self.drift.compared)
        return metrics

    def markdown(self) -> str:
        """Return the figures as a Markdown table, every text escaped."""
        parent = f"`{self.parent}`" if self.parent else "nothing"
        lines = {
            "Version": f"`{self.digest}`",
            "Content": f"`{self.content_digest}`",
            "Made": f"by {escape_markdown(self.change)} from {parent}",
            "Images": f"{self.kept:,}: {self.train:,} for training, {self.held_out:,} held out",
            "Compared with the parent": None if self.added is None else f"{self.added:,} new, {self.lost or 0:,} gone",
            "Duplicates left out": f"{self.duplicates:,}",
            "In quarantine": f"{self.quarantined:,}",
            "Taken down": f"{self.removed:,}",
            "Dropped by curation": self.dropped is not None and f"{self.dropped:,}",
            "Near-duplicates": self.near_duplicate_groups is not None
            and f"{self.near_duplicates:,} in {pluralize(self.near_duplicate_groups, 'group')}",
            "Classes": f"{self.classes:,}",
            "With a caption": format_share(self.captioned, self.kept),
            "Stored as": f"{self.size}×{self.size}, {'RGB' if self.channels == 3 else 'grey'}",
            "Buckets": self.buckets and ", ".join(f"{name}: {images:,}" for name, images in self.buckets.items()),
            "Files": f"{format_size(self.bytes)} with {pluralize(self.shards, 'shard')}",
        }
        if (drift := self.drift) is not None:
            lines |= {
                "KID": f"{format_signed(drift.kid)}, and chance alone reaches {format_signed(drift.kid_chance)}",
                "Fréchet distance": f"{format_plain(drift.fd)}, baseline {format_plain(drift.fd_baseline)}",
                "Neighbour accuracy": f"{drift.neighbor_accuracy:.1%}, baseline {drift.neighbor_accuracy_baseline:.1%}",
            }
        table = "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)
        return f"# Data set {escape_markdown(self.name)}\n\n{self.verdict}\n\n| | |\n|---|---|\n{table}\n"


def write_dataset_report(folder: Path, output: Path, progress: Progress = ignore_progress) -> DatasetSummary:
    """Write the page on the current version of the data set in ``folder`` to ``output``; equal versions, equal pages.

    Raises UserError if a file of the version is missing or damaged.
    """
    with closing(Dataset.open(folder, cache_bytes=0)) as dataset:  # few images are read, and at most twice
        line = islice(versions(folder), 1, None)
        manifest, parent = dataset.manifest, next(line, None)
        if manifest.change == "curation" and parent is not None and parent.change.startswith(("ingest", "merge of ")):
            # What an ingest or a merge, and the rules after it made is compared with what was there before.
            parent = next(line, parent)
        statistics = collect_statistics(folder, manifest, progress)
        comparison = compare_with_parent(dataset, parent, progress)
        summary = summarize(manifest, parent, statistics, comparison)
        reasons = group_reasons(statistics.quarantine)
        history = list(islice(log(folder), VERSIONS + 1))
        order = permutation(0, "dataset report/sample", 0, len(dataset))
        page = render(
            "dataset.html",
            summary=summary,
            findings=describe(summary, reasons, manifest, parent),
            statistics=statistics,
            reasons=reasons,
            dropped=show(folder, manifest).rules if manifest.dropped else None,
            comparison=comparison,
            kid_chart=_kid_chart(comparison),
            history=history[:VERSIONS],
            older=len(history) > VERSIONS,
            histograms=draw_histograms(statistics, manifest.channels),
            order=order,
            sheet=partial(_sheet, dataset),
            mean_image=partial(_mean_image, dataset),
            find_rows=partial(_find_rows, dataset),
            splits_of=partial(_name_splits, dataset),
            **_original_sizes(statistics, manifest),
            **_shapes(dataset, order),
            **_classes_and_captions(dataset, order, statistics),
            **_near_duplicate_thresholds(dataset, order, statistics),
        )
    write_bytes(output, page)
    return summary


def summarize(
    manifest: Manifest, parent: Manifest | None, statistics: RecordStatistics, comparison: ParentComparison
) -> DatasetSummary:
    """Summarize a version in numbers."""
    outcomes = sum((Counter(part.outcomes) for part in manifest.parts), Counter[Outcome]())
    groups, added_count = statistics.near_duplicates if statistics.hashed else None, comparison.added
    fields = ("name", "digest", "content_digest", "parent", "change", "kept", "channels", "size", "buckets", "storage")
    return DatasetSummary(
        **{name: getattr(manifest, name) for name in fields},
        train=manifest.counts["train"],
        held_out=manifest.counts["held_out"],
        added=added_count,
        lost=None if parent is None or added_count is None else parent.kept + added_count - manifest.kept,
        duplicates=outcomes["duplicate"],
        contradicted=statistics.contradicted,
        quarantined=len(statistics.quarantine),
        removed=outcomes["removed"],
        dropped=manifest.dropped or None,
        near_duplicate_groups=None if groups is None else len(groups),
        near_duplicates=None if groups is None else sum(map(len, groups)),
        classes=len(manifest.labels),
        captioned=statistics.captioned,
        shards=len(manifest.shards),
        bytes=sum(entry.bytes for entry in manifest.files),
        verdict=comparison.verdict,
        drift=comparison.drift,
    )


def _kid_chart(comparison: ParentComparison) -> Chart | None:
    """Draw KID of the new images among those of random permutations; None: they were not compared."""
    if comparison.drift is None or comparison.permuted_kids is None:
        return None
    test = partial(draw_permutation_test, permuted_kids=comparison.permuted_kids, kid=comparison.drift.kid)
    return chart("KID of the new images and of random permutations", test, (10, 1.7))


def _original_sizes(statistics: RecordStatistics, manifest: Manifest) -> dict[str, Any]:
    """Return the page's values on the widths and heights that images had in their source."""
    areas = np.array([math.prod(size) for size in statistics.sizes])
    sides, images = np.array([min(size) for size in statistics.sizes]), np.array(list(statistics.sizes.values()))
    size_chart = None
    if len(statistics.sizes) > 1:
        size_chart = chart("Original widths and heights", partial(draw_sizes, sizes=statistics.sizes), (3.6, 3.5))
    return {
        "size_chart": size_chart,
        "sizes": sorted(statistics.sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:8],
        "sides": (sides.min(), -np.quantile(-sides, 0.5, weights=images, method="inverted_cdf"), sides.max()),
        "smaller": int(images[areas < manifest.size**2 if manifest.buckets else sides < manifest.size].sum()),
    }


def _shapes(dataset: Dataset, order: Rows) -> dict[str, Any]:
    """Return the page's values on the shapes of stored images, with rows of each in the given ``order``."""
    manifest = dataset.manifest
    return {
        "shape_counts": list(zip(manifest.storage.buckets or (), *manifest.shape_counts.values(), strict=False)),
        "bucket_rows": [
            (shape_name(dataset.shapes[int(dataset.buckets(bucket_rows[:1])[0])]), bucket_rows[:12])
            for bucket_rows in (dataset.split_by_bucket(order) if manifest.buckets else [])
        ],
    }


def _classes_and_captions(dataset: Dataset, order: Rows, statistics: RecordStatistics) -> dict[str, Any]:
    """Return the page's values on classes and captions, with rows of each in the given ``order``."""
    manifest = dataset.manifest
    by_size = sorted(manifest.class_histogram.items(), key=lambda pair: (-pair[1], pair[0]))
    held_out = Counter(label for label in dataset.labels(dataset.rows("held_out")) if label is not None)
    leading = [name for name, _ in by_size[:12]]
    numbers = dataset.classes(order, leading).numpy()
    captions = dataset.captions(order[:AVERAGED]) if statistics.captioned else []
    return {
        "classes": by_size,
        "held_out": held_out,
        "untrained": sum(total == held_out[name] for name, total in by_size),
        "unlabelled": manifest.kept - sum(manifest.class_histogram.values()),
        "averaged": AVERAGED,
        "class_rows": [(name, order[numbers == number]) for number, name in enumerate(leading)],
        "captions": [(row, text) for row, text in zip(order, captions, strict=False) if text],
    }


def _near_duplicate_thresholds(dataset: Dataset, order: Rows, statistics: RecordStatistics) -> dict[str, Any]:
    """Return the page's values on thresholds of near-duplicates, by the first images of ``order``."""
    manifest_bits = dataset.manifest.near_duplicate_bits
    thresholds, sufficient_bits = list[HashThreshold](), None
    if len(order) and len(statistics.hashes) > 1:
        images = [to_pil_image(image) for batch in read_batches(dataset, order[:CALIBRATED]) for image in batch]
        thresholds, sufficient_bits = calibrate_thresholds(images, statistics.hashes, manifest_bits)
    return {
        "thresholds": thresholds,
        "enough": sufficient_bits,
        "recorded": manifest_bits,
        "missed": next((1 - threshold.copies for threshold in thresholds if threshold.bits == manifest_bits), 0),
    }


def _sheet(dataset: Dataset, rows: Rows, columns: int = 8) -> bytes:
    """Lay out the images of ``rows`` in a PNG."""
    return png_bytes(make_grid(_thumbnails(dataset, rows), columns, pad=0 if len(rows) == 1 else 2))


def _mean_image(dataset: Dataset, rows: Rows) -> bytes:
    """Average the images of ``rows`` in a PNG; those of several shapes are stretched to the square."""
    square = (min(SIDE, dataset.manifest.size),) * 2
    images = _thumbnails(dataset, rows)
    stack = images if isinstance(images, Tensor) else torch.cat([_reduce(image[None], square) for image in images])
    return png_bytes(make_grid(stack.double().mean(0, keepdim=True).round().to(torch.uint8), pad=0))


def _find_rows(dataset: Dataset, keys: Sequence[str]) -> list[int]:
    """Find the rows of a few kept images by binary search."""
    return [bisect_left(range(len(dataset)), key, key=lambda row: dataset.keys([row])[0]) for key in keys]


def _name_splits(dataset: Dataset, rows: Sequence[int]) -> str:
    """Name the splits in which ``rows`` are."""
    is_held_out = np.isin(rows, dataset.rows("held_out"))
    return "held out" if is_held_out.all() else "both splits" if is_held_out.any() else "training"


def describe(
    summary: DatasetSummary,
    reasons: Sequence[tuple[str, int, list[str]]],
    manifest: Manifest,
    parent: Manifest | None,
) -> list[str]:
    """Return the most important findings as sentences."""
    form = f"{manifest.stored_as} in {'colour' if summary.channels == 3 else 'grey'}"
    lines = [f"{pluralize(summary.kept, 'image')} of {form}; {format_count(summary.held_out)} held out from training."]
    if parent is not None:
        parts = [] if manifest.change.startswith("removal") else find_unshared_parts(manifest, parent)
        if manifest.change == "curation":
            # It writes tables anew of parts that were read before.
            parent_numbers = {part.number for part in parent.parts}
            parts = [part for part in parts if part.number not in parent_numbers]
        if outcomes := sum((Counter(part.outcomes) for part in parts), Counter[Outcome]()):
            new, copies, bad = (format_count(outcomes[outcome]) for outcome in ("kept", "duplicate", "quarantined"))
            total = pluralize(outcomes.total(), "file")
            lines.append(
                f"Of {total} read for this version, {new} were new images, {copies} duplicates, {bad} quarantined."
            )
        ours, theirs = set(manifest.labels), set(parent.labels)
        if new_classes := sorted(ours - theirs):
            lines.append(f"{pluralize(len(new_classes), 'new class', 'new classes')}: {_enumerate(new_classes)}.")
        if lost_classes := sorted(theirs - ours):
            lines.append(f"{pluralize(len(lost_classes), 'class', 'classes')} gone: {_enumerate(lost_classes)}.")
    if summary.lost:
        lines.append(f"{pluralize(summary.lost, 'image of its parent is', 'images of its parent are')} gone.")
    lines.append(summary.verdict)
    if summary.quarantined:
        pattern, files, _ = reasons[0]
        number = "all" if files == summary.quarantined else format_count(files)
        percent = format_share(summary.quarantined, summary.kept + summary.duplicates + summary.quarantined)
        lines.append(
            f"{percent} of all files are in quarantine ({format_count(summary.quarantined)}), {number} for this "
            f"reason: {pattern}."
        )
    return lines


def draw_permutation_test(axes: Axes, paper: Paper, permuted_kids: np.ndarray, kid: float) -> None:
    """Draw the KID of the added images beside the histogram of the KIDs of random permutations."""
    axes.stairs(*np.histogram(permuted_kids, 24), color=paper.muted, alpha=0.6, fill=True)
    axes.axvline(kid, color=paper.series[0], linewidth=2.5)
    axes.set(yticks=[], xlabel="KID")


def draw_sizes(axes: Axes, paper: Paper, sizes: Mapping[tuple[int, int], int]) -> None:
    """Draw how many images have which width and height, on equal logarithmic axes, and a dashed line for squares."""
    widths, heights = np.array(list(sizes)).T
    low, high = min(widths.min(), heights.min()) / 1.15, max(widths.max(), heights.max()) * 1.15
    edges, (faint, full) = np.geomspace(low, high, 41), ((*to_rgb(paper.series[0]), alpha) for alpha in (0.2, 1))
    colours = LinearSegmentedColormap.from_list("sizes", [faint, full])
    weights = list(sizes.values())
    axes.hist2d(widths, heights, [edges, edges], weights=weights, cmin=1, cmap=colours, norm=PowerNorm(0.5, vmin=0))
    axes.plot([low, high], [low, high], color=paper.muted, linewidth=1, linestyle=DASHED)
    octaves = 2.0 ** np.arange(np.ceil(np.log2(low)), np.log2(high))
    ticks = octaves[:: -(-len(octaves) // 7)] if len(octaves) > 1 else [low, high]
    labels = [f"{tick:,.0f}" for tick in ticks]
    axes.set(xscale="log", xlim=(low, high), xlabel="width in pixels")
    axes.set(yscale="log", ylim=(low, high), ylabel="height in pixels")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(ticks, labels)
    axes.set_box_aspect(1)


def draw_histograms(statistics: RecordStatistics, channels: int) -> list[tuple[str, Chart, dict[Split, float]]]:
    """Return name, histogram and mean by split of each measure of images with these ``channels``."""

    def draw(axes: Axes, paper: Paper, counts: np.ndarray, high: float) -> None:
        edges = np.linspace(0, high, BINS + 1)
        for split, colour, bins in zip(SPLITS, paper.series, counts, strict=False):
            if total := bins.sum():
                axes.stairs(bins / total, edges, color=colour, linewidth=1.6)
                if split == "train":
                    axes.stairs(bins / total, edges, color=colour, alpha=0.16, fill=True)
        axes.set(xlim=(0, high), ylim=(0, None), xticks=np.linspace(0, high, 5), yticks=[])

    histograms = []
    images = dict(zip(SPLITS, statistics.histograms[:, 0].sum(1), strict=True))
    for number, (name, high) in enumerate(list(MEASURES.items())[: 5 if channels == 3 else 2]):
        sums = zip(images.items(), statistics.sums[:, number], strict=True)
        means = {split: total / n for (split, n), total in sums if n}
        draw_measure = partial(draw, counts=statistics.histograms[:, number], high=high)
        size = (4.9, 1.8) if number < 2 else (3.2, 1.5)
        histograms.append((name, chart(f"Histogram of {name}", draw_measure, size), means))
    return histograms


def _thumbnails(dataset: Dataset, rows: Rows) -> Images:
    """Return the images in ``rows``, (C, h, w) uint8 each; of large ones the longer side is reduced to SIDE."""
    thumbnails: list[Tensor] = []
    for batch in read_batches(dataset, rows):
        for images in [batch] if isinstance(batch, Tensor) else [image[None] for image in batch]:
            sides = height_and_width(images)
            if (longer_side := max(sides)) > SIDE:
                images = _reduce(images, (round(sides[0] * SIDE / longer_side), round(sides[1] * SIDE / longer_side)))
            thumbnails += images
    return stack_images(thumbnails)


def _reduce(images: Tensor, shape: Shape) -> Tensor:
    return interpolate(images.float(), shape, mode="area").round().to(torch.uint8)


def _enumerate(names: Sequence[str]) -> str:
    remainder = len(names) - CLASS_NAMES
    return ", ".join(names[:CLASS_NAMES]) + (f" and {format_count(remainder)} more" if remainder > 0 else "")
