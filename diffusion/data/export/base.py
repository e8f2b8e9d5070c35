"""What an export writes: rows, in their order, and the interface of a format."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from diffusion.common.config import Config
from diffusion.common.files import write_atomically
from diffusion.data.manifest import MASK_SIZE, FileEntry, Manifest, Split, read_records
from diffusion.data.shards import LocalShards, mask_offset

SPLIT_NAMES: dict[Split, str] = {"train": "train", "held_out": "test"}
"""Names of the splits outside Darkroom."""
FILE_BYTES = 256 * 2**20
"""Approximate size of a file with many images, in bytes."""
Node = dict[str, Any]
"""A node of JSON-LD."""


class ExportDetails(Config):
    """What the descriptions of an export say besides what the manifest knows."""

    title: str | None = None
    """Name of the data set; None: its name here."""
    licence: str | None = None
    """Licence of the images; None: that of the manifest."""
    creator: str | None = None
    """Who made the data set."""
    url: str | None = None
    """Address of its page on the web."""


class Row(NamedTuple):
    """An image of the data set."""

    key: str
    label: str | None
    caption: str | None
    shard: FileEntry
    offset: int
    size: int
    """Bytes of its PNG."""
    mask_size: int | None
    """Bytes of its mask's PNG; None if it has none."""


class Rows:
    """The kept images of the data set in ``folder``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards = LocalShards(folder)

    def of(self, split: Split) -> Iterator[Row]:
        """Yield the images of a split in the order of the parts; raises UserError for damaged tables."""
        columns = ("outcome", "split", "key", "label", "caption", "offset", "size", MASK_SIZE.name)
        for part in self.manifest.parts:
            for row in read_records(self.folder, part, columns).to_pylist() if part.shard is not None else ():
                if row["outcome"] == "kept" and row["split"] == split:
                    assert part.shard is not None
                    place = row["offset"], row["size"], row[MASK_SIZE.name]
                    yield Row(row["key"], row["label"], row["caption"], part.shard, *place)

    @cached_property
    def has_captions(self) -> bool:
        """Whether any image has a caption."""
        return any(row.caption is not None for split in SPLIT_NAMES for row in self.of(split))

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Row, memoryview, memoryview]]:
        """Yield ``rows`` with their PNGs and those of their masks, empty for none; raises UserError for damage."""
        for shard, group in groupby(rows, key=lambda row: row.shard):
            members = list(group)
            pngs = self._shards.read(shard, [(row.offset, row.size) for row in members])
            places = [(mask_offset(row.offset, row.size), row.mask_size or 0) for row in members]
            yield from zip(members, pngs, self._shards.read(shard, places), strict=True)

    def close(self) -> None:
        """Release the shards."""
        self._shards.close()


class ExportFormat(ABC):
    """A format that other tools read; an instance writes one data set."""

    name: ClassVar[str]
    """Its name in ``--to``."""
    scheme: ClassVar[str]
    """What stands before the path of an export to ingest it again."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.manifest = rows, rows.manifest

    @property
    def splits(self) -> dict[Split, str]:
        """Return the names of the splits that have images."""
        return {split: name for split, name in SPLIT_NAMES.items() if self.manifest.counts[split]}

    @property
    def images(self) -> str:
        """Return the names of images as a glob: keys are hexadecimal, and names of masks end otherwise."""
        return "*[0-9a-f].png" if self.manifest.masks else "*.png"

    @abstractmethod
    def write(self, folder: Path, split: Split) -> Iterator[int]:
        """Write the images of ``split`` that are not in ``folder`` yet; yields numbers of images that are there.

        Files appear whole under their names, or not at all, so that a killed export goes on.
        """

    @abstractmethod
    def patterns(self) -> dict[str, str]:
        """Return the files of each split as a glob."""

    @abstractmethod
    def croissant(self, digests: dict[str, str]) -> tuple[list[Node], list[Node]]:
        """Describe files, with their SHA-256 by path in ``digests``, and the fields of a record, as Croissant does."""


def write_files(
    rows: Rows, split: Split, path: Callable[[int, int], Path], write: Callable[[Path, Sequence[Row]], object]
) -> Iterator[int]:
    """Write files of about ``FILE_BYTES``, named by ``path(number, count)``; yields the images in each."""
    counts, size = [0], 0
    for row in rows.of(split):
        if counts[-1] and size + row.size > FILE_BYTES:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += row.size
    remaining = rows.of(split)
    for number, count in enumerate(counts):
        members = list(islice(remaining, count))
        if not (file := path(number, len(counts))).is_file():
            write_atomically(file, lambda partial, members=members: write(partial, members))  # type: ignore[misc]
        yield count


def split_field(source: Node) -> Node:
    """Describe the split as a field of Croissant, from ``source``."""
    return field("split", "sc:Text", source, "Split.", references={"field": {"@id": "splits/name"}})


def path_source(file_set: str, pattern: str) -> Node:
    """Describe a part of the paths of a set of files, the group of ``pattern``, as the source of a field."""
    return {
        "fileSet": {"@id": file_set},
        "extract": {"fileProperty": "fullpath"},
        "transform": {"regex": pattern},
    }


def field(name: str, data_type: str, source: Node, description: str, **more: Any) -> Node:
    """Describe a field of a record as Croissant does."""
    return {
        "@type": "cr:Field",
        "@id": f"images/{name}",
        "description": description,
        "dataType": data_type,
        "source": source,
        **more,
    }
