"""Pictures so small that a copy lies beside its original, though it was compressed, grainy or a little shifted."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

SIDE = 8
"""Height and width of a thumbnail, in pixels; of smaller pictures their own. Measured on 28×28 scans and photographs of
clothes: larger ones find no more copies, and fewer that were blurred."""
SHIFTS = range(3)
"""Places at which the picture is cut out of one that is a pixel larger on each side."""
NAME = "pixels"
"""Of the space that they lie in."""


def thumbnails(pictures: Tensor) -> Tensor:
    """``pictures``, (N, C, H, W) uint8, averaged to SIDE × SIDE or less: (N, D) float32 in [0, 1]."""
    return _small(pictures.float() / 255)


def moved(pictures: Tensor, mirrored: bool = False) -> Tensor:
    """Thumbnails of ``pictures``, (N, C, H, W) uint8, as they are and moved by a pixel to all sides: (V, N, D) float32.

    The first view is the picture as it is. Edges are repeated. ``mirrored``: the same of the mirrored ones, for models
    that were trained on those as well.
    """
    height, width = pictures.shape[-2:]
    larger = pad(pictures.float() / 255, (1, 1, 1, 1), mode="replicate")
    places = sorted(((top, left) for top in SHIFTS for left in SHIFTS), key=lambda place: place != (1, 1))
    views = [_small(larger[..., top : top + height, left : left + width]) for top, left in places]
    if mirrored:
        views += list(moved(pictures.flip(3)))
    return torch.stack(views)


def _small(pictures: Tensor) -> Tensor:
    side = min(SIDE, *pictures.shape[-2:])
    return adaptive_avg_pool2d(pictures, (side, side)).flatten(1)
