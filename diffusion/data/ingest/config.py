"""Configuration of ``ingest``."""

from typing import Literal

from pydantic import Field

from diffusion.common.config import LARGEST_SIZE, Config, unset


class StorageConfig(Config):
    """How images become stored pixels: part of the data set's identity."""

    size: int = Field(28, ge=8, le=LARGEST_SIZE)
    """Height and width of every stored image, in pixels."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How a non-square image becomes square: crop its longer side, pad its shorter one, or squash."""
    mode: Literal["keep", "grey", "rgb"] = "keep"
    """Channels: ``keep`` stores grey if every image of the set shows no colour, and RGB otherwise."""
    background: str = Field("#000000", pattern="^#[0-9a-fA-F]{6}$")
    """Colour behind transparent pixels and in padding, as #rrggbb."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the images, chosen by content hash, that training never sees."""


class IngestConfig(StorageConfig):
    """How images are stored, which of them are kept, and how the work is distributed."""

    source: str = "images/digits"
    """Where the images lie: a folder, tar, zip, Parquet, table of URLs, s3:// prefix … (diffusion/data/sources)."""
    licence: str | None = Field(None, min_length=1, exclude_if=unset)
    """Licence of the images: CC-BY-4.0, or a sentence. It is written to the data set's manifest and every model's card;
    null: unchanged."""
    enlarge: bool = False
    """Whether images that are smaller than ``size`` are enlarged; otherwise they are quarantined."""
    min_size: int = Field(1, ge=1)
    """Images whose shorter side has fewer pixels than this are quarantined."""
    near_duplicates: int | None = Field(None, ge=0, le=48)
    """Images whose 256-bit perceptual hash differs from that of the first image of a group in at most this many bits
    join it, all in one split; 24 finds other sizes and compressions, and few distinct images."""
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """Share of quarantined images, among those read, above which the ingest fails."""
    max_pixels: int = Field(50_000_000, ge=64, le=178_956_970)
    """Images that declare more pixels than this are quarantined without being decoded; the maximum is Pillow's own
    limit."""
    max_bytes: int = Field(64 * 2**20, ge=1024)
    """Files larger than this, in bytes, are quarantined unread."""
    max_page_bytes: int = Field(2**27, ge=2**20)
    """Pages of Parquet files that would take more memory than this, unpacked, in bytes, are quarantined."""
    max_seconds: float = Field(10.0, gt=0)
    """Images that take longer than this to decode, in seconds, are quarantined."""

    shard_bytes: int = Field(64 * 2**20, ge=2**16)
    """Approximate size of a shard, in bytes; small sets get at least eight shards."""
    runner: Literal["threads", "processes", "ray"] = "threads"
    """Where images are prepared, one task per shard: threads or processes of this machine, or a Ray cluster."""
    workers: int = Field(2, ge=1)
    """Number of shards prepared concurrently."""
    download_seconds: float = Field(20.0, gt=0)
    """Timeout of one download in seconds, from the resolution of the host name to the last byte, redirects included."""
    download_tries: int = Field(4, ge=1)
    """Attempts at a URL before its image is quarantined."""
    allow_private_addresses: bool = False
    """Whether tables of URLs may name hosts on loopback, private, link-local or reserved addresses, also by a redirect:
    the author of the table can then send requests to this machine's own network. Otherwise such rows are quarantined;
    ``--requeue`` reads them again once this is true. Behind a proxy of the environment (``HTTPS_PROXY``) names are
    checked as this machine resolves them, and rows whose names it cannot resolve fail; the proxy resolves them again,
    so give it such a rule, too."""

    def storage(self) -> StorageConfig:
        """Return the fields that determine stored pixels; the others select images and distribute the work."""
        return StorageConfig(**{name: getattr(self, name) for name in StorageConfig.model_fields})
