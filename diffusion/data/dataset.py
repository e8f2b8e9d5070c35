"""Data set as used by training and evaluation: rows in an order free of history, images as tensors."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from filelock import FileLock
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.files import make_folder, remove_partials, write_atomically
from diffusion.common.shapes import Images, Shape, shape_name, stack_images
from diffusion.data.manifest import (
    MASK_SIZE,
    Manifest,
    Part,
    Split,
    find_intact_records,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
)
from diffusion.data.png import decode_many, shape_of
from diffusion.data.shards import LocalShards, ShardCache, StoredImages, mask_offset
from diffusion.data.tables import insert_records, open_database, read_rows, scratch_folder

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

IN_MEMORY = 2**22
"""Images up to which each process reads the table into memory; beyond, all map one file, written by the first."""

Rows: TypeAlias = Sequence[int] | np.ndarray
"""Row numbers, (N,)."""


class ShardSamples(NamedTuple):
    """The samples of a split, shard by shard."""

    samples: np.ndarray
    """Numbers in ``Dataset.rows`` of the split, sorted by shard, then by number: (N,) int64."""
    counts: np.ndarray
    """How many of them are in each shard of the manifest: (S,) int64."""


class Table(NamedTuple):
    """The kept images of a data set, in memory or mapped from a file."""

    images: np.ndarray
    """(N,) ROW."""
    rows: dict[Split, np.ndarray]
    """Rows of each split, sorted: int64."""
    by_shard: ShardSamples
    """Training images."""


class Dataset:
    """Images of a data set from verified shards; decoded ones are kept if all fit ``cache_bytes``. Thread-safe.

    A data set with buckets has images of several ``shapes``: its images are read from one bucket at a time.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, shards: LocalShards | ShardCache, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards
        # Properties of the manifest look at every part.
        self._entries, self._labels = manifest.shards, manifest.labels
        self._table, self._rows, self._by_shard = open_table(folder, manifest)
        self.shapes = manifest.shapes
        """Shapes (H, W) of the images in pixels, from the narrowest to the widest; one for a data set of squares."""
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        parts = _parts_with_shards(manifest)
        self.shard_buckets = np.array([numbers[part.shape or self.shapes[0]] for part in parts], np.int64)
        """Number in ``shapes`` of the images of each shard, (S,) int64."""
        counts = np.bincount(self.shard_buckets, [sum(part.splits.values()) for part in parts], len(self.shapes))
        pairs = zip(counts.astype(int).tolist(), self.shapes, strict=True)
        sizes = [(count, *shape, self.shape[0]) for count, shape in pairs]
        fits = sum(map(math.prod, sizes)) <= cache_bytes
        # The system allocates written pages only, so images never read cost no memory.
        self._caches = [np.empty(size, np.uint8) for size in sizes] if fits else None
        self._cached = np.zeros(len(self) if fits else 0, bool)
        self._places = np.empty(len(self) if fits else 0, np.int64)
        """Place of each row in the cache of its bucket."""
        if fits:
            row_buckets = self.buckets(np.arange(len(self)))
            for bucket, size in enumerate(sizes):
                self._places[row_buckets == bucket] = np.arange(size[0])

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

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of every image; with buckets, of the square of about as many pixels."""
        return self.manifest.channels, self.manifest.size, self.manifest.size

    def rows(self, split: Split) -> np.ndarray:
        """Return the rows of a split, sorted by key, as (N,) int64."""
        return self._rows[split]

    def by_shard(self) -> ShardSamples:
        """Return the training images shard by shard."""
        return self._by_shard

    def keys(self, rows: Rows) -> list[str]:
        """Return the key of each row: hex SHA-256 of its mode, shape and pixels."""
        return [key.tobytes().hex() for key in self._table["key"][_numbers(rows)].view(np.uint8).reshape(-1, 32)]

    def labels(self, rows: Rows) -> list[str | None]:
        """Return the label of each row."""
        names: list[str | None] = [*self._labels, None]
        return [names[number] for number in self._table["label"][_numbers(rows)]]

    def captions(self, rows: Rows) -> list[str | None]:
        """Return the caption of each row; of several, which are lines, the first."""
        captions = self._captions.take(pa.array(self._table["read"][_numbers(rows)])).to_pylist()
        return [caption and caption.partition("\n")[0] for caption in captions]

    def different_captions(self) -> tuple[list[str], np.ndarray]:
        """Return the distinct captions, sorted, and the index of each row's, −1 for none: (len(self),) int32.

        Several captions of an image are the lines of one.
        """
        column = self._captions.take(pa.array(self._table["read"]))
        texts = sorted(pc.unique(column).drop_null().to_pylist())
        return texts, _codes(column, texts)

    def sources(self, rows: Rows) -> list[str]:
        """Return the name of each row's image in the source that it came from."""
        sources = pa.chunked_array([*self._read_column("source")], pa.string())
        names: list[str] = sources.take(pa.array(self._table["read"][_numbers(rows)])).to_pylist()
        return names

    @cached_property
    def _captions(self) -> pa.ChunkedArray:
        """Return the captions in the order of the records; read at the first use, each different one once."""
        pieces = [piece.dictionary_encode() for piece in self._read_column("caption")]
        return pa.chunked_array(pieces, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()

    def _read_column(self, name: str) -> Iterator[pa.Array]:
        """Yield a column of texts, in the order of the records, part by part."""
        for part in _parts_with_shards(self.manifest):
            yield _read_kept(self.folder, part, name)[name].combine_chunks()

    def classes(self, rows: Rows, classes: Sequence[str]) -> Tensor:
        """Return each row's class as its number in ``classes``, len(classes) if it is none: (len(rows),) int64."""
        numbers: dict[str | None, int] = {label: number for number, label in enumerate(classes)}
        # The last entry is for images without a label, whose number −1 indexes it.
        table = np.array([*(numbers.get(label, len(classes)) for label in self._labels), len(classes)])
        return torch.from_numpy(table[self._table["label"][_numbers(rows)]])

    def shards(self, rows: Rows) -> np.ndarray:
        """Return the number of each row's shard in the manifest: (len(rows),) int32."""
        return self._table["shard"][_numbers(rows)]  # type: ignore[no-any-return]

    def buckets(self, rows: Rows) -> np.ndarray:
        """Return the number of each row's shape in ``shapes``: (len(rows),) int64."""
        return self.shard_buckets[self._table["shard"][_numbers(rows)]]  # type: ignore[no-any-return]

    def split_by_bucket(self, rows: Rows) -> list[np.ndarray]:
        """Split ``rows`` into those of each bucket that has any, in the order of ``shapes``; their order stays."""
        rows, row_buckets = _numbers(rows), self.buckets(rows)
        return [rows[row_buckets == bucket] for bucket in np.unique(row_buckets)]

    def prefetch(self, shards: Sequence[int] | None = None) -> None:
        """Prepare ``shards`` (None: all) in the background, soonest needed first."""
        self._shards.prefetch(self._entries if shards is None else [self._entries[number] for number in shards])

    def images(self, rows: Rows) -> Tensor:
        """Return the images in ``rows``, which are of one bucket, as (len(rows), C, H, W) uint8.

        Raises UserError if a shard is damaged, and ValueError if there are images of several shapes.
        """
        return torch.from_numpy(np.ascontiguousarray(self.pixels(rows).transpose(0, 3, 1, 2)))

    def images_in_order(self, rows: Rows) -> Images:
        """Return the images in ``rows``, of any buckets, each (C, H, W) uint8."""
        if len(self.shapes) == 1 or not len(rows):
            return self.images(rows)
        numbers, row_buckets = _numbers(rows), self.buckets(rows)
        images: dict[int, Tensor] = {}
        for bucket in np.unique(row_buckets):
            places = np.flatnonzero(row_buckets == bucket)
            images |= zip(places.tolist(), self.images(numbers[places]), strict=True)
        return stack_images([images[place] for place in range(len(numbers))])

    def pixels(self, rows: Rows) -> np.ndarray:
        """Return images as ``images`` does, but (len(rows), H, W, C), as stored, without a transposition."""
        rows, bucket = _numbers(rows), 0
        if len(self.shapes) > 1 and len(rows):
            bucket, *others = np.unique(self.buckets(rows)).tolist()
            if others:
                raise ValueError(f"rows of {len(others) + 1} shapes: give those of one bucket at a time")
        if self._caches is None:
            return self._decode(rows, self.shapes[bucket])
        cache, missing = self._caches[bucket], ~self._cached[rows]
        if missing.any():
            new_rows = rows[missing]
            cache[self._places[new_rows]] = self._decode(new_rows, self.shapes[bucket])
            self._cached[new_rows] = True
        return cache[self._places[rows]]

    def masks(self, rows: Rows) -> np.ndarray:
        """Return the masks of ``rows``, which are of one bucket: (len(rows), H, W) uint8, 255 where there is none."""
        rows = _numbers(rows)
        shape = self.shapes[int(self.buckets(rows[:1])[0])] if len(rows) else self.shapes[0]
        masks, sizes = np.full((len(rows), *shape), 255, np.uint8), self._mask_sizes[self._table["read"][rows]]
        if (is_masked := sizes > 0).any():
            table = self._table[rows[is_masked]]
            offsets = mask_offset(table["offset"], table["size"].astype(np.int64))
            stored = self._read_pngs(table["shard"], offsets, sizes[is_masked], (1, *shape))
            masks[is_masked] = stored.decode()[:, 0]
        return masks

    @cached_property
    def _mask_sizes(self) -> np.ndarray:
        """Return the bytes of each mask, 0 for none, in the order of the records, as int32; read at the first use."""
        tables = (_read_kept(self.folder, part, MASK_SIZE.name) for part in _parts_with_shards(self.manifest))
        return np.concatenate([pc.fill_null(table[MASK_SIZE.name], 0).to_numpy().astype(np.int32) for table in tables])

    def _decode(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """Decode the images in ``rows``, (len(rows), H, W, C): many of them in chunks and shard by shard."""
        channels = self.shape[0]
        if not 0 < len(rows) <= CHUNK:
            pixels = np.empty((len(rows), *shape, channels), np.uint8)
            order = np.lexsort((self._table["offset"][rows], self._table["shard"][rows]))
            for start in range(0, len(rows), CHUNK):
                places = order[start : start + CHUNK]
                pixels[places] = self._decode(rows[places], shape)
            return pixels
        return self._read_images(rows, shape).decode().transpose(0, 2, 3, 1)

    def stored(self, rows: Rows) -> StoredImages:
        """Read the images in ``rows``, at least one and all of one bucket, for other processes to decode."""
        rows = _numbers(rows)
        images = self._read_images(rows, self.shapes[int(self.buckets(rows[:1])[0])])
        return images._replace(pngs=[bytes(png) for png in images.pngs])

    def _read_images(self, rows: np.ndarray, shape: Shape) -> StoredImages:
        table = self._table[rows]
        return self._read_pngs(table["shard"], table["offset"], table["size"], (self.shape[0], *shape))

    def _read_pngs(
        self, shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, shape: tuple[int, int, int]
    ) -> StoredImages:
        """Read PNGs of ``shape`` (C, H, W) at these places, (N,) each."""
        order = np.argsort(shards, kind="stable")
        pngs: list[bytes | memoryview] = [b""] * len(shards)
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            entry = self._entries[shards[places[0]]]
            spans = list(zip(offsets[places].tolist(), sizes[places].tolist(), strict=True))
            contents: Sequence[bytes | memoryview] = self._shards.read(entry, spans)
            for place, png in zip(places.tolist(), contents, strict=True):
                pngs[place] = png
        return StoredImages(self.folder, pngs, shape)


def _numbers(rows: Rows) -> np.ndarray:
    return np.asarray(rows, np.int64)


def _read_kept(folder: Path, part: Part, *columns: str) -> pa.Table:
    table = read_records(folder, part, ["outcome", *columns])
    return table.filter(pc.equal(table["outcome"], "kept"))


def _parts_with_shards(manifest: Manifest) -> list[Part]:
    return [part for part in manifest.parts if part.shard is not None]


def open_table(folder: Path, manifest: Manifest) -> Table:
    """Read the table of the data set in ``folder``; beyond IN_MEMORY images it is mapped from a file.

    The first process writes the file, in the work folder, while the others wait. It takes 73 bytes per image.
    """
    if manifest.kept <= IN_MEMORY:
        labels = manifest.labels
        pieces = [_read_piece(folder, part, number, labels) for number, part in enumerate(_parts_with_shards(manifest))]
        images = np.concatenate(pieces)
        images["read"] = np.arange(len(images))
        images = images[np.argsort(images["key"])]
        rows = {split: np.flatnonzero(images["split"] == number) for number, split in enumerate(SPLITS)}
        shards = images["shard"][rows["train"]]
        counts = np.bincount(shards, minlength=len(manifest.shards))
        return Table(images, rows, ShardSamples(np.argsort(shards, kind="stable"), counts))
    path = work_folder(folder) / "tables" / f"{manifest.digest}.bin"
    make_folder(path.parent)
    with FileLock(path.with_name("lock")):
        if not path.is_file():
            # Those of other versions; processes that have mapped them keep them.
            for old_path in path.parent.glob("*.bin"):
                old_path.unlink()
            remove_partials(path.parent)
            with scratch_folder(path.parent / "runs") as runs:
                write_atomically(path, lambda partial: _write_table(partial, folder, manifest, runs))
    return _map_table(path, manifest, "r")


def _map_table(path: Path, manifest: Manifest, mode: Literal["r", "r+"]) -> Table:
    counts = np.array([part.splits.get("train", 0) for part in _parts_with_shards(manifest)])
    train = int(counts.sum())
    places = np.cumsum([0, manifest.kept * ROW.itemsize, train * 8, (manifest.kept - train) * 8, train * 8]).tolist()
    if mode == "r+":
        os.truncate(path, places[-1])
    file = np.asarray(np.memmap(path, np.uint8, mode))
    images, rows, held_out, samples = (file[first:end] for first, end in pairwise(places))
    split_rows: dict[Split, np.ndarray] = {"train": rows.view(np.int64), "held_out": held_out.view(np.int64)}
    return Table(images.view(ROW), split_rows, ShardSamples(samples.view(np.int64), counts))


_IMAGES = """
SELECT
    unhex(key),
    CASE split WHEN 'train' THEN 0 WHEN 'held_out' THEN 1 ELSE -1 END,
    coalesce(number, -1),
    part,
    "offset",
    size,
    first - 1 + row_number() OVER (PARTITION BY part ORDER BY "row")
FROM records JOIN firsts USING (part) LEFT JOIN labels ON label = name
WHERE outcome = 'kept'
"""


def _write_table(path: Path, folder: Path, manifest: Manifest, scratch: Path) -> None:
    """Write the table, sorted by a database."""
    parts, labels = _parts_with_shards(manifest), manifest.labels
    path.touch()
    table = _map_table(path, manifest, "r+")
    next_places = np.cumsum(table.by_shard.counts) - table.by_shard.counts
    row, row_counts = 0, dict.fromkeys(SPLITS, 0)
    with open_database(scratch) as database:
        database.execute("CREATE TABLE labels (name VARCHAR, number INTEGER)")
        database.execute("INSERT INTO labels SELECT unnest(?), unnest(?)", [labels, list(range(len(labels)))])
        database.execute("CREATE TABLE firsts (part INTEGER, first INTEGER)")
        firsts = np.cumsum([0, *(sum(part.splits.values()) for part in parts[:-1])]).tolist()
        database.execute("INSERT INTO firsts SELECT unnest(?), unnest(?)", [list(range(len(parts))), firsts])
        database.execute(
            'CREATE TABLE images (key BLOB, split TINYINT, label INTEGER, shard INTEGER, "offset" BIGINT, '
            "size INTEGER, read INTEGER)"
        )
        insert_records(database, "images", (find_intact_records(folder, part) for part in parts), _IMAGES)
        for images in read_rows(database, "SELECT * FROM images ORDER BY key", ROW):
            table.images[row : row + len(images)] = images
            for code, split in enumerate(SPLITS):
                rows = np.flatnonzero(images["split"] == code)
                first = row_counts[split]
                table.rows[split][first : first + len(rows)] = row + rows
                row_counts[split] += len(rows)
                if split == "train":
                    order = np.argsort(images["shard"][rows], kind="stable")
                    counts = np.bincount(images["shard"][rows], minlength=len(next_places))
                    offsets = np.cumsum(counts) - counts
                    places = np.arange(len(rows)) + np.repeat(next_places - offsets, counts)
                    table.by_shard.samples[places] = first + order
                    next_places += counts
            row += len(images)


def _read_piece(folder: Path, part: Part, number: int, labels: Sequence[str]) -> np.ndarray:
    """Read the kept images of a part, whose shard is ``number``, in the order of the records; without ``read``."""
    records = _read_kept(folder, part, "key", "split", "label", "offset", "size")
    piece = np.zeros(len(records), ROW)
    piece["key"] = np.frombuffer(bytes.fromhex("".join(records["key"].to_pylist())), "S32")
    piece["split"] = _codes(records["split"], SPLITS)
    piece["label"] = _codes(records["label"], labels)
    piece["shard"] = number
    piece["offset"] = records["offset"].to_numpy()
    piece["size"] = records["size"].to_numpy()
    return piece


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return each string's number in ``names`` as int32; −1 where it is none of them."""
    encoding = column.combine_chunks().dictionary_encode()
    values = encoding.dictionary.to_pylist()
    numbers = {name: number for number, name in enumerate(names)}
    table: np.ndarray = np.array([*(numbers.get(name, -1) for name in values), -1], np.int32)
    codes: np.ndarray = table[pc.fill_null(encoding.indices, len(values)).to_numpy()]
    return codes


def open_webdataset(
    folder: Path, split: Split = "train", shuffle: int = 0, seed: int = 0, shape: Shape | None = None
) -> "WebDataset":
    """Open one split of the data set in ``folder`` as a WebDataset pipeline, for other training scripts.

    A sample has ``key`` (hex SHA-256 of its pixels), ``image`` (uint8, (C, H, W)), ``label`` (number of its class in
    the manifest's labels, −1 for none), ``caption`` (str or None) and, in a data set with masks, ``mask`` (uint8,
    (H, W), 255 where there is none). ``torch.utils.data.DataLoader`` takes it with any number of workers, which divide
    the shards among them. Nothing in the shards is unpickled.

    ``shuffle``: size of the shuffle buffer in images; 0 for the stored order of images and shards, which are otherwise
    shuffled by ``seed``. ``shape``: only images of this height and width, which can be batched, of a data set with
    buckets. Raises UserError if a shard or table is missing or damaged, or no image has that shape.
    """
    # Imported here: Darkroom's own training does not need it.
    import webdataset

    dataset = Dataset.open(folder, cache_bytes=0)
    manifest = dataset.manifest
    rows = dataset.rows(split)
    keys = dataset.keys(rows)
    # The shards have the texts of the source, the records a captioner's captions and labels of lists.
    captions = dict(zip(keys, dataset.captions(rows), strict=True)) if manifest.captioners else None
    is_relabelled = any(part.relabelled for part in manifest.parts)
    labels = dict(zip(keys, dataset.labels(rows), strict=True)) if is_relabelled else None
    dataset.close()
    parts = [part for part in manifest.parts if shape is None or shape == (part.shape or manifest.shapes[0])]
    if not (shards := [str(folder / part.shard.name) for part in parts if part.shard is not None]):
        raise UserError(
            f"data set {manifest.name} has no images of {shape}: its shapes (height, width) are "
            f"{', '.join(map(str, manifest.shapes))}"
        )
    pipeline = webdataset.WebDataset(
        shards,
        shardshuffle=len(shards) if shuffle else False,
        seed=seed,
        empty_check=False,
    ).select(partial(_is_one_of, frozenset(keys)))
    if shuffle:
        pipeline = pipeline.shuffle(shuffle)
    numbers: dict[str | None, int] = {label: number for number, label in enumerate(manifest.labels)}
    shapes, has_masks = frozenset(manifest.shapes), manifest.masks > 0
    return pipeline.map(partial(_decode, manifest.channels, shapes, numbers, labels, captions, has_masks))


def _is_one_of(keys: frozenset[str], sample: dict[str, Any]) -> bool:
    return sample["__key__"] in keys


def _decode(
    channels: int,
    shapes: frozenset[Shape],
    numbers: dict[str | None, int],
    labels: dict[str, str | None] | None,
    captions: dict[str, str | None] | None,
    has_masks: bool,
    sample: dict[str, Any],
) -> dict[str, Any]:
    metadata, key = json.loads(sample["json"]), sample["__key__"]
    shape = shape_of(sample["png"])
    if shape not in shapes:
        raise ValueError(f"{key} has {shape_name(shape)} pixels, which is not a shape of its data set")
    mask = np.full(shape, 255, np.uint8)
    if "mask.png" in sample:
        mask = decode_many([sample["mask.png"]], (1, *shape))[0, 0].copy()
    return ({"mask": torch.from_numpy(mask)} if has_masks else {}) | {
        "key": key,
        "image": torch.from_numpy(decode_many([sample["png"]], (channels, *shape))[0].copy()),
        "label": numbers.get(metadata.get("label") if labels is None else labels[key], -1),
        "caption": metadata.get("caption") if captions is None else captions[key],
    }
