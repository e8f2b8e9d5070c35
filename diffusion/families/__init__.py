"""Table of the families of models: the class of each builds, trains and samples models of its kind."""

from collections.abc import Mapping

from diffusion.families.autoregressive import AutoregressiveModel
from diffusion.families.ddpm import DiffusionModel
from diffusion.families.gan import GANModel
from diffusion.families.model import Model
from diffusion.families.pretrained import PretrainedModel
from diffusion.families.vae import VAEModel
from diffusion.models.config import FamilyConfig

FAMILIES: Mapping[str, type[Model]] = {
    "ddpm": DiffusionModel,
    "vae": VAEModel,
    "gan": GANModel,
    "autoregressive": AutoregressiveModel,
    "diffusers": PretrainedModel,
}
"""Families by ``model.family``."""


def family_of(config: FamilyConfig) -> type[Model]:
    """Find the family that ``config`` configures."""
    return FAMILIES[config.family]
