"""Prints found again, by their address on S3 or by a copy: the picture, its batch, and its row in the manifest.

And pictures made on request, which lie in a folder with ``request.json`` (``diffusion.made``) instead.
"""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pydantic import Field, ValidationError

from diffusion.config import Config, PlainName
from diffusion.data.manifest import Sha256
from diffusion.errors import UserError
from diffusion.files import sha256_bytes
from diffusion.made import ABOUT, About
from flows import prints
from flows.prints import Batch, Row
from flows.registry import parse_model_uri
from flows.s3 import Location, Store
from flows.s3_errors import Missing
from flows.tags import RunId, VersionNumber

logger = logging.getLogger(__name__)

BATCH = "batch.json"
NUMBERED = re.compile(r"([0-9]{8})\.png")
NUMBER = re.compile("[0-9]{1,19}")


class Origin(Config):
    """Where a picture comes from, as its own PNG says."""

    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    seed: prints.Seed
    index: prints.Index
    task: Annotated[str, Field(max_length=100)] | None = None
    """As what it was made on request; None: it was printed."""


@dataclass(frozen=True)
class Picture:
    """A picture that somebody asks about."""

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
    """What an address or a file turned out to be: a picture, or a whole batch, of which ``picture`` is None."""

    where: str
    picture: Picture | None
    batch: Batch | None
    """None: it is to be found nowhere (any more)."""
    place: Location | None
    """Where the batch lies."""
    request: About | None = None
    """``request.json`` beside a picture that was made on request."""

    @property
    def origin(self) -> Batch | Origin:
        """Model version, run and data set of it: as its batch says, or else the picture itself."""
        origin = self.batch or (self.picture and self.picture.origin)
        # What names neither is not taken for ours.
        assert origin
        return origin


def find(where: str, store: Store, bucket: str) -> Printed:
    """What ``where``, an address on S3 or a file, is: a picture of ours, or a batch.

    The batch of a copy is looked for at the usual place in ``bucket``. Raises UserError if there is nothing there, or
    nothing of ours.
    """
    if not where.startswith("s3://"):
        path = Path(where)
        if not path.is_file():
            raise UserError(
                f"{where} is no file: give a picture of a batch, or its address, s3://BUCKET/…/00000007.png"
            )
        return _copy(where, path.read_bytes(), store, bucket)
    at = Location.parse(where)
    if not at.prefix.endswith(".png"):
        if (batch := _read_batch(store, at)) is None:
            raise UserError(f"{where} holds no {BATCH}: give the prefix of a batch of prints, or one of its pictures")
        return Printed(where, None, batch, at)
    folder, _, name = at.prefix.rpartition("/")
    if folder.endswith(".tar"):
        return _in_tar(where, Location(at.bucket, folder), name, store)
    place, png = Location(at.bucket, folder), store.get(at.bucket, at.prefix, prints.LARGEST_PICTURE)
    batch, number = _read_batch(store, place), NUMBERED.fullmatch(name)
    if batch is None or number is None or int(number[1]) >= batch.count:
        return _copy(where, png, store, bucket)
    index = int(number[1])
    return Printed(where, Picture(png, _origin(png), index, _read_row(store, place, batch, index)), batch, place)


def read_rows(store: Store, place: Location, batch: Batch, chunk: int) -> list[Row]:
    """A chunk's part of the manifest; raises Missing if it is not there, and UserError if it is damaged."""
    name = prints.part_key(chunk)
    return prints.part_rows(store.get(place.bucket, place.key(name), prints.LARGEST_PART), f"{place}/{name}")


def read_picture(store: Store, place: Location, batch: Batch, index: int, row: Row | None) -> bytes:
    """The PNG of picture number ``index``, of a tar by what its ``row`` says; raises Missing if it is not there."""
    key = place.key(prints.picture_key(index))
    if batch.format == "png":
        return store.get(place.bucket, key, prints.LARGEST_PICTURE)
    if row is None or "size" not in row or "offset" not in row:
        raise Missing(f"s3://{place.bucket}/{key} is not there, or not by what is written down of its batch")
    tar = place.key(prints.tar_key(index // batch.chunk_size))
    return store.get_span(place.bucket, tar, row["offset"], row["size"])


def read_pixels(png: bytes) -> np.ndarray | None:
    """The pixels of a PNG, (H, W) or (H, W, 3) uint8; None if it is none, or damaged."""
    opened = _opened(png)
    return None if opened is None else np.asarray(opened)


def pixels_sha256(pixels: np.ndarray | None) -> str | None:
    """As the manifest has it; None of None."""
    return None if pixels is None else sha256_bytes(np.ascontiguousarray(pixels).tobytes())


def _in_tar(where: str, tar: Location, name: str, store: Store) -> Printed:
    """A picture in a tar of a batch: the manifest says where it lies there."""
    place = Location(tar.bucket, tar.prefix.rpartition("/")[0])
    batch, number = _read_batch(store, place), NUMBERED.fullmatch(name)
    index = int(number[1]) if number else -1
    if batch is None or not 0 <= index < batch.count or place.key(batch.key(index)) != f"{tar.prefix}/{name}":
        raise UserError(f"{where} is no picture of a batch of prints: give one of the keys in its manifest")
    row = _read_row(store, place, batch, index)
    png = read_picture(store, place, batch, index, row)
    return Printed(where, Picture(png, _origin(png), index, row), batch, place)


def _copy(where: str, png: bytes, store: Store, bucket: str) -> Printed:
    """A picture that lies apart from its batch, which what its PNG says leads to."""
    origin = _origin(png)
    if origin is None:
        raise UserError(
            f"{where} names no registered model that made it: it is no picture of ours, is of a model in a file, or "
            "was saved anew without the texts that came with it; give the address that it was printed to"
        )
    if origin.task is not None:
        return _requested(where, png, origin)
    index = origin.index
    found = list(_batches_of(origin, store, bucket))
    pictures = [Picture(png, origin, index, _read_row(store, place, batch, index)) for batch, place in found]
    same = [
        number
        for theirs in ("sha256", "pixels_sha256")
        for number, each in enumerate(pictures)
        if each.row is not None and each.row[theirs] == getattr(each, theirs)
    ]
    # Of an altered picture the batch is known only if there is but one that it can be of.
    chosen = same or ([0] if len(found) == 1 else [])
    if not chosen:
        return Printed(where, Picture(png, origin, index, None), None, None)
    return Printed(where, pictures[chosen[0]], *found[chosen[0]])


def _requested(where: str, png: bytes, origin: Origin) -> Printed:
    """A picture made on request, and what stands beside it, if it is still where it was made."""
    beside = Path(where).with_name(ABOUT)
    try:
        request = About.model_validate_json(beside.read_bytes()) if beside.is_file() else None
    except ValidationError:  # a file of somebody else's that has the same name
        request = None
    if request is not None and request.model["model"] != f"models:/{origin.model}/{origin.version}":
        request = None
    rows: Sequence[Row] = request.pictures if request else ()
    row = next((row for row in rows if row["index"] == origin.index), None)
    return Printed(where, Picture(png, origin, origin.index, row), None, None, request)


def _batches_of(origin: Origin, store: Store, bucket: str) -> Iterator[tuple[Batch, Location]]:
    usual = Location(bucket) / "prints" / origin.model / str(origin.version)
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
        data = store.get(place.bucket, place.key(BATCH), prints.LARGEST_BATCH)
    except Missing:
        return None
    return prints.parse_batch(data, f"{place}/{BATCH}")


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
