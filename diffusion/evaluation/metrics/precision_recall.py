"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797): shares of images near others.

Precision and density ask whether generated images lie among real ones (fidelity), recall and coverage whether real
images have generated ones around them (variety).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads
from diffusion.evaluation.metrics.metric import SPLITS, Figure, ImageSet, Metric, Reference, draw_halves
from diffusion.evaluation.metrics.neighbours import map_blocks, squared_distances

BLOCK = 2048
"""Rows and columns of distances held at a time per worker thread: 16 MiB, mostly in the cores' caches."""
HALVES_BLOCK = 128
"""Rows of distances per worker thread when halves are compared: with 60,000 columns about 100 MB."""
MANIFOLD_NEIGHBOURS = 3
"""k of the neighbourhoods of precision and recall, as in arXiv 1904.06991."""
DENSITY_NEIGHBOURS = 5
"""k of the neighbourhoods of density and coverage, as in arXiv 2002.09797."""

TABLE = 64
"""Neighbours stored per feature. That fewer than 5 of them are in its half has probability 10⁻¹³; the neighbourhood
then reaches to the last of them."""


class Overlap(Metric):
    """Precision, recall, density and coverage."""

    name = "overlap"
    figures = (
        Figure(
            "precision",
            "precision",
            "Share of the evaluated images that lie among the reference (fidelity), 0 to 1 (arXiv 1904.06991, k = 3).",
            "Share of generated images among real ones: fidelity.",
            lower_is_better=False,
            interval="share of samples",
        ),
        Figure(
            "recall",
            "recall",
            "Share of the reference that lies among the evaluated images (variety), 0 to 1 (arXiv 1904.06991, k = 3).",
            "Share of real images among generated ones: variety.",
            lower_is_better=False,
            interval="share of reference",
        ),
        Figure(
            "density",
            "density",
            "Mean number of reference neighbourhoods that an evaluated image lies in, over k (fidelity, robust to "
            "outliers), at least 0, about 1 for real images (arXiv 2002.09797, k = 5).",
            "How many real ones a generated one lies among: about 1 for real images; fidelity, robustly.",
            lower_is_better=False,
            interval="non-negative",
        ),
        Figure(
            "coverage",
            "coverage",
            "Share of the reference with an evaluated image in its neighbourhood (variety), 0 to 1 (arXiv 2002.09797, "
            "k = 5).",
            "Share of real images with a generated one near: variety, robustly.",
            lower_is_better=False,
            interval="share of reference",
        ),
    )

    def prepare(self, features: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Find the nearest neighbours of real images among themselves."""
        return {"nearest": nearest_distances(features, progress)}

    def compute(self, samples: ImageSet, reference: Reference) -> Mapping[str, float]:
        """Compare all pairs."""
        nearest = nearest_distances(samples.features)
        return compute_overlap(samples.features, reference.features, nearest, reference.statistics["nearest"])

    def compute_halves(
        self, sets: Sequence[ImageSet], reference: Reference, splits: int, progress: Progress = ignore_progress
    ) -> list[dict[str, Tensor]]:
        """Compute all halves from one search for neighbours."""
        return shares_of_halves([samples.features for samples in sets], reference.features, splits, progress)


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


def shares_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[dict[str, Tensor]]:
    """Compute precision, recall, density and coverage, as in ``compute_overlap``, of the halves of ``sets``.

    Of features (N, D) against the halves of ``reference``, (M, D); N and M at least 12. Neighbours are those in the
    same half. Returns for each set (splits, 2) float64 by metric.
    """
    centre = reference.mean(0)
    real, real_members = reference - centre, draw_halves(len(reference), "reference", splits)
    shares = []
    with worker_threads(1):
        near_radii, wide_radii = _radii(real, real_members, (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS), progress)
        for features in sets:
            generated, generated_members = features - centre, draw_halves(len(features), "samples", splits)
            (radii,) = _radii(generated, generated_members, (MANIFOLD_NEIGHBOURS,), progress)
            values = _shares(
                generated, real, generated_members, real_members, (near_radii, wide_radii, radii), progress
            )
            shares.append({name: halves.view(-1, 2) for name, halves in values.items()})
    return shares


def _shares(
    generated: Tensor,
    real: Tensor,
    generated_members: Tensor,
    real_members: Tensor,
    radii: tuple[Tensor, Tensor, Tensor],
    progress: Progress,
) -> dict[str, Tensor]:
    """Compute the metrics on each half, (H,) float64; ``radii``: squared, two of the reference, one of the samples."""
    near_radii, wide_radii, generated_radii = radii
    max_wide_radii, max_generated_radii = wide_radii.amax(0), generated_radii.amax(0)
    precision_mask = torch.zeros_like(generated_members)
    coverage_mask, recall_mask = torch.zeros_like(real_members), torch.zeros_like(real_members)

    def compute_block(start: int) -> Tensor:
        rows = slice(start, start + HALVES_BLOCK)
        distances = squared_distances(generated[rows], real)
        # Few pairs are near each other in any half, and only these are checked in each.
        i, j = (distances <= max_wide_radii).nonzero(as_tuple=True)
        p, q = (distances <= max_generated_radii[rows, None]).nonzero(as_tuple=True)
        pair_distances, recall_distances = distances[i, j], distances[p, q]
        i, p = i + start, p + start
        pairs = torch.zeros(len(generated_members), dtype=torch.float64)
        # Threads share these arrays but only ever write True.
        for half in range(len(generated_members)):
            in_half = generated_members[half, i]
            precision_mask[half, i[in_half & (pair_distances <= near_radii[half, j])]] = True
            in_radius = in_half & (pair_distances < wide_radii[half, j])
            coverage_mask[half, j[in_radius]] = True
            recall_mask[half, q[real_members[half, q] & (recall_distances <= generated_radii[half, p])]] = True
            pairs[half] = in_radius.sum()
        return pairs

    pairs = torch.zeros(len(generated_members), dtype=torch.float64)
    for block in map_blocks(compute_block, len(generated), HALVES_BLOCK, "neighbourhoods of halves", progress):
        pairs += block
    samples, references = (members.sum(1, dtype=torch.float64) for members in (generated_members, real_members))
    return {
        "precision": precision_mask.sum(1) / samples,
        "recall": recall_mask.sum(1) / references,
        "density": pairs / (DENSITY_NEIGHBOURS * samples),
        "coverage": coverage_mask.sum(1) / references,
    }


def _radii(features: Tensor, members: Tensor, counts: Sequence[int], progress: Progress) -> list[Tensor]:
    """Compute squared distances to the k-th neighbour in each half, for k in ``counts``: (H, n), −1 outside it."""
    distances, neighbours = _find_nearest(features, progress)
    radii = [torch.empty(members.shape, dtype=features.dtype) for _ in counts]

    def compute_half(half: int) -> None:
        rank = members[half][neighbours].cumsum(1, dtype=torch.int8)
        for k, kth_radii in zip(counts, radii, strict=True):
            columns = (rank < k).sum(1).clamp(max=distances.shape[1] - 1)
            kth_radii[half] = distances.gather(1, columns[:, None])[:, 0].where(members[half], -1)

    list(map_blocks(compute_half, len(members)))
    return radii


def _find_nearest(features: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Find the nearest others of each feature: squared distances and indices, nearest first, (n, TABLE or all)."""

    def compute_block(start: int) -> tuple[Tensor, Tensor]:
        distances = squared_distances(features[start : start + HALVES_BLOCK], features)
        distances.diagonal(start).fill_(math.inf)
        values, indices = distances.topk(min(TABLE, len(features) - 1), largest=False)
        return values, indices.int()

    values, indices = zip(*map_blocks(compute_block, len(features), HALVES_BLOCK, "neighbours", progress), strict=True)
    return torch.cat(values), torch.cat(indices)
