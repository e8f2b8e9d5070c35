"""PNGs of stored images: written once, read by everybody, decoded many at a time."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torchvision
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from diffusion.data.png import decode_many, encode
from tests.builders.image_files import noise, png_file, png_of_chunks, saved

SIDES = st.integers(1, 9)
PIXELS = st.one_of(
    st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays.arrays(np.uint8, shape)),
    st.tuples(SIDES, SIDES, st.just(3)).flatmap(lambda shape: arrays.arrays(np.uint8, shape)),
)


def smooth(size: int, mode: str) -> np.ndarray:
    """Where each of the filters that are used is the best for some rows."""
    small = Image.fromarray(noise(4, 4, 3, seed=size).astype(np.uint8))
    pixels = np.array(small.resize((size, size), Image.Resampling.BICUBIC).convert(mode))
    pixels[size // 2] = np.where(np.arange(size) % 2, 255, 0).reshape(size, *(1,) * (pixels.ndim - 2))
    return pixels


def planes(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (C, H, W)."""
    return np.atleast_3d(pixels).transpose(2, 0, 1)


@given(PIXELS)
@settings(deadline=None)
def test_every_image_comes_back_as_it_was(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_many([encode(pixels)], planes(pixels).shape)[0], planes(pixels))


@given(PIXELS)
@settings(deadline=None)
def test_pillow_torchvision_and_webdataset_read_what_we_write(pixels: np.ndarray) -> None:
    png = encode(pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)
    decoded_image = torchvision.io.decode_png(torch.frombuffer(bytearray(png), dtype=torch.uint8))
    np.testing.assert_array_equal(decoded_image.numpy(), planes(pixels))
    handler = webdataset.imagehandler("rgb8" if pixels.ndim == 3 else "l8")
    np.testing.assert_array_equal(handler("png", png), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_rows_are_filtered_adaptively(mode: str) -> None:
    pixels = smooth(32, mode)
    png = encode(pixels)
    rows = zlib.decompress(png[41:-16])
    assert set(rows[:: len(rows) // 32]) == {0, 1, 2}
    assert len(png) < 0.8 * len(zlib.compress(pixels))


def test_many_of_any_kind_are_decoded_in_order() -> None:
    ours = [encode(smooth(24, "RGB")[:, ::step]) for step in (1, -1)]
    strangers = [saved(Image.fromarray(smooth(24, "RGB")[::-1]), "PNG")]
    grey = [encode(smooth(24, "L"))]
    pngs = [*ours, *strangers, *grey, *(encode(noise(24, 24, 3, seed=seed).astype(np.uint8)) for seed in range(900))]
    decoded = decode_many([memoryview(png) for png in pngs], (3, 24, 24))
    for png, pixels in zip(pngs, decoded, strict=True):
        np.testing.assert_array_equal(pixels, planes(np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))))


def test_grey_is_repeated_where_there_are_three_channels() -> None:
    pixels = smooth(16, "L")
    pngs = [encode(pixels), saved(Image.fromarray(pixels), "PNG")]
    for decoded in decode_many(pngs, (3, 16, 16)):
        np.testing.assert_array_equal(decoded, [pixels] * 3)


def test_decoding_no_images_gives_an_empty_array() -> None:
    assert decode_many([], (3, 4, 5)).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 3, 2, 1, 0)])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_filter_is_undone_interlaced_or_not(mode: str, interlaced: bool, filters: tuple[int, ...]) -> None:
    samples = noise(11, 7, len(mode))
    png = png_file(samples, mode, filters=filters, interlaced=interlaced)
    np.testing.assert_array_equal(decode_many([png], (len(mode), 11, 7))[0], samples.transpose(2, 0, 1))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_every_depth_of_grey_becomes_eight_bits(depth: int, interlaced: bool) -> None:
    samples = noise(9, 13, 1, most=2**depth - 1)
    decoded = decode_many([png_file(samples, "L", depth, interlaced=interlaced)], (1, 9, 13))[0]
    np.testing.assert_array_equal(decoded[0], np.round(samples[..., 0] * 255 / (2**depth - 1)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_are_looked_up(depth: int) -> None:
    samples, palette = noise(6, 5, 1, most=2**depth - 1), noise(2**depth, 3, seed=1)
    png = png_file(samples, "P", depth, chunks=[(b"PLTE", palette.astype(np.uint8).tobytes())])
    np.testing.assert_array_equal(decode_many([png], (3, 6, 5))[0], palette[samples[..., 0]].transpose(2, 0, 1))


def test_rows_may_lie_in_several_chunks_behind_others() -> None:
    samples = noise(12, 12, 3)
    png = png_file(samples, "RGB", chunks=[(b"tEXt", b"Comment\0hello")], pieces=5)
    np.testing.assert_array_equal(decode_many([png], (3, 12, 12))[0], samples.transpose(2, 0, 1))


def test_another_shape_is_an_error_that_names_both() -> None:
    for png in (encode(smooth(16, "RGB")), saved(Image.new("RGB", (16, 16)), "PNG")):
        with pytest.raises(ValueError, match="16×16 pixels instead of 8×16"):
            decode_many([png], (3, 16, 8))
    with pytest.raises(ValueError, match="colours"):
        decode_many([encode(smooth(16, "RGB"))], (1, 16, 16))


def test_damage_anywhere_is_an_error_never_another_image() -> None:
    pixels = smooth(16, "L")
    png = encode(pixels)
    with pytest.raises(ValueError, match="not a PNG"):
        decode_many([b"GIF89a"], (1, 16, 16))
    for at in range(len(png)):
        for damaged_png in (png[:at], png[:at] + bytes([png[at] ^ 0x41]) + png[at + 1 :]):
            try:
                decoded = decode_many([damaged_png], (1, 16, 16))[0, 0]
            except ValueError as error:
                assert str(error)  # noqa: PT017 (either way out is right)
            else:
                np.testing.assert_array_equal(decoded, pixels)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_decode_to_an_image_or_raise_value_error(data: bytes) -> None:
    head = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    for png in (
        data,
        png_of_chunks([(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]),
        encode(noise(4, 4))[:33] + data,
    ):
        with pytest.raises(ValueError, match=r"\w"):
            decode_many([png], (1, 4, 4))


def test_a_bomb_takes_no_more_memory_than_its_shape() -> None:
    head = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    bomb = png_of_chunks([(b"IHDR", head), (b"IDAT", zlib.compress(bytes(2**25))), (b"IEND", b"")])
    declared = png_of_chunks([(b"IHDR", struct.pack(">IIBBBBB", 2**15, 2**15, 8, 0, 0, 0, 0)), (b"IEND", b"")])
    with pytest.raises(ValueError, match="32768×32768"):
        decode_many([declared], (1, 16, 16))
    tracemalloc.start()
    try:
        decode_many([bomb], (1, 16, 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**21
