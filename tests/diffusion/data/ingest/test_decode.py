"""One image in: each policy, each limit, and a reason for whatever is refused."""

import io
import re
import struct
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps

from diffusion.data.ingest.decode import StoredImage, UnusableEntryError, prepare
from diffusion.data.png import decode_many
from tests.builders.image_files import (
    config,
    noise,
    pixels,
    png_file,
    png_of_chunks,
    press_profile,
    psnr,
    reason,
    saved,
    srgb_profile,
    swapped_profile,
    tiff_file,
)
from tests.builders.shapes import blob

UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an image is turned to be stored with each orientation."""

# Sizes and modes.


def test_crop_takes_unscaled_pixels_of_the_middle() -> None:
    for shape in ((8, 15, 3), (15, 8, 3), (8, 14, 3)):
        values = noise(*shape).astype(np.uint8)
        top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
        stored_pixels = pixels(saved(Image.fromarray(values), "PNG"))
        np.testing.assert_array_equal(stored_pixels, values[top : top + 8, left : left + 8])


def test_pad_keeps_the_whole_image_in_the_middle() -> None:
    wide = saved(Image.new("RGB", (32, 16), (200, 100, 50)), "PNG")
    stored_pixels = pixels(wide, size=16, fit="pad", background="#010203")
    assert (stored_pixels[:4] == [1, 2, 3]).all()
    assert (stored_pixels[4:12] == [200, 100, 50]).all()
    assert (stored_pixels[12:] == [1, 2, 3]).all()
    needle = saved(Image.new("RGB", (300, 1), (200, 100, 50)), "PNG")
    assert (pixels(needle, size=16, fit="pad") == [200, 100, 50]).any()


def test_squash_distorts_to_the_whole_square() -> None:
    values = np.zeros((16, 64, 3), np.uint8)
    values[:, :32] = 255
    stored_pixels = pixels(saved(Image.fromarray(values), "PNG"), fit="squash")
    assert (stored_pixels[:, 0] == 255).all()
    assert (stored_pixels[:, -1] == 0).all()
    assert (pixels(saved(Image.fromarray(values), "PNG"), fit="crop")[:, 0] == 255).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_images_are_not_enlarged_unless_configured(fit: str) -> None:
    thin, small = Image.new("L", (20, 6)), Image.new("L", (7, 6))
    for image in (thin, small):
        file = saved(image, "PNG")
        if image is thin and fit == "pad":
            assert prepare(file, config(fit=fit)).mode == "L"
        else:
            side = "longer" if fit == "pad" else "shorter"
            assert f"{image.width}×{image.height} pixels: the {side} side is under size = 8" in reason(file, fit=fit)
        assert prepare(file, config(fit=fit, enlarge=True)).pixels.shape == (8, 8)


def test_images_below_the_minimum_size_are_quarantined() -> None:
    file = saved(Image.new("L", (30, 19)), "PNG")
    assert "min_size = 20" in reason(file, min_size=20)
    assert prepare(file, config(min_size=19)).source_size == (30, 19)


def test_modes_keep_or_force_the_channels() -> None:
    colour, grey = blob(9, 8, "RGB"), blob(9, 8, "L")
    for image, mode, expected in (
        (colour, "keep", "RGB"),
        (grey, "keep", "L"),
        (colour, "grey", "L"),
        (grey, "rgb", "RGB"),
    ):
        stored_image = prepare(saved(image, "PNG"), config(mode=mode))
        assert stored_image.mode == expected
        np.testing.assert_array_equal(stored_image.pixels, np.asarray(image.convert(expected)))


def test_a_grey_image_has_one_key_however_it_was_saved() -> None:
    grey = blob(9, 8, "L")
    stored_image = [prepare(saved(grey.convert(mode), "PNG"), config()) for mode in ("L", "LA", "RGB", "RGBA", "P")]
    assert {each.key for each in stored_image} == {stored_image[0].key}
    assert {each.mode for each in stored_image} == {"L"}
    assert prepare(saved(grey.convert("RGB"), "PNG"), config(mode="rgb")).mode == "RGB"


def test_reduced_jpeg_decoding_matches_full_decoding() -> None:
    for number, (width, height) in enumerate([(512, 512), (501, 377), (333, 640), (1023, 767)]):
        fine = Image.effect_noise((width, height), 40).convert("RGB")
        image = ImageChops.overlay(blob(number, 640, "RGB").resize((width, height)), fine)
        file = saved(image, "JPEG", quality=90)
        whole = ImageOps.fit(Image.open(io.BytesIO(file)).convert("RGB"), (64, 64), Image.Resampling.BICUBIC)
        assert psnr(pixels(file, size=64), np.asarray(whole)) > 42


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_jpegs_are_decoded_as_upright_ones(orientation: int) -> None:
    upright = blob(3, 24, "RGB").resize((1001, 803), Image.Resampling.BICUBIC)
    turned = upright.transpose(UNDONE[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(turned, "JPEG", quality=95, exif=exif)
    whole = ImageOps.fit(upright, (64, 64), Image.Resampling.BICUBIC)
    assert psnr(pixels(file, size=64), np.asarray(whole)) > 42


def test_decoded_images_are_prepared_like_files() -> None:
    for mode in ("L", "RGB", "RGBA", "P", "1", "CMYK", "I;16"):
        image = (
            Image.fromarray(noise(12, 10, most=65535).astype(np.uint16))
            if mode == "I;16"
            else blob(4, 12, "RGB").convert(mode)
        )
        before = image.tobytes()
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert prepare(image, config()).key == prepare(saved(image, kind), config()).key
        assert image.tobytes() == before
    assert "enlarge" in reason(Image.new("L", (4, 4)))
    assert "over the limit of 100" in reason(Image.new("L", (20, 20)), max_pixels=100)


def test_key_is_the_digest_of_the_pixels_in_the_png() -> None:
    stored_image = prepare(saved(blob(1, 12, "RGB"), "PNG"), config())
    np.testing.assert_array_equal(decode_many([stored_image.png], (3, 8, 8))[0].transpose(1, 2, 0), stored_image.pixels)
    again = [prepare(stored_image.png, config()), prepare(saved(Image.fromarray(stored_image.pixels), "BMP"), config())]
    assert {each.key for each in again} == {stored_image.key}
    assert prepare(saved(blob(2, 12, "RGB"), "PNG"), config()).key != stored_image.key
    black = [
        prepare(saved(Image.new("L", (size, size)), "PNG"), config(size, mode=mode))
        for size, mode in ((16, "keep"), (16, "rgb"), (8, "keep"))
    ]
    assert len({each.key for each in black}) == 3


def test_threads_and_processes_decode_an_image_identically() -> None:
    files = [saved(blob(number, 150, "RGB"), "JPEG", icc_profile=swapped_profile()) for number in range(12)]
    alone = [prepare(file, config(16)) for file in files]
    for pool in (ThreadPoolExecutor(4), ProcessPoolExecutor(1)):
        with pool:
            images: list[StoredImage] = list(pool.map(prepare, files, [config(16)] * len(files)))
        assert [(each.key, each.png) for each in images] == [(each.key, each.png) for each in alone]


# Limits, damage and malice.


def rle_bitmap(side: int) -> bytes:
    """A BMP of run-length coded pixels, which take long to decode: each is a run of its own."""
    runs = (b"\1\7" * side + b"\0\0") * side
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + bytes(1024) + runs


def test_image_is_quarantined_after_the_decoding_timeout() -> None:
    slow = rle_bitmap(2000)
    assert prepare(rle_bitmap(100), config()).source_size == (100, 100)
    start = time.thread_time()
    assert "more than 0.1 seconds" in reason(slow, max_seconds=0.1)
    assert time.thread_time() - start < 0.5


def test_images_over_the_byte_or_pixel_limit_are_quarantined_undecoded() -> None:
    file = saved(blob(1, 64, "RGB"), "BMP")
    assert f"{len(file)} bytes" in reason(file, max_bytes=len(file) - 1)
    assert prepare(file, config(max_bytes=len(file))).source_size == (64, 64)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert "64×64 pixels are over the limit of 4095" in reason(saved(blob(1, 64, "RGB"), kind), max_pixels=4095)
        assert prepare(saved(blob(1, 64, "RGB"), kind), config(max_pixels=4096)).source_size == (64, 64)


def test_decompression_bombs_are_quarantined() -> None:
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    bomb = png_of_chunks([(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")])
    assert "20000×20000 pixels are over the limit" in reason(bomb)
    moving = bytearray(saved(blob(1, 8, "RGB"), "WEBP", save_all=True, append_images=[blob(2, 8, "RGB")]))
    moving[24:30] = (16_382).to_bytes(3, "little") * 2
    # Pillow 13 refuses it by itself, before its size is known.
    assert re.search("more pixels than the limit|16383×16383 pixels are over the limit", reason(bytes(moving)))
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22)))
    assert "damaged" in reason(png_file(noise(8, 8, 1), "L", chunks=[text]))
    profile = (b"iCCP", b"grey\0\0" + zlib.compress(bytes(2**22)))
    assert "damaged" in reason(png_file(noise(8, 8, 1), "L", chunks=[profile]))


def test_pages_that_name_themselves_end_the_file() -> None:
    file = bytearray(saved(blob(1, 8, "L"), "TIFF"))
    directory = struct.unpack_from("<I", file, 4)[0]
    following = directory + 2 + 12 * struct.unpack_from("<H", file, directory)[0]
    struct.pack_into("<I", file, following, directory)
    np.testing.assert_array_equal(pixels(bytes(file)), np.asarray(blob(1, 8, "L")))


def test_unknown_formats_are_quarantined_with_the_known_formats_named() -> None:
    for data in (b"", b"not an image", b"%PDF-1.4", saved(blob(1, 8, "RGB"), "PPM"), saved(blob(1, 8, "RGB"), "ICO")):
        assert reason(data) == "not an image in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_image_file_is_quarantined(kind: str) -> None:
    whole = saved(blob(1, 64, "RGB"), kind)
    for part in (0.3, 0.5, 0.9):
        assert reason(whole[: int(part * len(whole))], size=16)


def test_png_with_a_wrong_checksum_is_quarantined() -> None:
    whole = bytearray(saved(Image.fromarray(noise(32, 32, 3).astype(np.uint8)), "PNG"))
    whole[len(whole) // 2] ^= 1
    assert "damaged" in reason(bytes(whole))


def samples() -> list[bytes]:
    """Small files of all kinds, for hypothesis to damage."""
    colour, grey = blob(1, 24, "RGB"), blob(1, 24, "L")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [saved(colour, kind, exif=exif, icc_profile=srgb_profile()) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [saved(colour, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    files += [saved(grey, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF")]
    files += [
        saved(colour, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    files += [
        saved(colour.convert("CMYK"), "JPEG", icc_profile=press_profile()),
        saved(colour, "JPEG", progressive=True),
    ]
    files += [saved(colour.convert("RGBA"), kind) for kind in ("PNG", "WEBP", "TIFF")]
    files += [
        saved(colour.convert("RGBA"), "WEBP", lossless=True),
        saved(grey.convert("1"), "TIFF", compression="group4"),
    ]
    files += [
        saved(colour, kind, save_all=True, append_images=[grey.convert("RGB")]) for kind in ("PNG", "WEBP", "GIF")
    ]
    files += [png_file(noise(9, 9, len(mode), most=65535), mode, 16) for mode in ("L", "LA", "RGB", "RGBA")]
    files += [
        rle_bitmap(9),
        png_file(noise(9, 9, 1, most=3), "P", 2, chunks=[(b"PLTE", bytes(12)), (b"tRNS", b"\0\\9")]),
    ]
    files += [tiff_file(8, 8, [noise(8, 8, 3).astype("<u2").tobytes()], t258=(16,) * 3, t262=2, t277=3, t278=8)]
    return files


DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=6)), min_size=1, max_size=4)
"""Where, how many bytes go, and which take their place."""


def damaged(whole: bytes, places: list[tuple[float, int, bytes]]) -> bytes:
    for place, byte_count, instead in places:
        at = int(place * len(whole))
        whole = whole[:at] + instead + whole[at + byte_count :]
    return whole


def checksummed(png: bytes) -> bytes:
    """``png`` with right checksums, without which a decoder would look no further."""
    chunks, at = [], 8
    while at + 8 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        chunks.append((kind, png[at + 8 : at + 8 + size]))
        at += 12 + size
    return png_of_chunks(chunks)


@given(
    whole=st.deferred(lambda: st.sampled_from(samples())),
    places=DAMAGE,
    cut=st.floats(0.5, 1.5),
    fit=st.sampled_from(["crop", "pad", "squash"]),
)
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_decode_or_are_quarantined_but_never_crash(
    whole: bytes, places: list[tuple[float, int, bytes]], cut: float, fit: str
) -> None:
    data = damaged(whole, places)
    data = data[: int(cut * len(data))]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        data = checksummed(data)
    try:
        stored_image = prepare(data, config(enlarge=True, fit=fit, max_pixels=10_000))
    except UnusableEntryError as refusal:
        assert 0 < len(str(refusal)) < 200  # noqa: PT017 (either way out is right)
        assert str(refusal).isprintable()  # noqa: PT017
    else:
        assert stored_image.pixels.shape[:2] == (8, 8)
