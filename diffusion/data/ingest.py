"""Ingest: a folder of pictures in, a data set of WebDataset shards and a manifest out."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from diffusion.config import Config
from diffusion.data.config import IngestConfig
from diffusion.data.manifest import (
    QUARANTINE,
    SAMPLES,
    Manifest,
    content_digest,
    write_manifest,
    write_table,
)
from diffusion.data.pictures import Refused, StoredPicture, prepare
from diffusion.data.shards import Sample, ShardWriter
from diffusion.data.sources import Candidate, read_folder
from diffusion.errors import UserError
from diffusion.files import digest_of, sha256_bytes
from diffusion.progress import Progress, silent

THREADS = 2
BATCH = 256


class Quarantined(Config):
    """A refused file."""

    source: str
    reason: str
    sha256: str


class IngestResult(Config):
    """What an ingest did, as ``darkroom ingest --json`` prints it."""

    dataset: str
    folder: Path
    content_digest: str
    kept: int
    duplicates: int
    quarantined: list[Quarantined]


@dataclass(frozen=True)
class _Prepared:
    candidate: Candidate
    sha256: str
    picture: StoredPicture | None
    reason: str = ""


@dataclass
class _Statistics:
    """Sums over the training pictures, exact in integers, from which mean and deviation follow."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))

    def add(self, picture: StoredPicture) -> None:
        pixels = np.frombuffer(picture.pixels, np.uint8).astype(np.int64)
        pixels = pixels.reshape(-1, 3 if picture.mode == "RGB" else 1)
        self.count += len(pixels)
        self.total += pixels.sum(0)
        self.squares += (pixels**2).sum(0)

    def mean_and_std(self, channels: int) -> tuple[list[float], list[float]]:
        mean = self.total / max(self.count, 1)
        std = np.sqrt(np.maximum(self.squares / max(self.count, 1) - mean**2, 0))
        return (mean / 127.5 - 1)[:channels].tolist(), (std / 127.5)[:channels].tolist()


def ingest(
    source: Path, folder: Path, config: IngestConfig, progress: Progress = silent, threads: int = THREADS
) -> IngestResult:
    """Make the data set in ``folder`` (its name is the data set's) from the pictures in ``source``.

    Equal pictures and configuration give equal bytes. The old version of the data set stays whole until the
    new one is; a run that was killed is simply run again. Two ingests into one folder take turns.

    Raises UserError if no picture can be used, or more than ``config.max_quarantined`` of them are refused.
    """
    candidates = read_folder(source)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        return _ingest(candidates, source, folder, config, progress, threads)


def _ingest(
    candidates: list[Candidate],
    source: Path,
    folder: Path,
    config: IngestConfig,
    progress: Progress,
    threads: int,
) -> IngestResult:
    writer = ShardWriter(folder / "shards", config.shard_bytes)
    rows: dict[str, dict[str, Any]] = {}
    refused: list[Quarantined] = []
    duplicates = 0
    statistics = _Statistics()
    for done, prepared in enumerate(_prepare_all(candidates, config, threads), start=1):
        picture, candidate = prepared.picture, prepared.candidate
        if picture is None:
            refused.append(Quarantined(source=candidate.source, reason=prepared.reason, sha256=prepared.sha256))
        elif picture.key in rows:
            duplicates += 1
        else:
            rows[picture.key] = row = _row(prepared, picture, config)
            place = writer.add(Sample(picture.key, picture.png, _about(row)))
            row |= {"shard": place.shard, "offset": place.offset, "size": place.size}
            if row["split"] == "train":
                statistics.add(picture)
        progress("pictures ingested", done, len(candidates))
    _check(rows, refused, len(candidates), source, config)
    writer.close()

    samples = list(rows.values())
    channels = 3 if any(row["mode"] == "RGB" for row in samples) else 1
    mean, std = statistics.mean_and_std(channels)
    histogram = Counter(row["label"] for row in samples if row["label"] is not None)
    splits = Counter(row["split"] for row in samples)
    manifest = Manifest(
        name=folder.name,
        content_digest=content_digest(samples, config),
        layout_digest=digest_of([entry.sha256 for entry in writer.shards]),
        ingest=config,
        size=config.size,
        channels=channels,
        counts={"train": splits["train"], "held_out": splits["held_out"]},
        labels=sorted(histogram),
        class_histogram=dict(sorted(histogram.items())),
        mean=mean,
        std=std,
        sigma_data=float(np.sqrt(np.mean(np.square(std)))),
        duplicates=duplicates,
        quarantined=len(refused),
        shards=writer.shards,
        samples_table=write_table(folder, "samples", samples, SAMPLES),
        quarantine_table=write_table(folder, "quarantine", [r.model_dump() for r in refused], QUARANTINE),
    )
    write_manifest(folder, manifest)
    _remove_strays(folder, manifest)
    return IngestResult(
        dataset=folder.name,
        folder=folder,
        content_digest=manifest.content_digest,
        kept=len(samples),
        duplicates=duplicates,
        quarantined=refused,
    )


def _prepare_all(candidates: list[Candidate], config: IngestConfig, threads: int) -> Iterator[_Prepared]:
    """Prepare in parallel (Pillow works outside the interpreter lock), yielding in the order given."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(candidates), BATCH):
            yield from pool.map(partial(_prepare, config=config), candidates[start : start + BATCH])


def _prepare(candidate: Candidate, config: IngestConfig) -> _Prepared:
    digest = ""
    try:
        size = candidate.path.stat().st_size
        if size > config.max_bytes:
            raise Refused(f"{size} bytes are over the limit of {config.max_bytes}")
        data = candidate.path.read_bytes()
        digest = sha256_bytes(data)
        return _Prepared(candidate, digest, prepare(data, config))
    except FileNotFoundError:
        return _Prepared(candidate, digest, None, "named in the metadata but missing")
    except OSError as error:
        return _Prepared(candidate, digest, None, f"cannot be read: {error.strerror or error}")
    except Refused as refusal:
        return _Prepared(candidate, digest, None, str(refusal))


def split_of(key: str, held_out: float) -> str:
    """The split a picture falls into: a function of its content alone, so it never changes sides."""
    return "held_out" if int(key[:16], 16) < held_out * 2**64 else "train"


def _row(prepared: _Prepared, picture: StoredPicture, config: IngestConfig) -> dict[str, Any]:
    return {
        "key": picture.key,
        "mode": picture.mode,
        "width": picture.size[0],
        "height": picture.size[1],
        "label": prepared.candidate.label,
        "caption": prepared.candidate.caption,
        "split": split_of(picture.key, config.held_out),
        "source": prepared.candidate.source,
        "source_sha256": prepared.sha256,
    }


def _about(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": row["label"],
        "caption": row["caption"],
        "source": row["source"],
        "sha256": row["source_sha256"],
    }


def _check(
    kept: Iterable[str], refused: list[Quarantined], candidates: int, source: Path, config: IngestConfig
) -> None:
    leading = "; ".join(f"{count} × {reason}" for reason, count in Counter(r.reason for r in refused).most_common(3))
    if not candidates:
        raise UserError(f"no pictures in {source}: give a folder of JPEG, PNG, WebP, GIF, BMP or TIFF files")
    if not any(True for _ in kept):
        raise UserError(f"no usable picture in {source}: all {candidates} were refused ({leading})")
    if len(refused) > config.max_quarantined * candidates:
        raise UserError(
            f"{len(refused)} of {candidates} pictures in {source} were refused, more than the share of "
            f"{config.max_quarantined:g} allowed by ingest.max_quarantined ({leading})"
        )


def _remove_strays(folder: Path, manifest: Manifest) -> None:
    """Take away what older versions and killed runs left behind, now that nothing names it."""
    named = {entry.name for entry in (*manifest.shards, manifest.samples_table, manifest.quarantine_table)}
    for path in (*folder.glob("*.parquet"), *folder.glob("shards/*.tar"), *folder.rglob(".*.partial")):
        if path.relative_to(folder).as_posix() not in named:
            path.unlink()
