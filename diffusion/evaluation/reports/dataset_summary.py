"""Key figures of a data set version, and the most important findings in sentences."""

from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.escaping import escape_markdown, pluralize
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import Manifest, Outcome
from diffusion.data.versions.versions import find_unshared_parts
from diffusion.evaluation.reports.html import format_count, format_share, format_size
from diffusion.evaluation.reports.record_statistics import RecordStatistics

CLASS_NAMES = 8
"""Classes named in a sentence."""


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
    duplicates: int
    contradicted: int
    """Duplicates with another label or caption than the kept image."""
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

    def metrics(self) -> dict[str, float]:
        """Return the numbers as flat metrics."""
        numbers = self.model_dump(exclude={"storage"})
        return {f"dataset_{name}": float(value) for name, value in numbers.items() if isinstance(value, int)}

    def markdown(self) -> str:
        """Return the figures as a Markdown table, every text escaped."""
        parent = f"`{self.parent}`" if self.parent else "nothing"
        lines = {
            "Version": f"`{self.digest}`",
            "Content": f"`{self.content_digest}`",
            "Made": f"by {escape_markdown(self.change)} from {parent}",
            "Images": f"{self.kept:,}: {self.train:,} for training, {self.held_out:,} held out",
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
        table = "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)
        return f"# Data set {escape_markdown(self.name)}\n\n| | |\n|---|---|\n{table}\n"


def summarize(manifest: Manifest, statistics: RecordStatistics) -> DatasetSummary:
    """Summarize a version in numbers."""
    outcomes = sum((Counter(part.outcomes) for part in manifest.parts), Counter[Outcome]())
    groups = statistics.near_duplicates if statistics.hashed else None
    fields = ("name", "digest", "content_digest", "parent", "change", "kept", "channels", "size", "buckets", "storage")
    return DatasetSummary(
        **{name: getattr(manifest, name) for name in fields},
        train=manifest.counts["train"],
        held_out=manifest.counts["held_out"],
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
    )


def describe(
    summary: DatasetSummary, reasons: Sequence[tuple[str, int, list[str]]], manifest: Manifest, parent: Manifest | None
) -> list[str]:
    """Return the most important findings as sentences."""
    form = f"{manifest.stored_as} in {'colour' if summary.channels == 3 else 'grey'}"
    lines = [f"{pluralize(summary.kept, 'image')} of {form}; {format_count(summary.held_out)} held out from training."]
    if parent is not None:
        parts = [] if manifest.change.startswith("removal") else find_unshared_parts(manifest, parent)
        if manifest.change in ("curation", "captions"):
            # They write tables anew of parts that were read before.
            parent_numbers = {part.number for part in parent.parts}
            parts = [part for part in parts if part.number not in parent_numbers]
        if outcomes := sum((Counter(part.outcomes) for part in parts), Counter[Outcome]()):
            new, copies, bad = (format_count(outcomes[outcome]) for outcome in ("kept", "duplicate", "quarantined"))
            total = pluralize(outcomes.total(), "file")
            lines.append(
                f"Of {total} read for this version, {new} were new images, {copies} duplicates, {bad} quarantined."
            )
        classes, parent_classes = set(manifest.labels), set(parent.labels)
        if new_classes := sorted(classes - parent_classes):
            lines.append(f"{pluralize(len(new_classes), 'new class', 'new classes')}: {_enumerate(new_classes)}.")
        if lost_classes := sorted(parent_classes - classes):
            lines.append(f"{pluralize(len(lost_classes), 'class', 'classes')} gone: {_enumerate(lost_classes)}.")
    if summary.quarantined:
        pattern, files, _ = reasons[0]
        number = "all" if files == summary.quarantined else format_count(files)
        percent = format_share(summary.quarantined, summary.kept + summary.duplicates + summary.quarantined)
        lines.append(
            f"{percent} of all files are in quarantine ({format_count(summary.quarantined)}), {number} for this "
            f"reason: {pattern}."
        )
    return lines


def _enumerate(names: Sequence[str]) -> str:
    remainder = len(names) - CLASS_NAMES
    return ", ".join(names[:CLASS_NAMES]) + (f" and {format_count(remainder)} more" if remainder > 0 else "")
