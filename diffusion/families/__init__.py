"""Table of the families of models, each of which builds, trains and samples models of its kind."""

from collections.abc import Mapping
from typing import Any

from diffusion.families.autoregressive import AutoregressiveFamily
from diffusion.families.base import Family
from diffusion.families.ddpm import DiffusionFamily
from diffusion.families.gan import GANFamily
from diffusion.families.vae import VAEFamily
from diffusion.models.config import FamilyConfig

FAMILIES: Mapping[str, Family[Any, Any]] = {
    "ddpm": DiffusionFamily(),
    "vae": VAEFamily(),
    "gan": GANFamily(),
    "autoregressive": AutoregressiveFamily(),
}
"""Families by ``model.family``."""


def family_of(config: FamilyConfig) -> Family[Any, Any]:
    """Find the family that ``config`` configures."""
    return FAMILIES[config.family]
