"""Every format that people have, and every way in which an image in it may say what it looks like."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion.data.ingest.decode import prepare
from tests.builders.image_files import (
    config,
    linear_grey_profile,
    noise,
    pixels,
    png_file,
    press_profile,
    psnr,
    reason,
    saved,
    srgb_profile,
    swapped_profile,
    tiff_file,
)
from tests.builders.shapes import blob

# Formats: images of the stored size, so that nothing but decoding can change a pixel.

LOSSLESS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff packbits": ("TIFF", {"compression": "packbits"}),
}


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_that_were_saved(kind: str, mode: str) -> None:
    name, options = LOSSLESS[kind]
    image = blob(1, 8, "RGB").convert(mode)
    stored_image = prepare(saved(image, name, **options), config())
    assert stored_image.mode == ("RGB" if mode == "RGB" else "L")
    np.testing.assert_array_equal(stored_image.pixels, np.asarray(image.convert(stored_image.mode)))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_are_looked_up(kind: str) -> None:
    image = blob(2, 8, "RGB").quantize(16)
    np.testing.assert_array_equal(pixels(saved(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_of_every_depth_of_grey_keeps_its_brightness(depth: int, interlaced: bool) -> None:
    samples = noise(8, 8, 1, most=2**depth - 1)
    stored_image = prepare(png_file(samples, "L", depth, interlaced=interlaced), config())
    assert stored_image.mode == "L"
    np.testing.assert_array_equal(stored_image.pixels, np.round(samples[..., 0] * 255 / (2**depth - 1)))


@pytest.mark.parametrize("interlaced", [False, True])
def test_of_sixteen_bits_of_colour_the_upper_ones_stay(interlaced: bool) -> None:
    samples = noise(8, 8, 3, most=65535)
    expected = samples >> 8
    png = png_file(samples, "RGB", 16, interlaced=interlaced, filters=(1, 2, 4))
    np.testing.assert_array_equal(pixels(png), expected)
    rows = samples.astype("<u2").tobytes()
    tags = {"t258": (16, 16, 16), "t262": 2, "t277": 3, "t278": 8}
    np.testing.assert_array_equal(pixels(tiff_file(8, 8, [rows], **tags)), expected)
    rows = samples.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(tiff_file(8, 8, [rows], ">", **tags)), expected)


def test_sixteen_bits_with_alpha_are_laid_over_the_background() -> None:
    grey = np.stack([noise(8, 8, most=65535), np.where(noise(8, 8, most=1, seed=1), 65535, 0)], axis=-1)
    expected = np.where(grey[..., 1], grey[..., 0] >> 8, 0x30)
    stored_image = prepare(png_file(grey, "LA", 16), config(background="#303030"))
    assert stored_image.mode == "L"
    np.testing.assert_array_equal(stored_image.pixels, expected)
    colour = np.concatenate([grey[..., :1], noise(8, 8, 2, most=65535, seed=2), grey[..., 1:]], axis=-1)
    expected = np.where(colour[..., 3:], colour[..., :3] >> 8, 0x30)
    np.testing.assert_array_equal(pixels(png_file(colour, "RGBA", 16), background="#303030"), expected)


@pytest.mark.parametrize(("depth", "clear"), [(8, 7), (16, 1000)])
def test_a_colour_declared_transparent_shows_the_background_and_only_that(depth: int, clear: int) -> None:
    for mode in ("L", "RGB"):
        samples = noise(8, 8, len(mode), most=2**depth - 1)
        # Of sixteen bits of colour only the upper ones stay.
        cut = 8 if (mode, depth) == ("RGB", 16) else 0
        samples[3], samples[4] = clear, clear + (1 << cut)
        declared = [(b"tRNS", struct.pack(f">{len(mode)}H", *[clear] * len(mode)))]
        expected = samples >> cut if cut else np.round(samples * 255 / (2**depth - 1))
        expected[(samples >> cut == clear >> cut).all(-1)] = 0x99
        stored_image = prepare(png_file(samples, mode, depth, chunks=declared), config(background="#999999"))
        np.testing.assert_array_equal(np.atleast_3d(stored_image.pixels), expected)


def test_tiff_in_tiles_in_planes_or_with_white_as_zero() -> None:
    samples = noise(16, 16, 3).astype(np.uint8)
    tags = {"t258": (8, 8, 8), "t262": 2, "t277": 3}
    # A tile is at least 16 pixels wide.
    tiles = [samples[:, :, :].tobytes()]
    np.testing.assert_array_equal(pixels(tiff_file(16, 16, tiles, t322=16, t323=16, **tags), size=16), samples)
    big = noise(32, 32, 3).astype(np.uint8)
    tiles = [big[top : top + 16, left : left + 16].tobytes() for top in (0, 16) for left in (0, 16)]
    np.testing.assert_array_equal(pixels(tiff_file(32, 32, tiles, t322=16, t323=16, **tags), size=32), big)
    separate = [samples[..., channel].tobytes() for channel in range(3)]
    np.testing.assert_array_equal(pixels(tiff_file(16, 16, separate, t278=16, t284=2, **tags), size=16), samples)
    for bits in (8, 16):
        grey = noise(16, 16, most=2**bits - 1)
        file = tiff_file(16, 16, [grey.astype(f"<u{bits // 8}").tobytes()], t258=bits, t262=0, t277=1, t278=16)
        np.testing.assert_array_equal(pixels(file, size=16), np.round(255 - grey * 255 / (2**bits - 1)))


def test_tiff_of_twelve_bits_keeps_its_brightness() -> None:
    values = noise(8, 8, most=4095)
    even, odd = values[:, ::2], values[:, 1::2]
    rows = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=-1).astype(np.uint8).tobytes()
    stored_pixels = pixels(tiff_file(8, 8, [rows], t258=12, t262=1, t277=1, t278=8))
    np.testing.assert_allclose(stored_pixels, values * 255 / 4095, atol=0.51)


def test_images_of_unknown_value_range_are_quarantined() -> None:
    assert "floating-point" in reason(saved(Image.new("F", (8, 8), 0.5), "TIFF"))
    assert "floating-point" in reason(Image.new("F", (8, 8), 0.5))
    assert "65535" in reason(saved(Image.new("I", (8, 8), 70_000), "TIFF"))
    planes = [bytes(128)] * 3
    assert "planes" in reason(tiff_file(8, 8, planes, t258=(16, 16, 16), t262=2, t277=3, t278=8, t284=2))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpegs_are_close_to_what_was_saved(mode: str, progressive: bool) -> None:
    image = blob(3, 16, mode)
    stored_image = prepare(saved(image, "JPEG", quality=95, subsampling=0, progressive=progressive), config(16))
    assert stored_image.mode == mode
    assert psnr(stored_image.pixels, np.asarray(image)) > 38


def test_cmyk_is_what_it_looks_like_in_jpeg_and_tiff() -> None:
    for ink, colour in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 200), (55, 55, 55)),
    ):
        image = Image.new("CMYK", (8, 8), ink)
        for file in (saved(image, "JPEG", quality=100), saved(image, "TIFF", compression="tiff_lzw")):
            np.testing.assert_allclose(pixels(file)[4, 4], colour, atol=2)


def test_ycck_jpegs_are_what_they_look_like() -> None:
    # Adobe stores inks inverted, as if their amounts were red, green and blue, in YCbCr.
    cyan, magenta, yellow, black = 40, 200, 90, 30
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    stored = (luma, (yellow - luma) / 1.772 + 128, (cyan - luma) / 1.402 + 128)
    planes = Image.new("CMYK", (16, 16), (*(255 - round(value) for value in stored), black))
    file = saved(planes, "JPEG", quality=100, subsampling=0)
    at = file.index(b"Adobe") + 11
    assert file[at] == 0
    file = file[:at] + b"\2" + file[at + 1 :]
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    np.testing.assert_allclose(pixels(file)[4, 4], expected, atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [blob(number, 8, "RGB").quantize(32).convert("RGB") for number in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(file)) as image:
        assert getattr(image, "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels(file), np.asarray(frames[0]))


# Transparency.


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    stored_image = prepare(saved(image, "PNG", **options), config(background="#ff8000"))
    assert stored_image.mode == "RGB"
    assert (stored_image.pixels == [255, 128, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_half_transparent_pixels_are_mixed_with_the_background(kind: str) -> None:
    colours, alpha = noise(8, 8, 3), noise(8, 8, 1, seed=1)
    image = Image.fromarray(np.concatenate([colours, alpha], axis=-1).astype(np.uint8))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    background = np.array([255, 128, 0])
    mixed = (colours * alpha + background * (255 - alpha)) / 255
    np.testing.assert_allclose(pixels(saved(image, kind, **options), background="#ff8000"), mixed, atol=0.51)


def test_transparent_gif_shows_the_background() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(0, (0, 0, 4, 8))
    stored_pixels = pixels(saved(image, "GIF", transparency=0), background="#0000ff")
    assert (stored_pixels[:, :4] == [0, 0, 255]).all()
    assert (stored_pixels[:, 4:] == [0, 200, 0]).all()


def test_hidden_colours_of_transparent_pixels_do_not_bleed_when_shrinking() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 33, 64))
    assert pixels(saved(clear, "PNG"), background="#ff0000")[..., 1].max() == 0


def test_grey_becomes_colour_only_over_a_visible_background() -> None:
    grey = blob(1, 16, "L").convert("LA")
    assert prepare(saved(grey, "PNG"), config(background="#ff8000")).mode == "L"
    grey.putpixel((3, 3), (9, 0))
    assert prepare(saved(grey, "PNG"), config(background="#ff8000")).mode == "RGB"
    assert prepare(saved(grey, "PNG"), config(background="#808080")).mode == "L"
    wide = saved(Image.new("L", (32, 16), 200), "PNG")
    assert (pixels(wide, fit="pad", background="#ff8000")[0] == [255, 128, 0]).all()
    assert prepare(wide, config(fit="crop", background="#ff8000")).mode == "L"


# Colour profiles.


def test_a_profile_of_rgb_is_applied() -> None:
    image = blob(5, 8, "RGB")
    stored_pixels = pixels(saved(image, "PNG", icc_profile=swapped_profile()))
    np.testing.assert_allclose(stored_pixels, np.asarray(image)[..., ::-1], atol=2)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(swapped_profile()))
    direct = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    np.testing.assert_array_equal(stored_pixels, np.asarray(direct))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_profiles_are_found_in_every_format_that_has_them(kind: str) -> None:
    image = Image.new("RGB", (8, 8), (220, 90, 20))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    stored_pixels = pixels(saved(image, kind, icc_profile=swapped_profile(), **options))
    np.testing.assert_allclose(stored_pixels[4, 4], (20, 90, 220), atol=5)


def test_profiles_reach_palettes_and_transparent_images() -> None:
    image = Image.new("RGBA", (8, 8), (220, 90, 20, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    stored_pixels = pixels(saved(image, "PNG", icc_profile=swapped_profile()), background="#aabbcc")
    np.testing.assert_allclose(stored_pixels[4, 4], (20, 90, 220), atol=2)
    assert stored_pixels[0, 0].tolist() == [0xAA, 0xBB, 0xCC]
    palette = Image.new("RGB", (8, 8), (220, 90, 20)).quantize(4)
    stored_pixels = pixels(saved(palette, "PNG", icc_profile=swapped_profile()))
    np.testing.assert_allclose(stored_pixels[4, 4], (20, 90, 220), atol=2)


def test_srgb_itself_changes_nothing() -> None:
    for mode in ("RGB", "L"):
        image = blob(6, 8, mode)
        np.testing.assert_array_equal(pixels(saved(image, "PNG", icc_profile=srgb_profile())), np.asarray(image))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_profile_of_grey_is_applied_and_grey_stays_grey(depth: int) -> None:
    samples = np.linspace(0, 2**depth - 1, 64).astype(int).reshape(8, 8, 1)
    chunk = (b"iCCP", b"grey\0\0" + zlib.compress(linear_grey_profile()))
    stored_image = prepare(png_file(samples, "L", depth, chunks=[chunk]), config())
    light = samples[..., 0] / (2**depth - 1)
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert stored_image.mode == "L"
    # Sixteen bits become eight first, which is coarse where it is dark.
    np.testing.assert_allclose(stored_image.pixels[1:], expected[1:], atol=1.5 if depth == 8 else 4)


def test_a_profile_of_a_press_is_applied() -> None:
    image = Image.new("CMYK", (8, 8))
    for column, black in enumerate(range(0, 256, 36)):
        image.paste((0, 0, 0, black), (column, 0, column + 1, 8))
    lightness = 100 * (1 - 0.6 * np.arange(0, 256, 36) / 255)
    cube = ((lightness + 16) / 116) ** 3
    light = np.where(cube > 216 / 24389, cube, lightness * 27 / 24389)
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    naive = 255 - np.arange(0, 256, 36)
    assert np.abs(expected - naive).max() > 10
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        stored_pixels = pixels(saved(image, kind, icc_profile=press_profile(), **options), mode="rgb")
        np.testing.assert_allclose(stored_pixels[4], np.stack([expected] * 3, axis=-1), atol=4)


def test_mismatched_icc_profile_is_ignored_and_a_broken_one_quarantined() -> None:
    image = blob(7, 8, "RGB")
    other = pixels(saved(image, "PNG", icc_profile=linear_grey_profile()))
    np.testing.assert_array_equal(other, np.asarray(image))
    assert "colour profile" in reason(saved(image, "PNG", icc_profile=b"no profile at all"))
    assert "over the limit" in reason(saved(image, "JPEG", icc_profile=srgb_profile() + bytes(5_000_000)))


# Orientation.

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What a viewer does with the rows and columns of a file."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    lying = blob(8, 24, "RGB").crop((0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    file = saved(lying, kind, exif=exif, **options)
    upright = UPRIGHT[orientation](np.asarray(lying))
    stored_image = prepare(file, config(8, fit="pad", enlarge=True))
    assert stored_image.source_size == (upright.shape[1], upright.shape[0])
    expected = prepare(Image.fromarray(np.ascontiguousarray(upright)), config(8, fit="pad", enlarge=True))
    np.testing.assert_allclose(stored_image.pixels.astype(int), expected.pixels, atol=3 if kind == "JPEG" else 0)


def test_sixteen_bit_images_are_turned_too() -> None:
    samples = noise(8, 8, 3, most=65535)
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    stored_pixels = pixels(png_file(samples, "RGB", 16, chunks=[(b"eXIf", exif)]))
    np.testing.assert_array_equal(stored_pixels, np.rot90(samples >> 8, -1))
