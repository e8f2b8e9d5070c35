"""Nearest neighbours of features, in blocks of bounded size."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError, install_hint
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads

COPY_NEIGHBOURS = 20
"""Nearest neighbours whose mean distance measures the local density."""
BLOCK_DISTANCES = 2**21
"""Distances per worker thread in memory at a time: 8 MiB, mostly in the cores' caches."""
PROBED = 32
"""Clusters searched for each point by ``find_nearly_nearest``: of 100,000 images' features, 8 miss a tenth."""
KMEANS_STEPS, KMEANS_ROWS = 5, 64
"""Steps of its k-means, and rows per cluster that these see."""
SEARCHED = 1024
"""Points that a worker thread searches for at a time."""
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


def find_nearly_nearest(points: Tensor, rows: Tensor, count: int) -> NearestNeighbours:
    """Find what ``find_nearest`` finds among ``rows`` (N, D), but only in the clusters that each point is nearest to.

    k-means makes about 4 √N clusters, of which PROBED are searched (an inverted file of FAISS, arXiv 2401.08281), so
    time grows with N √N. A near-duplicate is missed if it lies in none of them; far neighbours are often missed.
    The result does not depend on the number of threads. Raises UserError without FAISS.
    """
    try:
        import faiss  # it loads an OpenMP library of its own
    except ImportError as error:
        raise UserError(f"neighbours of {len(rows):,} images need FAISS: {install_hint('evaluation')}") from error
    centre = rows.mean(0)
    database = (rows - centre).numpy()
    views = (points if points.ndim == 3 else points[None]) - centre
    clusters = min(round(4 * math.sqrt(len(rows))), len(rows))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(rows.shape[1]), rows.shape[1], clusters)
    index.nprobe = PROBED
    index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = 0, KMEANS_STEPS, 1
    trained = np.ascontiguousarray(database[:: max(1, len(rows) // (clusters * KMEANS_ROWS))])

    def build(_: int) -> None:
        faiss.omp_set_num_threads(1)  # of this worker thread
        index.train(trained)
        index.add(database)

    def search(start: int) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(1)
        block = views[:, start : start + SEARCHED]
        squares, numbers = index.search(block.reshape(-1, block.shape[-1]).numpy(), count)
        shape = (len(views), block.shape[1], count)
        values, found = (torch.from_numpy(each).view(shape).transpose(0, 1).flatten(1) for each in (squares, numbers))
        # Of a row that several views found, the nearest counts.
        values, order = values.sort(stable=True, dim=1)
        found, places = found.gather(1, order).sort(stable=True, dim=1)
        values = values.gather(1, places)
        values[:, 1:][found[:, 1:] == found[:, :-1]] = math.inf
        values, order = values.topk(count, largest=False)
        found = found.gather(1, order)
        return values, torch.where(values.isfinite() & (found >= 0), found, found[:, :1].clamp(min=0))

    list(map_blocks(build, 1))
    pieces = list(map_blocks(search, views.shape[1], SEARCHED))
    distances, found = (torch.cat(each) for each in zip(*pieces, strict=True))
    return NearestNeighbours(distances.clamp(min=0).sqrt(), found)


def connected_groups(first: np.ndarray, second: np.ndarray, count: int) -> list[list[int]]:
    """Return the connected components, of two or more, of ``count`` items with pairs of ``first`` and ``second``."""
    # Imported here: scipy takes longer to load than everything `darkroom --help` needs.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first)), (first, second)), (count, count))
    components = connected_components(graph, directed=False)[1]
    groups = np.split(np.argsort(components, kind="stable"), np.cumsum(np.bincount(components, minlength=1))[:-1])
    return [group.tolist() for group in groups if len(group) > 1]
