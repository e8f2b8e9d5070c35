"""Curation of a data set: rules decide which of its images are kept, which makes a version.

The decision is a function of the images and the rules alone: it depends neither on earlier decisions, nor on the order
in which images came, nor on the number of workers. Features and scores of networks differ between kinds of processors
in their last bits, so decisions on values next to a limit may, too. Only tables of records are written anew.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.extensions import extension_versions
from diffusion.common.files import digest_of, make_folder, sha256_file, write_json
from diffusion.common.progress import Progress, ignore_progress
from diffusion.curation.config import CurationConfig, SemanticCalibration, Verdict
from diffusion.curation.lists import Label, ListChange, ListOutcome, change_lists, decide_by_lists
from diffusion.curation.measures import Measurements, extractor_of, measure, read_images
from diffusion.curation.rules import GROUP
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index, explain_database_errors
from diffusion.data.ingest.ingest import IngestResult, remove_strays
from diffusion.data.ingest.merge import rewrite_part
from diffusion.data.ingest.staging import RemoteDataset
from diffusion.data.manifest import (
    STORED,
    Manifest,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
    write_manifest,
)
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.versions.image_lists import ListedImages, read_lists
from diffusion.data.versions.versions import rule_of
from diffusion.evaluation.config import EvaluationConfig

logger = logging.getLogger(__name__)

FORMAT = 4
"""Incremented when the same rules would decide otherwise."""
MAX_LISTED, SHOWN = 1000, 20
"""Dropped images listed in a result, and in words."""


class DroppedImage(Config):
    """An image that curation left out."""

    key: str
    source: str
    reason: str
    """The rule with its threshold, and the image's value."""


class CurationResult(Config):
    """The data set after its curation: the output of ``darkroom data curate --json``."""

    dataset: str
    content_digest: str
    digest: str
    """Name of the version: the digest of its manifest."""
    changed: bool
    """Whether this curation made a new version, or would have made one."""
    kept: int
    dropped: int
    newly_dropped: int
    restored: int
    """Images dropped and brought back by this curation."""
    rules: dict[str, int]
    """Number of dropped images by the rule that dropped them, the first one in the order of the configuration."""
    images: list[DroppedImage]
    """The first dropped images, by key."""
    semantic: SemanticCalibration | None = None
    """What finds semantic near-duplicates; None if they were not looked for."""
    relabelled: int | None = Field(None, exclude_if=is_unset)
    """Kept and dropped images whose label is a list's; None if there are none."""
    list_change: ListOutcome | None = Field(None, exclude_if=is_unset)
    """What became of the list that was to be recorded or withdrawn; None if none was."""

    def lines(self, dry_run: bool = False) -> list[str]:
        """Describe the result; ``dry_run``: of rules that were not applied."""
        verb_prefix, version_suffix = ("would be ", " would be made") if dry_run else ("", "")
        rest = self.dropped - len(self.images[:SHOWN])
        # `data show` knows nothing of what was not applied.
        hint = f"--json (up to {MAX_LISTED:,})" if dry_run else f"darkroom data show --dataset {self.dataset} --all"
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in self.rules.items())
        changes = f"{self.newly_dropped:,} newly dropped, {self.restored:,} brought back"
        return [
            f"{pluralize(self.kept, 'image')} {verb_prefix}kept, {self.dropped:,} {verb_prefix}dropped ({changes})",
            *(self.list_change.lines() if self.list_change else []),
            *([f"labels     {self.relabelled:,} by lists"] if self.relabelled else []),
            *([f"rules      {rules}"] if rules else []),
            *([f"semantic   {self.semantic.line}"] if self.semantic else []),
            *(f"  dropped: {image.source}: {image.reason}" for image in self.images[:SHOWN]),
            *([f"  … and {rest:,} more: {hint}"] if rest > 0 else []),
            *([] if self.changed else [f"no new version{version_suffix}: the rules decide as in {self.digest[:12]}"]),
        ]


@dataclass(frozen=True)
class Grouping:
    """Groups of near-duplicates: the leader of each image, (N,), itself for images that are alone or lead."""

    leaders: np.ndarray
    limit: float
    """Largest distance from a leader: bits, or the Euclidean distance of features."""


@dataclass(frozen=True)
class Decision:
    """What rules decide for all stored images of a version, in the order of their keys."""

    reasons: list[str | None]
    """Why an image is dropped; None if it is kept."""
    leaders: list[str | None]
    """Key of the image that is kept instead of one dropped as a near-duplicate; None for all others."""
    labels: list[Label]
    columns: dict[str, np.ndarray]
    """All measures by name, (N,) float64, ``outlier`` included where features were compared."""
    near: Grouping | None
    semantic: Grouping | None
    calibration: SemanticCalibration | None

    @property
    def rules(self) -> dict[str, int]:
        """Return the number of dropped images by rule, the most frequent first."""
        return dict(Counter(map(rule_of, filter(None, self.reasons))).most_common())


def decide(
    folder: Path,
    manifest: Manifest,
    measurements: Measurements,
    config: CurationConfig,
    evaluation: EvaluationConfig,
    lists: Sequence[ListedImages],
    progress: Progress = ignore_progress,
) -> Decision:
    """Apply ``lists`` and ``config``: first to single images; those dropped lead no group of near-duplicates."""
    columns = dict(measurements.columns)
    if (features := measurements.matrices.get("features")) is not None:
        from diffusion.curation.duplicates import outlier_scores

        columns["outlier"] = outlier_scores(features)
    reasons, image_labels = decide_by_lists(measurements.records, lists)
    leader_keys: list[str | None] = [None] * len(measurements)
    for setting, name, bound, limit in config.limits:
        values = columns[name]
        for row in np.flatnonzero(values < limit if bound == "min" else values > limit):
            reasons[row] = reasons[row] or f"{setting} = {limit:g}: {name} is {values[row]:.6g}"
    records = measurements.records
    area = records["width"].to_numpy().astype(np.int64) * records["height"].to_numpy()
    preference = np.lexsort((np.arange(len(area)), -area))
    keys, labels = records["key"].to_pylist(), [image.label for image in image_labels]

    def remaining_rows() -> np.ndarray:
        return preference[[reasons[row] is None for row in preference]]

    def classes(verdict: Verdict) -> Sequence[str | None]:
        return labels if verdict == "one_per_class" else [None] * len(labels)

    def drop_copies(grouping: Grouping, rule: str, verdict: Verdict, describe: Callable[[int, int], str]) -> None:
        leaders = grouping.leaders
        is_copy = (leaders != np.arange(len(leaders))) & (verdict != "report")
        for row in np.flatnonzero(is_copy).tolist():
            leader_keys[row] = leader = keys[leaders[row]]
            reasons[row] = f"{rule} = {verdict}: {describe(row, leaders[row])} from {leader[:16]}"

    near = semantic = calibration = None
    if (verdict := config.near_duplicates) is not None:
        from diffusion.curation.duplicates import leaders_by_hash

        phashes, max_bits = measurements.phashes, config.near_duplicate_bits
        near = Grouping(leaders_by_hash(phashes, remaining_rows(), classes(verdict), max_bits), max_bits)

        def describe_bits(row: int, leader: int) -> str:
            bits = (int(phashes[row], 16) ^ int(phashes[leader], 16)).bit_count()
            return f"{pluralize(bits, 'bit')} (at most {max_bits})"

        drop_copies(near, "near_duplicates", verdict, describe_bits)
    if (verdict := config.semantic_duplicates) is not None:
        semantic, distances, calibration = _find_semantic(
            folder, manifest, measurements, config, evaluation, remaining_rows(), classes(verdict), progress
        )
        text = f"(at most {semantic.limit:.4g})"
        drop_copies(semantic, "semantic_duplicates", verdict, lambda row, _: f"distance {distances[row]:.3g} {text}")
    return Decision(reasons, leader_keys, image_labels, columns, near, semantic, calibration)


def _find_semantic(
    folder: Path,
    manifest: Manifest,
    measurements: Measurements,
    config: CurationConfig,
    evaluation: EvaluationConfig,
    order: np.ndarray,
    classes: Sequence[str | None],
    progress: Progress,
) -> tuple[Grouping, np.ndarray, SemanticCalibration]:
    """Group the images in ``order`` by semantic near-duplicates; returns also their distances to the leaders, (N,)."""
    from diffusion.curation.duplicates import CALIBRATION_IMAGES, Appearance, CandidatePairs, calibrate_distance

    appearance = Appearance(measurements.matrices["features"], measurements.matrices["small"])
    pairs = CandidatePairs(appearance, order, classes, progress)
    # Keys are digests, so the first ones are a random sample that stays nearly the same when images are added.
    samples = images_of(folder, manifest, measurements.records.slice(0, CALIBRATION_IMAGES), measurements.store)
    extractor = extractor_of(evaluation)
    calibration = calibrate_distance(appearance, pairs, samples, extractor, config.semantic_distance)
    leaders, distances = pairs.leaders(order, calibration.distance)
    return Grouping(leaders, calibration.distance), distances, calibration


def images_of(folder: Path, manifest: Manifest, records: pa.Table, store: ShardStore | None = None) -> list[np.ndarray]:
    """Read the images of ``records``, rows of ``Measurements``, in their order: each (H, W, 3) uint8."""
    parts = records["part"].to_numpy()
    images: dict[int, np.ndarray] = {}
    for number in np.unique(parts).tolist():
        rows, part = np.flatnonzero(parts == number), manifest.parts[number]
        assert part.shard is not None
        with shard_file(folder, part.shard, store) as path:
            images |= zip(rows.tolist(), read_images(path, records.take(rows)), strict=True)
    return [images[row] for row in range(len(records))]


def curate(
    folder: Path,
    config: CurationConfig,
    ingest: IngestConfig,
    evaluation: EvaluationConfig,
    progress: Progress = ignore_progress,
    *,
    dry_run: bool = False,
    change: ListChange | None = None,
    remote: RemoteDataset | None = None,
) -> CurationResult:
    """Make a version of the data set in ``folder`` whose kept images are those that lists and rules allow.

    Rules are ``config``'s, and lists the data set's own after ``change``. Without either dropped images come back, and
    a set that has none stays as it is, unread. Measures are cached in the work folder. Repeated, or repeated after a
    kill, it gives the same result. ``dry_run`` changes nothing but the cache. ``remote`` has the shards that are not in
    ``folder``. Locks out ingests.

    Raises UserError as ``change_lists`` does, if more than ``config.max_dropped`` of the images would be dropped, or
    none kept, if a file of the data set is missing or damaged, or a network is unavailable.
    """
    before = read_manifest(folder)
    if not (config.drops or before.is_curated or change):
        return _result(folder, before, None, changed=False)
    work = work_folder(folder)
    make_folder(work)
    with FileLock(work / "lock"):
        before = read_manifest(folder)
        # Of the same images the same rules decide the same.
        nsfw = config.nsfw is not None and config.nsfw.path.is_file() and sha256_file(config.nsfw.path)
        packages = {name: extension_versions(GROUP).get(name) for name in config.rules}
        rules = digest_of([FORMAT, config.model_dump(mode="json"), evaluation.model_dump(mode="json"), nsfw, packages])
        stamp = {"version": before.digest, "rules": rules}
        stamp_path = work / "curated.json"
        with suppress(FileNotFoundError, ValueError):
            if change is None and json.loads(stamp_path.read_bytes()) == stamp:
                return _result(folder, before, None, changed=False)
        require_whole(folder, before, without_shards=remote is not None)
        lists, outcome = change_lists(folder, before, change) if change else (read_lists(folder, before), None)
        measurements = measure(folder, before, config, evaluation, make_fan_out(ingest), progress, remote=remote)
        decision = decide(folder, before, measurements, config, evaluation, lists, progress)
        if decision.calibration is not None and (warning := decision.calibration.warning) is not None:
            logger.warning("%s", warning)
        _require_enough(before, decision, config)
        differs = _find_changes(measurements, decision)
        after, is_changed = before, bool(differs.any()) or [each.about for each in lists] != (before.lists or [])
        if is_changed and not dry_run:
            after = _apply(folder, before, lists, measurements, decision, differs, ingest, remote)
        if not dry_run:
            remove_strays(folder)
            write_json(stamp_path, stamp | {"version": after.digest})
        return _result(folder, after, (measurements, decision), is_changed).model_copy(update={"list_change": outcome})


def _find_changes(measurements: Measurements, decision: Decision) -> np.ndarray:
    """Return for which images the outcome, the rule, the leader or the label change, (N,) bool.

    Not a rule's reason: percentiles and calibrated distances in it change with every image that comes.
    """
    records = measurements.records

    def essence(reason: str | None) -> str | None:
        return reason if not reason or reason.startswith("list ") else rule_of(reason)

    drop_flags, reasons = (pc.equal(records["outcome"], "dropped").to_pylist(), records["reason"].to_pylist())
    rules = (essence(reason) if is_dropped else None for is_dropped, reason in zip(drop_flags, reasons, strict=True))
    labels = zip(*(records[name].to_pylist() for name in Label._fields), strict=True)
    before = zip(rules, records["leader"].to_pylist(), labels, strict=True)
    after = zip(map(essence, decision.reasons), decision.leaders, decision.labels, strict=True)
    return np.array([new != old for new, old in zip(after, before, strict=True)], bool)


def _require_enough(manifest: Manifest, decision: Decision, config: CurationConfig) -> None:
    total, drop_count = len(decision.reasons), sum(reason is not None for reason in decision.reasons)
    if drop_count == total or drop_count > config.max_dropped * total:
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in decision.rules.items())
        raise UserError(
            f"curation would drop {drop_count:,} of {total:,} images of data set {manifest.name} ({rules}), more than "
            f"the share of {config.max_dropped:g} that curation.max_dropped allows: loosen these rules, or allow more"
        )


def _apply(
    folder: Path,
    before: Manifest,
    lists: Sequence[ListedImages],
    measurements: Measurements,
    decision: Decision,
    differs: np.ndarray,
    ingest: IngestConfig,
    remote: RemoteDataset | None,
) -> Manifest:
    """Write the version with the outcomes of ``decision``, in which images that ``differs`` selects change."""
    for each in lists:
        each.write(folder)
    records, parts = measurements.records, list(before.parts)
    triples = zip(decision.reasons, decision.leaders, decision.labels, strict=True)
    decisions = dict(zip(records["key"].to_pylist(), triples, strict=True))
    work, bits = work_folder(folder), ingest.near_duplicate_bits(before.near_duplicate_bits)
    with (
        explain_database_errors(work),
        closing(Index(work / "index.sqlite", folder, before, bits, remote)) as index,
        index.transaction(),
    ):
        for place in np.unique(records["part"].to_numpy()[differs]).tolist():
            part = before.parts[place]
            rows = read_records(folder, part).to_pylist()
            for row in rows:
                if row["outcome"] in STORED:
                    reason, leader, label = decisions[row["key"]]
                    row |= {"outcome": "kept" if reason is None else "dropped", "reason": reason, "leader": leader}
                    row |= label._asdict()
                    index.set_outcome(row)
                    index.describe(row)
            parts[place] = rewrite_part(folder, part, rows, before.size, part.shard)
        after = before.make_child("curation", parts)
        fields = {"lists": [each.about for each in lists] or None, "content_digest": index.content_digest(after)}
        after = after.model_copy(update=fields)
        write_manifest(folder, after)
        index.set_version(after)
    return after


def _result(
    folder: Path, manifest: Manifest, curation: tuple[Measurements, Decision] | None, changed: bool
) -> CurationResult:
    """Describe ``manifest``, and what was decided that led to it, or would lead to another version."""
    relabelled = sum(part.relabelled or 0 for part in manifest.parts)
    if curation is None:
        parts = [part for part in manifest.parts if part.outcomes.get("dropped")]
        tables = [read_records(folder, part, ("outcome", "key", "source", "reason")) for part in parts]
        rows = [row for table in tables for row in table.filter(pc.field("outcome") == "dropped").to_pylist()]
        new_count = restored_count = 0
    else:
        measurements, decision = curation
        relabelled = sum(label.labelled_by is not None for label in decision.labels)
        columns = measurements.records.select(["key", "source", "outcome"]).to_pylist()
        stored_rows = [row | {"reason": reason} for row, reason in zip(columns, decision.reasons, strict=True)]
        rows = [row for row in stored_rows if row["reason"] is not None]
        new_count = sum(row["outcome"] == "kept" for row in rows)
        restored_count = sum(row["outcome"] == "dropped" and row["reason"] is None for row in stored_rows)
    rows.sort(key=lambda row: row["key"])
    rules = Counter(rule_of(row["reason"]) for row in rows).most_common()
    total = manifest.kept + manifest.dropped
    return CurationResult(
        dataset=folder.name,
        content_digest=manifest.content_digest,
        digest=manifest.digest,
        changed=changed,
        kept=total - len(rows),
        dropped=len(rows),
        newly_dropped=new_count,
        restored=restored_count,
        rules=dict(rules),
        images=[DroppedImage(key=row["key"], source=row["source"], reason=row["reason"]) for row in rows[:MAX_LISTED]],
        semantic=curation[1].calibration if curation else None,
        relabelled=relabelled or None,
    )


def curate_ingested(
    result: IngestResult,
    config: CurationConfig,
    ingest: IngestConfig,
    evaluation: EvaluationConfig,
    progress: Progress = ignore_progress,
    *,
    remote: RemoteDataset | None = None,
) -> IngestResult:
    """Curate the data set of an ingest, and return its result with the version made so; see ``curate``."""
    curation = curate(result.folder, config, ingest, evaluation, progress, remote=remote)
    version = {name: getattr(curation, name) for name in ("content_digest", "digest", "kept")}
    dropped_count = curation.dropped if config.drops or curation.changed or curation.dropped else None
    return result.model_copy(update=version | {"changed": result.changed or curation.changed, "dropped": dropped_count})
