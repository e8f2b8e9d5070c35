"""Nearest neighbours of features in blocks of bounded size; precision, recall, density and coverage from them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads

BLOCK = 2048
"""Rows and columns of distances held at a time per worker thread: 16 MiB, mostly in the cores' caches."""
MANIFOLD_NEIGHBOURS = 3
"""k of the neighbourhoods of precision and recall, as in arXiv 1904.06991."""
DENSITY_NEIGHBOURS = 5
"""k of those of density and coverage, as in arXiv 2002.09797."""


T = TypeVar("T")


def map_blocks(
    work: Callable[[int], T], count: int, block: int = 1, what: str = "", progress: Progress = ignore_progress
) -> Iterator[T]:
    """Yield ``work(start)`` of each ``block`` of ``count`` rows, in order, computed by worker threads."""
    starts = range(0, count, block)
    with worker_threads() as pool:
        for start, result in zip(starts, pool.map(work, starts), strict=True):
            yield result
            progress(what, min(start + block, count), count)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x − y|² of rows (n, D) and (m, D): (n, m), at least 0; centre them, as errors are relative to |x|²."""
    return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest_distances(features: Tensor, progress: Progress = ignore_progress) -> Tensor:
    """Compute squared distances of features (N, D) to their 5 nearest others: (N, 5), ascending; N at least 6."""
    centre, count = features.mean(0), DENSITY_NEIGHBOURS

    def compute_block(start: int) -> Tensor:
        rows = features[start : start + BLOCK] - centre
        nearest = rows.new_full((len(rows), count), math.inf)
        for column, others in _blocks(features, centre):
            distances = squared_distances(rows, others)
            if column == start:
                distances.fill_diagonal_(math.inf)
            block_nearest = distances.topk(min(count, len(others)), largest=False).values
            nearest = torch.cat([nearest, block_nearest], 1).topk(count, largest=False).values
        return nearest

    return torch.cat([*map_blocks(compute_block, len(features), BLOCK, "neighbours of real images", progress)])


def compute_overlap(
    samples: Tensor, reference: Tensor, near_samples: Tensor, near_reference: Tensor
) -> dict[str, float]:
    """Compare features (N, D) of samples and (M, D) of a reference, each with its ``nearest_distances``.

    Returns precision and recall (arXiv 1904.06991, k = 3), density and coverage (arXiv 2002.09797, k = 5) by name.
    """
    centre = reference.mean(0)
    sample_radii = near_samples[:, MANIFOLD_NEIGHBOURS - 1]
    reference_radii, wide_radii = (near_reference[:, k - 1, None] for k in (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS))

    def compare_block(start: int) -> tuple[Tensor, Tensor, int, int]:
        block = slice(start, start + BLOCK)
        rows = reference[block] - centre
        recall_mask, coverage_mask = torch.zeros(2, len(rows), dtype=torch.bool)
        precision_mask, pairs = torch.zeros(len(samples), dtype=torch.bool), 0
        for offset, generated in _blocks(samples, centre):
            columns = slice(offset, offset + len(generated))
            distances = squared_distances(rows, generated)
            precision_mask[columns] = (distances <= reference_radii[block]).any(0)
            recall_mask |= (distances <= sample_radii[columns]).any(1)
            in_radius = distances < wide_radii[block]
            pairs += int(in_radius.sum())
            coverage_mask |= in_radius.any(1)
        return precision_mask, recall_mask, pairs, int(coverage_mask.sum())

    precision, recall, pairs, coverage = zip(*map_blocks(compare_block, len(reference), BLOCK), strict=True)
    return {
        "precision": torch.stack(precision).any(0).double().mean().item(),
        "recall": torch.cat(recall).double().mean().item(),
        "density": sum(pairs) / (DENSITY_NEIGHBOURS * len(samples)),
        "coverage": sum(coverage) / len(reference),
    }


def _blocks(features: Tensor, centre: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of features (N, D) minus ``centre``, each with the number of its first row."""
    for start in range(0, len(features), BLOCK):
        yield start, features[start : start + BLOCK] - centre


COPY_NEIGHBOURS = 20
"""Nearest neighbours whose mean distance measures the local density."""
BLOCK_DISTANCES = 2**21
"""Distances per worker thread in memory at a time: 8 MiB, mostly in the cores' caches."""


@dataclass(frozen=True)
class NearestNeighbours:
    """The k nearest neighbours of N points, nearest first."""

    distances: Tensor
    """Euclidean distances, (N, k) float32."""
    rows: Tensor
    """Row numbers of the neighbours, (N, k) int64."""

    @property
    def relative(self) -> Tensor:
        """Return the distance to the nearest over the mean of all k (arXiv 2301.13188, section 5.1), (N,) in [0, 1]."""
        # If all k distances are 0, the ratio is 0.
        return (self.distances[:, 0] / self.distances.mean(1)).nan_to_num(0.0)


def find_nearest(
    points: Tensor,
    pieces: Iterable[Tensor],
    count: int = COPY_NEIGHBOURS,
    themselves: bool = False,
    progress: Progress = ignore_progress,
) -> NearestNeighbours:
    """Find the ``count`` nearest, or as many as there are, to each of ``points`` among the rows of all ``pieces``.

    Points are (N, D) float32, or in several views (V, N, D), of which the nearest counts; pieces (B, D) float32.
    ``themselves``: the rows are the points (their first view), none of which is its own neighbour. Distances are
    accurate to about a thousandth of a row's length, as they come from fast products of float32.
    """
    # Centring makes the numbers smaller, and with them the rounding error of their differences.
    centre = points.mean(tuple(range(points.ndim - 1)))
    x = (points if points.ndim == 3 else points[None]) - centre
    # Products of these are squared distances: |x|² − 2 x·y + |y|².
    views = torch.cat([-2 * x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)
    size, row_count = views.shape[1], 0
    best = torch.full((size, count), math.inf), torch.full((size, count), -1)
    with worker_threads() as pool:
        for piece in pieces:
            y = piece - centre
            rows = torch.cat([y, torch.ones_like(y[:, :1]), y.square().sum(1, keepdim=True)], 1)
            step = max(1, BLOCK_DISTANCES // (len(views) * len(piece)))
            list(pool.map(partial(_search, best, views, rows, row_count, step, themselves), range(0, size, step)))
            row_count += len(piece)
            progress("images compared with", row_count, None)
    neighbour_count = row_count - themselves
    return NearestNeighbours(best[0][:, :neighbour_count].clamp(min=0).sqrt(), best[1][:, :neighbour_count])


def _search(
    best: tuple[Tensor, Tensor], views: Tensor, rows: Tensor, offset: int, step: int, themselves: bool, start: int
) -> None:
    """Merge ``rows``, from number ``offset``, into the ``best`` of ``step`` points from number ``start``."""
    block = slice(start, start + step)
    squares = (views[:, block] @ rows.T).amin(0)
    if themselves:
        squares.diagonal(start - offset).fill_(math.inf)
    values, places = squares.topk(min(best[0].shape[1], len(rows)), largest=False)
    candidates = torch.cat([best[0][block], values], 1), torch.cat([best[1][block], places + offset], 1)
    values, order = candidates[0].topk(best[0].shape[1], largest=False)
    best[0][block], best[1][block] = values, candidates[1].gather(1, order)


def connected_groups(first: np.ndarray, second: np.ndarray, count: int) -> list[list[int]]:
    """Return the connected components, of two or more, of ``count`` items with pairs of ``first`` and ``second``."""
    # Imported here: scipy takes longer to load than everything `darkroom --help` needs.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first)), (first, second)), (count, count))
    components = connected_components(graph, directed=False)[1]
    groups = np.split(np.argsort(components, kind="stable"), np.cumsum(np.bincount(components, minlength=1))[:-1])
    return [group.tolist() for group in groups if len(group) > 1]
