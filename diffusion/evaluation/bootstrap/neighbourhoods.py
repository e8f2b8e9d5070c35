"""Precision, recall, density and coverage on halves, from neighbours that are looked for once."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap.halves import SPLITS, Figure, halves
from diffusion.evaluation.neighbours import squared_distances
from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

MANIFOLD, DENSITY = 3, 5
"""k of precision and recall (arXiv 1904.06991), and of density and coverage (arXiv 2002.09797)."""
FEWEST = 2 * (DENSITY + 1)
"""Features of a set of which each half has neighbourhoods."""
TABLE = 64
"""Neighbours remembered of each feature. That fewer than 5 of them are in its half happens once in 10¹³: then the
neighbourhood reaches to the last of them."""
BLOCK = 128
"""Rows of distances that a lane holds."""


def neighbourhoods(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[dict[Figure, Tensor]]:
    """Of the halves of each of the ``sets``, features (N, D), and the ``reference``, (M, D), N and M at least 12.

    Precision: share of samples no farther from some reference than its 3rd nearest other; recall: the same the other
    way round; density: how many reference features have a sample nearer than their 5th nearest other, over 5; coverage:
    share of the reference that has any sample so near. Neighbours are those in the same half.
    Returns for each set (splits, 2) float64 by metric.
    """
    centre = reference.mean(0)
    real, of_real = reference - centre, halves(len(reference), "reference", splits)
    found = []
    with lanes() as pool:
        near, wide = _radii(real, of_real, (MANIFOLD, DENSITY), pool, progress)
        for features in sets:
            drawn, of_drawn = features - centre, halves(len(features), "samples", splits)
            (around,) = _radii(drawn, of_drawn, (MANIFOLD,), pool, progress)
            values = _shares(drawn, real, of_drawn, of_real, (near, wide, around), pool, progress)
            found.append({name: each.view(-1, 2) for name, each in values.items()})
    return found


def _shares(
    drawn: Tensor,
    real: Tensor,
    of_drawn: Tensor,
    of_real: Tensor,
    radii: tuple[Tensor, Tensor, Tensor],
    pool: Executor,
    progress: Progress,
) -> dict[Figure, Tensor]:
    """Each figure on each half, (H,) float64; ``radii``: two of the reference and one of the samples, squared."""
    near, wide, around = radii
    wide_at_most, around_at_most = wide.amax(0), around.amax(0)
    precise = torch.zeros_like(of_drawn)
    covered, recalled = torch.zeros_like(of_real), torch.zeros_like(of_real)

    def of_block(start: int) -> Tensor:
        rows = slice(start, start + BLOCK)
        distances = squared_distances(drawn[rows], real)
        # Few pairs are near each other in any half, and only they are looked at in each.
        i, j = (distances <= wide_at_most).nonzero(as_tuple=True)
        p, q = (distances <= around_at_most[rows, None]).nonzero(as_tuple=True)
        apart, asunder = distances[i, j], distances[p, q]
        i, p = i + start, p + start
        pairs = torch.zeros(len(of_drawn), dtype=torch.float64)
        # Lanes share what they fill in, but only ever set to true.
        for half in range(len(of_drawn)):
            here = of_drawn[half, i]
            precise[half, i[here & (apart <= near[half, j])]] = True
            within = here & (apart < wide[half, j])
            covered[half, j[within]] = True
            recalled[half, q[of_real[half, q] & (asunder <= around[half, p])]] = True
            pairs[half] = within.sum()
        return pairs

    pairs = torch.zeros(len(of_drawn), dtype=torch.float64)
    for number, block in enumerate(pool.map(of_block, range(0, len(drawn), BLOCK)), start=1):
        pairs += block
        progress("neighbourhoods of halves", min(number * BLOCK, len(drawn)), len(drawn))
    samples, references = (members.sum(1, dtype=torch.float64) for members in (of_drawn, of_real))
    return {
        "precision": precise.sum(1) / samples,
        "recall": recalled.sum(1) / references,
        "density": pairs / (DENSITY * samples),
        "coverage": covered.sum(1) / references,
    }


def _radii(
    features: Tensor, members: Tensor, counts: Sequence[int], pool: Executor, progress: Progress
) -> list[Tensor]:
    """Squared distance of each of n features to the k-th nearest other in its half, for each k of ``counts``: (H, n).

    −1, nearer than anything, for features that are not in that half.
    """
    distances, neighbours = _nearest(features, pool, progress)
    found = [torch.empty(members.shape, dtype=features.dtype) for _ in counts]

    def of_half(half: int) -> None:
        rank = members[half][neighbours].cumsum(1, dtype=torch.int8)
        for k, radii in zip(counts, found, strict=True):
            at = (rank < k).sum(1).clamp(max=distances.shape[1] - 1)
            radii[half] = distances.gather(1, at[:, None])[:, 0].where(members[half], -1)

    list(pool.map(of_half, range(len(members))))
    return found


def _nearest(features: Tensor, pool: Executor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Squared distances to, and numbers of, the nearest others of each feature, nearest first: (n, TABLE or all)."""

    def of_block(start: int) -> tuple[Tensor, Tensor]:
        distances = squared_distances(features[start : start + BLOCK], features)
        distances.diagonal(start).fill_(math.inf)
        values, at = distances.topk(min(TABLE, len(features) - 1), largest=False)
        return values, at.int()

    pieces = []
    for piece in pool.map(of_block, range(0, len(features), BLOCK)):
        pieces.append(piece)
        progress("neighbours", min(len(pieces) * BLOCK, len(features)), len(features))
    values, at = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(at)
