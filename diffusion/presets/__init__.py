"""Presets of the configuration, one YAML file each; fields that a file leaves out have their defaults."""

from importlib.resources import files
from typing import Any, Literal

from diffusion.common.parsing import parse_yaml
from diffusion.families.config import FAMILIES

PresetName = Literal["fast", "ddpm", "large"]


def preset(name: str) -> dict[str, Any]:
    """Read the file of a preset, of a family other than ddpm, or of super-resolution, as sections of fields.

    That of a family is ``preset.yaml`` in its folder, if it needs one.
    """
    file = files(__name__).joinpath(f"{name}.yaml")
    if name != "ddpm" and (family := FAMILIES.get(name)) is not None:
        file = files(family.__module__.rpartition(".")[0]).joinpath("preset.yaml")
        if not file.is_file():
            return {}
    sections: dict[str, Any] = parse_yaml(file.read_text()) or {}
    return sections


def complete_from_preset(chosen: dict[str, Any], name: PresetName) -> dict[str, Any]:
    """Complete ``chosen``, sections of fields, from the preset ``name``.

    Presets are for diffusion models. Other families have one file each, and any preset but the default raises
    ValueError for them. For super-resolution the file ``enlarging`` overrides parts of the default preset.
    """
    model, source = chosen.get("model"), str(name)
    if isinstance(model, dict) and (family := model.get("family", "ddpm")) != "ddpm":
        if name != "fast":
            raise ValueError(f"preset {name} is of diffusion models: leave it out for model.family = {family}")
        if family not in FAMILIES:
            return chosen
        source = family
    merged, sections = dict(chosen), preset(source)
    if source == "fast" and isinstance(model, dict) and model.get("low_resolution") is not None:
        sections = {section: fields | preset("enlarging").get(section, {}) for section, fields in sections.items()}
    for section, fields in sections.items():
        given = chosen.get(section)
        if given is None:
            merged[section] = fields
        elif isinstance(given, dict):
            # Fields of the preset without effect beside those that are given.
            replaced = {"ema_decay"} if given.get("ema_stds") else set()
            if given.get("timestep_sampling", "lognormal") != "lognormal":
                replaced.add("log_sigma_mean")
            if given.get("sampler") in ("consistency", "scheduler"):
                replaced |= {"steps", "sigma_max", "sigma_min"}
            merged[section] = {name: value for name, value in fields.items() if name not in replaced} | given
    return merged
