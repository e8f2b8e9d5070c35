"""Decoding of one image: from a file to stored 8-bit pixels in grey or RGB, or the reason why it is quarantined.

The result depends on the bytes, the configuration and the library versions alone, except for the time limit.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from time import monotonic, thread_time
from typing import cast

import numpy as np
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Transpose
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from diffusion.common.files import sha256_bytes
from diffusion.data import png
from diffusion.data.ingest.buckets import nearest_shape
from diffusion.data.ingest.config import IngestConfig

# Only these decoders are used, so that a file cannot choose an exotic one.
DECODERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (rb"\xff\xd8\xff", JpegImageFile),
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"BM", BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
)
"""Formats by the first bytes of a file."""
LARGE = 2**24
"""Pixels from which a process decodes one image at a time, at about twenty bytes per pixel; JPEGs are reduced."""
LARGE_DECODE = RLock()  # an image and its mask
MASK_PROBLEM = "its mask"
"""Start of the reason why an image cannot be used that concerns its mask alone."""
MAX_PROFILE_BYTES = 4 * 2**20
"""Maximum size of a colour profile in bytes; profiles of presses have up to three million."""
REDUCED = 2
"""Minimum ratio of a JPEG's decoded size to its stored size. For 600 photographs reduced from 500 to 64 pixels, the
worst PSNR against full decoding is 44 dB, in half the time; at ratio 1 it is 29 dB."""
TRANSPOSITIONS = (
    *(Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE),
    *(Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90),
)
"""Transpositions that undo the EXIF orientations 2 to 8."""
FLIPPED_X, TOP_WAS_LAST, TURNED = {2, 3, 6, 7}, {3, 4, 7, 8}, {5, 6, 7, 8}
"""Orientations whose left or upper side was the right or lower one of the stored image, and whose sides swap."""


def ignore_pillow_warnings() -> None:
    """Keep Pillow in this process from printing what it finds odd in images, as ingest has reasons of its own."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusableEntryError(Exception):
    """The image cannot be used; the message, one short line, is the reason recorded in the quarantine."""


@dataclass(frozen=True)
class StoredImage:
    """An image as stored in a shard."""

    key: str
    """Hex SHA-256 of mode, shape and pixels: equal images have equal keys."""
    mode: str
    """``L`` (grey) or ``RGB``."""
    source_size: tuple[int, int]
    """Width and height of the image as it came, in pixels, after its EXIF rotation."""
    pixels: np.ndarray
    """(H, W) for grey, (H, W, 3) for RGB; uint8."""
    png: bytes
    mask: tuple[str, bytes] | None = None
    """Digest as ``key``, and PNG in grey, of the weight of each pixel; None: all of them count in full."""


def prepare(
    payload: bytes | Image.Image,
    config: IngestConfig,
    mask_payload: "bytes | Image.Image | UnusableEntryError | None" = None,
) -> StoredImage:
    """Decode, orient, convert to sRGB, flatten and resize one image, given as a file's bytes or decoded already.

    ``mask_payload``: its mask, which is cut and resized as the image is, and padded with 0, or the reason why it cannot
    be read; reasons that concern the mask begin with MASK_PROBLEM.

    Of several frames or pages the first is used. ``config.max_seconds`` is CPU time, checked whenever a decoder reads
    on. A WebP or compressed TIFF is decoded in one go, which only ``config.max_pixels`` keeps short.

    Raises UnusableEntryError, with the reason, and nothing else, whatever the bytes are.
    """
    with _catch_errors(config), ExitStack() as stack:
        source = _decode(payload, config, stack)
        image = _fit(source, _to_grey_or_rgb(source, config), config)
        if config.mode == "keep":
            # An image without colour is grey, so that it has one key however it was saved.
            red, *others = image.split()
            image = red if all(red.tobytes() == channel.tobytes() for channel in others) else image
        mask = _prepare_mask(source, mask_payload, config, stack)
    pixels = np.asarray(image)
    return StoredImage(_digest_pixels(image), image.mode, source.size, pixels, png.encode(pixels), mask)


def _digest_pixels(image: Image.Image) -> str:
    header = f"{image.mode}:{image.width}x{image.height}:".encode()
    return sha256_bytes(header + np.asarray(image).tobytes())


def _prepare_mask(
    source: "_Source",
    payload: "bytes | Image.Image | UnusableEntryError | None",
    config: IngestConfig,
    stack: ExitStack,
) -> tuple[str, bytes] | None:
    """Decode the mask of ``source`` and fit it as the image; None if there is none, or it is white everywhere."""
    if payload is None and config.masks != "alpha":
        return None
    mask: Image.Image | None
    config = config.model_copy(update={"background": "#000000", "enlarge": True, "min_size": 1})
    if payload is None:
        mask = _split_alpha(source.image)[1]
    else:
        try:
            if isinstance(payload, UnusableEntryError):
                raise payload
            mask_source = _decode(payload, config, stack, reduce=False)
            mask_source.image.info.pop("icc_profile", None)  # weights are not colours
            mask = _split_alpha(mask_source.image)[0].convert("L")
        except Exception as error:
            raise UnusableEntryError(f"{MASK_PROBLEM}: {_one_line(error)}") from error
        (width, height), (mask_width, mask_height) = source.size, mask_source.size
        if abs(mask_width * height - mask_height * width) > max(source.size):  # beyond rounding
            raise UnusableEntryError(
                f"{MASK_PROBLEM} has another aspect ratio, {mask_width}×{mask_height} pixels, than its {width}×{height}"
            )
        source = _Source(mask, source.size, 1)
        mask = mask if mask.size == source.size else mask.resize(source.size, Image.Resampling.BILINEAR)
    if mask is None:
        return None
    mask = _fit(source, mask, config)
    return None if mask.getextrema() == (255, 255) else (_digest_pixels(mask), png.encode(np.asarray(mask)))


def read_size(payload: bytes, config: IngestConfig) -> tuple[int, int]:
    """Read width and height from the header of an image file, without decoding a pixel.

    Raises UnusableEntryError as ``prepare`` does: for more bytes or pixels than ``config`` allows, say.
    """
    with _catch_errors(config):
        return _read_header(payload, config)[1].size


def decode_rgba(payload: bytes, config: IngestConfig) -> Image.Image:
    """Decode as ``prepare`` does, but at the original size and with its transparency: ``RGBA``."""
    with _catch_errors(config), ExitStack() as stack:
        image, alpha = _split_alpha(_decode(payload, config, stack, reduce=False).image)
        image = image.convert("RGBA")
        if alpha is not None:
            image.putalpha(alpha)
        return image


def decode_unscaled(payload: bytes, config: IngestConfig) -> np.ndarray:
    """Decode as ``prepare`` does, but at the original size, under 2 · ``config.size``: (H, W) or (H, W, 3) uint8."""
    with _catch_errors(config), ExitStack() as stack:
        source = _decode(payload, config, stack)
        if max(source.size) >= REDUCED * config.size:
            width, height = source.size
            raise UnusableEntryError(f"{width}×{height} pixels: a side of more than {REDUCED * config.size - 1}")
        return np.asarray(_to_grey_or_rgb(source, config))


@contextmanager
def _catch_errors(config: IngestConfig) -> Iterator[None]:
    """Turn any error of decoding into an UnusableEntryError with the reason."""
    try:
        yield
    except UnusableEntryError:
        raise
    except Image.DecompressionBombError as error:  # raised by decoders that take memory as they read the head
        raise UnusableEntryError(f"more pixels than the limit of {config.max_pixels}") from error
    except Exception as error:  # decoders raise whatever they like on bytes that they did not expect
        raise UnusableEntryError(f"damaged: {_one_line(error)}") from error


@dataclass(frozen=True)
class _Source:
    """Decoded, upright image in its original colours and bit depth, of ``size`` before ``scale``."""

    image: Image.Image
    size: tuple[int, int]
    scale: int
    """The image was decoded at this fraction of its size, rounded up."""
    spare: tuple[float, float] = (0, 0)
    """Share of that rounding at the left and top, for rotated images; otherwise it is at the right and bottom."""


class _TimeLimitedFile(io.BytesIO):
    """In-memory file that refuses reads once its thread has used ``seconds`` of CPU time."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self.seconds = seconds
        self.soonest = monotonic() + seconds
        self.until = thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        self.check()
        return super().read(size)

    def check(self) -> None:
        # CPU time is at most wall time, which is twenty times as fast to read.
        if monotonic() > self.soonest and thread_time() > self.until:
            raise UnusableEntryError(f"takes more than {self.seconds:g} seconds to decode")


def _read_header(payload: bytes, config: IngestConfig) -> tuple[_TimeLimitedFile, ImageFile]:
    if len(payload) > config.max_bytes:
        raise UnusableEntryError(f"{len(payload)} bytes are over the limit of {config.max_bytes}")
    file = _TimeLimitedFile(payload, config.max_seconds)
    image = _open(file)
    _require_usable(image.size, config)
    return file, image


def _decode(payload: bytes | Image.Image, config: IngestConfig, stack: ExitStack, reduce: bool = True) -> _Source:
    """Decode ``payload``; with ``reduce`` a JPEG that will be scaled down, at a fraction of its size."""
    if isinstance(payload, Image.Image):
        _require_usable(payload.size, config)
        payload.load()
        return _turn_upright(payload, payload.size, 1)
    file, image = _read_header(payload, config)
    size, scale = image.size, 1
    args = image.tile[0].args if image.tile else ""
    layout = str(args[0] if isinstance(args, tuple) else args)  # of samples, as Pillow names it: ``RGB;16B``, say
    if (
        isinstance(image, TiffImageFile)
        and max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
        and (image.tag_v2.get(PLANAR_CONFIGURATION), image.info.get("compression")) == (2, "raw")
    ):
        # Pillow misreads them as planes of 8 bits.
        raise UnusableEntryError("uncompressed planes of 16 bits: save it with the samples of a pixel side by side")
    if isinstance(image, JpegImageFile):
        is_turned = image.getexif().get(Base.Orientation, 1) in TURNED
        width, height = _resized_size(size[::-1], config)[::-1] if is_turned else _resized_size(size, config)
        draft = image.draft(None, (REDUCED * width, REDUCED * height)) if reduce else None
        scale = round(size[0] / draft[1][2]) if draft else 1
        image.decodermaxblock = 4096  # a few bytes may be a scan over the whole image
    elif size[0] * size[1] > LARGE:
        stack.enter_context(LARGE_DECODE)
    image.load()
    if isinstance(image, PngImageFile):
        _open(file).verify()  # decoding ignores checksums
    file.check()
    if image.mode.startswith("I;16"):
        return _turn_upright(_from_integers(image, layout), size, scale)
    transparency = image.info.get("transparency")
    if ";16" in layout and isinstance(transparency, tuple):
        # Pillow keeps the upper bytes of colours, but not of the transparent one.
        image.info["transparency"] = tuple(sample >> 8 for sample in transparency)
    return _turn_upright(image, size, scale)


def _open(file: _TimeLimitedFile) -> ImageFile:
    """Read the header of ``file``. Without Image.open, whose warning about large images does not apply here."""
    file.seek(0)
    start = file.read(16)
    file.seek(0)
    for signature, decoder in DECODERS:
        if re.match(signature, start, re.DOTALL):
            return decoder(file)
    raise UnusableEntryError("not an image in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)")


def _require_usable(size: tuple[int, int], config: IngestConfig) -> None:
    width, height = size
    if width * height > config.max_pixels:
        raise UnusableEntryError(f"{width}×{height} pixels are over the limit of {config.max_pixels}")
    if min(size) < config.min_size:
        raise UnusableEntryError(f"{width}×{height} pixels: the shorter side is under min_size = {config.min_size}")
    name, side = ("longer", max(size)) if config.fit == "pad" else ("shorter", min(size))
    if side < config.size and not config.enlarge and config.fit != "bucket":
        raise UnusableEntryError(
            f"{width}×{height} pixels: the {name} side is under size = {config.size}, and ingest.enlarge is off"
        )


def _turn_upright(image: Image.Image, size: tuple[int, int], scale: int) -> _Source:
    orientation = image.getexif().get(Base.Orientation, 1)
    if orientation not in range(2, 9):
        return _Source(image, size, scale)
    image = image.transpose(TRANSPOSITIONS[orientation - 2])
    size = size[::-1] if orientation in TURNED else size
    excess = [decoded_side - side / scale for decoded_side, side in zip(image.size, size, strict=True)]
    left = excess[0] if orientation in FLIPPED_X else 0
    top = excess[1] if orientation in TOP_WAS_LAST else 0
    return _Source(image, size, scale, (left, top))


def _to_grey_or_rgb(source: _Source, config: IngestConfig) -> Image.Image:
    """Convert the image to ``L`` or ``RGB`` in sRGB, over the background where it is transparent."""
    image, alpha = _split_alpha(source.image)
    grey = image.mode == "L"
    shows_background = alpha is not None or (config.fit == "pad" and source.size[0] != source.size[1])
    is_coloured = len(set(bytes.fromhex(config.background[1:]))) > 1
    kept_mode = "L" if grey and not (shows_background and is_coloured) else "RGB"
    image = image.convert({"grey": "L", "rgb": "RGB", "keep": kept_mode}[config.mode])
    if alpha is None:
        return image
    return Image.composite(image, Image.new(image.mode, image.size, config.background), alpha)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Convert ``image`` to ``L`` or ``RGB`` in sRGB; returns it and its opacity, None if it is opaque."""
    if image.mode == "F":
        raise UnusableEntryError("floating-point pixels have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_integers(image)
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.has_transparency_data and image.mode != "CMYK":
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        alpha = alpha if alpha.getextrema() != (255, 255) else None
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if grey else "RGB")
    return _to_srgb(image), alpha


def _from_integers(image: Image.Image, layout: str = "") -> Image.Image:
    """Round grey samples of 12 or 16 bits, or of 32 in the range of 16, to 8 bits."""
    integers = image.convert("I")
    low, high = cast(tuple[int, int], integers.getextrema())
    if low < 0 or high > 65535:
        raise UnusableEntryError("32-bit pixels outside 0…65535: save it with 8 or 16 bits")
    values = np.arange(2**16)
    if layout == "I;12":
        values = np.minimum(values << 4 | values >> 8, 65535)
    if layout and isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        values = 65535 - values  # white is zero
    grey = integers.point(((values + 128) // 257).tolist(), "L")
    if (transparency := image.info.get("transparency")) is not None:
        grey.putalpha(integers.point([255 * (value != transparency) for value in range(2**16)], "L"))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the colour profile of ``image`` (``L``, ``RGB`` or ``CMYK``); grey stays grey."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return image
    if len(profile) > MAX_PROFILE_BYTES:
        raise UnusableEntryError(
            f"a colour profile of {len(profile)} bytes, which is over the limit of {MAX_PROFILE_BYTES}"
        )
    try:
        convert = _conversion(profile, image.mode)
    except (ImageCms.PyCMSError, OSError) as error:
        raise UnusableEntryError(f"unusable colour profile: {_one_line(error)}") from error
    return convert(image) if convert else image


@lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Build the conversion of images of ``mode`` from ``profile`` to sRGB; None if it changes or fits nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    kind = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
    if kind is None or (kind != mode and (kind, mode) != ("RGB", "L")):
        return None
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), kind, "RGB")

    def convert(image: Image.Image) -> Image.Image:
        return cast(Image.Image, ImageCms.applyTransform(image, transform))

    if mode == "CMYK":
        return convert
    if mode == "L":
        levels = Image.frombytes("L", (256, 1), bytes(range(256)))
        table = convert(levels.convert(kind)).convert("L").tobytes()
        return None if _nearly_equal(table, levels.tobytes()) else lambda image: image.point(list(table))
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1).reshape(64, 64, 3)
    probe = Image.fromarray(cube)
    return None if _nearly_equal(convert(probe).tobytes(), probe.tobytes()) else convert


def _nearly_equal(one: bytes, other: bytes) -> bool:
    """Return whether no 8-bit sample differs by more than rounding."""
    difference = np.frombuffer(one, np.uint8).astype(np.int16) - np.frombuffer(other, np.uint8)
    return bool(np.abs(difference).max() <= 1)


def _resized_size(size: tuple[int, int], config: IngestConfig) -> tuple[int, int]:
    """Return width and height of an image of ``size`` after resizing, before padding."""
    if config.fit == "bucket":
        height, width = nearest_shape(*size, config.shapes)
        return width, height
    if config.fit != "pad":
        return config.size, config.size
    width, height = (max(1, round(side * config.size / max(size))) for side in size)
    return width, height


def _fit(source: _Source, image: Image.Image, config: IngestConfig) -> Image.Image:
    """Resize ``image``, converted from ``source``, to ``config.size`` pixels high and wide, or to its bucket."""
    width, height = source.size
    new_width, new_height = _resized_size(source.size, config)
    if config.fit == "bucket" and not config.enlarge and (width < new_width or height < new_height):
        raise UnusableEntryError(
            f"{width}×{height} pixels do not cover the bucket of {new_width}×{new_height}, and ingest.enlarge is off"
        )
    left, top = 0, 0
    if config.fit in ("crop", "bucket"):
        # Whole pixels, so that an image that is not scaled keeps its pixels.
        crop_width = min(width, max(1, round(height * new_width / new_height)))
        crop_height = min(height, max(1, round(width * new_height / new_width)))
        left, top, width, height = (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
    box = (left, top, left + width, top + height)
    # Not to the last pixel: the sides of an image decoded at a fraction are rounded up.
    scaled_box = (edge / source.scale + spare for edge, spare in zip(box, source.spare * 2, strict=True))
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC, box=tuple(scaled_box))  # type: ignore[arg-type]
    if config.fit != "pad" or image.size == (config.size, config.size):
        return image
    canvas = Image.new(image.mode, (config.size, config.size), config.background)
    canvas.paste(image, ((config.size - image.width) // 2, (config.size - image.height) // 2))
    return canvas


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:150]
