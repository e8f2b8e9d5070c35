"""Lookup of generated images by S3 address or local copy, with the records of their batch."""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pydantic import Field, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from diffusion.common.image_grids import GRID
from diffusion.data.manifest import Sha256
from diffusion.generation.requests import ABOUT, RequestRecord
from flows.sampling import batch_format
from flows.sampling.batch_format import BATCH, Row, SamplingBatch
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import RunId, VersionNumber, parse_model_uri

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"([0-9]{8})\.png")


class ImageOrigin(Config):
    """Provenance of an image, as recorded in the metadata of its PNG."""

    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    seed: batch_format.Seed
    index: batch_format.ImageIndex
    task: Annotated[str, Field(max_length=100)] | None = None
    """Task of an image made on request; None for an image of a sampling batch."""


@dataclass(frozen=True)
class LocatedImage:
    """A generated image with its provenance."""

    png: bytes
    origin: ImageOrigin | None
    index: int
    row: Row | None

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the PNG as it is now."""
        return sha256_bytes(self.png)

    @property
    def pixels_sha256(self) -> str | None:
        """Hex SHA-256 of the pixels as they are now; None if the PNG cannot be decoded."""
        return pixels_sha256(read_pixels(self.png))


@dataclass(frozen=True)
class SampleLocation:
    """A located generated image; or a whole sampling batch or request, in which case ``image`` is None."""

    where: str
    image: LocatedImage | None
    batch: SamplingBatch | None
    place: Location | None
    request: RequestRecord | None = None
    """Content of ``request.json`` beside an image made on request."""
    grid_origin: ImageOrigin | None = None
    """What the grid of a request says of itself."""

    @property
    def origin(self) -> SamplingBatch | ImageOrigin:
        """Model version, run and data set, from the batch or else from the image itself."""
        origin = self.batch or (self.image and self.image.origin) or self.grid_origin
        # ``find`` rejects images that have neither.
        assert origin
        return origin


def find(address: str, store: Store, bucket: str) -> SampleLocation:
    """Locate the generated image or sampling batch at ``address``, an S3 address or a local file.

    The batch of a copy is searched at its default place in ``bucket``. Raises UserError if no registered model made it.
    """
    if not address.startswith("s3://"):
        path = Path(address)
        if not path.is_file():
            raise UserError(
                f"{address} is not a file: give an image of a batch, or its address, s3://BUCKET/…/00000007.png"
            )
        return _locate_copy(address, path.read_bytes(), store, bucket)
    location = Location.parse(address)
    if not location.prefix.endswith(".png"):
        if (batch := _read_batch(store, location)) is None:
            raise UserError(f"{address} holds no {BATCH}: give the prefix of a sampling batch, or one of its images")
        return SampleLocation(address, None, batch, location)
    folder, _, name = location.prefix.rpartition("/")
    in_tar = folder.endswith(".tar")
    png = None if in_tar else store.get(location.bucket, location.prefix, batch_format.MAX_IMAGE_BYTES)
    place = Location(location.bucket, folder.rpartition("/")[0] if in_tar else folder)
    batch, number = _read_batch(store, place), NUMBERED.fullmatch(name)
    index = int(number[1]) if number else -1
    if batch is None or not 0 <= index < batch.count or (in_tar and place.key(batch.key(index)) != location.prefix):
        if png is None:
            raise UserError(f"{address} is not an image of a sampling batch: give one of the keys in its manifest")
        return _locate_copy(address, png, store, bucket)
    row = _read_row(store, place, batch, index)
    if png is None:
        png = read_image(store, place, batch, index, row)
    return SampleLocation(address, LocatedImage(png, _read_origin(png), index, row), batch, place)


def read_rows(store: Store, place: Location, batch: SamplingBatch, chunk: int) -> list[Row]:
    """Rows of a chunk's part of the manifest.

    Raises MissingObjectError if it does not exist, and UserError if it is damaged.
    """
    name = batch_format.part_key(chunk)
    data = store.get(place.bucket, place.key(name), batch_format.MAX_PART_BYTES)
    return batch_format.part_rows(data, f"{place}/{name}")


def read_image(store: Store, place: Location, batch: SamplingBatch, index: int, row: Row | None) -> bytes:
    """PNG of image number ``index``, located in a tar by its ``row``; raises MissingObjectError if there is none."""
    key = place.key(batch_format.image_key(index))
    if batch.format == "png":
        return store.get(place.bucket, key, batch_format.MAX_IMAGE_BYTES)
    if row is None or "size" not in row or "offset" not in row:
        raise MissingObjectError(f"s3://{place.bucket}/{key} is not there, or not by what is written down of its batch")
    tar = place.key(batch_format.tar_key(index // batch.chunk_size))
    return store.get_span(place.bucket, tar, row["offset"], row["size"])


def read_pixels(png: bytes) -> np.ndarray | None:
    """Pixels of a PNG, (H, W) or (H, W, 3) uint8; None if it is damaged or not a PNG."""
    image = _open_png(png)
    return None if image is None else np.asarray(image)


def pixels_sha256(pixels: np.ndarray | None) -> str | None:
    """Hex SHA-256 of ``pixels`` as in the manifest; None for None."""
    return None if pixels is None else sha256_bytes(np.ascontiguousarray(pixels).tobytes())


def _locate_copy(address: str, png: bytes, store: Store, bucket: str) -> SampleLocation:
    texts = _read_texts(png)
    if (uri := texts.get(GRID, "")).startswith("s3://"):
        place = Location.parse(uri)
        batch = _read_batch(store, place)
        if batch is None or f"models:/{batch.model}/{batch.version}" != texts.get("model"):
            raise UserError(f"{address} is the grid of {uri}, where no batch of its model is (any more)")
        return SampleLocation(address, None, batch, place)
    if (origin := _read_origin(png)) is None:
        raise UserError(
            f"{address} names no registered model that made it: it is not an image of Darkroom's, is of a model in a "
            "file, or was saved again without its PNG metadata; give the address that it was sampled to"
        )
    if origin.task is not None:
        location = _locate_requested(address, png, origin)
        return replace(location, image=None, grid_origin=origin) if GRID in texts else location
    index, candidates = origin.index, []
    for batch, place in _find_batches(origin, store, bucket):
        candidates.append((LocatedImage(png, origin, index, _read_row(store, place, batch, index)), batch, place))
    for field in ("sha256", "pixels_sha256"):
        for image, batch, place in candidates:
            if image.row is not None and image.row[field] == getattr(image, field):
                return SampleLocation(address, image, batch, place)
    # The batch of an altered image is known only if there is a single candidate.
    if len(candidates) == 1:
        return SampleLocation(address, *candidates[0])
    return SampleLocation(address, LocatedImage(png, origin, index, None), None, None)


def _locate_requested(address: str, png: bytes, origin: ImageOrigin) -> SampleLocation:
    request_path = Path(address).with_name(ABOUT)
    try:
        request = RequestRecord.model_validate_json(request_path.read_bytes()) if request_path.is_file() else None
    except ValidationError:  # an unrelated file of the same name
        request = None
    if request is not None and request.model["model"] != f"models:/{origin.model}/{origin.version}":
        request = None
    rows: Sequence[Row] = request.images if request else ()
    row = next((row for row in rows if row["index"] == origin.index), None)
    return SampleLocation(address, LocatedImage(png, origin, origin.index, row), None, None, request)


def _find_batches(origin: ImageOrigin, store: Store, bucket: str) -> Iterator[tuple[SamplingBatch, Location]]:
    place = Location(bucket) / "samples" / origin.model / str(origin.version)
    for key in store.list_keys(place.bucket, place.key("")):
        folder, _, name = key.rpartition("/")
        try:
            batch = _read_batch(store, Location(bucket, folder)) if name == BATCH else None
        except UserError as error:  # an unreadable batch does not hide the others
            logger.warning("%s", error)
            continue
        if batch is not None and batch.seed == origin.seed and batch.count > origin.index:
            yield batch, Location(bucket, folder)


def _read_batch(store: Store, place: Location) -> SamplingBatch | None:
    try:
        data = store.get(place.bucket, place.key(BATCH), batch_format.MAX_BATCH_BYTES)
    except MissingObjectError:
        return None
    return batch_format.parse_batch(data, f"{place}/{BATCH}")


def _read_row(store: Store, place: Location, batch: SamplingBatch, index: int) -> Row | None:
    try:
        rows = read_rows(store, place, batch, index // batch.chunk_size)
    except MissingObjectError:
        return None
    except UserError as error:
        logger.warning("%s", error)
        return None
    return next((row for row in rows if row["index"] == index), None)


def _read_texts(png: bytes) -> dict[str, str]:
    """Read Darkroom's metadata in a PNG; empty if it has none."""
    texts = {} if (image := _open_png(png)) is None else image.text
    return {name.removeprefix("darkroom:"): str(text) for name, text in texts.items() if name.startswith("darkroom:")}


def _read_origin(png: bytes) -> ImageOrigin | None:
    texts = _read_texts(png)
    try:
        texts["model"], texts["version"] = parse_model_uri(texts["model"])
        return ImageOrigin.model_validate({name: texts[name] for name in ImageOrigin.model_fields if name in texts})
    # Malformed numbers and names are rejected before any server is queried.
    except (KeyError, ValueError, UserError):
        return None


def _open_png(png: bytes) -> PngImageFile | None:
    try:
        image = Image.open(io.BytesIO(png), formats=("PNG",))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    assert isinstance(image, PngImageFile)
    return image
