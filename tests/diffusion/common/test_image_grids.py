import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.common.image_grids import make_grid, png_bytes


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
