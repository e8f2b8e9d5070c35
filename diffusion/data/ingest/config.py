"""Configuration of ``ingest``."""

from itertools import pairwise
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from diffusion.common.config import MAX_SIDE, MAX_SIZE, Config, is_unset
from diffusion.common.files import digest_of
from diffusion.common.shapes import Shape, parse_shape, shape_name

AREAS = (0.75, 1.25)
"""Minimum and maximum pixels of a bucket, as multiples of the square's."""
MAX_BITS = 48
"""Largest threshold of near-duplicates, in bits of 256: the index looks up all hashes up to it."""
VARIABLE = "^[A-Za-z_][A-Za-z0-9_]*$"
"""Name of an environment variable."""
UNCALIBRATED_BITS = 24
"""Threshold of near-duplicates in a data set of too few images to calibrate it."""


def _order_shapes(buckets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Put shapes in the one order in which they are stored; raises ValueError for none, and for equal aspect ratios."""
    shapes = sorted(map(parse_shape, buckets or ()), key=lambda shape: shape[1] / shape[0])
    names = tuple(map(shape_name, shapes))
    # Images go to the nearest ratio: no image would go to the second of two equal ones.
    for number, ((height, width), (other_height, other_width)) in enumerate(pairwise(shapes)):
        if width * other_height == other_width * height:
            raise ValueError(f"{names[number]} and {names[number + 1]} have one aspect ratio: leave one of them out")
    return names or None


class StorageConfig(Config):
    """How images become stored pixels: part of the data set's identity."""

    size: int = Field(28, ge=8, le=MAX_SIZE)
    """Height and width of every stored image, in pixels; with buckets, of the square that has as many pixels."""
    fit: Literal["crop", "pad", "squash", "bucket"] = "crop"
    """How a non-square image becomes square: crop its longer side, pad its shorter one, or squash. ``bucket``: it does
    not; it is stored in the one of ``buckets`` whose aspect ratio is nearest, resized to cover it and cropped."""
    buckets: Annotated[tuple[str, ...] | None, AfterValidator(_order_shapes)] = Field(
        None, min_length=1, max_length=32, exclude_if=is_unset
    )
    """Shapes of stored images as WIDTHxHEIGHT in pixels, of unequal aspect ratios and about as many pixels as the
    square of ``size``, for ``fit: bucket``: [80x48, 64x64, 48x80]. Null: at most eight, chosen by a sample of the
    images at the first ingest; they are part of the data set from then on."""
    mode: Literal["keep", "grey", "rgb"] = "keep"
    """Channels: ``keep`` stores grey if every image of the set shows no colour, and RGB otherwise."""
    background: str = Field("#000000", pattern="^#[0-9a-fA-F]{6}$")
    """Colour behind transparent pixels and in padding, as #rrggbb."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the images, chosen by content hash, that training never sees."""

    @property
    def shapes(self) -> list[Shape]:
        """Return the shapes (H, W) of stored images, from the narrowest to the widest."""
        return [parse_shape(name) for name in self.buckets] if self.buckets else [(self.size, self.size)]

    @model_validator(mode="after")
    def _buckets_fit_size(self) -> Self:
        if self.buckets is None:
            return self
        if self.fit != "bucket":
            raise ValueError(
                f"ingest.buckets are for ingest.fit=bucket, and ingest.fit is {self.fit}: set it, or leave them out"
            )
        min_pixels, max_pixels = (round(factor * self.size**2) for factor in AREAS)
        for height, width in self.shapes:
            if (
                not min_pixels <= height * width <= max_pixels
                or min(height, width) < 8
                or max(height, width) > MAX_SIDE
            ):
                raise ValueError(
                    f"ingest.buckets has {width}x{height}, and all need about as many pixels as {self.size}x{self.size}"
                    f", {min_pixels:,} to {max_pixels:,}, and sides of 8 to {MAX_SIDE}: change it, or ingest.size"
                )
        return self


CaptionSource = Literal["txt", "caption", "json", "csv", "none"]
FolderNames = Literal["names", "class", "caption"]
MaskSource = Literal["alpha", "files"]

CAPTIONER = "captioner"
"""Mark of the fields of ``ingest.captioner`` of which one is given: it says what captions."""


def _require_address(name: str, url: str) -> None:
    """Raise ValueError if ``url`` is not an HTTP address without credentials."""
    import httpx  # slow, and few sets are captioned over HTTP

    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname or "@" in place.netloc:
        raise ValueError(f"{name} must be http://HOST… or https://HOST…; credentials belong into token_env")
    if " " in url:
        raise ValueError(f"{name} has a space: write it as %20")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{name}: {error}") from error
    _ = place.port  # raises ValueError outside 0 to 65535


class CaptionProgram(Config):
    """What captions images: a command or an HTTP endpoint, with what it gets from the environment."""

    command: Annotated[tuple[str, ...] | None, CAPTIONER] = Field(None, min_length=1)
    """Program and arguments, started once per image without a shell. It reads the stored image as PNG from standard
    input, or from the file whose path replaces an argument ``{image}``, and writes the caption to standard output in
    UTF-8; empty output: no caption for this image. A run of a deployment starts only what ``DARKROOM_CAPTIONERS`` in
    the worker's environment names."""
    environment: tuple[Annotated[str, Field(pattern=VARIABLE)], ...] | None = Field(None, exclude_if=is_unset)
    """Environment variables that the command gets besides those that hold no secret, such as ``PATH``, ``HOME``,
    ``LANG`` and ``CUDA_VISIBLE_DEVICES``."""
    url: Annotated[str | None, CAPTIONER] = None
    """HTTP endpoint instead of a command: the PNG is the body of a POST, the answer is JSON, {"caption": "…"}, or null
    for no caption. Redirects are not followed."""
    openai: Annotated[str | None, CAPTIONER] = Field(None, exclude_if=is_unset)
    """Base URL of a server with OpenAI's interface, such as http://127.0.0.1:11434/v1 of Ollama; vLLM, SGLang and LM
    Studio have it as well. Each image is a chat of its own, sent to ``chat/completions`` below it."""
    token_env: str | None = Field(None, pattern=VARIABLE)
    """Environment variable with a token, sent to ``url`` or ``openai`` as ``Authorization: Bearer …``."""

    @model_validator(mode="after")
    def _names_one_captioner(self) -> Self:
        names = [name for name, field in type(self).model_fields.items() if CAPTIONER in field.metadata]
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError(f"give either {' or '.join(names)}")
        for name, url in (("url", self.url), ("openai", self.openai)):
            if url is not None:
                _require_address(name, url)
        if self.command and self.token_env:
            raise ValueError("token_env is for url and openai: a command gets the variables that environment names")
        if not self.command and self.environment:
            raise ValueError("environment is for command: an endpoint gets the token that token_env names")
        return self


class CaptionerConfig(CaptionProgram):
    """A command or an HTTP endpoint of yours that captions images, called once per image."""

    version: str | None = Field(None, min_length=1, max_length=100)
    """Version of the model and its prompt, in your words: if it, command or url changes, all are captioned again. Null
    is for ``openai`` alone, whose ``model``, ``prompt`` and ``max_tokens`` count in the same way."""
    model: str | None = Field(None, min_length=1, max_length=200, exclude_if=is_unset)
    """Name of the model of an ``openai`` server, such as qwen2.5vl."""
    prompt: str | None = Field(None, min_length=1, max_length=10_000, exclude_if=is_unset)
    """What an ``openai`` server is asked about each image."""
    max_tokens: int | None = Field(None, ge=1, le=4096, exclude_if=is_unset)
    """Longest answer of an ``openai`` server, in tokens; one that is cut does not count. Null: the server's limit."""
    replace: bool = False
    """Whether captions of the source are replaced; otherwise only images without one are captioned."""
    workers: int = Field(4, ge=1, le=256)
    """Number of images captioned concurrently."""
    seconds: float = Field(60.0, gt=0)
    """Deadline of one answer in seconds, from the start of the request or command to the last byte."""
    tries: int = Field(4, ge=1)
    """Attempts at ``url`` before an image stays without a caption until the next ingest; a command is started once."""
    max_failed: float = Field(0.5, ge=0, le=1)
    """Share of the images that get no caption above which the ingest fails; the captions of the others are kept."""

    @property
    def identity(self) -> str:
        """Version and a digest of everything that determines the captions, as written to the records."""
        parts: list[object] = [self.command, self.url, self.version]
        if self.openai is not None:
            parts += [self.openai, self.model, self.prompt, self.max_tokens]
        return f"{self.version or self.model} ({digest_of(parts)[:12]})"

    @model_validator(mode="after")
    def _is_identified(self) -> Self:
        chat = {"model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens}
        if self.openai is None:
            if self.version is None:
                raise ValueError("version is missing: name the model and its prompt in your words")
            if given := [name for name, value in chat.items() if value is not None]:
                raise ValueError(f"{given[0]} is for openai: leave it out")
        elif missing := [name for name, value in chat.items() if value is None and name != "max_tokens"]:
            raise ValueError(f"openai needs a {missing[0]}")
        return self


class IngestConfig(StorageConfig):
    """How images are stored, which of them are kept, and how the work is distributed."""

    source: str = "images/digits"
    """Where the images lie: a folder, tar, zip, Parquet, s3:// prefix, hf:// data set …
    (diffusion/data/sources)."""
    captions: CaptionSource | None = Field(None, exclude_if=is_unset)
    """Where captions of images in folders, archives and on S3 are read from, unless a metadata.csv or metadata.jsonl
    has them: NAME.txt, NAME.caption or NAME.json beside NAME.png, captions.csv, or none of these. Null: the first of
    these that has one. Each line of a caption is a caption of its own."""
    masks: MaskSource | None = Field(None, exclude_if=is_unset)
    """Where masks come from: grey images that weight the pixels of the loss (``training.mask``), from 0 for black to 1
    for white. ``files``: NAME.mask.png or NAME-masklabel.png beside NAME.png, or the column ``mask`` of a table.
    ``alpha``: the opacity of the image itself. An image without a mask counts in full. Null: no masks are read, and
    those of the data set stay."""
    default_caption: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(None, exclude_if=is_unset)
    """Caption of images without one."""
    trigger: Annotated[str, Field(pattern=r"^\S(.*\S)?$", max_length=100)] | None = Field(None, exclude_if=is_unset)
    """Word that names what a model is to learn: it replaces [trigger] in captions, is put before those that lack it,
    and is the caption of images without one."""
    folders: FolderNames | None = Field(None, exclude_if=is_unset)
    """What the names of folders are. ``names``: classes. ``class``: classes, without the repeats of folders called as
    in sd-scripts, 10_cat. ``caption``: the word of such a folder is the caption of its images without one, and there
    are no classes. Null: class."""
    licence: str | None = Field(None, min_length=1, exclude_if=is_unset)
    """Licence of the images: CC-BY-4.0, or a sentence. It is written to the data set's manifest and every model's card;
    null: unchanged, or what the card of an hf:// data set says."""
    enlarge: bool = False
    """Whether images that are smaller than ``size`` are enlarged; otherwise they are quarantined."""
    min_size: int = Field(1, ge=1)
    """Images whose shorter side has fewer pixels than this are quarantined."""
    near_duplicates: Annotated[int, Field(ge=0, le=MAX_BITS)] | Literal["auto"] | None = None
    """Images whose 256-bit perceptual hash differs from the hash of a group's first image in at most this many bits
    join it, all in one split; 24 finds other sizes and compressions, and few distinct images. ``auto``: the number is
    calibrated by a sample of the images at the first ingest with it, and part of the data set from then on."""
    captioner: CaptionerConfig | None = Field(None, exclude_if=is_unset)
    """What captions images at the end of an ingest, after rules of ``curation`` have dropped some; null: images have
    the captions of the source alone."""
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
    """Where shards are prepared, measured and merged, and a training's captions and latents encoded: threads or
    processes of this machine, or a Ray cluster."""
    workers: int = Field(2, ge=1)
    """Number of shards at work concurrently. Threads that encode are one per core."""

    @field_validator("near_duplicates", mode="before")
    @classmethod
    def _is_bits_or_auto(cls, value: object) -> object:
        # One error instead of one for each type.
        if value in (None, "auto") or (type(value) is int and 0 <= value <= MAX_BITS):
            return value
        raise ValueError(f"must be a number of bits from 0 to {MAX_BITS}, auto or null")

    def near_duplicate_bits(self, recorded: int | None) -> int | None:
        """Return the number of bits that ``near_duplicates`` stands for in a data set whose manifest has ``recorded``.

        None: near-duplicates are not grouped.
        """
        if self.near_duplicates == "auto":
            return UNCALIBRATED_BITS if recorded is None else recorded
        return self.near_duplicates

    def storage(self) -> StorageConfig:
        """Return the fields that determine stored pixels; the others select images and distribute the work."""
        return StorageConfig(**{name: getattr(self, name) for name in StorageConfig.model_fields})
