"""Equal images of many parts: which comes first, and the content digest of those that do."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import Part, digest_of_samples, find_intact_records, work_folder
from diffusion.data.tables import insert_records, open_database, read_rows, scratch_folder

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SAMPLE = np.dtype([("key", "S32"), ("digest", "S32"), ("part", "i4"), ("row", "i4"), ("kept", "?")])
"""Stored image of a part: its sample digest, the number of its part among those resolved, its row in the records."""
DUPLICATE = np.dtype([("part", "i4"), ("row", "i4"), ("relabelled", "?")])
"""Image that another one precedes, as in SAMPLE, and whether it has another label or caption."""
_SAMPLES = """
SELECT
    unhex(key),
    unhex(sha256(
        '["' || key || '","' || split || '",' || quote(label) || ',' || quote(caption)
        || coalesce(',"' || mask || '"', '') || ']'
    )),
    part,
    "row",
    outcome = 'kept',
    key IN (SELECT digest FROM removed) OR source_sha256 IN (SELECT digest FROM removed)
FROM records
WHERE outcome IN ('kept', 'dropped')
"""
_REMOVED = "SELECT lower(hex(key)) FROM samples WHERE removed ORDER BY key, part"


def resolve(
    parts: Sequence[tuple[Path, Part]], storage: StorageConfig, scratch: Path, removed: Collection[str] = ()
) -> tuple[str, np.ndarray]:
    """Find the first of equal images of ``parts``, each with the folder of its data set, in their order.

    Memory does not grow with the images, except for 9 bytes for each duplicate: the database spills into ``scratch``.
    Returns the content digest without the duplicates, and these, as DUPLICATE, sorted. Raises UserError if a table is
    missing or damaged, or an image has a key or the digest of a file in ``removed``.
    """
    with open_database(scratch) as database:
        _define_quote(database)
        database.execute("CREATE TABLE removed AS SELECT unnest(?::VARCHAR[]) AS digest", [list(removed)])
        # Sorted by their bytes, keys are in the order of their hex digits.
        database.execute(
            'CREATE TABLE samples (key BLOB, digest BLOB, part INTEGER, "row" INTEGER, kept BOOLEAN, removed BOOLEAN)'
        )
        paths = (find_intact_records(folder, part) for folder, part in parts)
        insert_records(database, "samples", paths, _SAMPLES)
        removed_keys = [key for (key,) in database.execute(_REMOVED).fetchall()]
        if removed_keys:
            key_list = " ".join(removed_keys[:5]) + (" …" if len(removed_keys) > 5 else "")
            raise UserError(
                f"{len(removed_keys):,} images were taken down from one of the data sets and are still in another: run "
                f"`darkroom data remove {key_list} --dataset NAME` there first"
            )
        duplicates = [np.empty(0, DUPLICATE)]

        def digests() -> Iterator[bytes]:
            query = 'SELECT key, digest, part, "row", kept FROM samples ORDER BY key, part, "row"'
            for firsts, others in _split(read_rows(database, query, SAMPLE)):
                yield firsts["digest"][firsts["kept"]].tobytes()
                duplicates.append(others)

        content_digest = digest_of_samples(storage, digests())
    return content_digest, np.sort(np.concatenate(duplicates))


def content_digest(folder: Path, parts: Iterable[Part], storage: StorageConfig) -> str:
    """Compute the content digest of the images of ``parts``; raises UserError if a table is missing or damaged.

    The caller holds the data set's lock.
    """
    with scratch_folder(work_folder(folder) / "ranges") as scratch:
        return resolve([(folder, part) for part in parts], storage, scratch)[0]


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
