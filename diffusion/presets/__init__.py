"""Named beginnings of a configuration, each a readable file: what it leaves out has the default of its field."""

from importlib.resources import files
from typing import Any, Literal

import yaml

PresetName = Literal["fast", "ddpm", "large"]


def preset(name: PresetName) -> dict[str, Any]:
    """The sections and fields that the preset sets."""
    sections: dict[str, Any] = yaml.safe_load(files(__name__).joinpath(f"{name}.yaml").read_text())
    return sections


def over(chosen: dict[str, Any], name: PresetName) -> dict[str, Any]:
    """``chosen``, sections of fields, with what it leaves out taken from the preset ``name``.

    The presets are of diffusion models: one of another family takes nothing from the default, and to choose another
    for it is a ValueError.
    """
    model = chosen.get("model")
    if isinstance(model, dict) and (family := model.get("family", "ddpm")) != "ddpm":
        if name != "fast":
            raise ValueError(f"preset {name} is of diffusion models: leave it out for model.family = {family}")
        return chosen
    merged = dict(chosen)
    for section, fields in preset(name).items():
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
