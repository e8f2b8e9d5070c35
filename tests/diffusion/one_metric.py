"""One metric with its halves, where a simulation would be slow with all of them."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.evaluation.bootstrap import Figure, Replicates, frechet, kid, neighbourhoods
from diffusion.evaluation.kid import kid as kid_of
from diffusion.evaluation.metrics import frechet_distance
from diffusion.evaluation.neighbours import nearest, overlap


def kid_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[Replicates]:
    halves = kid(sets, reference, splits)
    return [
        Replicates.of("kid", kid_of(x, reference).value, of_x, x, reference)
        for x, of_x in zip(sets, halves, strict=True)
    ]


def frechet_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[Replicates]:
    halves = frechet(sets, reference, splits)
    return [
        Replicates.of("fd", frechet_distance(x, reference), of_x, x, reference)
        for x, of_x in zip(sets, halves, strict=True)
    ]


def share_replicates(sets: Sequence[Tensor], reference: Tensor, splits: int) -> list[dict[Figure, Replicates]]:
    found = []
    for x, halves in zip(sets, neighbourhoods(sets, reference, splits), strict=True):
        whole = overlap(x, reference, nearest(x), nearest(reference))
        found.append(
            {name: Replicates.of(name, getattr(whole, name), of_x, x, reference) for name, of_x in halves.items()}
        )
    return found
