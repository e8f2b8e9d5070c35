"""Pictures of a data set to be looked at, chosen by seed and reduced to what a page needs."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.data.dataset import Dataset, Rows
from diffusion.grids import grid, png_bytes
from diffusion.random import permutation

SAMPLE = 2000
"""Pictures that the mean is taken of, at most."""
CLASS_SAMPLE = 200
"""The same of a class."""
SIDE = 64
"""Height and width, in pixels, to which larger pictures are reduced."""
PIECE_BYTES = 2**26
"""Of pictures at their full size, held at a time."""
SHEET = 64
"""Pictures on the sheet of a set without classes, and on those of its few classes together."""
CLASSES = 12
"""Classes of which samples are shown, the largest ones."""
PER_CLASS = 8
"""Pictures of a class, at least, if it has as many."""
CLASS_MEANS = 10
CAPTIONS = 8


@dataclass(frozen=True)
class Plate:
    """A picture file with what stands under it."""

    title: str
    count: int
    """Pictures that it shows or stands for."""
    png: bytes


@dataclass(frozen=True)
class Gallery:
    """What a page shows of a data set."""

    sampled: int
    """Pictures behind the means."""
    mean: bytes
    class_means: list[Plate]
    sheet: Plate | None
    """If not all pictures have a class."""
    classes: list[Plate]
    captions: list[Plate]


def gallery(dataset: Dataset, captioned: bool) -> Gallery:
    """Pictures of ``dataset``; ``captioned``: whether any of them has a caption."""
    counts = Counter(dataset.manifest.class_histogram)
    classes = [name for name, _ in counts.most_common(CLASSES)]
    order = permutation(0, "dataset report/sample", 0, len(dataset))
    sample = order[:SAMPLE]
    pictures = thumbnails(dataset, sample)
    told = enumerate(dataset.captions(sample) if captioned else ())
    captions = (Plate(caption, 1, sheet(pictures[number : number + 1], 1)) for number, caption in told if caption)
    shown = pictures[:SHEET]
    return Gallery(
        sampled=len(sample),
        mean=sheet(_mean(pictures), 1),
        class_means=_class_means(dataset, order, classes[:CLASS_MEANS]),
        sheet=None if counts.total() == len(dataset) else Plate("", len(shown), sheet(shown, 2 * PER_CLASS)),
        classes=_class_samples(dataset, order, classes),
        captions=list(islice(captions, CAPTIONS)),
    )


def pieces(dataset: Dataset, rows: Rows) -> Iterator[Tensor]:
    """The pictures in ``rows``, some at a time: (n, C, H, W) uint8."""
    step = max(1, PIECE_BYTES // math.prod(dataset.shape))
    for start in range(0, len(rows), step):
        yield dataset.pictures(rows[start : start + step])


def thumbnails(dataset: Dataset, rows: Rows) -> Tensor:
    """The pictures in ``rows``, the large ones reduced: (len(rows), C, h, w) uint8, h and w at most SIDE."""
    reduced = [_reduced(piece) for piece in pieces(dataset, rows)]
    return torch.cat(reduced)


def sheet(pictures: Tensor, columns: int) -> bytes:
    """``pictures``, (n, C, H, W) uint8, side by side as a PNG file."""
    return png_bytes(grid(pictures, columns, pad=0 if len(pictures) == 1 else 2))


def _reduced(pictures: Tensor) -> Tensor:
    if pictures.shape[-1] <= SIDE:
        return pictures
    return interpolate(pictures.float(), (SIDE, SIDE), mode="area").round().to(torch.uint8)


def _mean(pictures: Tensor) -> Tensor:
    return pictures.double().mean(0, keepdim=True).round().to(torch.uint8)


def _class_means(dataset: Dataset, order: np.ndarray, classes: Sequence[str]) -> list[Plate]:
    """Means over the first pictures of each class in a given order of the rows."""
    numbers = dataset.classes(order, classes).numpy()
    rows = [(name, order[numbers == number][:CLASS_SAMPLE]) for number, name in enumerate(classes)]
    return [Plate(name, len(each), sheet(_mean(thumbnails(dataset, each)), 1)) for name, each in rows]


def _class_samples(dataset: Dataset, order: np.ndarray, classes: Sequence[str]) -> list[Plate]:
    """The first pictures of each class in a given order of the rows: the more, the fewer classes there are."""
    numbers = dataset.classes(order, classes).numpy()
    counts = dataset.manifest.class_histogram
    most = PER_CLASS * max(1, SHEET // (PER_CLASS * max(1, len(classes))))
    rows = [(name, order[numbers == number][:most]) for number, name in enumerate(classes)]
    return [Plate(name, counts[name], sheet(thumbnails(dataset, each), PER_CLASS)) for name, each in rows]
