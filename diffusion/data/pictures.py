"""One picture: from whatever lies in a file to square 8-bit pixels in grey or RGB, or a reason why not."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diffusion.data import png
from diffusion.data.config import IngestConfig
from diffusion.files import sha256_bytes

# Only these decoders are ever tried, so that a file cannot choose an exotic one.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class Refused(Exception):
    """The picture cannot be used; the message is the reason kept in the quarantine."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it goes into a shard."""

    key: str
    """Hex SHA-256 of mode, shape and pixels: equal pictures have equal keys."""
    mode: str
    """``L`` (grey) or ``RGB``."""
    source_size: tuple[int, int]
    """Width and height of the picture as it came, in pixels, after its EXIF rotation."""
    pixels: np.ndarray
    """(H, W) for grey, (H, W, 3) for RGB; uint8."""
    png: bytes


def prepare(payload: bytes | Image.Image, config: IngestConfig) -> StoredPicture:
    """Decode, orient, convert, flatten and resize one picture, given as a file's bytes or decoded already.

    Raises Refused, with the reason, for anything that is no whole picture within the limits.
    """
    picture = _decode(payload, config) if isinstance(payload, bytes) else payload
    _require_usable_size(picture.size, config)
    source_size = picture.size
    picture = _square(_to_grey_or_rgb(picture, config), config)
    return store(picture, source_size)


def store(picture: Image.Image, source_size: tuple[int, int]) -> StoredPicture:
    """Name and encode a finished ``L`` or ``RGB`` picture."""
    pixels = np.asarray(picture)
    header = f"{picture.mode}:{picture.width}x{picture.height}:".encode()
    return StoredPicture(sha256_bytes(header + pixels.tobytes()), picture.mode, source_size, pixels, png.encode(pixels))


def _require_usable_size(size: tuple[int, int], config: IngestConfig) -> None:
    width, height = size
    if width * height > config.max_pixels:
        raise Refused(f"{width}×{height} pixels are over the limit of {config.max_pixels}")
    if min(size) < config.min_size:
        raise Refused(f"{width}×{height} pixels: the shorter side is under the minimum of {config.min_size}")
    side, name = (max(size), "longer") if config.fit == "pad" else (min(size), "shorter")
    if side < config.size and not config.enlarge:
        raise Refused(f"{width}×{height} pixels: the {name} side would have to be enlarged to {config.size}")


def _square(picture: Image.Image, config: IngestConfig) -> Image.Image:
    square = (config.size, config.size)
    if config.fit == "crop":
        return ImageOps.fit(picture, square, Image.Resampling.LANCZOS)
    if config.fit == "squash":
        return picture.resize(square, Image.Resampling.LANCZOS)
    return ImageOps.pad(picture, square, Image.Resampling.LANCZOS, color=_background(picture.mode, config))


def _decode(data: bytes, config: IngestConfig) -> Image.Image:
    if len(data) > config.max_bytes:
        raise Refused(f"{len(data)} bytes are over the limit of {config.max_bytes}")
    try:
        with warnings.catch_warnings():
            # Our own limit on declared pixels stands in for Pillow's warning about large ones.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > config.max_pixels:
            raise Refused(f"{picture.width}×{picture.height} pixels are over the limit of {config.max_pixels}")
        picture.seek(0)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(f"over the limit of {config.max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise Refused("not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)") from error
    except Exception as error:  # decoders raise whatever they like
        raise Refused(f"damaged: {error}") from error


def _to_grey_or_rgb(picture: Image.Image, config: IngestConfig) -> Image.Image:
    if picture.mode == "F":
        raise Refused("floating-point pixels have no known range: save it with 8 or 16 bits")
    if picture.mode in SIXTEEN_BIT or picture.mode == "I":
        picture = _from_sixteen_bits(picture)
    picture = _to_srgb(picture)
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        flat = Image.new("RGBA", picture.size, config.background)
        picture = Image.alpha_composite(flat, picture).convert("RGB")
        grey = grey and len(set(_rgb(config.background))) == 1
    target = {"grey": "L", "rgb": "RGB", "keep": "L" if grey else "RGB"}[config.mode]
    return picture.convert(target)


def _from_sixteen_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Refused("32-bit pixels outside 0…65535: save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "RGBA", "CMYK"):
        target = "RGBA" if picture.mode == "RGBA" else "RGB"
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=target)
        except (ImageCms.PyCMSError, OSError) as error:
            raise Refused(f"unusable colour profile: {error}") from error
        if converted is None:
            raise AssertionError("profileToProfile returns a picture unless asked to work in place")
        return converted
    return picture.convert("RGB") if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV") else picture


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def _background(mode: str, config: IngestConfig) -> int | tuple[int, int, int]:
    rgb = _rgb(config.background)
    return Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0)) if mode == "L" else rgb  # type: ignore[return-value]
