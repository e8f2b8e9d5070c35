"""Equal images of many parts, found range of keys by range of keys, so that no process sees all records."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes
from diffusion.data.fan_out import FanOut, make_fan_out
from diffusion.data.ingest.config import IngestConfig, StorageConfig
from diffusion.data.key_ranges import RANGE, range_count, read_range, scratch_folder, write_run
from diffusion.data.manifest import MASK, STORED, Part, digest_of_samples, read_records, sample_digest, work_folder
from diffusion.data.versions.versions import count_stored

SAMPLE = np.dtype([("key", "S32"), ("digest", "S32"), ("part", "i4"), ("row", "i4"), ("kept", "?")])
"""Stored image of a part: its sample digest, the number of its part among those resolved, its row in the records."""
DUPLICATE = np.dtype([("part", "i4"), ("row", "i4"), ("relabelled", "?")])
"""Image that another one precedes, as in SAMPLE, and whether it has another label or caption."""


@dataclass(frozen=True)
class _Run:
    path: Path
    parts: list[tuple[int, Path, Part]]
    removed: frozenset[str]


@dataclass(frozen=True)
class _Range:
    path: Path
    runs: list[Path]
    number: int
    count: int


def resolve(
    parts: Sequence[tuple[Path, Part]],
    storage: StorageConfig,
    scratch: Path,
    fan_out: FanOut,
    removed: frozenset[str] = frozenset(),
) -> tuple[str, np.ndarray]:
    """Find the first of equal images of ``parts``, each with the folder of its data set, in their order.

    Workers have about RANGE rows in memory; files in ``scratch`` take 73 bytes per image. Returns the content digest
    without all others, and these, as DUPLICATE. Raises UserError if a table is missing or damaged, or an image has a
    key or the digest of a file in ``removed``.
    """
    runs: list[Path] = []
    removed_keys: list[str] = []
    tasks = (
        _Run(scratch / f"run-{group[0][0]}.npy", group, removed)
        for group in _group((number, *part) for number, part in enumerate(parts))
    )
    for path, keys in fan_out(_write_run, tasks):
        runs.append(path)
        removed_keys += keys
    if removed_keys:
        key_list = " ".join(removed_keys[:5]) + (" …" if len(removed_keys) > 5 else "")
        raise UserError(
            f"{len(removed_keys):,} images were taken down from one of the data sets and are still in another: run "
            f"`darkroom data remove {key_list} --dataset NAME` there first"
        )
    count = range_count(sum(count_stored(part) for _, part in parts))
    duplicates = [np.empty(0, DUPLICATE)]

    def digests() -> Iterator[bytes]:
        ranges = (_Range(scratch / f"range-{number}.bin", runs, number, count) for number in range(count))
        for path, range_duplicates in fan_out(_resolve_range, ranges):
            duplicates.append(range_duplicates)
            yield path.read_bytes()
            path.unlink()

    return digest_of_samples(storage, digests()), np.concatenate(duplicates)


def content_digest(folder: Path, parts: Iterable[Part], storage: StorageConfig) -> str:
    """Compute the content digest of the images of ``parts``; raises UserError if a table is missing or damaged.

    The caller holds the data set's lock.
    """
    with scratch_folder(work_folder(folder) / "ranges") as scratch:
        return resolve([(folder, part) for part in parts], storage, scratch, make_fan_out(IngestConfig()))[0]


def _group(parts: Iterable[tuple[int, Path, Part]]) -> Iterator[list[tuple[int, Path, Part]]]:
    group: list[tuple[int, Path, Part]] = []
    for entry in parts:
        group.append(entry)
        if sum(count_stored(part) for _, _, part in group) >= RANGE:
            yield group
            group = []
    if group:
        yield group


def _write_run(run: _Run) -> tuple[Path, list[str]]:
    """Write the images of some parts as a sorted run; returns also the keys of those that were taken down."""
    pieces, keys = [np.empty(0, SAMPLE)], []
    columns = ("key", "split", "label", "caption", MASK.name)
    for number, folder, part in run.parts:
        table = read_records(folder, part, ("outcome", "source_sha256", *columns))
        outcomes = np.array(table["outcome"].to_pylist())
        places = np.flatnonzero(np.isin(outcomes, STORED))
        rows = table.take(places).to_pylist()
        if run.removed:
            keys += [row["key"] for row in rows if not run.removed.isdisjoint((row["key"], row["source_sha256"]))]
        piece = np.zeros(len(rows), SAMPLE)
        piece["key"] = [bytes.fromhex(row["key"]) for row in rows]
        piece["digest"] = [sample_digest(*(row[name] for name in columns)) for row in rows]
        piece["part"], piece["row"], piece["kept"] = number, places, outcomes[places] == "kept"
        pieces.append(piece)
    return write_run(run.path, np.concatenate(pieces)), keys


def _resolve_range(task: _Range) -> tuple[Path, np.ndarray]:
    """Write the sample digests of a range, each key's first; returns also the others."""
    rows = read_range(task.runs, task.number, task.count)
    is_first = np.ones(len(rows), bool)
    is_first[1:] = rows["key"][1:] != rows["key"][:-1]
    digests = rows["digest"][is_first]
    write_bytes(task.path, digests[rows["kept"][is_first]].tobytes())
    others = rows[~is_first]
    duplicates = np.zeros(len(others), DUPLICATE)
    duplicates["part"], duplicates["row"] = others["part"], others["row"]
    duplicates["relabelled"] = others["digest"] != digests[np.cumsum(is_first)[~is_first] - 1]
    return task.path, duplicates
