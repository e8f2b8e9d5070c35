"""A data set as training and evaluation see it: rows in an order free of history, pictures as tensors."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from diffusion.data.manifest import Manifest, Split, read_manifest
from diffusion.data.shards import damage, opened
from diffusion.errors import UserError
from diffusion.files import sha256_file

CACHE_BYTES = 2 * 2**30
"""Decoded pictures are kept in memory up to this size, and decoded anew for every batch beyond it."""
THREADS = 2
WARM_BATCH = 1024


class Dataset:
    """The data set in a folder: every file checked against the manifest, pictures read from the shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        table_path = folder / manifest.samples_table.name
        if not table_path.is_file() or sha256_file(table_path) != manifest.samples_table.sha256:
            raise UserError(f"{table_path} is missing or damaged: {_mend(folder)}")
        for shard in manifest.shards:
            if found := damage(folder, shard):
                raise UserError(f"shard {folder / shard.name} is {found}: {_mend(folder)}")
        self.folder = folder
        self.manifest = manifest
        table = pq.read_table(table_path).sort_by("key")
        self.keys: list[str] = table["key"].to_pylist()
        self.labels: list[str | None] = table["label"].to_pylist()
        self.captions: list[str | None] = table["caption"].to_pylist()
        self._splits = np.array(table["split"].to_pylist())
        self._shards, self._offsets, self._sizes = (table[name].to_numpy() for name in ("shard", "offset", "size"))
        self._cache: Tensor | None = None

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open the data set in ``folder``; raises UserError, naming the file, for whatever is damaged."""
        return cls(folder, read_manifest(folder))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture."""
        return self.manifest.channels, self.manifest.size, self.manifest.size

    def rows(self, split: Split) -> list[int]:
        """The rows of a split, sorted by key."""
        return np.flatnonzero(self._splits == split).tolist()

    def classes(self, rows: Sequence[int], classes: Sequence[str]) -> Tensor:
        """The class of each row as its number in ``classes``, len(classes) where it is none: (len(rows),) int64."""
        numbers = {label: number for number, label in enumerate(classes)}
        return torch.tensor([numbers.get(self.labels[row] or "", len(classes)) for row in rows])

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """The pictures in ``rows`` as (len(rows), C, H, W) uint8."""
        if self._cache is None and len(self.keys) * int(np.prod(self.shape)) <= CACHE_BYTES:
            self._cache = self._decode(range(len(self.keys)))
        if self._cache is not None:
            return self._cache[torch.as_tensor(rows, dtype=torch.long)]
        return self._decode(rows)

    def _decode(self, rows: Sequence[int]) -> Tensor:
        pictures = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        paths = [self.folder / shard.name for shard in self.manifest.shards]
        with opened(paths) as shards, ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(rows), WARM_BATCH):
                batch = rows[start : start + WARM_BATCH]
                pngs = []
                for row in batch:
                    shard = shards[self._shards[row]]
                    shard.seek(self._offsets[row])
                    pngs.append(shard.read(self._sizes[row]))
                for number, pixels in enumerate(pool.map(self._pixels, pngs), start=start):
                    pictures[number] = torch.from_numpy(pixels)
        return pictures

    def _pixels(self, png: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(png), formats=("PNG",))
        channels, height, width = self.shape
        if picture.size != (width, height):
            raise UserError(f"a picture in {self.folder} is {picture.size}, not {width}×{height}: {_mend(self.folder)}")
        pixels = np.array(picture.convert("RGB" if channels == 3 else "L"))
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _mend(folder: Path) -> str:
    return f"ingest the data set {folder.name} again from its source, or restore it with `dvc checkout`"
