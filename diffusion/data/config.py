"""What ``ingest`` makes of the pictures it finds."""

from typing import Literal

from pydantic import Field

from diffusion.config import Config


class IngestConfig(Config):
    """How pictures become stored pixels. All of it but the limits is part of the data set's identity."""

    source: str = "pictures/digits"
    """Where the pictures lie: a folder, with a sub-folder per class or a metadata.csv / metadata.jsonl."""
    size: int = Field(28, ge=8, le=1024)
    """Height and width of every stored picture, in pixels."""
    fit: Literal["crop", "pad"] = "crop"
    """How a picture that is not square becomes square: cut its longer side, or fill up its shorter one."""
    mode: Literal["keep", "grey", "rgb"] = "keep"
    """Channels: ``keep`` stores grey if every picture of the set is grey, and RGB otherwise."""
    background: str = Field("#000000", pattern="^#[0-9a-fA-F]{6}$")
    """What shows through transparent pixels and fills up padded ones, as #rrggbb."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the pictures, chosen by content hash, that training never sees."""
    shard_bytes: int = Field(64 * 2**20, ge=2**16)
    """A shard is closed when its members reach this many bytes."""
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """Share of refused pictures above which the ingest fails."""
    max_pixels: int = Field(50_000_000, ge=64, le=178_956_970)
    """Pictures that declare more pixels than this are refused undecoded; Pillow itself opens no larger ones."""
    max_bytes: int = Field(64 * 2**20, ge=1024)
    """Files larger than this are refused unread."""
