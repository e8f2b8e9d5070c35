"""The manifest of a data set, read first and written last: its parts, one for each chunk of an ingest and bucket."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator

from diffusion.common.config import Config, PlainName, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import canonical_json, digest_of, sha256_bytes, sha256_file, write_bytes
from diffusion.common.parsing import parse_json
from diffusion.common.shapes import Shape
from diffusion.data.ingest.config import MAX_BITS, StorageConfig

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Split = Literal["train", "held_out"]
Outcome = Literal["kept", "dropped", "duplicate", "quarantined", "removed"]
STORED: tuple[Outcome, ...] = ("kept", "dropped")
"""Outcomes of images whose bytes lie in the shard of their part."""

FORMAT_VERSION: Literal[3] = 3
"""Format version of manifests and of the tables they name."""
RECORDS = pa.schema(
    [
        *[(name, pa.string()) for name in ("source", "source_sha256", "outcome", "reason", "key", "split")],
        *[(name, pa.string()) for name in ("label", "caption", "mode")],
        *[(name, pa.int32()) for name in ("width", "height")],
        *[(name, pa.int64()) for name in ("offset", "size")],
        *[(name, pa.list_(pa.int64())) for name in ("total", "squares")],
        ("phash", pa.string()),
        ("near", pa.list_(pa.string())),
    ]
)
"""One row per image that was read, in the order of reading.

``source_sha256`` is of the bytes as they came, empty if there were none. ``outcome`` is ``kept``, ``dropped`` (a
rule of curation or a list, named in ``reason``, leaves it out; its bytes stay in the shard, and it comes back when they
allow), ``duplicate`` (its pixels were there already), ``quarantined`` (``reason`` says why) or ``removed`` (taken down;
only key and digest are left). ``width`` and ``height`` are of the image as it came. For kept and dropped rows
``offset`` and ``size`` are of the PNG in the part's shard; ``total`` and ``squares`` are the sums of its stored
8-bit values and of their squares over the pixels, per channel (1 or 3 by ``mode``). ``phash`` (64 hex digits) and
``near`` (key of the first image of the group of near-duplicates that it joined) are null unless near-duplicates are
configured.
"""
CAPTIONER = pa.field("captioner", pa.string())
"""Column of tables with captions of a captioner: its identity, null where the caption is the source's."""
LEADER = pa.field("leader", pa.string())
"""Column of tables with images dropped as near-duplicates: the key of the image kept instead, null for all others."""
LABELLED_BY, GIVEN_LABEL = pa.field("labelled_by", pa.string()), pa.field("given_label", pa.string())
"""Columns of tables with images whose label is a list's: the name of the list, and the label that they came with."""
MASK, MASK_SIZE = pa.field("mask", pa.string()), pa.field("mask_size", pa.int64())
"""Columns of tables with masks: the SHA-256 of a mask's mode, shape and pixels, and the size of its PNG, which lies
behind the image's in the shard; null for images without one."""
OPTIONAL = (CAPTIONER, LEADER, LABELLED_BY, GIVEN_LABEL, MASK, MASK_SIZE)
"""Columns that only tables with a value in them have."""


class FileEntry(Config):
    """A file of the data set, relative to its folder."""

    name: str = Field(pattern=r"^(shards|records)/[0-9A-Za-z_-][0-9A-Za-z._-]*$")
    """Path; the pattern prevents a manifest from S3 from naming files elsewhere."""
    sha256: Sha256
    bytes: int


class Totals(Config):
    """Exact sums over the stored training images; the sums of several parts can be added."""

    pixels: int = 0
    total: tuple[int, int, int] = (0, 0, 0)
    """Sum of 8-bit values per channel; a grey image counts for all three."""
    squares: tuple[int, int, int] = (0, 0, 0)


class Part(Config):
    """A part of a data set, of one chunk of one ingest and one bucket: a table and a shard, both named by content."""

    number: int
    records: FileEntry
    """Table of all entries read (RECORDS)."""
    shard: FileEntry | None
    """WebDataset tar of the kept and the dropped images; None if there are none."""
    outcomes: dict[Outcome, int]
    splits: dict[Split, int]
    classes: dict[str, int]
    modes: dict[str, int]
    """Kept images by split, by label and by stored mode, ``L`` or ``RGB``."""
    totals: Totals
    source: str | None = Field(None, exclude_if=is_unset)
    """Versioned source of its images, as hf://datasets/OWNER/NAME@COMMIT, or what read them, as SCHEME: PACKAGE
    VERSION; None: the source has no versions."""
    shape: Shape | None = Field(None, exclude_if=is_unset)
    """Height and width of every image in the shard, in pixels; None: it has no shard, or the data set no buckets."""
    captioners: dict[str, int] | None = Field(None, exclude_if=is_unset)
    """Kept images by the captioner that captioned them; None: all captions are the source's."""
    masks: int | None = Field(None, exclude_if=is_unset)
    """Kept images with a mask; None if there are none."""
    relabelled: int | None = Field(None, exclude_if=is_unset)
    """Kept and dropped images whose label is a list's; None if there are none."""


class ImageList(Config):
    """Images that a table of another tool named, to be dropped or to have another label until it is withdrawn."""

    name: PlainName
    kind: Literal["drop", "label"]
    table: FileEntry
    """Parquet table of ``key`` and ``source_sha256`` of each image, and ``text``: the reason or the label."""
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    """Day on which it was recorded, in UTC."""
    images: int
    unmatched: int
    """Rows of the tool's table that named none or several of the data set's images."""
    recorded: Sha256 | None = Field(None, exclude_if=is_unset)
    """SHA-256 of the table as it was recorded, before takedowns from it; None: there were none."""

    @property
    def identity(self) -> tuple[str, str]:
        """Return what makes it the same list as another one, whatever was taken down from either."""
        return self.kind, self.recorded or self.table.sha256

    @property
    def line(self) -> str:
        """Describe the list in a line."""
        verb = "drops" if self.kind == "drop" else "labels"
        count = pluralize(self.images, "image")
        rest = f", {pluralize(self.unmatched, 'row')} unmatched" if self.unmatched else ""
        return f"{self.name} {verb} {count} since {self.date}{rest} ({self.table.sha256[:12]})"


class Manifest(Config):
    """A version of a data set."""

    format_version: Literal[3] = FORMAT_VERSION
    name: PlainName
    parent: Sha256 | None
    """Digest of the manifest that this version was made from; None for the first."""
    change: str
    """What created this version from its parent: ``ingest``, ``rebuild``, ``curation``, ``captions``, ``removal: ``
    and its reason, or ``union with `` and the beginning of the digest of another machine's version."""
    content_digest: Sha256 | Literal[""]
    """SHA-256 over the sorted samples and the storage configuration; free of history."""
    storage: StorageConfig
    licence: str | None = Field(None, exclude_if=is_unset)
    """Licence of the images, if known."""
    near_duplicate_bits: int | None = Field(None, ge=0, le=MAX_BITS, exclude_if=is_unset)
    """Number of bits that ``ingest.near_duplicates: auto`` stands for; None: it was not calibrated."""
    lists: list[ImageList] | None = Field(None, exclude_if=is_unset)
    """Lists of images that curation applies, in this order; None: there are none."""
    parts: list[Part]

    @model_validator(mode="after")
    def _parts_have_shapes(self) -> Self:
        shapes: list[Shape | None] = [*self.storage.shapes] if self.storage.buckets else [None]
        if any(part.shape not in shapes for part in self.parts if part.shard is not None):
            raise ValueError("a part has another shape than the data set")
        return self

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the manifest's bytes: the name of this version."""
        return sha256_bytes(manifest_bytes(self))

    def make_child(self, change: str, parts: list["Part"], content_digest: str | None = None) -> Self:
        """Return the version that ``change`` makes of this one; its content is the same unless it is given."""
        fields = {"parent": self.digest, "change": change, "parts": parts}
        return self.model_copy(update=fields | ({"content_digest": content_digest} if content_digest else {}))

    @property
    def layout_digest(self) -> str:
        """Return the SHA-256 over the shards in their order."""
        return digest_of([shard.sha256 for shard in self.shards])

    @property
    def shards(self) -> list[FileEntry]:
        """Return the shards of all parts, in order."""
        return [part.shard for part in self.parts if part.shard is not None]

    @property
    def files(self) -> list[FileEntry]:
        """Return every file of this version except its manifest."""
        entries = [entry for part in self.parts for entry in (part.shard, part.records) if entry is not None]
        return entries + [each.table for each in self.lists or ()]

    @property
    def sources(self) -> list[str]:
        """Return the versioned sources of its parts, each once, in order."""
        return list(dict.fromkeys(part.source for part in self.parts if part.source is not None))

    @property
    def captioners(self) -> dict[str, int]:
        """Return the number of images by the captioner that captioned them, sorted; empty if there was none."""
        total = sum((Counter(part.captioners) for part in self.parts if part.captioners), Counter[str]())
        return dict(sorted(total.items()))

    @property
    def masks(self) -> int:
        """Return the number of images with a mask."""
        return sum(part.masks or 0 for part in self.parts)

    @property
    def size(self) -> int:
        """Return height and width of every image in pixels; with buckets, of the square of about as many."""
        return self.storage.size

    @property
    def shapes(self) -> list[Shape]:
        """Return the shapes (H, W) of the images, in pixels, from the narrowest to the widest."""
        return self.storage.shapes

    @property
    def stored_as(self) -> str:
        """Describe the shapes of the images: 28×28 pixels, or several shapes of about as many."""
        square = f"{self.size}×{self.size} pixels"
        if self.storage.buckets is None:
            return square
        return f"{len(self.shapes)} shape{'s' if len(self.shapes) > 1 else ''} of about {square}"

    @property
    def buckets(self) -> dict[str, int] | None:
        """Return the number of images of each shape, as WIDTHxHEIGHT; None for a data set of squares."""
        if self.storage.buckets is None:
            return None
        counts = zip(*self.shape_counts.values(), strict=True)
        return dict(zip(self.storage.buckets, map(sum, counts), strict=True))

    @property
    def shape_counts(self) -> dict[Split, list[int]]:
        """Return the number of images of each of ``shapes``, by split."""
        square = (self.size, self.size)
        return {
            split: [
                sum(part.splits.get(split, 0) for part in self.parts if (part.shape or square) == shape)
                for shape in self.shapes
            ]
            for split in get_args(Split)
        }

    @property
    def train_shapes(self) -> dict[Shape, int] | None:
        """Return the number of training images of each shape that has any; None for a data set of squares."""
        if not self.storage.buckets:
            return None
        counts = zip(self.shapes, self.shape_counts["train"], strict=True)
        return {shape: count for shape, count in counts if count}

    def find_storage_difference(self, other: StorageConfig) -> tuple[str, Any, Any] | None:
        """Return the first storage setting that differs from ``other``, and both values; any buckets match null."""
        if other.fit == "bucket" and other.buckets is None:
            other = other.model_copy(update={"buckets": self.storage.buckets})
        settings = ((name, value, getattr(other, name)) for name, value in self.storage)
        return next((setting for setting in settings if setting[1] != setting[2]), None)

    @property
    def channels(self) -> Literal[1, 3]:
        """Return 3 if any image has colours, else 1."""
        return 3 if any(part.modes.get("RGB") for part in self.parts) else 1

    @property
    def kept(self) -> int:
        """Return the number of images."""
        return sum(self.counts.values())

    @property
    def dropped(self) -> int:
        """Return the number of images that curation left out."""
        return sum(part.outcomes.get("dropped", 0) for part in self.parts)

    @property
    def is_curated(self) -> bool:
        """Whether curation has anything to apply or to undo, whatever rules are configured."""
        return bool(self.lists or self.dropped or any(part.relabelled for part in self.parts))

    @property
    def counts(self) -> dict[Split, int]:
        """Return the number of images by split."""
        return {split: sum(part.splits.get(split, 0) for part in self.parts) for split in get_args(Split)}

    @property
    def class_histogram(self) -> dict[str, int]:
        """Return the number of images by class, sorted; empty if the set has no classes."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.classes)
        return dict(sorted(total.items()))

    @property
    def labels(self) -> list[str]:
        """Return the class names, sorted; empty if the set has none."""
        return list(self.class_histogram)

    @property
    def mean(self) -> list[float]:
        """Of the training images, per channel, in [−1, 1]."""
        return list((self._moments()[0] / 127.5 - 1)[: self.channels])

    @property
    def std(self) -> list[float]:
        """Of the training images, per channel, in [−1, 1]."""
        mean, squares = self._moments()
        return list((np.sqrt(np.maximum(squares - mean**2, 0)) / 127.5)[: self.channels])

    @property
    def sigma_data(self) -> float:
        """Return the root of the mean variance over the channels: EDM's σ_data (arXiv 2206.00364)."""
        return float(np.sqrt(np.mean(np.square(self.std))))

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        totals = [part.totals for part in self.parts]
        pixels = max(sum(sums.pixels for sums in totals), 1)
        mean = np.array([sum(sums.total[channel] for sums in totals) / pixels for channel in range(3)])
        return mean, np.array([sum(sums.squares[channel] for sums in totals) / pixels for channel in range(3)])


def read_records(folder: Path, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the records of a part, all columns or some in their order, OPTIONAL ones as nulls if the table has none.

    Raises UserError if the table is missing or damaged.
    """
    return read_table(find_intact_records(folder, part), columns)


def find_intact_records(folder: Path, part: Part) -> Path:
    """Return the path of the records of a part; raises UserError if the table is missing or damaged."""
    path = folder / part.records.name
    if not path.is_file() or sha256_file(path) != part.records.sha256:
        raise UserError(f"{path} is missing or damaged: {repair_hint(folder)}")
    return path


def read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read a table of records as ``read_records`` does, without checking it."""
    table = pq.ParquetFile(path).read(None if columns is None else list(columns))
    for field in OPTIONAL:
        if field.name in (columns or ()) and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table if columns is None else table.select(list(columns))


def require_whole(folder: Path, manifest: Manifest, without_shards: bool = False) -> None:
    """Raise UserError if a file of the data set in ``folder`` is missing or truncated; contents are not checked.

    ``without_shards`` allows that shards are missing.
    """
    for entry in manifest.files:
        path = folder / entry.name
        if without_shards and entry.name.startswith("shards/") and not path.is_file():
            continue
        if (size := path.stat().st_size if path.is_file() else None) != entry.bytes:
            state = "missing" if size is None else f"{size} bytes long instead of {entry.bytes}"
            raise UserError(f"{path} is {state}: {repair_hint(folder)}")


def find_intact(folder: Path, entry: FileEntry) -> Path:
    """Return the path of a file of the data set in ``folder``; raises UserError if it is missing or damaged."""
    path = folder / entry.name
    if not path.is_file() or sha256_file(path) != entry.sha256:
        raise UserError(f"{path} is missing or damaged (its SHA-256 differs): {repair_hint(folder)}")
    return path


def repair_hint(folder: Path) -> str:
    """Describe how to repair the data set in ``folder``."""
    # A version is named after the bytes of its manifest.
    version = sha256_file(folder / "manifest.json")[:12]
    return (
        f"restore it with `darkroom data checkout {version} --dataset {folder.name}`, or build the data set again from "
        f"a source that has all of it, with `darkroom ingest SOURCE --dataset {folder.name} --rebuild`"
    )


def work_folder(folder: Path) -> Path:
    """Return the folder in which an ingest into ``folder`` keeps its lock, its index and unfinished work."""
    return folder.parent / f".{folder.name}"


def measures_folder(folder: Path) -> Path:
    """Return the cache folder of the measures by which images of the data set in ``folder`` are curated.

    The names of its tables begin with 32 digits of the SHA-256 of the shard that they describe.
    """
    return work_folder(folder) / "measures"


def read_manifest(folder: Path) -> Manifest:
    """Read the current version of the data set in ``folder``; raises UserError if there is none or it is damaged."""
    path = folder / "manifest.json"
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        names = sorted(path.parent.name for path in folder.parent.glob("*/manifest.json"))
        hint = f" (there is {', '.join(names[:10])}{' …' if len(names) > 10 else ''})" if names else ""
        raise UserError(
            f"no data set in {folder}{hint}: run `darkroom ingest SOURCE --dataset {folder.name}`, or, if it is in the "
            f"bucket, `darkroom data checkout --dataset {folder.name}`"
        ) from error


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse a manifest; raises UserError, naming the location ``where``, if it is damaged."""
    try:
        if (version := parse_json(data).get("format_version")) != FORMAT_VERSION:
            raise UserError(
                f"{where} has format {version}, and this Darkroom reads {FORMAT_VERSION}: ingest its source again "
                "under another name (--dataset)"
            )
        return Manifest.model_validate_json(data)
    except (ValidationError, ValueError, AttributeError) as error:
        words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"{where} is damaged ({words}): delete it, and get its version back with `darkroom data checkout VERSION`, "
            "or ingest the data set again"
        ) from error


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialize ``manifest``."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make ``manifest`` the current version of the data set in ``folder``; the previous one moves to its versions."""
    path = folder / "manifest.json"
    if path.is_file() and (parent := path.read_bytes()) != manifest_bytes(manifest):
        write_bytes(version_path(folder, sha256_bytes(parent)), parent)
    write_bytes(path, manifest_bytes(manifest))


def version_path(folder: Path, digest: str) -> Path:
    """Return the path of the manifest of an earlier version."""
    return folder / "versions" / f"{digest[:16]}.json"


def versions(folder: Path) -> Iterator[Manifest]:
    """Yield the versions of the data set in ``folder``, the current one first, each followed by its parent."""
    manifest = read_manifest(folder)
    yield manifest
    while manifest.parent is not None:
        path = version_path(folder, manifest.parent)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {repair_hint(folder)}") from error
        if sha256_bytes(data) != manifest.parent:
            raise UserError(f"{path} is damaged: {repair_hint(folder)}")
        manifest = parse_manifest(data, str(path))
        yield manifest


def sample_digest(key: str, split: str, label: str | None, caption: str | None, mask: str | None = None) -> bytes:
    """Compute the SHA-256 of one kept image, its conditioning (label, caption), split and mask, as canonical JSON."""
    fields = [key, split, label, caption] + ([] if mask is None else [mask])
    return hashlib.sha256(canonical_json(fields).encode()).digest()


def digest_of_samples(storage: StorageConfig, samples: Iterable[bytes]) -> str:
    """Compute the hex SHA-256 over the canonical JSON of ``storage`` and the ``sample_digest``s in order of keys."""
    digest = hashlib.sha256(canonical_json(storage.model_dump(mode="json")).encode())
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()
