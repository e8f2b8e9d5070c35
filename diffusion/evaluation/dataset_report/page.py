"""A version of a data set as one HTML page that needs nothing but itself."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest, Outcome, versions
from diffusion.data.versions import log
from diffusion.evaluation.dataset_report.charts import (
    chance_chart,
    class_bars,
    histogram,
    shorter_sides,
    size_chart,
)
from diffusion.evaluation.dataset_report.comparison import Comparison, News, compare, news
from diffusion.evaluation.dataset_report.gallery import Plate, gallery, sheet, thumbnails
from diffusion.evaluation.dataset_report.summary import DatasetSummary
from diffusion.evaluation.dataset_report.survey import Copied, Survey, survey
from diffusion.evaluation.pages import count, counted, render, share
from diffusion.files import write_bytes
from diffusion.progress import Progress, silent

VERSIONS = 30
"""Rows of the table of versions."""
GROUPS = 6
"""Groups of near-copies shown, the largest ones."""
GROUP_MEMBERS = 16
"""Pictures shown of each."""
REASONS = 20
SIZES = 8
NAMES = 8
"""Classes named in a sentence."""


@dataclass(frozen=True)
class Original:
    """A picture that came more than once, to be shown."""

    copied: Copied
    png: bytes


def write_dataset_report(folder: Path, output: Path, progress: Progress = silent) -> DatasetSummary:
    """Write the page on the current version of the data set in ``folder`` to the file ``output``.

    Equal versions give equal pages. Raises UserError, naming the file, if anything of the version is missing or
    damaged.
    """
    # Few pictures are looked at, and no more than once or twice.
    with closing(Dataset.open(folder, cache_bytes=0)) as dataset:
        return _write(dataset, output, progress)


def _write(dataset: Dataset, output: Path, progress: Progress) -> DatasetSummary:
    folder, manifest = dataset.folder, dataset.manifest
    line = versions(folder)
    next(line)
    parent = next(line, None)
    found = survey(folder, manifest, progress)
    comparison = compare(dataset, parent, progress)
    told = None if parent is None else news(manifest, parent)
    summary = _summary(manifest, parent, found, comparison)
    history = list(islice(log(folder), VERSIONS + 1))
    classes = manifest.class_histogram
    drift, chances = comparison.drift, comparison.chances
    page = render(
        "dataset.html",
        summary=summary,
        findings=findings(summary, found, told),
        comparison=comparison,
        chance_chart=None if drift is None or chances is None else chance_chart(chances, drift.kid),
        gallery=gallery(dataset, found.captioned > 0),
        bars=class_bars(classes, _held_out_classes(dataset)) if classes else None,
        unlabelled=summary.kept - sum(classes.values()),
        histograms=[histogram(tones) for tones in found.tones],
        sizes=_leading(found.sizes, SIZES),
        distinct_sizes=len(found.sizes),
        size_chart=size_chart(found.sizes) if len(found.sizes) > 1 else None,
        sides=shorter_sides(found.sizes, manifest.size),
        originals=[Original(each, sheet(thumbnails(dataset, _rows(dataset, [each.key])), 1)) for each in found.copied],
        groups=[_group(dataset, keys) for keys in found.groups[:GROUPS]],
        reasons=found.reasons[:REASONS],
        other_reasons=found.reasons[REASONS:],
        refusals=found.refusals,
        history=history[:VERSIONS],
        older=len(history) > VERSIONS,
    )
    write_bytes(output, page)
    return summary


def findings(summary: DatasetSummary, found: Survey, told: News | None) -> list[str]:
    """What is to be known first, in words; ``told``: None if there is no parent."""
    form = f"{summary.size}×{summary.size} pixels in {'colour' if summary.channels == 3 else 'grey'}"
    said = [f"{counted(summary.kept, 'picture')} of {form}; {count(summary.held_out)} held out from training."]
    if told is not None:
        said += _news_in_words(told)
    if summary.lost:
        said.append(f"{counted(summary.lost, 'picture')} of its parent {'is' if summary.lost == 1 else 'are'} gone.")
    said.append(summary.verdict)
    if found.refused:
        tried = summary.kept + summary.duplicates + summary.quarantined
        leading = found.reasons[0]
        most = "all" if leading.count == found.refused else count(leading.count)
        said.append(
            f"{share(summary.quarantined, tried)} of all files stand in quarantine ({count(summary.quarantined)}), "
            f"{most} for this reason: {leading.kind}."
        )
    return said


def _news_in_words(told: News) -> list[str]:
    said = []
    if told.outcomes:
        new, again, refused = (count(told.outcomes[outcome]) for outcome in ("kept", "duplicate", "quarantined"))
        read = counted(told.outcomes.total(), "file")
        said.append(f"Of {read} read for this version, {new} were new pictures, {again} duplicates, {refused} refused.")
    if told.new_classes:
        said.append(f"{counted(len(told.new_classes), 'new class', 'new classes')}: {_listed(told.new_classes)}.")
    if told.lost_classes:
        said.append(f"{counted(len(told.lost_classes), 'class', 'classes')} gone: {_listed(told.lost_classes)}.")
    return said


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {count(more)} more" if more > 0 else "")


def _summary(manifest: Manifest, parent: Manifest | None, found: Survey, comparison: Comparison) -> DatasetSummary:
    outcomes: Counter[Outcome] = Counter()
    for part in manifest.parts:
        outcomes.update(part.outcomes)
    added = comparison.added
    return DatasetSummary(
        name=manifest.name,
        digest=manifest.digest,
        content_digest=manifest.content_digest,
        parent=manifest.parent,
        change=manifest.change,
        kept=manifest.kept,
        train=manifest.counts["train"],
        held_out=manifest.counts["held_out"],
        added=added,
        lost=None if parent is None or added is None else parent.kept + added - manifest.kept,
        duplicates=outcomes["duplicate"],
        contradicted=found.contradicted,
        quarantined=found.refused,
        removed=outcomes["removed"],
        near_groups=len(found.groups) if found.hashed else None,
        near_copies=sum(len(keys) for keys in found.groups) if found.hashed else None,
        classes=len(manifest.labels),
        captioned=found.captioned,
        channels=manifest.channels,
        size=manifest.size,
        storage=manifest.storage,
        shards=len(manifest.shards),
        bytes=sum(entry.bytes for entry in manifest.files),
        verdict=comparison.verdict,
        drift=comparison.drift,
    )


def _rows(dataset: Dataset, keys: Sequence[str]) -> list[int]:
    """The rows of kept pictures, by a search for each: meant for few."""
    return [bisect_left(range(len(dataset)), key, key=lambda row: dataset.keys([row])[0]) for key in keys]


def _group(dataset: Dataset, keys: Sequence[str]) -> Plate:
    rows = _rows(dataset, keys[:GROUP_MEMBERS])
    held_out = np.isin(rows, dataset.rows("held_out"))
    split = "held out" if held_out.all() else "both splits" if held_out.any() else "training"
    return Plate(split, len(keys), sheet(thumbnails(dataset, rows), 8))


def _held_out_classes(dataset: Dataset) -> Counter[str]:
    labels = dataset.labels(dataset.rows("held_out"))
    return Counter(label for label in labels if label is not None)


def _leading(sizes: Counter[tuple[int, int]], most: int) -> list[tuple[tuple[int, int], int]]:
    return sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
