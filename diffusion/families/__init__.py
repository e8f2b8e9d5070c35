"""Families of models: each is one module that says how a model of its kind is built, trained and drawn from."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion.models.config import FamilyConfig

if TYPE_CHECKING:
    from diffusion.families.base import Family


def family_of(config: FamilyConfig) -> "Family[Any, Any]":
    """The family that ``config`` configures: what the module of its name calls FAMILY, loaded when first asked for."""
    found: Family[Any, Any] = import_module(f"{__name__}.{config.family}").FAMILY
    return found
