"""All figures at once, of all sets that are compared with the same reference."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.errors import UserError
from diffusion.evaluation.bootstrap.frechet import frechet
from diffusion.evaluation.bootstrap.halves import SPLITS, Figure, Replicates
from diffusion.evaluation.bootstrap.kid import kid
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST, neighbourhoods
from diffusion.progress import Progress, silent


def replicates(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[dict[Figure, Replicates]]:
    """Every figure of each of the ``sets``, features (N, D), against the ``reference``, (M, D), on halves.

    Give all that is to be compared in one call (challenger, champion, the floor's real pictures): what depends on the
    reference alone, which is most, is computed once. Equal input gives equal bits on any number of cores. Raises
    UserError for sets of fewer than 12, of which no half has neighbourhoods.
    """
    fewest = min(map(len, (*sets, reference)))
    if fewest < FEWEST:
        raise UserError(
            f"errors of figures need {FEWEST} pictures on either side, and there are {fewest}: draw more with "
            "evaluation.samples, or hold more out with ingest.held_out"
        )
    distances = zip(frechet(sets, reference, splits, progress), kid(sets, reference, splits, progress), strict=True)
    shares = neighbourhoods(sets, reference, splits, progress)
    return [{"fd": fd, "kid": mmd, **others} for (fd, mmd), others in zip(distances, shares, strict=True)]
