"""Which features lie among which others: exact distances between all pairs, in blocks of bounded size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

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


def nearest(features: Tensor, count: int = NEIGHBOURS, progress: Progress = silent) -> Tensor:
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
            progress("neighbours of real pictures", sum(map(len, pieces)), len(features))
    return torch.cat(pieces)


def overlap(samples: Tensor, reference: Tensor, near_samples: Tensor, near_reference: Tensor) -> Overlap:
    """Of features (N, D) of samples and (M, D) of a reference, each with what ``nearest`` says of it.

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
        for at, drawn in _blocks(samples, centre):
            columns = slice(at, at + len(drawn))
            distances = squared_distances(rows, drawn)
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
