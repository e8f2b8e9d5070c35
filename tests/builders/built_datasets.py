"""Data sets written by hand, so that a test knows what is in them."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion.common.files import digest_of
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import RECORDS, FileEntry, Manifest, Part, Totals, write_manifest

Record: TypeAlias = dict[str, Any]
"""A row of RECORDS; those of kept images have them under ``pixels``."""


def key_of(pixels: np.ndarray) -> str:
    """The key of an image, (H, W) or (H, W, 3) uint8."""
    mode = "L" if pixels.ndim == 2 else "RGB"
    header = f"{mode}:{pixels.shape[1]}x{pixels.shape[0]}:".encode()
    return hashlib.sha256(header + pixels.tobytes()).hexdigest()


def image_record(pixels: np.ndarray, source: str, split: str = "train", **fields: Any) -> Record:
    """A record of a kept image, with its pixels under ``pixels``."""
    values = pixels.reshape(-1, 1 if pixels.ndim == 2 else 3).astype(np.int64)
    height, width = pixels.shape[:2]
    return {
        "pixels": pixels,
        "source": source,
        "source_sha256": "0" * 64,
        "outcome": "kept",
        "key": key_of(pixels),
        "split": split,
        "mode": "L" if pixels.ndim == 2 else "RGB",
        "width": width,
        "height": height,
        "total": values.sum(0).tolist(),
        "squares": (values**2).sum(0).tolist(),
    } | fields


def duplicate(of: Record, source: str) -> Record:
    """A record of a file with the pixels of a kept image."""
    return {"source": source, "source_sha256": "1" * 64, "outcome": "duplicate", "key": of["key"]}


def quarantined(source: str, reason: str) -> Record:
    """A record of a quarantined file."""
    return {"source": source, "source_sha256": "2" * 64, "outcome": "quarantined", "reason": reason}


@dataclass
class BuiltDataset:
    """A data set in ``folder`` that grows by ``version``."""

    folder: Path
    size: int
    name: str = "built"
    parts: list[Part] = field(default_factory=list)
    manifest: Manifest | None = None

    def version(self, *parts: Sequence[Record], change: str = "ingest") -> Manifest:
        """Add a part for each list of records, and make the whole the current version."""
        for rows in parts:
            self.parts.append(self._part(len(self.parts), rows))
        return self.write(change)

    def replace(self, number: int, rows: Sequence[Record], change: str) -> Manifest:
        """Write a part anew, take away what it was, and make the whole the current version."""
        old_part = self.parts[number]
        self.parts[number] = self._part(number, rows)
        for entry in (old_part.shard, old_part.records):
            if entry is not None:
                (self.folder / entry.name).unlink()
        return self.write(change)

    def write(self, change: str) -> Manifest:
        """Make the parts as they are the current version."""
        manifest = Manifest(
            name=self.name,
            parent=self.manifest.digest if self.manifest else None,
            change=change,
            content_digest=digest_of([part.model_dump(mode="json") for part in self.parts]),
            storage=StorageConfig(size=self.size),
            parts=list(self.parts),
        )
        write_manifest(self.folder, manifest)
        self.manifest = manifest
        return manifest

    def _part(self, number: int, rows: Sequence[Record]) -> Part:
        images = [row for row in rows if row["outcome"] == "kept"]
        shard = io.BytesIO()
        with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in images:
                png = io.BytesIO()
                Image.fromarray(row["pixels"]).save(png, "PNG")
                row["offset"], row["size"] = shard.tell() + tarfile.BLOCKSIZE, len(png.getvalue())
                for name, data in (("png", png.getvalue()), ("json", json.dumps({"source": row["source"]}).encode())):
                    member = tarfile.TarInfo(f"{row['key']}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict.fromkeys(RECORDS.names) | row for row in rows], RECORDS), table)
        train = [row for row in images if row["split"] == "train"]
        total, squares = (
            tuple(sum(np.broadcast_to(row[name], 3)[channel].item() for row in train) for channel in range(3))
            for name in ("total", "squares")
        )
        return Part(
            number=number,
            records=self._file("records", number, "parquet", table.getvalue()),
            shard=self._file("shards", number, "tar", shard.getvalue()) if images else None,
            outcomes=Counter(row["outcome"] for row in rows),
            splits=Counter(row["split"] for row in images),
            classes=Counter(row["label"] for row in images if row.get("label") is not None),
            modes=Counter(row["mode"] for row in images),
            totals=Totals(pixels=len(train) * self.size**2, total=total, squares=squares),
        )

    def _file(self, kind: str, number: int, suffix: str, data: bytes) -> FileEntry:
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / kind / f"{number:05d}-{digest[:16]}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return FileEntry(name=str(path.relative_to(self.folder)), sha256=digest, bytes=len(data))
