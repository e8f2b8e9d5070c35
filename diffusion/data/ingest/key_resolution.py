"""Equal images of many parts: which comes first, and the content digest of those that do."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import STORED, Part, digest_of_samples, find_intact_records, work_folder
from diffusion.data.tables import insert_records, open_database, query_records, quote_path, read_rows, scratch_folder

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SAMPLE = np.dtype([("key", "S32"), ("digest", "S32"), ("part", "i4"), ("row", "i4"), ("kept", "?")])
"""Stored image of a part: its sample digest, the number of its part among those resolved, its row in the records."""
DUPLICATE = np.dtype([("part", "i4"), ("row", "i4"), ("relabelled", "?")])
"""Image that another one precedes, as in SAMPLE, and whether it has another label or caption."""
_SAMPLES = """
SELECT
    unhex(key) AS key,
    unhex(sha256(
        '["' || key || '","' || split || '",' || quote(label) || ',' || quote(caption)
        || coalesce(',"' || mask || '"', '') || ']'
    )) AS digest,
    part,
    "row",
    outcome = 'kept' AS kept,
    left(key, {digits}) AS range
FROM records
WHERE outcome IN ('kept', 'dropped')
"""
_REMOVED = """
SELECT key, part
FROM records
WHERE outcome IN ('kept', 'dropped')
    AND (key IN (SELECT digest FROM removed) OR source_sha256 IN (SELECT digest FROM removed))
"""
MAX_RANGE = 2**21
"""Images whose keys and digests are sorted in memory at a time."""


def resolve(
    parts: Sequence[tuple[Path, Part]], storage: StorageConfig, scratch: Path, removed: Collection[str] = ()
) -> tuple[str, np.ndarray]:
    """Find the first of equal images of ``parts``, each with the folder of its data set, in their order.

    Memory does not grow with the images, except for 9 bytes for each duplicate: ``scratch`` has ranges of keys, which
    are sorted one by one.
    Returns the content digest without the duplicates, and these, as DUPLICATE, sorted. Raises UserError if a table is
    missing or damaged, or an image has a key or the digest of a file in ``removed``.
    """
    paths = [find_intact_records(folder, part) for folder, part in parts]
    with open_database(scratch) as database, TemporaryDirectory(dir=scratch, prefix="ranges-") as ranges:
        if removed:
            _require_none(database, paths, removed)
        _define_quote(database)
        count, digits = sum(part.outcomes.get(name, 0) for _, part in parts for name in STORED), 1
        while count > MAX_RANGE * 16**digits:
            digits += 1
        # A table that does not fit would be written twice: as it is filled and as it is sorted.
        options = "FORMAT parquet, PARTITION_BY (range), APPEND, COMPRESSION uncompressed"
        statement = f"COPY ({{}}) TO {quote_path(Path(ranges))} ({options})"
        query_records(database, paths, _SAMPLES.format(digits=digits), statement)
        duplicates = [np.empty(0, DUPLICATE)]

        def samples() -> Iterator[np.ndarray]:
            # Sorted by their bytes, keys are in the order of their hex digits.
            for folder in sorted(Path(ranges).iterdir()):
                files = f"read_parquet({quote_path(folder, '*.parquet')}, hive_partitioning = false)"
                query = f'SELECT key, digest, part, "row", kept FROM {files} ORDER BY key, part, "row"'
                yield from read_rows(database, query, SAMPLE)

        def digests() -> Iterator[bytes]:
            for firsts, others in _split(samples()):
                yield firsts["digest"][firsts["kept"]].tobytes()
                duplicates.append(others)

        content_digest = digest_of_samples(storage, digests())
    found = np.concatenate(duplicates)
    # A sort of rows takes several times as long.
    return content_digest, found[np.lexsort((found["row"], found["part"]))]


def content_digest(folder: Path, parts: Iterable[Part], storage: StorageConfig) -> str:
    """Compute the content digest of the images of ``parts``; raises UserError if a table is missing or damaged.

    The caller holds the data set's lock.
    """
    with scratch_folder(work_folder(folder) / "ranges") as scratch:
        return resolve([(folder, part) for part in parts], storage, scratch)[0]


def _require_none(database: "DuckDBPyConnection", paths: Sequence[Path], removed: Collection[str]) -> None:
    """Raise UserError if an image at ``paths`` has a key or the digest of a file in ``removed``."""
    database.execute("CREATE TABLE removed AS SELECT unnest(?::VARCHAR[]) AS digest", [list(removed)])
    database.execute("CREATE TABLE found (key VARCHAR, part INTEGER)")
    insert_records(database, "found", paths, _REMOVED)
    if keys := [key for (key,) in database.execute("SELECT key FROM found ORDER BY key, part").fetchall()]:
        key_list = " ".join(keys[:5]) + (" …" if len(keys) > 5 else "")
        raise UserError(
            f"{len(keys):,} images were taken down from one of the data sets and are still in another: run "
            f"`darkroom data remove {key_list} --dataset NAME` there first"
        )


def _define_quote(database: "DuckDBPyConnection") -> None:
    """Define ``quote``, a text or null as canonical JSON has it.

    DuckDB's own to_json writes some control characters in another way.
    """
    text = "value"
    for character in ("\\", '"', *map(chr, range(32))):
        text = f"replace({text}, chr({ord(character)}), '{json.dumps(character)[1:-1]}')"
    # Most texts need no escapes, and 34 replacements take longer than the digest.
    database.execute(
        "CREATE MACRO quote(value) AS CASE WHEN value IS NULL THEN 'null' "
        f"""WHEN regexp_matches(value, '["\\\\\\x00-\\x1f]') THEN '"' || {text} || '"' ELSE '"' || value || '"' END"""
    )


def _split(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split sorted samples into each key's first and, as DUPLICATE, the others."""
    last = np.empty(0, SAMPLE)
    for batch in batches:
        rows = np.concatenate([last, batch])
        is_first = np.ones(len(rows), bool)
        is_first[1:] = rows["key"][1:] != rows["key"][:-1]
        firsts, others = rows[is_first], rows[~is_first]
        duplicates = np.empty(len(others), DUPLICATE)
        duplicates["part"], duplicates["row"] = others["part"], others["row"]
        duplicates["relabelled"] = others["digest"] != firsts["digest"][np.cumsum(is_first)[~is_first] - 1]
        yield firsts[len(last) :], duplicates
        last = firsts[-1:]
