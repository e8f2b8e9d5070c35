"""Intervals of a model's figures and of its floor's, from halves that are cut once and remembered."""

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.evaluation.bootstrap import Figure, Replicates, replicates
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST
from diffusion.evaluation.results import Estimates
from diffusion.evaluation.sealed import recall
from diffusion.fingerprint import Fingerprint
from diffusion.progress import Progress, silent

FIGURES: tuple[Figure, ...] = get_args(Figure)


class HalvesKey(Config):
    """All that figures on halves depend on."""

    kind: Literal["halves"] = "halves"
    format_version: Literal[1] = 1
    """Grows when cuts or figures come out another way."""
    model: str
    """SHA-256 of its file."""
    conditions: str
    """Key of those under which it was judged."""
    fingerprint: Fingerprint
    """Of the machine that drew its pictures."""


def estimates(
    folder: Path, key: HalvesKey, drawn: Tensor, floor: Tensor, reference: Tensor, progress: Progress = silent
) -> Estimates | None:
    """Each figure with its error: of features ``drawn`` (N, D) and of those behind the ``floor`` (F, D).

    Both against the ``reference`` (M, D), of which they must be independent; for what as many pictures get on average.
    Kept in ``folder`` under ``key``. None if a set has fewer than 12 pictures, whose halves have no neighbourhoods.
    """
    if min(map(len, (drawn, floor, reference))) < FEWEST:
        return None

    def work() -> dict[str, Tensor]:
        found = replicates([drawn, floor], reference, progress=progress)
        return {
            name: torch.stack([_flat(figures[figure]) for figure in FIGURES])
            for name, figures in zip(("best", "floor"), found, strict=True)
        }

    kept = recall(folder, key, work)
    sizes = {"best": len(drawn), "floor": len(floor)}
    return Estimates.model_validate(
        {
            name: {
                figure: Replicates.of(figure, values, count, len(reference)).estimate
                for figure, values in zip(FIGURES, kept[name], strict=True)
            }
            for name, count in sizes.items()
        }
    )


def _flat(found: Replicates) -> Tensor:
    """As ``Replicates.of`` takes it."""
    return torch.cat([found.halves.flatten(), found.halves.new_tensor([found.whole])])
