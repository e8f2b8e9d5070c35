"""Sampled images found again, by their address on S3 or by a copy, with their batch and its records compared.

The records of a batch are ``batch.json``, the parts of the manifest, its Parquet table and ``_SUCCESS``. Images made on
request lie in a folder with ``request.json`` (``diffusion.generation.generation_result``) instead.
"""

import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pydantic import Field, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes, sha256_file
from diffusion.data.manifest import Sha256
from diffusion.data.shards import BLOCK
from diffusion.generation.generation_result import ABOUT, RequestRecord
from flows.registry.model_versions import parse_model_uri
from flows.sampling import sampling_batch
from flows.sampling.request_table import KEPT, LARGEST_GROUP
from flows.sampling.sampling_batch import BATCH, MANIFEST, SUCCESS, Batch, Row
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing
from flows.storage.tags import RunId, VersionNumber

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"([0-9]{8})\.png")
NUMBER = re.compile("[0-9]{1,19}")
MOST_NAMED = 20
LARGEST_SUCCESS = 16 * 2**20
"""Bytes that ``_SUCCESS`` may have: a hundred for each chunk."""
LARGEST_TABLE = 64 * 2**30
"""Bytes that ``manifest.parquet`` and ``requests.parquet`` may have: a hundred million rows."""
LARGEST_ABOUT = 2**18
"""Bytes that the JSON beside an image in a tar may have."""


class Origin(Config):
    """Where an image comes from, as its own PNG says."""

    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    seed: sampling_batch.Seed
    index: sampling_batch.Index
    task: Annotated[str, Field(max_length=100)] | None = None
    """As what it was made on request; None: it was printed."""


@dataclass(frozen=True)
class StoredImage:
    """An image that somebody asks about."""

    png: bytes
    origin: Origin | None
    """None: it does not say, or no longer."""
    index: int
    """Its number in its batch."""
    row: Row | None
    """What the manifest of its batch says of it."""

    @property
    def sha256(self) -> str:
        """Of its bytes as they are now."""
        return sha256_bytes(self.png)

    @property
    def pixels_sha256(self) -> str | None:
        """Of its pixels as they are now; None if there are none to be read."""
        return pixels_sha256(read_pixels(self.png))


@dataclass(frozen=True)
class Printed:
    """What an address or a file turned out to be: an image, or a whole batch, of which ``image`` is None."""

    where: str
    image: StoredImage | None
    batch: Batch | None
    """None: it is to be found nowhere (any more)."""
    place: Location | None
    """Where the batch lies."""
    request: RequestRecord | None = None
    """``request.json`` beside an image that was made on request."""

    @property
    def origin(self) -> Batch | Origin:
        """Model version, run and data set of it: as its batch says, or else the image itself."""
        origin = self.batch or (self.image and self.image.origin)
        # What names neither is not taken for ours.
        assert origin
        return origin


def find(where: str, store: Store, bucket: str) -> Printed:
    """What ``where``, an address on S3 or a file, is: an image of ours, or a batch.

    The batch of a copy is looked for at the usual place in ``bucket``. Raises UserError if there is nothing there, or
    nothing of ours.
    """
    if not where.startswith("s3://"):
        path = Path(where)
        if not path.is_file():
            raise UserError(f"{where} is no file: give an image of a batch, or its address, s3://BUCKET/…/00000007.png")
        return _copy(where, path.read_bytes(), store, bucket)
    at = Location.parse(where)
    if not at.prefix.endswith(".png"):
        if (batch := _read_batch(store, at)) is None:
            raise UserError(f"{where} holds no {BATCH}: give the prefix of a sampling batch, or one of its images")
        return Printed(where, None, batch, at)
    folder, _, name = at.prefix.rpartition("/")
    if folder.endswith(".tar"):
        return _in_tar(where, Location(at.bucket, folder), name, store)
    place, png = Location(at.bucket, folder), store.get(at.bucket, at.prefix, sampling_batch.LARGEST_IMAGE)
    batch, number = _read_batch(store, place), NUMBERED.fullmatch(name)
    if batch is None or number is None or int(number[1]) >= batch.count:
        return _copy(where, png, store, bucket)
    index = int(number[1])
    return Printed(where, StoredImage(png, _origin(png), index, _read_row(store, place, batch, index)), batch, place)


def read_rows(store: Store, place: Location, batch: Batch, chunk: int) -> list[Row]:
    """A chunk's part of the manifest; raises Missing if it is not there, and UserError if it is damaged."""
    name = sampling_batch.part_key(chunk)
    return sampling_batch.part_rows(
        store.get(place.bucket, place.key(name), sampling_batch.LARGEST_PART), f"{place}/{name}"
    )


def read_image(store: Store, place: Location, batch: Batch, index: int, row: Row | None) -> bytes:
    """The PNG of image number ``index``, of a tar by what its ``row`` says; raises Missing if it is not there."""
    key = place.key(sampling_batch.image_key(index))
    if batch.format == "png":
        return store.get(place.bucket, key, sampling_batch.LARGEST_IMAGE)
    if row is None or "size" not in row or "offset" not in row:
        raise Missing(f"s3://{place.bucket}/{key} is not there, or not by what is written down of its batch")
    tar = place.key(sampling_batch.tar_key(index // batch.chunk_size))
    return store.get_span(place.bucket, tar, row["offset"], row["size"])


def read_pixels(png: bytes) -> np.ndarray | None:
    """The pixels of a PNG, (H, W) or (H, W, 3) uint8; None if it is none, or damaged."""
    opened = _opened(png)
    return None if opened is None else np.asarray(opened)


def pixels_sha256(pixels: np.ndarray | None) -> str | None:
    """As the manifest has it; None of None."""
    return None if pixels is None else sha256_bytes(np.ascontiguousarray(pixels).tobytes())


def _in_tar(where: str, tar: Location, name: str, store: Store) -> Printed:
    """An image in a tar of a batch: the manifest says where it lies there."""
    place = Location(tar.bucket, tar.prefix.rpartition("/")[0])
    batch, number = _read_batch(store, place), NUMBERED.fullmatch(name)
    index = int(number[1]) if number else -1
    if batch is None or not 0 <= index < batch.count or place.key(batch.key(index)) != f"{tar.prefix}/{name}":
        raise UserError(f"{where} is no image of a sampling batch: give one of the keys in its manifest")
    row = _read_row(store, place, batch, index)
    png = read_image(store, place, batch, index, row)
    return Printed(where, StoredImage(png, _origin(png), index, row), batch, place)


def _copy(where: str, png: bytes, store: Store, bucket: str) -> Printed:
    """An image that lies apart from its batch, which what its PNG says leads to."""
    origin = _origin(png)
    if origin is None:
        raise UserError(
            f"{where} names no registered model that made it: it is no image of ours, is of a model in a file, or "
            "was saved anew without the texts that came with it; give the address that it was printed to"
        )
    if origin.task is not None:
        return _requested(where, png, origin)
    index = origin.index
    found = list(_batches_of(origin, store, bucket))
    images = [StoredImage(png, origin, index, _read_row(store, place, batch, index)) for batch, place in found]
    same = [
        number
        for theirs in ("sha256", "pixels_sha256")
        for number, each in enumerate(images)
        if each.row is not None and each.row[theirs] == getattr(each, theirs)
    ]
    # Of an altered image the batch is known only if there is but one that it can be of.
    chosen = same or ([0] if len(found) == 1 else [])
    if not chosen:
        return Printed(where, StoredImage(png, origin, index, None), None, None)
    return Printed(where, images[chosen[0]], *found[chosen[0]])


def _requested(where: str, png: bytes, origin: Origin) -> Printed:
    """An image made on request, and what stands beside it, if it is still where it was made."""
    beside = Path(where).with_name(ABOUT)
    try:
        request = RequestRecord.model_validate_json(beside.read_bytes()) if beside.is_file() else None
    except ValidationError:  # a file of somebody else's that has the same name
        request = None
    if request is not None and request.model["model"] != f"models:/{origin.model}/{origin.version}":
        request = None
    rows: Sequence[Row] = request.images if request else ()
    row = next((row for row in rows if row["index"] == origin.index), None)
    return Printed(where, StoredImage(png, origin, origin.index, row), None, None, request)


def _batches_of(origin: Origin, store: Store, bucket: str) -> Iterator[tuple[Batch, Location]]:
    usual = Location(bucket) / "samples" / origin.model / str(origin.version)
    for key in store.list_keys(usual.bucket, usual.key("")):
        folder, _, name = key.rpartition("/")
        try:
            batch = _read_batch(store, Location(bucket, folder)) if name == BATCH else None
        except UserError as error:  # one that nobody can read stands in the way of no other
            logger.warning("%s", error)
            continue
        if batch is not None and batch.seed == origin.seed and batch.count > origin.index:
            yield batch, Location(bucket, folder)


def _read_batch(store: Store, place: Location) -> Batch | None:
    try:
        data = store.get(place.bucket, place.key(BATCH), sampling_batch.LARGEST_BATCH)
    except Missing:
        return None
    return sampling_batch.parse_batch(data, f"{place}/{BATCH}")


def _read_row(store: Store, place: Location, batch: Batch, index: int) -> Row | None:
    try:
        rows = read_rows(store, place, batch, index // batch.chunk_size)
    except Missing:
        return None
    except UserError as error:
        logger.warning("%s", error)
        return None
    return next((row for row in rows if row["index"] == index), None)


def _origin(png: bytes) -> Origin | None:
    opened = _opened(png)
    if opened is None:
        return None
    told = {name.removeprefix("darkroom:"): text for name, text in opened.text.items() if name.startswith("darkroom:")}
    try:
        model, version = parse_model_uri(told["model"])
        numbers = [NUMBER.fullmatch(text) for text in (version, told["seed"], told["index"])]
        number, seed, index = (int(each[0]) for each in numbers if each)
        return Origin(
            model=model,
            version=number,
            run_id=told["run_id"],
            content_digest=told["content_digest"],
            seed=seed,
            index=index,
            task=told.get("task"),
        )
    # What a number is that has too many digits, or a name that is none, nobody has to ask a server.
    except (KeyError, ValueError, UserError):
        return None


def _opened(png: bytes) -> PngImageFile | None:
    try:
        opened = Image.open(io.BytesIO(png), formats=("PNG",))
        opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    assert isinstance(opened, PngImageFile)
    return opened


class Success(Config):
    """Content of ``_SUCCESS``."""

    format_version: Literal[1] = 1
    sha256: dict[str, Sha256]
    """Of every other record of the batch, by its name there."""

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return canonical_json(self.model_dump(mode="json")).encode()


def success_of(store: Store, batch: Batch, place: Location, parts: dict[str, str]) -> Success:
    """What ``_SUCCESS`` is to say of a batch whose other records are there; ``parts`` are the digests of its parts."""
    names = [MANIFEST] if batch.requests is None else [MANIFEST, KEPT]
    others = {name: store.sha256(place.bucket, place.key(name)) for name in names}
    return Success(sha256={BATCH: sha256_bytes(batch.json_bytes()), **others, **parts})


def disagreements(store: Store, batch: Batch, place: Location, index: int | None) -> list[str]:
    """Where the records of a batch do not agree, in words: those about image number ``index``, or all of them.

    The first MOST_NAMED are named, and the others counted.
    """
    chunks = range(len(batch.chunks())) if index is None else [index // batch.chunk_size]
    with TemporaryDirectory() as scratch:
        found = _Records(store, batch, place, Path(scratch)).compare(chunks, index)
        named = list(islice(found, MOST_NAMED))
        more = sum(1 for _ in found)
    return [*named, *([f"and {more} more disagreements of the records in {place}"] if more else [])]


class _Records:
    """The records of one batch, each read once."""

    def __init__(self, store: Store, batch: Batch, place: Location, scratch: Path) -> None:
        self.store = store
        self.batch = batch
        self.place = place
        self.scratch = scratch
        self.success: Success | None = None
        """``_SUCCESS``; None if it is not there, or cannot be read."""
        self.finished = False
        """Whether ``_SUCCESS`` is there."""
        self.table: pq.ParquetFile | None = None
        """The manifest as Parquet; None if it is not there, or not of this batch."""

    def compare(self, chunks: Iterable[int], index: int | None) -> Iterator[str]:
        """Every disagreement of the records about ``chunks``; of rows, if ``index`` is one, that one alone."""
        beside = [] if self.batch.requests is None else [KEPT]
        yield from self._read_success({BATCH, MANIFEST, *beside})
        for name in (BATCH, *beside, *([MANIFEST] if self.finished else [])):
            yield from self._file(name)
        yield from self._open_table()
        for chunk in chunks:
            yield from self._chunk(chunk, index)

    def _read_success(self, beside: set[str]) -> Iterator[str]:
        """Read ``_SUCCESS``, and look whether it names the parts of the manifest and what lies ``beside`` them."""
        try:
            data = self._get(SUCCESS, LARGEST_SUCCESS)
        except Missing:
            return
        except UserError:
            data = b""
        self.finished = True
        try:
            self.success = Success.model_validate_json(data)
        except ValidationError:
            words = "holds no digests of the batch's records: it was altered, or an older Darkroom wrote it"
            yield f"{self._uri(SUCCESS)} {words}"
            return
        names = beside | set(map(sampling_batch.part_key, range(len(self.batch.chunks()))))
        if odd := sorted(names ^ self.success.sha256.keys()):
            some = ", ".join(odd[:3]) + (" …" if len(odd) > 3 else "")
            yield f"{self._uri(SUCCESS)} and {self._uri(BATCH)} disagree on which records there are: {some}"

    def _file(self, name: str) -> Iterator[str]:
        """Fetch a record, and compare it with ``_SUCCESS``."""
        path = self.scratch / name
        try:
            self.store.fetch(self.place.bucket, self.place.key(name), path, LARGEST_TABLE)
            yield from self._digest(name, sha256_file(path))
        except Missing:
            yield f"{self._uri(name)} is gone"
        except UserError as error:
            yield str(error)

    def _digest(self, name: str, digest: str) -> Iterator[str]:
        if self.success is not None and self.success.sha256.get(name, digest) != digest:
            yield f"{self._uri(name)} is not what {self._uri(SUCCESS)} says: one of the two was altered"

    def _open_table(self) -> Iterator[str]:
        """Open the manifest as Parquet, if it was fetched."""
        names = sampling_batch.schema_of(self.batch).names
        try:
            if (path := self.scratch / MANIFEST).is_file():
                file = pq.ParquetFile(path, read_dictionary=names)
                if file.schema_arrow.names != names or file.num_row_groups != len(self.batch.chunks()):
                    raise UserError("it has other columns or row groups")
                self.table = file
        except (pa.ArrowException, OSError, UserError) as error:
            yield f"{self._uri(MANIFEST)} is not the manifest of this batch: {' '.join(str(error).split())}"

    def _chunk(self, chunk: int, index: int | None) -> Iterator[str]:
        name, indices = sampling_batch.part_key(chunk), self.batch.chunks()[chunk]
        rows: list[Row] | None = None
        try:
            data = self._get(name, sampling_batch.LARGEST_PART)
            yield from self._digest(name, sha256_bytes(data))
            rows = sampling_batch.part_rows(data, self._uri(name))
        except Missing:
            if self.finished:
                yield f"{self._uri(name)} is gone"
        except UserError as error:
            yield str(error)
        if rows is not None and len(rows) != len(indices):
            yield f"{self._uri(name)} has {len(rows)} rows, and {self._uri(BATCH)} {len(indices)} images for them"
            rows = None
        others: list[Row] | None = None
        if self.table is not None:
            try:
                others = _row_group(self.table, chunk, len(indices))
            except (pa.ArrowException, OSError, UserError) as error:
                yield f"{self._uri(MANIFEST)} cannot be read: {' '.join(str(error).split())}"
        for number, image in enumerate(indices):
            if index is not None and index != image:
                continue
            row = None if rows is None else rows[number]
            other = None if others is None else others[number]
            if row is not None and (odd := sampling_batch.conflicts(self.batch, image, row)):
                yield self._differ(name, BATCH, image, odd)
            if row is not None and other is not None and (odd := _differences(row, other)):
                yield self._differ(name, MANIFEST, image, odd)
            if index is not None and row is not None and self.batch.format == "tar" and "tar" in row:
                yield from self._about(row)
            if row is None and other is not None and (odd := sampling_batch.conflicts(self.batch, image, other)):
                yield self._differ(MANIFEST, BATCH, image, odd)

    def _about(self, row: Row) -> Iterator[str]:
        """Compare the JSON beside an image in a tar with its ``row``, and its place with that of the image."""
        name = f"{row['tar']}/{row['index']:08d}.json"
        try:
            same = _read_about(self.store, self.place, row) == canonical_json(sampling_batch.shard_json(row)).encode()
        except (KeyError, Missing, UserError):
            same = False
        if not same:
            part = sampling_batch.part_key(row["index"] // self.batch.chunk_size)
            yield self._differ(name, part, row["index"], ["what is said of it"])

    def _differ(self, one: str, other: str, image: int, fields: list[str]) -> str:
        return f"{self._uri(one)} and {self._uri(other)} disagree on image {image}: {', '.join(fields)}"

    def _get(self, name: str, most: int) -> bytes:
        return self.store.get(self.place.bucket, self.place.key(name), most)

    def _uri(self, name: str) -> str:
        return f"{self.place}/{name}"


def _differences(row: Row, other: Row) -> list[str]:
    return sorted(name for name in {*row, *other} if row.get(name) != other.get(name))


def _row_group(file: pq.ParquetFile, number: int, rows: int) -> list[Row]:
    """The rows of a row group; texts that repeat are held once, however often a hostile file repeats them."""
    about = file.metadata.row_group(number)
    if about.num_rows != rows or about.total_byte_size > LARGEST_GROUP:
        raise UserError(f"row group {number} has {about.num_rows} rows and {about.total_byte_size} bytes")
    table = file.read_row_group(number)
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    found: list[Any] = []
    for array in column.chunks:
        if isinstance(array, pa.DictionaryArray):
            texts = array.dictionary.to_pylist()
            found += [None if at is None else texts[at] for at in array.indices.to_pylist()]
        else:
            found += array.to_pylist()
    return found


def _read_about(store: Store, place: Location, row: Row) -> bytes:
    """The JSON beside an image in a tar, at the place that ``row`` gives; raises UserError if there is none."""
    start = row["offset"] + -(-row["size"] // BLOCK) * BLOCK
    header = store.get_span(place.bucket, place.key(row["tar"]), start, BLOCK)
    try:
        size = int(header[124:135], 8)
    except ValueError:
        size = 0
    if not 0 < size <= LARGEST_ABOUT:
        raise UserError(f"{place}/{row['tar']} has no JSON beside image {row['index']}")
    return store.get_span(place.bucket, place.key(row["tar"]), start + BLOCK, size)


def read_parts(store: Store, batch: Batch, place: Location) -> Iterator[tuple[str, str, list[Row]]]:
    """Name, SHA-256 and rows of each part of the manifest; raises UserError if one is not of ``batch``."""
    for chunk, indices in enumerate(batch.chunks()):
        name = sampling_batch.part_key(chunk)
        data = store.get(place.bucket, place.key(name), sampling_batch.LARGEST_PART)
        rows = sampling_batch.part_rows(data, f"{place}/{name}")
        if len(rows) != len(indices) or any(
            sampling_batch.conflicts(batch, *each) for each in zip(indices, rows, strict=True)
        ):
            raise UserError(
                f"{place}/{name} is not of this batch: delete it, and give the same `darkroom sample` again, which "
                "makes its images anew"
            )
        yield name, sha256_bytes(data), rows
