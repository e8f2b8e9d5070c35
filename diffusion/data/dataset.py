"""Data set as used by training and evaluation: rows in an order free of history, images as tensors."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, Split, read_manifest, read_records, repair_hint, require_whole
from diffusion.data.png import decode_many
from diffusion.data.shards import LocalShards, ShardCache

if TYPE_CHECKING:
    from webdataset import WebDataset

CACHE_BYTES = 2 * 2**30
"""Size limit, in bytes, up to which the decoded images of the whole set are kept in memory."""
CHUNK = 1024
"""Images decoded at a time."""
SPLITS: tuple[Split, ...] = ("train", "held_out")
ROW = np.dtype(
    [
        *[("key", "S32"), ("split", "i1"), ("label", "i4"), ("shard", "i4")],
        *[("offset", "i8"), ("size", "i4"), ("read", "i4")],
    ]
)
"""Row of the table of the kept images, sorted by key (bytes, which sort as their hex digits do): 57 bytes each.

``split``, ``label`` and ``shard`` are numbers in SPLITS and the manifest's labels (−1: none) and shards; ``read`` is
the number of kept images before this one in the records.
"""

Rows: TypeAlias = Sequence[int] | np.ndarray
"""Row numbers, (N,)."""


class Dataset:
    """Images of a data set from verified shards; decoded ones are kept if all fit ``cache_bytes``. Thread-safe."""

    def __init__(
        self, folder: Path, manifest: Manifest, shards: LocalShards | ShardCache, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards
        self._entries = manifest.shards
        self._table = _read_table(folder, manifest)
        channels, height, width = self.shape
        fits = len(self) * channels * height * width <= cache_bytes
        # The system allocates written pages only, so images never read cost no memory.
        self._cache = np.empty((len(self), height, width, channels), np.uint8) if fits else None
        self._cached = np.zeros(len(self), bool)

    @classmethod
    def open(cls, folder: Path, shards: ShardCache | None = None, cache_bytes: int = CACHE_BYTES) -> "Dataset":
        """Open the data set in ``folder``, or its shards in ``shards``; raises UserError for missing or cut files."""
        manifest = read_manifest(folder)
        if shards is None:
            require_whole(folder, manifest)
        return cls(folder, manifest, LocalShards(folder) if shards is None else shards, cache_bytes)

    def close(self) -> None:
        """Close files and stop threads."""
        self._shards.close()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of every image."""
        return self.manifest.channels, self.manifest.size, self.manifest.size

    def rows(self, split: Split) -> np.ndarray:
        """Return the rows of a split, sorted by key, as (N,) int64."""
        return np.flatnonzero(self._table["split"] == SPLITS.index(split))

    def keys(self, rows: Rows) -> list[str]:
        """Return the key of each row: hex SHA-256 of its mode, shape and pixels."""
        return [key.tobytes().hex() for key in self._table["key"][_numbers(rows)].view(np.uint8).reshape(-1, 32)]

    def labels(self, rows: Rows) -> list[str | None]:
        """Return the label of each row."""
        names: list[str | None] = [*self.manifest.labels, None]
        return [names[number] for number in self._table["label"][_numbers(rows)]]

    def captions(self, rows: Rows) -> list[str | None]:
        """Return the caption of each row."""
        return self._captions.take(pa.array(self._table["read"][_numbers(rows)])).to_pylist()  # type: ignore[no-any-return]

    def different_captions(self) -> tuple[list[str], np.ndarray]:
        """Return the distinct captions, sorted, and the index of each row's, −1 for none: (len(self),) int32."""
        column = self._captions.take(pa.array(self._table["read"]))
        texts = sorted(pc.unique(column).drop_null().to_pylist())
        return texts, _codes(column, texts)

    @cached_property
    def _captions(self) -> pa.ChunkedArray:
        """Return the captions in the order of the records; read at the first use."""
        pieces = [table["caption"].combine_chunks() for _, table in _kept(self.folder, self.manifest, "caption")]
        return pa.chunked_array(pieces, pa.string())

    def classes(self, rows: Rows, classes: Sequence[str]) -> Tensor:
        """Return each row's class as its number in ``classes``, len(classes) if it is none: (len(rows),) int64."""
        numbers = {label: number for number, label in enumerate(classes)}
        # The last entry is for images without a label, whose number −1 indexes it.
        table = np.array([*(numbers.get(label, len(classes)) for label in self.manifest.labels), len(classes)])
        return torch.from_numpy(table[self._table["label"][_numbers(rows)]])

    def shards(self, rows: Rows) -> np.ndarray:
        """Return the number of each row's shard in the manifest: (len(rows),) int32."""
        return self._table["shard"][_numbers(rows)]  # type: ignore[no-any-return]

    def prefetch(self, shards: Sequence[int] | None = None) -> None:
        """Prepare ``shards`` (None: all) in the background, soonest needed first."""
        self._shards.prefetch(self._entries if shards is None else [self._entries[number] for number in shards])

    def images(self, rows: Rows) -> Tensor:
        """Return the images in ``rows`` as (len(rows), C, H, W) uint8; raises UserError if a shard is damaged."""
        return torch.from_numpy(np.ascontiguousarray(self.pixels(rows).transpose(0, 3, 1, 2)))

    def pixels(self, rows: Rows) -> np.ndarray:
        """Return images as ``images`` does, but (len(rows), H, W, C), as stored, without a transposition."""
        rows = _numbers(rows)
        if self._cache is None:
            return self._decoded(rows)
        missing = ~self._cached[rows]
        if missing.any():
            new = rows[missing]
            self._cache[new] = self._decoded(new)
            self._cached[new] = True
        return self._cache[rows]

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        """Decode the images in ``rows``, (len(rows), H, W, C): many of them in chunks and shard by shard."""
        channels, height, width = self.shape
        if not 0 < len(rows) <= CHUNK:
            pixels = np.empty((len(rows), height, width, channels), np.uint8)
            order = np.lexsort((self._table["offset"][rows], self._table["shard"][rows]))
            for start in range(0, len(rows), CHUNK):
                places = order[start : start + CHUNK]
                pixels[places] = self._decoded(rows[places])
            return pixels
        table = self._table[rows]
        shards, offsets, sizes = table["shard"], table["offset"], table["size"]
        order = np.argsort(shards, kind="stable")
        pngs: list[bytes | memoryview] = [b""] * len(rows)
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            entry = self._entries[shards[places[0]]]
            spans = list(zip(offsets[places].tolist(), sizes[places].tolist(), strict=True))
            found: Sequence[bytes | memoryview] = self._shards.read(entry, spans)
            for place, png in zip(places.tolist(), found, strict=True):
                pngs[place] = png
        try:
            return decode_many(pngs, self.shape).transpose(0, 2, 3, 1)
        except ValueError as error:
            raise UserError(
                f"an image in {self.folder} is not what its record says ({error}): {repair_hint(self.folder)}"
            ) from error


def _numbers(rows: Rows) -> np.ndarray:
    return np.asarray(rows, np.int64)


def _kept(folder: Path, manifest: Manifest, *columns: str) -> Iterator[tuple[int, pa.Table]]:
    for number, part in enumerate(part for part in manifest.parts if part.shard is not None):
        table = read_records(folder, part, ["outcome", *columns])
        yield number, table.filter(pc.equal(table["outcome"], "kept"))


def _read_table(folder: Path, manifest: Manifest) -> np.ndarray:
    pieces = []
    for number, records in _kept(folder, manifest, "key", "split", "label", "offset", "size"):
        piece = np.empty(len(records), ROW)
        piece["key"] = np.frombuffer(bytes.fromhex("".join(records["key"].to_pylist())), "S32")
        piece["split"] = _codes(records["split"], SPLITS)
        piece["label"] = _codes(records["label"], manifest.labels)
        piece["shard"] = number
        piece["offset"] = records["offset"].to_numpy()
        piece["size"] = records["size"].to_numpy()
        pieces.append(piece)
    table = np.concatenate(pieces)
    table["read"] = np.arange(len(table))
    return table[np.argsort(table["key"])]


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return each string's number in ``names`` as int32; −1 where it is none of them."""
    encoded = column.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    numbers = {name: number for number, name in enumerate(names)}
    table: np.ndarray = np.array([*(numbers.get(name, -1) for name in found), -1], np.int32)
    codes: np.ndarray = table[pc.fill_null(encoded.indices, len(found)).to_numpy()]
    return codes


def open_webdataset(folder: Path, split: Split = "train", shuffle: int = 0, seed: int = 0) -> "WebDataset":
    """Open one split of the data set in ``folder`` as a WebDataset pipeline, for other training scripts.

    A sample has ``key`` (hex SHA-256 of its pixels), ``image`` (uint8, (C, H, W)), ``label`` (number of its class in
    the manifest's labels, −1 for none) and ``caption`` (str or None). ``torch.utils.data.DataLoader`` takes it with any
    number of workers, which divide the shards among them. Nothing in the shards is unpickled.

    ``shuffle``: size of the shuffle buffer in images; 0 for the stored order of images and shards, which are otherwise
    shuffled by ``seed``. Raises UserError if a shard or table is missing or damaged.
    """
    # Imported here: Darkroom's own training does not need it.
    import webdataset

    dataset = Dataset.open(folder, cache_bytes=0)
    manifest = dataset.manifest
    keys = frozenset(dataset.keys(dataset.rows(split)))
    dataset.close()
    pipeline = webdataset.WebDataset(
        [str(folder / shard.name) for shard in manifest.shards],
        shardshuffle=len(manifest.shards) if shuffle else False,
        seed=seed,
        empty_check=False,
    ).select(partial(_is_one_of, keys))
    if shuffle:
        pipeline = pipeline.shuffle(shuffle)
    numbers = {label: number for number, label in enumerate(manifest.labels)}
    return pipeline.map(partial(_decoded, dataset.shape, numbers))


def _is_one_of(keys: frozenset[str], sample: dict[str, Any]) -> bool:
    return sample["__key__"] in keys


def _decoded(shape: tuple[int, int, int], numbers: dict[str, int], sample: dict[str, Any]) -> dict[str, Any]:
    about = json.loads(sample["json"])
    return {
        "key": sample["__key__"],
        "image": torch.from_numpy(decode_many([sample["png"]], shape)[0].copy()),
        "label": numbers.get(about.get("label"), -1),
        "caption": about.get("caption"),
    }
