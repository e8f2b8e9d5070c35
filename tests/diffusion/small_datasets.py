"""Data sets written member by member: what is in which shard is up to the test."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion.data.config import StorageConfig
from diffusion.data.manifest import RECORDS, FileEntry, Manifest, Part, Totals, write_manifest
from diffusion.files import digest_of, sha256_bytes, sha256_file


def random_pictures(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    """(count, channels, size, size) uint8, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def key_of(pixels: np.ndarray) -> str:
    """The key of a picture (C, H, W)."""
    channels, height, width = pixels.shape
    mode = "RGB" if channels == 3 else "L"
    return sha256_bytes(f"{mode}:{width}x{height}:".encode() + pixels.transpose(1, 2, 0).tobytes())


def write_dataset(
    folder: Path,
    pictures: np.ndarray,
    per_shard: int,
    labels: list[str | None] | None = None,
    captions: list[str | None] | None = None,
    held_out_every: int = 4,
) -> Manifest:
    """The data set of ``pictures``, (N, C, H, W) uint8, in shards of ``per_shard``; every so many are held out.

    Each records table also has a row of a picture that was refused.
    """
    count = len(pictures)
    labels, captions = labels or [None] * count, captions or [None] * count
    parts = []
    for number, first in enumerate(range(0, count, per_shard)):
        chosen = range(first, min(first + per_shard, count))
        rows = [dict.fromkeys(RECORDS.names) | {"source": "x", "outcome": "quarantined", "reason": "damaged"}]
        for index in chosen:
            row = {
                "source": f"{index}.png",
                "outcome": "kept",
                "key": key_of(pictures[index]),
                "split": "held_out" if held_out_every and index % held_out_every == 0 else "train",
                "label": labels[index],
                "caption": captions[index],
            }
            rows.append(dict.fromkeys(RECORDS.names) | row)
        shard = _write_shard(folder, number, [pictures[index] for index in chosen], rows[1:])
        kept = rows[1:]
        part = Part(
            number=number,
            records=_write_records(folder, number, rows),
            shard=shard,
            outcomes={"kept": len(kept), "quarantined": 1},
            splits=Counter(row["split"] for row in kept),
            classes=Counter(row["label"] for row in kept if row["label"] is not None),
            modes={"RGB" if pictures.shape[1] == 3 else "L": len(kept)},
            totals=Totals(),
        )
        parts.append(part)
    manifest = Manifest(
        name=folder.name,
        parent=None,
        change="ingest",
        content_digest=digest_of(sorted(key_of(each) for each in pictures)),
        storage=StorageConfig(size=pictures.shape[-1]),
        parts=parts,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_shard(folder: Path, number: int, pictures: list[np.ndarray], rows: list[dict[str, object]]) -> FileEntry:
    path = folder / "shards" / f"{number:05d}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pixels, row in zip(pictures, rows, strict=True):
            png = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(png, "PNG")
            about = json.dumps({"label": row["label"], "caption": row["caption"]}).encode()
            for suffix, data in (("png", png.getvalue()), ("json", about)):
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                member.size = len(data)
                if suffix == "png":
                    row["offset"], row["size"] = tar.offset + tarfile.BLOCKSIZE, len(data)
                tar.addfile(member, io.BytesIO(data))
    return _entry(folder, path)


def _write_records(folder: Path, number: int, rows: list[dict[str, object]]) -> FileEntry:
    path = folder / "records" / f"{number:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, RECORDS), path)
    return _entry(folder, path)


def _entry(folder: Path, path: Path) -> FileEntry:
    name = path.relative_to(folder).as_posix()
    return FileEntry(name=name, sha256=sha256_file(path), bytes=path.stat().st_size)
