"""Combinations of settings to be tried: what ``darkroom sweep`` makes of ``--over``."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue, ValidationError

from diffusion.config import Config
from diffusion.errors import UserError
from diffusion.files import digest_of
from flows.params import Params, in_words

SECTIONS = ("model", "training")
"""What may be varied: data, sampling and evaluation are the same for all, so that their figures compare."""
FIXED = ("training.dataset", "training.output", "model.family")


class Combination(Config):
    """Some settings, and the configuration that has them."""

    settings: dict[str, JsonValue]
    """By dotted key."""
    params: Params
    folder: Path
    """Where its evaluation is written to."""
    digest: str
    """Of what is compared, the same however its values were written."""


def parse_over(words: Sequence[str]) -> dict[str, list[Any]]:
    """Values by dotted key from ``key=value,value``; a value is YAML, so that [1,2],[1,2,2] are two of them.

    Raises UserError for what cannot be read so.
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
    """Every combination of the values in ``over``; raises UserError for a key or value that makes no sense."""
    if not over:
        raise UserError("nothing to vary: say what with --over training.learning_rate=1e-3,4e-3")
    for key in over:
        if key.partition(".")[0] not in SECTIONS or key in FIXED:
            raise UserError(
                f"--over {key}: what is compared must have data, sampling and evaluation in common; vary fields of "
                f"{' and '.join(SECTIONS)}, but for {', '.join(FIXED)}"
            )
    chosen = (dict(zip(over, values, strict=True)) for values in itertools.product(*over.values()))
    found = [_with(params, settings) for settings in chosen]
    # By what they say, however it is written: 1e-3 is 0.001.
    if len({each.digest for each in found}) < len(found):
        raise UserError("--over gives the same value twice: leave one of them out")
    return found


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
    # The digest, so that another beginning of the same settings has a folder of its own.
    digest = digest_of({name: getattr(varied, name).model_dump(mode="json") for name in SECTIONS})[:8]
    name = f"{re.sub(r'[^0-9A-Za-z.=,_-]+', '-', words_of(settings))[:80]}-{digest}"
    output = Path("runs", "sweeps", params.model_name, name)
    training = varied.training.model_copy(update={"output": output})
    varied = varied.model_copy(update={"training": training})
    return Combination(settings=settings, params=varied, folder=params.report_folder / "sweeps" / name, digest=digest)


def words_of(settings: Mapping[str, object]) -> str:
    """Settings in short, such as ``learning_rate=0.001,width=32``."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
