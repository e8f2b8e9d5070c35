"""Prints: pictures of a model version on S3, written once, with a manifest that leads back to the data.

A batch lies under one prefix: ``batch.json`` (what was asked for) first, then the pictures and a part of
the manifest per chunk, then ``manifest.parquet``, and ``_SUCCESS`` last. Every object is a function of
``batch.json`` alone, so whoever finds a batch unfinished can finish it.
"""

import io
import json
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import Asked, SamplingConfig
from diffusion.files import canonical_json, digest_of, sha256_bytes
from diffusion.fingerprint import Fingerprint
from diffusion.grids import image_of
from diffusion.marked import marked_png

CHUNK_BATCHES = 4
"""Compute batches per chunk: small enough to lose little to a kill, large enough to be worth a task."""
MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("run_id", pa.string()),
        ("content_digest", pa.string()),
        ("weights_sha256", pa.string()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("guidance", pa.float64()),
    ]
)
"""One row per picture; ``fingerprint`` is canonical JSON, ``label`` and ``prompt`` what the picture was to show."""


class Batch(Config):
    """What was asked for, and all that decides the bits of the answer."""

    model: str
    version: int
    run_id: str
    content_digest: str
    weights_sha256: str
    seed: int
    count: int
    sampling: SamplingConfig
    fingerprint: Fingerprint
    asked: Asked | None = None
    """What the pictures are to show; None: whatever comes."""

    @property
    def name(self) -> str:
        """A name that differs for different requests to one model version."""
        how = self.sampling.model_dump(mode="json", exclude_none=True)
        digest = digest_of(how if self.asked is None else how | {"asked": self.asked.model_dump(mode="json")})[:8]
        return f"seed{self.seed}-count{self.count}-{self.sampling.sampler}{self.sampling.steps}-{digest}"

    def chunks(self) -> list[range]:
        """The picture numbers of each chunk: whole compute batches, but for the last."""
        size = CHUNK_BATCHES * self.sampling.compute_batch
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def json_bytes(self) -> bytes:
        """``batch.json``: what is not asked for is left out, so that later options change no earlier batch."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True)).encode()


def picture_key(index: int) -> str:
    """Name of picture number ``index`` inside its batch."""
    return f"{index:08d}.png"


def part_key(chunk: int) -> str:
    """Name of a chunk's part of the manifest inside its batch."""
    return f"manifest/part-{chunk:05d}.jsonl"


def encode(batch: Batch, index: int, picture: Tensor, label: str | None) -> tuple[bytes, dict[str, object]]:
    """Picture number ``index``, (C, H, W) uint8, as a PNG that says where it comes from, and its manifest row.

    ``label``: the class that it was to show.
    """
    prompt = batch.asked.prompt(index) if batch.asked else None
    image = image_of(picture)
    about: dict[str, str | None] = {
        "seed": str(batch.seed),
        "index": str(index),
        "model": f"models:/{batch.model}/{batch.version}",
        "run_id": batch.run_id,
        "content_digest": batch.content_digest,
        "label": batch.asked.label(index) if batch.asked else None,
        "prompt": prompt,
    }
    png = marked_png(image, about)
    row = {
        "key": picture_key(index),
        "index": index,
        "seed": batch.seed,
        "model": batch.model,
        "version": batch.version,
        "run_id": batch.run_id,
        "content_digest": batch.content_digest,
        "weights_sha256": batch.weights_sha256,
        "sha256": sha256_bytes(png),
        "pixels_sha256": sha256_bytes(image.tobytes()),
        "fingerprint": canonical_json(batch.fingerprint.model_dump(mode="json")),
        "label": label,
        "prompt": prompt,
        "negative_prompt": batch.asked and batch.asked.negative_prompt,
        "guidance": batch.sampling.guidance,
    }
    return png, row


def part_bytes(rows: Iterable[dict[str, object]]) -> bytes:
    """A chunk's part of the manifest: JSON lines."""
    return "".join(f"{canonical_json(row)}\n" for row in rows).encode()


def part_rows(part: bytes) -> list[dict[str, object]]:
    """The rows of a part."""
    return [json.loads(line) for line in part.decode().splitlines()]


def parquet_bytes(parts: Iterator[list[dict[str, object]]]) -> bytes:
    """The manifest of the whole batch, a row group per part."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, MANIFEST) as writer:
        for rows in parts:
            writer.write_table(pa.Table.from_pylist(rows, schema=MANIFEST))
    return sink.getvalue()
