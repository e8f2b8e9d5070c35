"""Families side by side: the configuration of each, when all train on the same data for as long, and what comes out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.evaluation.comparison import Comparison, compare
from diffusion.evaluation.comparison_page import PAGE, write_comparison_page
from diffusion.models.config import FAMILIES
from diffusion.progress import Progress
from flows.params import Params

SHARED: Mapping[str, frozenset[str]] = {
    "training": frozenset(
        {
            "dataset",
            "images",
            "minutes",
            "cpu_threads",
            "flip",
            "seed",
            "precision",
            "device",
            "compile",
            "checkpoints",
            "keep",
            "workers",
            "prefetch",
            "cache_bytes",
            "stream_bytes",
            "window",
        }
    ),
    "sampling": frozenset({"compute_batch", "precision", "device"}),
}
"""What families have in common: the data, how long, and what computes. All else has the defaults of each."""


def contestants(params: Params, families: Sequence[str]) -> dict[str, Params]:
    """The configuration of each of ``families`` that is compared, by its name.

    That of the family of ``params`` is ``params``; others are trained with their own defaults on the same pictures, for
    as long, and judged alike. Raises UserError for a family that there is not, one that is named twice, and for what
    cannot be the same for all.
    """
    if unknown := [family for family in families if family not in FAMILIES]:
        raise UserError(f"there is no family {unknown[0]!r}: there is {', '.join(FAMILIES)}")
    if len(set(families)) < max(2, len(families)):
        raise UserError(f"--family {' --family '.join(families)}: name two families or more, each once")
    for field, value in (("training.output", params.training.output), ("registry.model", params.registry.model)):
        if value is not None:
            raise UserError(f"{field} = {value} is one place, and each family needs its own: leave it out")
    if params.model.low_resolution is not None:
        raise UserError("model.low_resolution makes a model that enlarges, and families are compared by what they draw")
    return {family: params if family == params.model.family else _of(family, params) for family in families}


def _of(family: str, params: Params) -> Params:
    shared: dict[str, Any] = {
        section: getattr(params, section).model_dump(include=set(fields)) for section, fields in SHARED.items()
    }
    whole = {"ingest": params.ingest.model_dump(), "evaluation": params.evaluation.model_dump(exclude={"ema_stds"})}
    return Params.model_validate(shared | whole | {"model": {"family": family}})


def judged(entrants: Mapping[str, Params], progress: Progress) -> Comparison:
    """What each ended its training with, compared, and the page of it."""
    params, output = next(iter(entrants.values())), report_folder(entrants)
    models = {name: (each.run_folder / "final.safetensors", each.sampling) for name, each in entrants.items()}
    comparison, sheets = compare(params.dataset_folder, models, params.evaluation, output, progress)
    write_comparison_page(output / PAGE, comparison, sheets)
    return comparison


def report_folder(entrants: Mapping[str, Params]) -> Path:
    """Where a comparison is written: with the reports on the data set, whatever the family."""
    return Path("reports") / next(iter(entrants.values())).training.dataset
