"""Nearest neighbours among features in blocks of bounded size, and precision, recall, density and coverage by them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffusion.common.progress import Progress, silent
from diffusion.common.threads import lanes

BLOCK = 2048
"""Rows and columns of distances held at a time in each lane: 16 MiB, from cores' caches mostly."""
MANIFOLD_NEIGHBOURS = 3
"""k of the neighbourhoods of precision and recall, as in arXiv 1904.06991."""
DENSITY_NEIGHBOURS = 5
"""k of those of density and coverage, as in arXiv 2002.09797."""
NEIGHBOURS = max(MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS)
"""Nearest others of each feature that are worth knowing."""


@dataclass(frozen=True)
class Overlap:
    """How much of two sets lies among the other one."""

    precision: float
    """Share of the samples nearer to some reference than its 3rd nearest other reference is, or as near."""
    recall: float
    """Share of the reference nearer to some sample than its 3rd nearest other sample is, or as near."""
    density: float
    """Reference neighbourhoods (to the 5th nearest) that a sample lies in, a fifth of their mean number."""
    coverage: float
    """Share of the reference that has a sample nearer than its 5th nearest other reference."""


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x − y|² between rows (n, D) and rows (m, D): (n, m), at least 0.

    Through products, so its error is that of |x|² and |y|²: centre them before.
    """
    crossed = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return crossed.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest_distances(features: Tensor, count: int = NEIGHBOURS, progress: Progress = silent) -> Tensor:
    """Squared distances of each of the features (N, D) to the ``count`` nearest others: (N, count), ascending.

    N must be above ``count``. Takes N²·D products: 60,000 of 1,280 a minute and a half on two cores.
    """
    centre = features.mean(0)

    def of_block(start: int) -> Tensor:
        rows = features[start : start + BLOCK] - centre
        found = rows.new_full((len(rows), count), math.inf)
        for at, others in _blocks(features, centre):
            distances = squared_distances(rows, others)
            if at == start:
                distances.fill_diagonal_(math.inf)
            close = distances.topk(min(count, len(others)), largest=False).values
            found = torch.cat([found, close], 1).topk(count, largest=False).values
        return found

    pieces: list[Tensor] = []
    with lanes() as pool:
        for piece in pool.map(of_block, range(0, len(features), BLOCK)):
            pieces.append(piece)
            progress("neighbours of real images", sum(map(len, pieces)), len(features))
    return torch.cat(pieces)


def compute_overlap(samples: Tensor, reference: Tensor, near_samples: Tensor, near_reference: Tensor) -> Overlap:
    """Of features (N, D) of samples and (M, D) of a reference, each with what ``nearest_distances`` says of it.

    Precision and recall as in arXiv 1904.06991, density and coverage as in arXiv 2002.09797.
    """
    centre = reference.mean(0)
    of_samples = near_samples[:, MANIFOLD_NEIGHBOURS - 1]
    of_reference, wider = near_reference[:, MANIFOLD_NEIGHBOURS - 1, None], near_reference[:, DENSITY_NEIGHBOURS - 1]

    def of_block(start: int) -> tuple[Tensor, Tensor, int, int]:
        block = slice(start, start + BLOCK)
        rows = reference[block] - centre
        closest = rows.new_full((len(rows),), math.inf)
        among = torch.zeros(len(rows), dtype=torch.bool)
        lying, pairs = torch.zeros(len(samples), dtype=torch.bool), 0
        for at, generated in _blocks(samples, centre):
            columns = slice(at, at + len(generated))
            distances = squared_distances(rows, generated)
            lying[columns] = (distances <= of_reference[block]).any(0)
            among |= (distances <= of_samples[columns]).any(1)
            pairs += int((distances < wider[block, None]).sum())
            closest = torch.minimum(closest, distances.amin(1))
        return lying, among, pairs, int((closest < wider[block]).sum())

    with lanes() as pool:
        blocks = list(pool.map(of_block, range(0, len(reference), BLOCK)))
    lying, among, pairs, covered = zip(*blocks, strict=True)
    return Overlap(
        precision=torch.stack(lying).any(0).double().mean().item(),
        recall=torch.cat(among).double().mean().item(),
        density=sum(pairs) / (DENSITY_NEIGHBOURS * len(samples)),
        coverage=sum(covered) / len(reference),
    )


def _blocks(features: Tensor, centre: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of features (N, D) moved by ``centre``, each with the number of its first row."""
    for start in range(0, len(features), BLOCK):
        yield start, features[start : start + BLOCK] - centre


COPY_NEIGHBOURS = 20
"""NearestNeighbours points whose mean distance says how dense it is around one."""
BLOCK_DISTANCES = 2**24
"""Distances that a lane has in memory at a time, 64 MiB of them."""


@dataclass(frozen=True)
class NearestNeighbours:
    """Of N points the k nearest to each, the nearest first."""

    distances: Tensor
    """Euclidean, (N, k) float32."""
    rows: Tensor
    """Which they are, (N, k) int64."""

    @property
    def relative(self) -> Tensor:
        """How far the nearest is for how dense it is there, (N,) in [0, 1]: over the mean distance of all k.

        As arXiv 2301.13188 has it (section 5.1): a copy lies next to one image, a blurred average close to many.
        """
        # Where all k are in the same place, the nearest is as near as can be.
        return (self.distances[:, 0] / self.distances.mean(1)).nan_to_num(0.0)


def find_nearest(
    points: Tensor,
    pieces: Iterable[Tensor],
    count: int = COPY_NEIGHBOURS,
    themselves: bool = False,
    progress: Progress = silent,
) -> NearestNeighbours:
    """The ``count`` nearest, or as many as there are, to each of ``points`` among the rows of all ``pieces``.

    Points are (N, D) float32, or in several views (V, N, D), of which the nearest counts; pieces (B, D) float32.
    ``themselves``: the rows are the points (their first view), none of which is its own neighbour. A distance is right
    to about a thousandth of a row's length: it comes of products of float32, which are what is fast.
    """
    # About a common centre numbers are smaller, and so is what rounding takes from their differences.
    centre = points.mean(tuple(range(points.ndim - 1)))
    views = _augmented((points if points.ndim == 3 else points[None]) - centre)
    size, seen = views.shape[1], 0
    best = torch.full((size, count), math.inf), torch.full((size, count), -1)
    with lanes() as pool:
        for piece in pieces:
            step = max(1, BLOCK_DISTANCES // (len(views) * len(piece)))
            search = partial(_search, best, views, _augmented_rows(piece - centre), seen, step, themselves)
            list(pool.map(search, range(0, size, step)))
            seen += len(piece)
            progress("images compared with", seen, None)
    there = seen - themselves
    return NearestNeighbours(best[0][:, :there].clamp(min=0).sqrt(), best[1][:, :there])


def _search(
    best: tuple[Tensor, Tensor], views: Tensor, rows: Tensor, first: int, step: int, themselves: bool, start: int
) -> None:
    """Let ``rows``, number ``first`` and on, into the ``best`` of ``step`` points from number ``start`` on."""
    here = slice(start, start + step)
    squares = (views[:, here] @ rows.T).amin(0)
    if themselves:
        squares.diagonal(start - first).fill_(math.inf)
    values, places = squares.topk(min(best[0].shape[1], len(rows)), largest=False)
    both = torch.cat([best[0][here], values], 1), torch.cat([best[1][here], places + first], 1)
    values, order = both[0].topk(best[0].shape[1], largest=False)
    best[0][here], best[1][here] = values, both[1].gather(1, order)


def _augmented(points: Tensor) -> Tensor:
    """(…, D) to (…, D + 2), whose products with augmented rows are squared distances: |x|² − 2 x·y + |y|²."""
    return torch.cat([-2 * points, points.square().sum(-1, keepdim=True), torch.ones_like(points[..., :1])], -1)


def _augmented_rows(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1]), rows.square().sum(1, keepdim=True)], 1)
