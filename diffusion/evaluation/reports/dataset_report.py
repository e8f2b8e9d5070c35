"""Self-contained HTML page on a data set version: sample images, charts, tables and key figures."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.ticker import NullLocator
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.common.config import Config
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import grid, png_bytes
from diffusion.common.progress import Progress, silent
from diffusion.common.random import permutation
from diffusion.data.dataset import SPLITS, Dataset, Rows
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import Manifest, Outcome, Split, versions
from diffusion.data.versions.versions import log, unshared
from diffusion.evaluation.reports.charts import Chart, Paper, chart
from diffusion.evaluation.reports.dataset_statistics import (
    BINS,
    MEASURES,
    Drift,
    ParentComparison,
    RecordStatistics,
    collect_statistics,
    compare_with_parent,
    group_reasons,
    is_removal,
    read_batches,
)
from diffusion.evaluation.reports.html import count, counted, plain, render, share, signed, storage

SIDE = 64
"""Height and width to which larger images are reduced, in pixels."""
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
    near_duplicate_groups: int | None
    """None if near-duplicates were not searched for."""
    near_duplicates: int | None
    classes: int
    captioned: int
    channels: int
    size: int
    """Height and width of the stored images, in pixels."""
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
            "Near-duplicates": self.near_duplicate_groups is not None
            and f"{self.near_duplicates:,} in {counted(self.near_duplicate_groups, 'group')}",
            "Classes": f"{self.classes:,}",
            "With a caption": share(self.captioned, self.kept),
            "Stored as": f"{self.size}×{self.size}, {'RGB' if self.channels == 3 else 'grey'}",
            "Files": f"{storage(self.bytes)} with {counted(self.shards, 'shard')}",
        }
        if (drift := self.drift) is not None:
            lines |= {
                "KID": f"{signed(drift.kid)}, and chance alone reaches {signed(drift.kid_chance)}",
                "Fréchet distance": f"{plain(drift.fd)}, baseline {plain(drift.fd_baseline)}",
                "Neighbour accuracy": f"{drift.neighbor_accuracy:.1%}, baseline {drift.neighbor_accuracy_baseline:.1%}",
            }
        table = "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)
        return f"# Data set {escape_markdown(self.name)}\n\n{self.verdict}\n\n| | |\n|---|---|\n{table}\n"


def write_dataset_report(folder: Path, output: Path, progress: Progress = silent) -> DatasetSummary:
    """Write the page on the current version of the data set in ``folder`` to ``output``; equal versions, equal pages.

    Raises:
        UserError: If a file of the version is missing or damaged.
    """
    with closing(Dataset.open(folder, cache_bytes=0)) as dataset:  # few images are read, and at most twice
        manifest, parent = dataset.manifest, next(islice(versions(folder), 1, None), None)
        statistics = collect_statistics(folder, manifest, progress)
        comparison = compare_with_parent(dataset, parent, progress)
        summary = summarize(manifest, parent, statistics, comparison)
        reasons = group_reasons(statistics.quarantine)
        kid_chart = size_chart = None
        if comparison.drift is not None and comparison.permuted_kids is not None:
            test = partial(draw_permutation_test, permuted_kids=comparison.permuted_kids, kid=comparison.drift.kid)
            kid_chart = chart("KID of the new images and of random permutations", test, (10, 1.7))
        if len(statistics.sizes) > 1:
            size_chart = chart("Original widths and heights", partial(draw_sizes, sizes=statistics.sizes), (3.6, 3.5))
        order = permutation(0, "dataset report/sample", 0, len(dataset))
        by_size = sorted(manifest.class_histogram.items(), key=lambda pair: (-pair[1], pair[0]))
        held_out = Counter(label for label in dataset.labels(dataset.rows("held_out")) if label is not None)
        leading = [name for name, _ in by_size[:12]]
        numbers = dataset.classes(order, leading).numpy()
        captions = dataset.captions(order[:AVERAGED]) if statistics.captioned else []
        history = list(islice(log(folder), VERSIONS + 1))
        sides, images = np.array([min(size) for size in statistics.sizes]), np.array(list(statistics.sizes.values()))
        page = render(
            "dataset.html",
            summary=summary,
            findings=describe(summary, reasons, manifest, parent),
            statistics=statistics,
            reasons=reasons,
            comparison=comparison,
            history=history[:VERSIONS],
            older=len(history) > VERSIONS,
            histograms=draw_histograms(statistics, manifest.channels),
            kid_chart=kid_chart,
            size_chart=size_chart,
            sizes=sorted(statistics.sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:8],
            sides=(sides.min(), -np.quantile(-sides, 0.5, weights=images, method="inverted_cdf"), sides.max()),
            smaller=int(images[sides < manifest.size].sum()),
            classes=by_size,
            held_out=held_out,
            untrained=sum(total == held_out[name] for name, total in by_size),
            unlabelled=manifest.kept - sum(manifest.class_histogram.values()),
            order=order,
            averaged=AVERAGED,
            class_rows=[(name, order[numbers == number]) for number, name in enumerate(leading)],
            captions=[(row, text) for row, text in zip(order, captions, strict=False) if text],
            sheet=partial(_sheet, dataset),
            mean_image=partial(_mean_image, dataset),
            find_rows=partial(_find_rows, dataset),
            splits_of=partial(_splits_of, dataset),
        )
    write_bytes(output, page)
    return summary


def summarize(
    manifest: Manifest, parent: Manifest | None, statistics: RecordStatistics, comparison: ParentComparison
) -> DatasetSummary:
    """Collect the key figures of ``manifest``."""
    outcomes = sum((Counter(part.outcomes) for part in manifest.parts), Counter[Outcome]())
    groups = statistics.near_duplicates if statistics.hashed else None
    added = comparison.added
    same = ("name", "digest", "content_digest", "parent", "change", "kept", "channels", "size", "storage")
    return DatasetSummary(
        **{name: getattr(manifest, name) for name in same},
        train=manifest.counts["train"],
        held_out=manifest.counts["held_out"],
        added=added,
        lost=None if parent is None or added is None else parent.kept + added - manifest.kept,
        duplicates=outcomes["duplicate"],
        contradicted=statistics.contradicted,
        quarantined=statistics.quarantine.count,
        removed=outcomes["removed"],
        near_duplicate_groups=None if groups is None else len(groups),
        near_duplicates=None if groups is None else sum(map(len, groups)),
        classes=len(manifest.labels),
        captioned=statistics.captioned,
        shards=len(manifest.shards),
        bytes=sum(entry.bytes for entry in manifest.files),
        verdict=comparison.verdict,
        drift=comparison.drift,
    )


def describe(
    summary: DatasetSummary,
    reasons: Sequence[tuple[str, int, list[str]]],
    manifest: Manifest,
    parent: Manifest | None,
) -> list[str]:
    """Return the most important findings as sentences."""
    form = f"{summary.size}×{summary.size} pixels in {'colour' if summary.channels == 3 else 'grey'}"
    lines = [f"{counted(summary.kept, 'image')} of {form}; {count(summary.held_out)} held out from training."]
    if parent is not None:
        parts = [] if is_removal(manifest) else unshared(manifest, parent)
        if outcomes := sum((Counter(part.outcomes) for part in parts), Counter[Outcome]()):
            new, again, bad = (count(outcomes[outcome]) for outcome in ("kept", "duplicate", "quarantined"))
            read = counted(outcomes.total(), "file")
            lines.append(
                f"Of {read} read for this version, {new} were new images, {again} duplicates, {bad} quarantined."
            )
        ours, theirs = set(manifest.labels), set(parent.labels)
        if new_classes := sorted(ours - theirs):
            lines.append(f"{counted(len(new_classes), 'new class', 'new classes')}: {_enumerate(new_classes)}.")
        if lost_classes := sorted(theirs - ours):
            lines.append(f"{counted(len(lost_classes), 'class', 'classes')} gone: {_enumerate(lost_classes)}.")
    if summary.lost:
        lines.append(f"{counted(summary.lost, 'image')} of its parent {'is' if summary.lost == 1 else 'are'} gone.")
    lines.append(summary.verdict)
    if summary.quarantined:
        pattern, files, _ = reasons[0]
        most = "all" if files == summary.quarantined else count(files)
        of_all = share(summary.quarantined, summary.kept + summary.duplicates + summary.quarantined)
        lines.append(
            f"{of_all} of all files are in quarantine ({count(summary.quarantined)}), {most} for this reason: "
            f"{pattern}."
        )
    return lines


def draw_histogram(axes: Axes, paper: Paper, counts: Mapping[Split, np.ndarray], high: float) -> None:
    """Draw the share of each split's images per bin; ``counts``: (BINS,) for the range from 0 to ``high``."""
    edges = np.linspace(0, high, BINS + 1)
    for split, colour in zip(SPLITS, paper.series, strict=False):
        if total := counts[split].sum():
            axes.stairs(counts[split] / total, edges, color=colour, linewidth=1.6)
            if split == "train":
                axes.stairs(counts[split] / total, edges, color=colour, alpha=0.16, fill=True)
    axes.set(xlim=(0, high), ylim=(0, None), xticks=np.linspace(0, high, 5), yticks=[])


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
    axes.plot([low, high], [low, high], color=paper.muted, linewidth=1, linestyle=(0, (4, 3)))
    octaves = 2.0 ** np.arange(np.ceil(np.log2(low)), np.log2(high))
    ticks = octaves[:: -(-len(octaves) // 7)] if len(octaves) > 1 else [low, high]
    labels = [f"{tick:,.0f}" for tick in ticks]
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="width in pixels",
        ylabel="height in pixels",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(ticks, labels)
    axes.set_box_aspect(1)


def draw_histograms(statistics: RecordStatistics, channels: int) -> list[tuple[str, Chart, dict[Split, float]]]:
    """Return name, histogram and mean by split of each measure of images with these ``channels``."""
    histograms = []
    for number, (name, high) in enumerate(list(MEASURES.items())[: 5 if channels == 3 else 2]):
        counts = {split: statistics.histograms[split][number] for split in SPLITS}
        means = {split: statistics.sums[split][number] / n for split in SPLITS if (n := counts[split].sum())}
        draw = partial(draw_histogram, counts=counts, high=high)
        histograms.append((name, chart(f"Histogram of {name}", draw, (4.9, 1.8) if number < 2 else (3.2, 1.5)), means))
    return histograms


def _thumbnails(dataset: Dataset, rows: Rows) -> Tensor:
    """Return the images in ``rows``, large ones reduced to SIDE × SIDE: (len(rows), C, h, w) uint8."""
    batches = read_batches(dataset, rows)
    if dataset.manifest.size > SIDE:
        reduced = (interpolate(batch.float(), (SIDE, SIDE), mode="area") for batch in batches)
        batches = (batch.round().to(torch.uint8) for batch in reduced)
    return torch.cat(list(batches))


def _sheet(dataset: Dataset, rows: Rows, columns: int = 8) -> bytes:
    """Return a PNG of the images in ``rows`` side by side."""
    return png_bytes(grid(_thumbnails(dataset, rows), columns, pad=0 if len(rows) == 1 else 2))


def _mean_image(dataset: Dataset, rows: Rows) -> bytes:
    mean = _thumbnails(dataset, rows).double().mean(0, keepdim=True)
    return png_bytes(grid(mean.round().to(torch.uint8), pad=0))


def _find_rows(dataset: Dataset, keys: Sequence[str]) -> list[int]:
    """Find the rows of a few kept images by binary search."""
    return [bisect_left(range(len(dataset)), key, key=lambda row: dataset.keys([row])[0]) for key in keys]


def _splits_of(dataset: Dataset, rows: Sequence[int]) -> str:
    held_out = np.isin(rows, dataset.rows("held_out"))
    return "held out" if held_out.all() else "both splits" if held_out.any() else "training"


def _enumerate(names: Sequence[str]) -> str:
    more = len(names) - CLASS_NAMES
    return ", ".join(names[:CLASS_NAMES]) + (f" and {count(more)} more" if more > 0 else "")
