"""Sampling batches: images of a model version on S3, written once, with a manifest that leads back to the data.

A batch lies under one prefix: ``batch.json`` (what was asked for) first, with ``requests.parquet`` if that is a
table, then the images, as files or as a tar per chunk, and a part of the manifest per chunk, then
``manifest.parquet``, and ``_SUCCESS`` last. Every object is a function of the first two alone, so whoever finds a batch
unfinished can finish it.

Before ``darkroom gc`` deletes a batch it marks its prefix, by ``s3://BUCKET/deleted/PREFIX``. Nothing is sampled into a
prefix that is marked: the same request then gets the next one, BATCH.2 and so on, which no deletion that is late can
reach.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from diffusion.common.config import Config, PlainName, unset
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, digest_of, sha256_bytes
from diffusion.common.fingerprint import Fingerprint
from diffusion.common.image_grids import image_of
from diffusion.common.png_metadata import marked_png
from diffusion.data.manifest import Sha256
from diffusion.data.shards import BLOCK, Extent
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.process.samplers import SamplingConfig
from flows.sampling.request_table import Requests
from flows.storage.tags import RunId, VersionNumber

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from flows.storage.s3 import Location

Row = dict[str, Any]
"""What a manifest says of an image: see ``ManifestRow``."""

BATCH, MANIFEST, SUCCESS = "batch.json", "manifest.parquet", "_SUCCESS"
"""The first object of a batch, and the last two."""
PARQUET = "application/vnd.apache.parquet"
"""Content type of tables."""
CHUNK_BATCHES = 4
"""Compute batches per chunk: small enough to lose little to a kill, large enough to be worth a task."""
MOST_CHUNKS = 256
"""Larger batches have larger chunks, up to LARGEST_CHUNK: orchestration has a cost for each task."""
LARGEST_CHUNK = 4096
"""Images in a chunk, unless the configuration says otherwise: what a chunk's manifest holds is held in memory."""
DELETED = "deleted"
"""Prefix of the marks of batches that are being deleted, or were: not beside them, where those who sample may write."""
USUAL = re.compile(r"samples/[^/]+/[0-9]{1,10}/[^/]+")
"""Prefix of a batch that was not sent elsewhere."""
RESUMED = "resumed"
"""Prefix of the marks by which jobs that go on with an unfinished batch show that it is not abandoned."""
CHUNK_OBJECT = re.compile(r"(?P<image>\d{8,})\.png|samples-(?P<tar>\d{5,})\.tar|manifest/part-(?P<part>\d{5,})\.jsonl")
"""Objects of a chunk, by their names inside a batch."""
MOST_IMAGES = 10**8
"""Images of a batch: their numbers have eight digits."""
CHUNKS_AT_MOST = 10**5
"""Chunks of a batch, whatever the configuration says: each is a task, and a part of the manifest."""
LARGEST_BATCH = 64 * 2**20
"""Bytes that ``batch.json`` may have."""
LARGEST_PART = 512 * 2**20
"""Bytes that a part of the manifest may have."""
LARGEST_IMAGE = 64 * 2**20
"""Bytes that an image may have."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=MOST_IMAGES)]


class Batch(Config):
    """What was asked for, and all that decides the bits of the answer."""

    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    weights_sha256: Sha256
    code_sha256: Sha256 | None = Field(None, exclude_if=unset)
    """Digest of the code that the version ships (``registry.digest_code``), as its tag had it when the batch was begun;
    None: the version was registered before there were such tags."""
    seed: Seed
    count: int = Field(ge=1, le=MOST_IMAGES)
    sampling: SamplingConfig
    fingerprint: Fingerprint
    conditions: Conditions | None = None
    """What the images are to show; None: whatever comes. With ``requests`` only what is asked of all of them."""
    requests: Requests | None = None
    """What each is to show, by the table in ``requests.parquet``."""
    chunk: int | None = Field(None, ge=1, le=2**20, exclude_if=unset)
    """Images in a chunk; None: CHUNK_BATCHES compute batches."""
    format: Literal["png", "tar"] = Field("png", exclude_if=lambda name: name == "png")
    """Whether the images are files, or lie in a tar for each chunk."""

    @model_validator(mode="after")
    def _has_few_chunks(self) -> "Batch":
        if self.count > CHUNKS_AT_MOST * self.chunk_size:
            raise ValueError(f"{self.count} images in chunks of {self.chunk_size} are over {CHUNKS_AT_MOST} chunks")
        return self

    @property
    def name(self) -> str:
        """A name that differs for different requests to one model version."""
        how = self.sampling.model_dump(mode="json", exclude_none=True)
        wanted = self.model_dump(mode="json", include={"conditions", "requests", "format"})
        digest = digest_of(how | {name: value for name, value in wanted.items() if value is not None})[:8]
        return f"seed{self.seed}-count{self.count}-{self.sampling.sampler}{self.sampling.steps}-{digest}"

    @property
    def chunk_size(self) -> int:
        """Images in each chunk but the last."""
        return self.chunk or CHUNK_BATCHES * self.sampling.compute_batch

    def chunks(self) -> list[range]:
        """The image numbers of each chunk: whole compute batches, but for the last."""
        size = self.chunk_size
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def key(self, index: int) -> str:
        """Address of image number ``index`` inside the batch; that of one in a tar leads through the tar."""
        name = image_key(index)
        return name if self.format == "png" else f"{tar_key(index // self.chunk_size)}/{name}"

    def row(self, index: int) -> Row:
        """What the manifest says of image number ``index`` because it is of this batch."""
        fields = ("seed", "model", "version", "run_id", "content_digest", "weights_sha256")
        own = {name: getattr(self, name) for name in fields}
        return {"key": self.key(index), "index": index, **own, "guidance": self.sampling.guidance}

    def json_bytes(self) -> bytes:
        """``batch.json``: what is not asked for is left out, so that later options change no earlier batch."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True)).encode()


def parse_batch(data: bytes, where: str) -> Batch:
    """The batch that ``data`` holds; raises UserError, naming ``where`` it lies, if this Darkroom cannot read it."""
    try:
        return Batch.model_validate_json(data)
    except ValidationError as error:
        raise UserError(
            f"{where} is damaged, or of a newer Darkroom than this one ({_in_words(error)}): update, or if it is "
            "damaged delete it and what lies beside it"
        ) from error


class ManifestRow(Config):
    """A row of the manifest: an image, where it comes from, and what it was to show."""

    key: Annotated[str, Field(max_length=100)]
    """Address inside the batch."""
    index: Index
    seed: Seed
    model: PlainName
    version: VersionNumber
    run_id: RunId
    content_digest: Sha256
    weights_sha256: Sha256
    sha256: Sha256
    pixels_sha256: Sha256
    fingerprint: Annotated[str, Field(max_length=10_000)]
    """Canonical JSON."""
    label: str | None
    prompt: str | None
    negative_prompt: str | None
    guidance: float | None
    tar: Annotated[str, Field(max_length=100)] | None = None
    offset: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Where the PNG lies in the tar, so that a range request gets it."""
    size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] | None = None


IN_TARS = ("tar", "offset", "size")
"""Columns of batches of tars alone."""
COLUMN_TYPES = dict.fromkeys(("index", "seed", "version", "offset", "size"), pa.int64()) | {"guidance": pa.float64()}
"""Of the columns of the manifest that hold no text."""


def chunk_size(count: int, compute_batch: int) -> int:
    """Images in a chunk of a batch of ``count``, unless the configuration says how many."""
    batches = -(-count // compute_batch)
    most = max(LARGEST_CHUNK // compute_batch, CHUNK_BATCHES)
    return compute_batch * min(max(-(-batches // MOST_CHUNKS), CHUNK_BATCHES), most)


def image_key(index: int) -> str:
    """Name of image number ``index``, inside its batch or its tar."""
    return f"{index:08d}.png"


def tar_key(chunk: int) -> str:
    """Name of a chunk's tar inside its batch."""
    return f"samples-{chunk:05d}.tar"


def part_key(chunk: int) -> str:
    """Name of a chunk's part of the manifest inside its batch."""
    return f"manifest/part-{chunk:05d}.jsonl"


def is_usual(place: "Location") -> bool:
    """Whether ``place`` is one of those that ``darkroom gc`` looks after."""
    return USUAL.fullmatch(place.prefix) is not None


def chunk_of(batch: Batch, name: str) -> int | None:
    """The chunk that the object ``name`` of ``batch`` belongs to; None if it belongs to none."""
    found = CHUNK_OBJECT.fullmatch(name)
    if found is None or (found["tar" if batch.format == "png" else "image"] is not None):
        return None
    chunk = int(found["image"]) // batch.chunk_size if found["image"] else int(found["tar"] or found["part"])
    return chunk if chunk * batch.chunk_size < batch.count else None


def encode(
    batch: Batch, index: int, image: Tensor, label: str | None, conditions: Conditions | None = None
) -> tuple[bytes, Row]:
    """Image number ``index``, (C, H, W) uint8, as a PNG that says where it comes from, and its manifest row.

    ``label``: the class that it was to show; ``conditions``: what it was drawn by, None: what is asked of all.
    """
    conditions = conditions or batch.conditions or UNCONDITIONAL
    prompt = conditions.prompt(index)
    png_image = image_of(image)
    about: dict[str, str | None] = {
        "seed": str(batch.seed),
        "index": str(index),
        "model": f"models:/{batch.model}/{batch.version}",
        "run_id": batch.run_id,
        "content_digest": batch.content_digest,
        "label": conditions.label(index),
        "prompt": prompt,
    }
    png = marked_png(png_image, about)
    row = batch.row(index) | {
        "sha256": sha256_bytes(png),
        "pixels_sha256": sha256_bytes(png_image.tobytes()),
        "fingerprint": canonical_json(batch.fingerprint.model_dump(mode="json")),
        "label": label,
        "prompt": prompt,
        "negative_prompt": conditions.negative_prompt,
    }
    return png, row


def shard_json(row: Row) -> dict[str, Any]:
    """What stands beside an image in a tar; with ``label`` and ``caption``, as data sets are ingested with."""
    names = ("label", "seed", "index", "run_id", "content_digest", "weights_sha256", "sha256")
    model = f"models:/{row['model']}/{row['version']}"
    return {name: row[name] for name in names} | {"caption": row["prompt"], "model": model}


def placed(row: Row, tar: str, extent: Extent) -> Row:
    """``row`` with the place of its image in ``tar``."""
    return row | {"tar": tar, "offset": extent.start + BLOCK, "size": extent.png}


def part_bytes(rows: Iterable[Row]) -> bytes:
    """A chunk's part of the manifest: JSON lines."""
    return "".join(f"{canonical_json(row)}\n" for row in rows).encode()


def part_rows(part: bytes, where: str) -> list[Row]:
    """The rows of a part; raises UserError, naming ``where`` it lies, if it is none."""
    try:
        # Not by splitlines(): texts may hold what Unicode takes for the end of a line.
        lines = part.split(b"\n")[:-1]
        return [ManifestRow.model_validate_json(line).model_dump(exclude_unset=True) for line in lines]
    except ValidationError as error:
        raise UserError(
            f"{where} is no part of a manifest ({_in_words(error)}): delete it, and give the same `darkroom sample` "
            "again, which makes its images anew"
        ) from error


def conflicts(batch: Batch, index: int, row: Row) -> list[str]:
    """Fields of ``row`` that are not what ``batch`` says of image number ``index``, sorted."""
    conditions = batch.conditions or UNCONDITIONAL
    expected = batch.row(index) | {
        "negative_prompt": conditions.negative_prompt,
        "tar": tar_key(index // batch.chunk_size) if batch.format == "tar" else None,
    }
    if batch.requests is None:
        expected["prompt"] = conditions.prompt(index)
        if (label := conditions.label(index)) is not None:
            expected["label"] = label
    found = {name for name, value in expected.items() if row.get(name) != value}
    try:
        # Parsed: later versions may write more fields of it.
        same = Fingerprint.model_validate_json(row["fingerprint"]) == batch.fingerprint
    except ValidationError:
        same = False
    return sorted(found if same else found | {"fingerprint"})


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def schema_of(batch: Batch) -> pa.Schema:
    """Columns of the manifest of ``batch``."""
    names = [name for name in ManifestRow.model_fields if batch.format == "tar" or name not in IN_TARS]
    return pa.schema([(name, COLUMN_TYPES.get(name, pa.string())) for name in names])


def write_parquet(sink: "SupportsWrite[bytes]", parts: Iterator[list[Row]], batch: Batch) -> None:
    """The manifest of the whole batch, a row group per part, of which one is held at a time."""
    schema = schema_of(batch)
    with pq.ParquetWriter(sink, schema) as writer:
        for rows in parts:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
