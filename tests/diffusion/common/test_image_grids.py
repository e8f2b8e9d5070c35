import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.common.image_grids import MAX_TEXTS, make_captioned_grid, make_grid, png_bytes


@given(
    count=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    columns=st.integers(1, 5),
    pad=st.integers(0, 3),
    scale=st.integers(1, 3),
)
def test_every_pixel_is_found_again_in_the_grid(count: int, channels: int, columns: int, pad: int, scale: int) -> None:
    images = torch.randint(0, 256, (count, channels, 4, 6), generator=torch.Generator().manual_seed(count))
    images = images.to(torch.uint8)
    sheet = np.asarray(make_grid(images, columns, pad, scale))
    for number in range(count):
        row, column = divmod(number, columns)
        for y, x in [(0, 0), (3, 5), (2, 1)]:
            top = pad + row * (4 * scale + pad) + y * scale
            left = pad + column * (6 * scale + pad) + x * scale
            block = sheet[top : top + scale, left : left + scale].reshape(scale, scale, channels)
            assert (block == images[number, :, y, x].numpy()).all()


def test_uncovered_grid_cells_are_white() -> None:
    sheet = np.asarray(make_grid(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), columns=2, pad=2, scale=1))
    assert sheet.shape == (14, 14)
    assert (sheet[8:12, 8:12] == 255).all()
    assert (sheet[:2] == 255).all()
    assert (sheet == 0).sum() == 3 * 16


@pytest.mark.parametrize(("size", "expected"), [(8, 8), (28, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged_until_they_can_be_seen(size: int, expected: int) -> None:
    assert make_grid(torch.zeros(1, 1, size, size, dtype=torch.uint8), pad=0).size == (size * expected,) * 2


def test_png_bytes_are_lossless_and_the_same_each_time() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image = make_grid(images)
    assert png_bytes(image) == png_bytes(make_grid(images))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(image)))), np.asarray(image))


def test_each_text_has_a_row_of_its_images_after_it() -> None:
    tones = [10, 60, 110, 160, 210]
    images = [torch.full((1, 8, 8), tone, dtype=torch.uint8) for tone in tones]
    sheet = np.asarray(make_captioned_grid(images, ["cat", "dog", "cat", "dog", "cat"]))
    rows: list[list[int]] = []
    for line in sheet:
        found = [tone for tone in tones if (line == tone).sum() >= 64]
        if found and found not in rows:
            rows.append(found)
    assert rows == [[10, 110, 210], [60, 160]]
    left = min(int(np.argmax(line == 10)) for line in sheet if (line == 10).sum() >= 64)
    for half in np.array_split(sheet[:, : left - 2], 2):
        assert half.min() < 128, "no text"


@pytest.mark.parametrize("texts", [["one"] * 30, [str(number) for number in range(MAX_TEXTS + 10)]])
def test_one_text_or_many_make_a_plain_grid(texts: list[str]) -> None:
    images = torch.zeros(30, 3, 8, 8, dtype=torch.uint8)
    assert png_bytes(make_captioned_grid(images, texts)) == png_bytes(make_grid(images))


@pytest.mark.parametrize(
    "text", ["", " ", "two\nlines", "\x1b[31m\u202e", "x" * 10_000, "a word " * 2_000, "\U0001f600"]
)
def test_any_text_fits_beside_its_row(text: str) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    grid, short = make_captioned_grid(images, [text, "other"]), make_captioned_grid(images, ["a", "b"])
    assert grid.height == short.height
    assert short.width <= grid.width < short.width + 200


def test_characters_that_the_font_lacks_are_escaped() -> None:
    images = [torch.zeros((3, 32, 32), dtype=torch.uint8)] * 2
    assert png_bytes(make_captioned_grid(images, ["猫", "Straße ψ"])) == png_bytes(
        make_captioned_grid(images, [r"\u732b", "Straße ψ"])
    )
    assert png_bytes(make_captioned_grid(images, ["ß", "ψ"])) != png_bytes(
        make_captioned_grid(images, [r"\xdf", r"\u03c8"])
    )
