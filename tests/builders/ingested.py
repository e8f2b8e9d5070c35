"""What an ingest leaves in a data set's folder."""

from pathlib import Path

import pyarrow.parquet as pq

from diffusion.data.manifest import read_manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(folder: Path) -> list[dict[str, object]]:
    return [
        row for part in read_manifest(folder).parts for row in pq.read_table(folder / part.records.name).to_pylist()
    ]
