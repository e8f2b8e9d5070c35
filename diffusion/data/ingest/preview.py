"""Preview of an ingest: what the source holds, and what becomes of the images that would be read."""

import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.progress import ignore_progress
from diffusion.common.shapes import Shape, shape_name
from diffusion.data.ingest.buckets import nearest_shape
from diffusion.data.ingest.chunks import ENTRY, digest_payload, make_plan
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import MASK_PROBLEM, UnusableEntryError, prepare
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.ingest import Rebuild, complete_buckets, origin_of, require_same_storage
from diffusion.data.manifest import Manifest, read_manifest, work_folder
from diffusion.data.shards import missing_shards
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, Entry, ObjectStore, Source
from diffusion.data.sources.survey import Survey, survey

MAX_TRIED = 1000
"""Images that a preview decodes: seconds."""


class Forecast(Config):
    """What an ingest makes of the images that it would read first."""

    tried: int
    """Number of images that were decoded for it."""
    kept: int
    """Images that it would keep, unless a rule on near-duplicates or of curation drops some."""
    duplicates: int
    removed: int
    """Images that were taken down before, and are left out."""
    quarantined: dict[str, int]
    """Number of images that cannot be used, by reason, the most frequent first."""

    def lines(self, new: int) -> list[str]:
        """Describe it, for ``new`` images that would be read in all."""
        counts = [f"would keep {self.kept:,}"]
        counts += [pluralize(self.duplicates, "duplicate")] if self.duplicates else []
        counts += [f"{self.removed:,} left out, as taken down before"] if self.removed else []
        counts += [f"{sum(self.quarantined.values()):,} quarantined"] if self.quarantined else []
        start = f"of the first {self.tried:,} " if self.tried < new else ""
        reasons = [f"  quarantined: {count:,} × {reason}" for reason, count in list(self.quarantined.items())[:5]]
        return [f"{start}{', '.join(counts)}", *reasons]


class IngestPreview(Config):
    """What an ingest would do."""

    dataset: str
    kept: int | None
    """Images in the data set; None if there is none yet."""
    new: int
    """Entries of the source that would be read: those not read before, or changed since."""
    forecast: Forecast | None
    """What would become of these; None for a source that is not on this machine."""
    fails: str | None
    """Why the ingest would fail; None if nothing is known against it."""
    size: int
    shapes: list[Shape]
    """Shapes (H, W) in which images are stored, in pixels."""
    survey: Survey

    def lines(self) -> list[str]:
        """Describe the source, and what of it is new."""
        target = "a new data set" if self.kept is None else f"data set {self.dataset}, which has {self.kept:,} images"
        warning = ["small      images below ingest.size are quarantined: lower it, or set ingest.enlarge=true"]
        lines = [*self.survey.lines(), *(warning if self.survey.has_images_below(self.size) else [])]
        resolution = f"{self.size}×{self.size} pixels"
        if self.shapes != [(self.size, self.size)]:
            resolution = f"{len(self.shapes)} shapes of about as many pixels as {self.size}×{self.size}"
            counts = Counter(nearest_shape(*size, self.shapes) for size in self.survey.sizes)
            shares = (f"{shape_name(shape)} {counts[shape] / max(counts.total(), 1):.0%}" for shape in self.shapes)
            lines.append(f"buckets    {', '.join(shares)} of the sampled images")
        lines.append(f"would read {self.new:,} of them into {target}, at {resolution}")
        lines += self.forecast.lines(self.new) if self.forecast is not None else []
        return lines + ([f"would fail: {self.fails}"] if self.fails else [])


def preview(
    folder: Path,
    config: IngestConfig,
    *,
    requeue: bool = False,
    rebuild: Rebuild = "never",
    objects: ObjectStore | None = None,
) -> IngestPreview:
    """Look at ``config.source``, and decode the first new images of a source on this machine; changes nothing.

    Raises UserError as ``ingest`` does.
    """
    before = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    rebuilding = before is None or require_same_storage(before, config, rebuild)
    forecast = None
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for path in work_folder(folder).glob("index.sqlite*"):
            shutil.copyfile(path, scratch / path.name)
        source_survey = survey(config, scratch, objects)
        config = complete_buckets(config, None if rebuilding else before, lambda: source_survey)
        with closing(_open_index(scratch / "index.sqlite", folder, before, config)) as index:
            listings = path if (path := work_folder(folder) / "listings").is_dir() else None
            source = open_source(config.source, Access(config, scratch, objects, listings=listings))
            plan = scratch / "plan.sqlite"
            _, new = make_plan(plan, source, origin_of(config), index.path, requeue, rebuilding, ignore_progress)
            if Path(config.source).exists():
                forecast = _forecast(plan, source, config, index, rebuilding)
    kept_count = None if before is None or rebuilding else before.kept
    return IngestPreview(
        dataset=folder.name,
        kept=kept_count,
        new=new,
        forecast=forecast,
        fails=None if forecast is None or forecast.tried < new else _failure(forecast, kept_count, config),
        size=config.size,
        shapes=config.shapes,
        survey=source_survey,
    )


def _open_index(path: Path, folder: Path, before: Manifest | None, config: IngestConfig) -> Index:
    """Open the index at ``path``, without hashes if they would have to be computed from shards that are not here."""
    bits = config.near_duplicate_bits(None if before is None else before.near_duplicate_bits)
    try:
        return Index(path, folder, before, bits)
    except UserError:
        if before is None or not missing_shards(folder, before):
            raise
    # No outcome of a preview depends on them.
    return Index(path, folder, before, None)


def _forecast(plan: Path, source: Source, config: IngestConfig, index: Index, rebuilding: bool) -> Forecast:
    """Decode the first images of the ``plan`` and find their outcomes, as chunks and their merge do."""
    with closing(sqlite3.connect(plan)) as database:
        query = f"SELECT {ENTRY}, known FROM plan ORDER BY number LIMIT {MAX_TRIED}"
        rows = [(Entry(*row[:-1]), (row[-1] or "").lower().split(",")) for row in database.execute(query)]
    readable = [entry for entry, _ in rows if entry.problem is None]
    payloads = source.read(readable)
    masks = source.read_masks(readable) if config.masks == "files" else repeat(None)
    outcomes, reasons, keys = Counter[str](), Counter[str](), set[str]()
    for entry, known_digests in rows:
        try:
            if entry.problem is not None:
                raise UnusableEntryError(entry.problem)
            payload, mask = next(payloads), next(masks)
            if isinstance(payload, UnusableEntryError):
                raise payload
            digest = digest_payload(payload)
            if digest in known_digests and entry.mask is None:
                continue
            key = prepare(payload, config, mask).key
        except UnusableEntryError as error:
            if str(error).startswith(MASK_PROBLEM) and not rebuilding and index.has_image(entry.source, digest):
                continue  # it keeps its mask
            # Without the size of each.
            reasons[re.sub(r"^\d+×\d+ pixels:? ", "", str(error))] += 1
            continue
        is_stored = key in keys or (not rebuilding and index.sample(key) is not None)
        outcomes["removed" if index.is_removed(key, digest) else "duplicates" if is_stored else "kept"] += 1
        keys.add(key)
    return Forecast(
        tried=len(rows),
        **{name: outcomes[name] for name in ("kept", "duplicates", "removed")},
        quarantined=dict(reasons.most_common()),
    )


def _failure(forecast: Forecast, kept: int | None, config: IngestConfig) -> str | None:
    quarantined = sum(forecast.quarantined.values())
    total = forecast.kept + forecast.duplicates + forecast.removed + quarantined
    if not (kept or forecast.kept):
        return f"no usable image in {config.source}"
    if quarantined > config.max_quarantined * total:
        return f"more images are quarantined than ingest.max_quarantined = {config.max_quarantined:g} allows"
    return None
