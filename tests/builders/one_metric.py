"""Metrics with their halves, and single ones, where a simulation would be slow with all of them."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.evaluation.bootstrap import Replicates
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance, frechet_of_halves
from diffusion.evaluation.metrics.kid import compute_kid as kid_of
from diffusion.evaluation.metrics.kid import kid_of_halves
from diffusion.evaluation.metrics.precision_recall import compute_overlap, nearest_distances, shares_of_halves
from diffusion.evaluation.metrics.scores import compute_halves, compute_scores, prepare_reference


def compute_replicates(
    sets: Sequence[Tensor], reference: Tensor, splits: int, progress: Progress = ignore_progress
) -> list[dict[str, Replicates]]:
    reference_statistics, results = prepare_reference(reference), []
    for x, halves in zip(sets, compute_halves(sets, reference, splits, progress), strict=True):
        scores = compute_scores(x, reference_statistics, "features")
        results.append(
            {
                name: Replicates(name, scores.get_metric(name), of_x, len(x), *reference.shape)
                for name, of_x in halves.items()
            }
        )
    return results


def kid_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[Replicates]:
    halves = kid_of_halves(sets, reference, splits)
    return [
        Replicates("kid", kid_of(x, reference)[0], of_x, len(x), *reference.shape)
        for x, of_x in zip(sets, halves, strict=True)
    ]


def frechet_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[Replicates]:
    halves = frechet_of_halves(sets, reference, splits)
    return [
        Replicates(
            "fd", frechet_distance(compute_moments(x), compute_moments(reference)), of_x, len(x), *reference.shape
        )
        for x, of_x in zip(sets, halves, strict=True)
    ]


def share_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[dict[str, Replicates]]:
    results = []
    for x, halves in zip(sets, shares_of_halves(sets, reference, splits), strict=True):
        whole = compute_overlap(x, reference, nearest_distances(x), nearest_distances(reference))
        results.append(
            {name: Replicates(name, whole[name], of_x, len(x), *reference.shape) for name, of_x in halves.items()}
        )
    return results
