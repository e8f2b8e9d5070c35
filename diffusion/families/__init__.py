"""Families of models, in one table: each says how a model of its kind is built, trained and sampled from."""

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
"""By ``model.family``."""


def family_of(config: FamilyConfig) -> Family[Any, Any]:
    """Find the family that ``config`` configures."""
    return FAMILIES[config.family]
