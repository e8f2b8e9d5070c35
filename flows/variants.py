"""Variants of a configuration: combinations of settings for ``darkroom sweep``, families for ``darkroom compare``."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.image_grids import grid, png_bytes
from diffusion.common.progress import Progress, silent
from diffusion.evaluation.ranking import Ranking, rank_models
from diffusion.evaluation.reports.ranking_report import PAGE, write_ranking_report
from diffusion.models.config import FAMILIES
from flows.config import Params, in_words

SECTIONS = ("model", "training")
"""Sections that may vary; data, sampling and evaluation are the same for all, so that metrics are comparable."""
FIXED = ("training.dataset", "training.output", "model.family")
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
"""Settings shared by all families: data, budget and compute; the rest has each family's defaults."""


class Combination(Config):
    """A combination of settings, and the resulting configuration."""

    settings: dict[str, JsonValue]
    """Values by dotted key."""
    params: Params
    folder: Path
    """Folder of its evaluation."""
    digest: str
    """Digest of the parsed model and training sections."""


class RankingResult(Config):
    """Ranking of trained variants, with its report."""

    ranking: Ranking
    report: Path
    run_id: str | None = None
    """MLflow parent run of a sweep."""


def parse_over(words: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``key=value,value`` into values by dotted key; values are YAML, so that [1,2],[1,2,2] are two values.

    Raises UserError for malformed or repeated keys.
    """
    over: dict[str, list[Any]] = {}
    for each in words:
        key, equal, text = each.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]") if equal else []
        except yaml.YAMLError:
            values = []
        if not values or not key.strip():
            raise UserError(f"--over {each}: write it as key=value,value, for example training.learning_rate=1e-3,4e-3")
        if key.strip() in over:
            raise UserError(f"--over {each}: {key.strip()} is given twice; write all its values after one --over")
        over[key.strip()] = values
    return over


def combinations(params: Params, over: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """Every combination of the values in ``over``; raises UserError for an invalid key or value."""
    if not over:
        raise UserError("nothing to vary: say what with --over training.learning_rate=1e-3,4e-3")
    for key in over:
        if key.partition(".")[0] not in SECTIONS or key in FIXED:
            raise UserError(
                f"--over {key}: data, sampling and evaluation must be the same for all; vary fields of "
                f"{' and '.join(SECTIONS)}, but for {', '.join(FIXED)}"
            )
    choices = (dict(zip(over, values, strict=True)) for values in itertools.product(*over.values()))
    points = [_with(params, settings) for settings in choices]
    # By parsed value: 1e-3 equals 0.001.
    if len({each.digest for each in points}) < len(points):
        raise UserError("--over gives the same value twice: leave one of them out")
    return points


def _with(params: Params, settings: dict[str, Any]) -> Combination:
    tree = params.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"--over {key}: {section} is a value, not a section")
        node[name] = value
    try:
        varied = Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"--over with {words_of(settings)}: {in_words(error)}") from error
    # With the digest, so that settings with equal abbreviations have different folders.
    digest = digest_of({name: getattr(varied, name).model_dump(mode="json") for name in SECTIONS})[:8]
    name = f"{re.sub(r'[^0-9A-Za-z.=,_-]+', '-', words_of(settings))[:80]}-{digest}"
    output = Path("runs", "sweeps", params.model_name, name)
    training = varied.training.model_copy(update={"output": output})
    varied = varied.model_copy(update={"training": training})
    return Combination(settings=settings, params=varied, folder=params.report_folder / "sweeps" / name, digest=digest)


def words_of(settings: Mapping[str, object]) -> str:
    """Abbreviated settings, such as ``learning_rate=0.001,width=32``."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def family_variants(params: Params, names: Sequence[str]) -> dict[str, Params]:
    """Configurations of the families in ``names``, by name.

    The family of ``params`` keeps ``params``; the others have their own defaults with the same images, budget and
    evaluation. Raises UserError for an unknown or repeated family, and for settings that families cannot share.
    """
    if unknown := [family for family in names if family not in FAMILIES]:
        raise UserError(f"there is no family {unknown[0]!r}: there is {', '.join(FAMILIES)}")
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--family {' --family '.join(names)}: name two families or more, each once")
    for field, value in (("training.output", params.training.output), ("registry.model", params.registry.model)):
        if value is not None:
            raise UserError(f"{field} = {value} is one place, and each family needs its own: leave it out")
    if params.model.low_resolution is not None:
        raise UserError("model.low_resolution makes a super-resolution model, and `compare` ranks generative ones")
    return {family: params if family == params.model.family else _of_family(family, params) for family in names}


def _of_family(family: str, params: Params) -> Params:
    shared: dict[str, Any] = {
        section: getattr(params, section).model_dump(include=set(fields)) for section, fields in SHARED.items()
    }
    whole = {"ingest": params.ingest.model_dump(), "evaluation": params.evaluation.model_dump(exclude={"ema_stds"})}
    return Params.model_validate(shared | whole | {"model": {"family": family}})


def rank_variants(variants: Mapping[str, Params], progress: Progress = silent) -> tuple[Ranking, Path]:
    """Rank the final models of ``variants``; returns the ranking and its report in the data set's report folder."""
    params = next(iter(variants.values()))
    folder = Path("reports") / params.training.dataset
    models = {name: (each.run_folder / "final.safetensors", each.sampling) for name, each in variants.items()}
    ranking, images = rank_models(params.dataset_folder, models, params.evaluation, folder, progress)
    sheets = {name: png_bytes(grid(each, columns=8)) for name, each in images.items()}
    write_ranking_report(folder / PAGE, ranking, sheets, sheets.pop("real"))
    return ranking, folder / PAGE
