"""Which of many points lie closest to each of others, and how close, in blocks that fit into memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

NEIGHBOURS = 20
"""Closest points whose mean distance says how dense it is around one."""
BLOCK = 2**24
"""Distances that a lane has in memory at a time, 64 MiB of them."""


@dataclass(frozen=True)
class Closest:
    """Of N points the k nearest to each, the nearest first."""

    distances: Tensor
    """Euclidean, (N, k) float32."""
    rows: Tensor
    """Which they are, (N, k) int64."""

    @property
    def relative(self) -> Tensor:
        """How far the nearest is for how dense it is there, (N,) in [0, 1]: over the mean distance of all k.

        As arXiv 2301.13188 has it (section 5.1): a copy lies next to one picture, a blurred average close to many.
        """
        # Where all k are in the same place, the nearest is as near as can be.
        return (self.distances[:, 0] / self.distances.mean(1)).nan_to_num(0.0)


def closest(
    points: Tensor,
    pieces: Iterable[Tensor],
    count: int = NEIGHBOURS,
    themselves: bool = False,
    progress: Progress = silent,
) -> Closest:
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
            step = max(1, BLOCK // (len(views) * len(piece)))
            search = partial(_search, best, views, _augmented_rows(piece - centre), seen, step, themselves)
            list(pool.map(search, range(0, size, step)))
            seen += len(piece)
            progress("pictures compared with", seen, None)
    there = seen - themselves
    return Closest(best[0][:, :there].clamp(min=0).sqrt(), best[1][:, :there])


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
