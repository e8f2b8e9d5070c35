"""Named beginnings of a configuration, each a readable file: what it leaves out has the default of its field."""

from importlib.resources import files
from typing import Any, Literal

import yaml

from diffusion.families.config import FAMILIES

PresetName = Literal["fast", "ddpm", "large"]


def preset(name: str) -> dict[str, Any]:
    """The sections and fields that the preset sets, or the file of a family other than ddpm."""
    sections: dict[str, Any] = yaml.safe_load(files(__name__).joinpath(f"{name}.yaml").read_text()) or {}
    return sections


def over(chosen: dict[str, Any], name: PresetName) -> dict[str, Any]:
    """``chosen``, sections of fields, with what it leaves out taken from the preset ``name``.

    The presets are of diffusion models: another family has a file of its own instead, and to choose a preset for it
    that is not the default is a ValueError.
    """
    model, source = chosen.get("model"), str(name)
    if isinstance(model, dict) and (family := model.get("family", "ddpm")) != "ddpm":
        if name != "fast":
            raise ValueError(f"preset {name} is of diffusion models: leave it out for model.family = {family}")
        if family not in FAMILIES:
            return chosen
        source = family
    merged = dict(chosen)
    for section, fields in preset(source).items():
        given = chosen.get(section)
        if given is None:
            merged[section] = fields
        elif isinstance(given, dict):
            # The two are alternatives: who chooses one means to do without the other.
            left = {
                name: value for name, value in fields.items() if name != "ema_decay" or not given.get("ema_lengths")
            }
            merged[section] = left | given
    return merged
