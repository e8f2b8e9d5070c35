"""Self-contained HTML page on a data set version: sample images, charts, tables and key figures.

Statistics come from the version's records.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.ticker import NullLocator
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import make_grid, png_bytes, to_pil_image
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import permutation
from diffusion.common.shapes import Images, Shape, height_and_width, shape_name, stack_images
from diffusion.data.dataset import SPLITS, Dataset, Rows
from diffusion.data.ingest.calibration import HashThreshold, calibrate_thresholds
from diffusion.data.manifest import Split, read_manifest, versions
from diffusion.data.shards import ShardStore, open_missing_shards
from diffusion.data.versions.versions import log, show
from diffusion.evaluation.reports.charts import DASHED, Chart, Paper, chart
from diffusion.evaluation.reports.dataset_summary import DatasetSummary, describe, summarize
from diffusion.evaluation.reports.html import Sections, render_page
from diffusion.evaluation.reports.record_statistics import (
    BINS,
    MEASURES,
    RecordStatistics,
    collect_statistics,
    group_reasons,
)

SIDE = 64
"""Longer side to which larger images are reduced, in pixels."""
BATCH_BYTES = 2**26
"""Bytes of images at full size in memory at a time."""
AVERAGED = 2000
"""Images averaged for a mean image, at most; a tenth of it for the mean image of a class."""
CALIBRATED = 300
"""Images whose copies calibrate the search for near-duplicates."""
PRECEDING = {"curation": ("ingest",), "captions": ("curation", "ingest")}
"""What a step makes its version after; a page is about all of them together."""
VERSIONS = 30
"""Versions listed."""


@dataclass(frozen=True)
class DatasetPage:
    """What the sections of the page show."""

    dataset: Dataset
    summary: DatasetSummary
    statistics: RecordStatistics
    reasons: list[tuple[str, int, list[str]]]
    """Reasons of the quarantine: see ``group_reasons``."""
    order: np.ndarray
    """All rows in random order."""

    @cached_property
    def classes(self) -> list[tuple[str, int]]:
        """Return the classes with their numbers of images, the largest first."""
        return sorted(self.dataset.manifest.class_histogram.items(), key=lambda pair: (-pair[1], pair[0]))

    @cached_property
    def class_rows(self) -> list[tuple[str, np.ndarray]]:
        """Return rows of the largest classes, in random order."""
        leading = [name for name, _ in self.classes[:12]]
        numbers = self.dataset.classes(self.order, leading).numpy()
        return [(name, self.order[numbers == number]) for number, name in enumerate(leading)]

    @property
    def unlabelled(self) -> int:
        """Return the number of images without a class."""
        return self.summary.kept - sum(total for _, total in self.classes)

    def sheet(self, rows: Rows, columns: int = 8) -> bytes:
        """Lay out the images of ``rows`` in a PNG."""
        return png_bytes(make_grid(self.thumbnails(rows), columns, pad=0 if len(rows) == 1 else 2))

    def mean_image(self, rows: Rows) -> bytes:
        """Average the images of ``rows`` in a PNG; images of several shapes are stretched to the square."""
        square = (min(SIDE, self.summary.size),) * 2
        images = self.thumbnails(rows)
        stack = images if isinstance(images, Tensor) else torch.cat([_reduce(image[None], square) for image in images])
        return png_bytes(make_grid(stack.double().mean(0, keepdim=True).round().to(torch.uint8), pad=0))

    def thumbnails(self, rows: Rows) -> Images:
        """Return the images in ``rows``, (C, h, w) uint8 each; of large ones the longer side is reduced to SIDE."""
        thumbnails: list[Tensor] = []
        for batch in read_batches(self.dataset, rows):
            for image in batch:
                height, width = height_and_width(image)
                if (side := max(height, width)) > SIDE:
                    image = _reduce(image[None], (round(height * SIDE / side), round(width * SIDE / side)))[0]
                thumbnails.append(image)
        return stack_images(thumbnails)

    def find_rows(self, keys: Sequence[str]) -> list[int]:
        """Find the rows of a few kept images by binary search."""
        dataset = self.dataset
        return [bisect_left(range(len(dataset)), key, key=lambda row: dataset.keys([row])[0]) for key in keys]

    def splits_of(self, rows: Sequence[int]) -> str:
        """Name the splits in which ``rows`` are."""
        is_held_out = np.isin(rows, self.dataset.rows("held_out"))
        return "held out" if is_held_out.all() else "both splits" if is_held_out.any() else "training"


def read_batches(dataset: Dataset, rows: Rows) -> Iterator[Images]:
    """Yield the images in ``rows``, of any shapes, in batches of about BATCH_BYTES: (C, H, W) uint8 each."""
    step = max(1, BATCH_BYTES // int(np.prod(dataset.shape)))
    for start in range(0, len(rows), step):
        yield dataset.images_in_order(rows[start : start + step])


def _reduce(images: Tensor, shape: Shape) -> Tensor:
    return interpolate(images.float(), shape, mode="area").round().to(torch.uint8)


def write_dataset_report(
    folder: Path, output: Path, progress: Progress = ignore_progress, store: ShardStore | None = None
) -> DatasetSummary:
    """Write the page on the current version of the data set in ``folder`` to ``output``; equal versions, equal pages.

    Shards that are not in ``folder`` are fetched from ``store``, a few at a time. Raises UserError if a file of the
    version is missing or damaged.
    """
    with (
        open_missing_shards(folder, read_manifest(folder), store) as shards,
        # Few images are read, and at most twice.
        closing(Dataset.open(folder, shards, cache_bytes=0)) as dataset,
    ):
        line = islice(versions(folder), 1, None)
        manifest, parent = dataset.manifest, next(line, None)
        change = manifest.change
        # An ingest, and the rules and captions after it, follow what was there before.
        while parent is not None and parent.change.startswith(PRECEDING.get(change, ())):
            if (earlier := next(line, None)) is None:
                break
            change, parent = parent.change, earlier
        statistics = collect_statistics(folder, manifest, progress)
        summary, reasons = summarize(manifest, statistics), group_reasons(statistics.quarantine)
        order = permutation(0, "dataset report/sample", 0, len(dataset))
        page = DatasetPage(dataset, summary, statistics, reasons, order)
        helpers = {"sheet": page.sheet, "mean_image": page.mean_image, "averaged": AVERAGED}
        findings = describe(summary, reasons, manifest, parent)
        html = render_page("dataset", SECTIONS, page, findings=findings, **helpers)
    write_bytes(output, html)
    return summary


def _classes(page: DatasetPage) -> dict[str, object] | None:
    if not page.classes:
        return None
    labels = page.dataset.labels(page.dataset.rows("held_out"))
    held_out = Counter(label for label in labels if label is not None)
    untrained = sum(total == held_out[name] for name, total in page.classes)
    return {"classes": page.classes, "unlabelled": page.unlabelled, "held_out": held_out, "untrained": untrained}


def _captions(page: DatasetPage) -> dict[str, object] | None:
    """Show captions of images, if some have one."""
    if not page.statistics.captioned:
        return None
    captions = page.dataset.captions(page.order[:AVERAGED])
    return {"captions": [(row, text) for row, text in zip(page.order, captions, strict=False) if text]}


def _sizes(page: DatasetPage) -> dict[str, object] | None:
    """Show the widths and heights that images had in their source, if they differ."""
    sizes, summary = page.statistics.sizes, page.summary
    if len(sizes) < 2:
        return None
    areas = np.array([math.prod(size) for size in sizes])
    sides, images = np.array([min(size) for size in sizes]), np.array(list(sizes.values()))
    return {
        "size_chart": chart("Original widths and heights", partial(draw_sizes, sizes=sizes), (3.6, 3.5)),
        "sizes": sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:8],
        "sides": (sides.min(), -np.quantile(-sides, 0.5, weights=images, method="inverted_cdf"), sides.max()),
        "smaller": int(images[areas < summary.size**2 if summary.buckets else sides < summary.size].sum()),
    }


def _buckets(page: DatasetPage) -> dict[str, object] | None:
    """Show the shapes of stored images, with some of each."""
    dataset, manifest = page.dataset, page.dataset.manifest
    if not manifest.buckets:
        return None
    rows = [
        (shape_name(dataset.shapes[int(dataset.buckets(bucket_rows[:1])[0])]), bucket_rows[:12])
        for bucket_rows in dataset.split_by_bucket(page.order)
    ]
    counts = zip(manifest.storage.buckets or (), *manifest.shape_counts.values(), strict=False)
    return {"shape_counts": list(counts), "bucket_rows": rows}


def _near_duplicates(page: DatasetPage) -> dict[str, object] | None:
    """Show near-duplicates, and what thresholds of their search find."""
    bits = page.dataset.manifest.near_duplicate_bits
    thresholds, sufficient_bits = list[HashThreshold](), None
    if len(page.order) and len(page.statistics.hashes) > 1:
        batches = read_batches(page.dataset, page.order[:CALIBRATED])
        images = [to_pil_image(image) for batch in batches for image in batch]
        thresholds, sufficient_bits = calibrate_thresholds(images, page.statistics.hashes, bits)
    if not thresholds and not page.statistics.near_duplicates:
        return None
    return {
        "thresholds": thresholds,
        "enough": sufficient_bits,
        "recorded": bits,
        "missed": next((1 - threshold.copies for threshold in thresholds if threshold.bits == bits), 0),
        "find_rows": page.find_rows,
        "splits_of": page.splits_of,
    }


def _dropped(page: DatasetPage) -> dict[str, object] | None:
    manifest = page.dataset.manifest
    return {"dropped": show(page.dataset.folder, manifest).rules} if manifest.dropped else None


def _versions(page: DatasetPage) -> dict[str, object]:
    history = list(islice(log(page.dataset.folder), VERSIONS + 1))
    return {"history": history[:VERSIONS], "older": len(history) > VERSIONS}


SECTIONS: Sections[DatasetPage] = {
    "images": lambda page: {"classes": page.classes, "class_rows": page.class_rows, "unlabelled": page.unlabelled},
    "classes": _classes,
    "captions": _captions,
    "colour": lambda page: {"histograms": draw_histograms(page.statistics, page.summary.channels)},
    "sizes": _sizes,
    "buckets": _buckets,
    "duplicates": lambda page: {"find_rows": page.find_rows} if page.statistics.most_duplicated else None,
    "near_duplicates": _near_duplicates,
    "dropped": _dropped,
    "quarantine": lambda page: {} if page.summary.quarantined else None,
    "versions": _versions,
    "details": lambda page: {},
}
"""Sections in order, each with a template in ``templates/dataset``."""


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
