"""Format of sampling batches: images of a model version on S3 with a manifest that leads back to the data.

A batch is written in this order: ``batch.json`` (the request), ``requests.parquet`` (the request table, if there is
one), the images, as files or as a tar per chunk, with a part of the manifest per chunk, ``manifest.parquet``, and
``_SUCCESS``. Every object is a function of the first two alone, so any machine can finish a batch.

Before ``darkroom gc`` deletes a batch it marks its prefix by ``s3://BUCKET/deleted/PREFIX``. Nothing is sampled into a
marked prefix: the same request gets the next one, BATCH.2 and so on, which a late deletion cannot reach.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from diffusion.common.config import MAX_SIDE, Config, PlainName, is_unset
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.files import canonical_json, digest_of, sha256_bytes
from diffusion.common.fingerprint import Fingerprint
from diffusion.common.image_grids import encode_png_with_metadata, to_pil_image
from diffusion.data.manifest import Sha256
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.process.samplers import SamplingConfig
from flows.sampling.request_table import Requests
from flows.storage.tags import RunId, VersionNumber

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Row = dict[str, Any]
"""Row of a manifest, with the fields of ``ManifestRow``."""
BATCH, MANIFEST, SUCCESS = "batch.json", "manifest.parquet", "_SUCCESS"
PARQUET = "application/vnd.apache.parquet"
CHUNK_BATCHES = 4  # compute batches per chunk: small enough to lose little to a kill, large enough for a task
RESUMED = "resumed"
"""Prefix of the marks of unfinished batches in work."""
CHUNK_OBJECT = re.compile(r"(?P<image>\d{8,})\.png|samples-(?P<tar>\d{5,})\.tar|manifest/part-(?P<part>\d{5,})\.jsonl")
MAX_BATCH_IMAGES, MAX_BATCH_CHUNKS = 10**7, 10**5
"""Maxima of a batch: the manifest must fit in one object, and each chunk is a task and a part of the manifest."""
MAX_BATCH_BYTES, MAX_PART_BYTES, MAX_IMAGE_BYTES = 64 * 2**20, 512 * 2**20, 64 * 2**20
"""Maximum sizes in bytes of ``batch.json``, of a part of the manifest and of an image."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
ImageIndex = Annotated[int, Field(ge=0, lt=MAX_BATCH_IMAGES)]


class SamplingBatch(Config):
    """Request for a sampling batch, with everything that determines the bits of its images."""

    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    weights_sha256: Sha256
    code_sha256: Sha256 | None = Field(None, exclude_if=is_unset)
    """Digest of the code that the version ships, by its tag when the batch was begun; None without such a tag."""
    seed: Seed
    count: int = Field(ge=1, le=MAX_BATCH_IMAGES)
    sampling: SamplingConfig
    fingerprint: Fingerprint
    conditions: Conditions | None = None
    """Conditions of the images; None for unconditional ones. With ``requests`` only the negative prompt and a size."""
    requests: Requests | None = None
    """Reference to the request table in ``requests.parquet``, one row per image."""
    chunk: int | None = Field(None, ge=1, le=2**20, exclude_if=is_unset)
    """Images in a chunk; None for CHUNK_BATCHES compute batches."""
    format: Literal["png", "tar"] = Field("png", exclude_if=lambda name: name == "png")
    """Storage of the images: files, or a tar for each chunk."""

    @model_validator(mode="after")
    def _has_few_chunks(self) -> "SamplingBatch":
        if self.count > MAX_BATCH_CHUNKS * self.chunk_size:
            raise ValueError(f"{self.count} images in chunks of {self.chunk_size} are over {MAX_BATCH_CHUNKS} chunks")
        return self

    @property
    def name(self) -> str:
        """Name of the batch, unique among different requests to one model version."""
        sampling = self.sampling.model_dump(mode="json", exclude_none=True)
        request = self.model_dump(mode="json", include={"conditions", "requests", "format"})
        digest = digest_of(sampling | {name: value for name, value in request.items() if value is not None})[:8]
        return f"seed{self.seed}-count{self.count}-{self.sampling.sampler}{self.sampling.steps}-{digest}"

    @property
    def has_sizes(self) -> bool:
        """Whether the manifest tells width and height of each image; else all are squares of the model's size."""
        return bool(self.conditions and self.conditions.sizes) or bool(
            self.requests and "size" in self.requests.columns
        )

    @property
    def chunk_size(self) -> int:
        """Number of images in each chunk but the last."""
        return self.chunk or CHUNK_BATCHES * self.sampling.compute_batch

    def chunks(self) -> list[range]:
        """Image numbers of each chunk: whole compute batches, but for the last."""
        size = self.chunk_size
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def key(self, index: int) -> str:
        """Key of image number ``index`` inside the batch; TAR/NAME for an image in a tar."""
        name = image_key(index)
        return name if self.format == "png" else f"{tar_key(index // self.chunk_size)}/{name}"

    def row(self, index: int) -> Row:
        """Fields of image number ``index`` in the manifest that follow from the batch alone."""
        fields = self.model_dump(include={"seed", "model", "version", "run_id", "content_digest", "weights_sha256"})
        row = {"key": self.key(index), "index": index, **fields, "guidance": self.sampling.guidance}
        return row if self.sampling.autoguidance is None else row | {"autoguidance": self.sampling.autoguidance}

    def json_bytes(self) -> bytes:
        """Content of ``batch.json``; unset options are left out, so that later options change no earlier batch."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True)).encode()


class Success(Config):
    """Content of ``_SUCCESS``."""

    format_version: Literal[1] = 1
    sha256: dict[str, Sha256]
    """Hex SHA-256 of every other record of the batch, by its name in the batch."""


def parse_batch(data: bytes, place: str) -> SamplingBatch:
    """Parse ``batch.json``; raises UserError that names its ``place`` if this Darkroom cannot read it."""
    try:
        return SamplingBatch.model_validate_json(data)
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(
            f"{place} is damaged, or of a newer Darkroom than this one ({words}): update, or if it is damaged delete "
            "it and what lies beside it"
        ) from error


class ManifestRow(Config):
    """Row of the manifest: an image, its provenance and its conditions."""

    key: Annotated[str, Field(max_length=100)]
    index: ImageIndex
    seed: Seed
    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    weights_sha256: Sha256
    sha256: Sha256
    pixels_sha256: Sha256
    fingerprint: Annotated[str, Field(max_length=10_000)]
    """Fingerprint as canonical JSON."""
    label: str | None
    prompt: str | None
    negative_prompt: str | None
    guidance: float | None
    autoguidance: float | None = None
    """Scale of autoguidance, in batches that have it."""
    width: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    height: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    """Width and height in pixels, in batches that name sizes."""
    tar: Annotated[str, Field(max_length=100)] | None = None
    offset: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Position of the PNG in the tar in bytes, for range requests."""
    size: Annotated[int, Field(ge=1, le=MAX_IMAGE_BYTES)] | None = None


INTEGERS = ("index", "seed", "version", "width", "height", "offset", "size")
COLUMN_TYPES = dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys(("guidance", "autoguidance"), pa.float64())
"""Types of the manifest's columns that are not text."""


def chunk_size(count: int, compute_batch: int) -> int:
    """Default number of images in a chunk: for over 256 chunks more, as each is a task, up to 4096."""
    batches = -(-count // compute_batch)
    limit = max(4096 // compute_batch, CHUNK_BATCHES)
    return compute_batch * min(max(-(-batches // 256), CHUNK_BATCHES), limit)


def image_key(index: int) -> str:
    """Name of image number ``index``, inside its batch or its tar."""
    return f"{index:08d}.png"


def tar_key(chunk: int) -> str:
    """Name of a chunk's tar inside its batch."""
    return f"samples-{chunk:05d}.tar"


def part_key(chunk: int) -> str:
    """Name of a chunk's part of the manifest inside its batch."""
    return f"manifest/part-{chunk:05d}.jsonl"


def find_chunk(batch: SamplingBatch, name: str) -> int | None:
    """Chunk that the object ``name`` of ``batch`` belongs to; None if it belongs to none."""
    match = CHUNK_OBJECT.fullmatch(name)
    if match is None or (match["tar" if batch.format == "png" else "image"] is not None):
        return None
    if match["image"]:
        index = int(match["image"])
        chunk, is_known = index // batch.chunk_size, index < batch.count and name == image_key(index)
    else:
        chunk = int(match["tar"] or match["part"])
        is_known = chunk * batch.chunk_size < batch.count and name in (tar_key(chunk), part_key(chunk))
    return chunk if is_known else None


def encode(
    batch: SamplingBatch, index: int, image: Tensor, label: str | None, conditions: Conditions | None = None
) -> tuple[bytes, Row]:
    """Encode image number ``index``, (C, H, W) uint8, as a PNG with provenance metadata; returns PNG and manifest row.

    ``label`` is the class it was conditioned on; ``conditions`` default to the batch's.
    """
    conditions = conditions or batch.conditions or UNCONDITIONAL
    prompt = conditions.prompt(index)
    png_image = to_pil_image(image)
    metadata: dict[str, str | None] = {
        "seed": str(batch.seed),
        "index": str(index),
        "model": f"models:/{batch.model}/{batch.version}",
        "run_id": batch.run_id,
        "content_digest": batch.content_digest,
        "label": conditions.label(index),
        "prompt": prompt,
    }
    png = encode_png_with_metadata(png_image, metadata)
    row = batch.row(index) | {
        "sha256": sha256_bytes(png),
        "pixels_sha256": sha256_bytes(png_image.tobytes()),
        "fingerprint": canonical_json(batch.fingerprint.model_dump(mode="json")),
        "label": label,
        "prompt": prompt,
        "negative_prompt": conditions.negative_prompt,
    }
    if batch.has_sizes:
        row |= {"width": png_image.width, "height": png_image.height}
    return png, row


def shard_json(row: Row) -> dict[str, Any]:
    """JSON beside an image in a tar, with ``label`` and ``caption`` as ingest reads them."""
    names = ("label", "seed", "index", "run_id", "content_digest", "weights_sha256", "sha256")
    model = f"models:/{row['model']}/{row['version']}"
    return {name: row[name] for name in names} | {"caption": row["prompt"], "model": model}


def part_bytes(rows: Iterable[Row]) -> bytes:
    """Encode a chunk's part of the manifest as JSON lines."""
    return "".join(f"{canonical_json(row)}\n" for row in rows).encode()


def part_rows(part: bytes, place: str) -> list[Row]:
    """Parse a part of the manifest; raises UserError that names its ``place`` if it is not one."""
    try:
        # Not splitlines(): texts may contain Unicode line separators.
        return [ManifestRow.model_validate_json(line).model_dump(exclude_unset=True) for line in part.split(b"\n")[:-1]]
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(
            f"{place} is not a part of a manifest ({words}): delete it, and give the same `darkroom sample` again, "
            "which generates its images again"
        ) from error


def find_conflicts(batch: SamplingBatch, index: int, row: Row) -> list[str]:
    """Sorted fields of ``row`` that differ from what ``batch`` determines for image number ``index``."""
    conditions = batch.conditions or UNCONDITIONAL
    fields = batch.row(index) | {
        "negative_prompt": conditions.negative_prompt,
        "tar": tar_key(index // batch.chunk_size) if batch.format == "tar" else None,
        "fingerprint": canonical_json(batch.fingerprint.model_dump(mode="json")),
    }
    if batch.requests is None:
        fields["prompt"] = conditions.prompt(index)
        if (label := conditions.label(index)) is not None:
            fields["label"] = label
        if (size := conditions.size(index)) is not None:
            fields |= {"height": size[0], "width": size[1]}
    return sorted(name for name, value in fields.items() if row.get(name) != value)


def make_schema(batch: SamplingBatch) -> pa.Schema:
    """Schema of the Parquet manifest of ``batch``."""
    omissions = set() if batch.format == "tar" else {"tar", "offset", "size"}
    omissions |= set() if batch.has_sizes else {"width", "height"}
    omissions |= {"autoguidance"} if batch.sampling.autoguidance is None else set()
    names = [name for name in ManifestRow.model_fields if name not in omissions]
    return pa.schema([(name, COLUMN_TYPES.get(name, pa.string())) for name in names])


def write_parquet(sink: "SupportsWrite[bytes]", parts: Iterator[list[Row]], batch: SamplingBatch) -> None:
    """Write the Parquet manifest of a batch, one row group per part; one part is held in memory at a time."""
    with pq.ParquetWriter(sink, make_schema(batch)) as writer:
        for rows in parts:
            writer.write_table(pa.Table.from_pylist(rows, writer.schema))
