"""All metrics at once, of all sets that are compared with the same reference."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.errors import UserError
from diffusion.evaluation.bootstrap.frechet import frechet
from diffusion.evaluation.bootstrap.halves import SPLITS, Figure, Replicates
from diffusion.evaluation.bootstrap.kid import kid
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST, neighbourhoods
from diffusion.evaluation.metrics import Scores, judge
from diffusion.evaluation.reference import Reference
from diffusion.progress import Progress, silent


def replicates(
    sets: Sequence[Tensor],
    reference: Tensor,
    splits: int = SPLITS,
    progress: Progress = silent,
    scores: Sequence[Scores] | None = None,
) -> list[dict[Figure, Replicates]]:
    """Every metric of each of the ``sets``, features (N, D), against the ``reference``, (M, D), with its halves.

    Give all that is to be compared in one call (candidate, champion, the real baseline): what depends on the reference
    alone, which is most, is computed once. Equal input gives equal bits on any number of cores. ``scores``: of each set
    as a whole, if they are known. Raises UserError for sets of fewer than 12, of which no half has neighbourhoods.
    """
    fewest = min(map(len, (*sets, reference)))
    if fewest < FEWEST:
        raise UserError(
            f"errors of metrics need {FEWEST} images on either side, and there are {fewest}: generate more with "
            "evaluation.samples, or hold more out with ingest.held_out"
        )
    if scores is None:
        known = Reference.of(reference)
        scores = [judge(each, known, "features") for each in sets]
    of_halves: list[dict[Figure, Tensor]] = [
        {"fd": fd, "kid": mmd, **shares}
        for fd, mmd, shares in zip(
            frechet(sets, reference, splits, progress),
            kid(sets, reference, splits, progress),
            neighbourhoods(sets, reference, splits, progress),
            strict=True,
        )
    ]
    return [
        {figure: Replicates.of(figure, whole.of(figure), halves, samples, reference) for figure, halves in each.items()}
        for samples, whole, each in zip(sets, scores, of_halves, strict=True)
    ]
