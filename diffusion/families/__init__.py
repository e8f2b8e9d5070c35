"""Families of models: a folder each with its configuration, network and model, listed in ``families.config``."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.families.base import BaseFamilyConfig
    from diffusion.families.model import Model


def family_of(config: "BaseFamilyConfig") -> "type[Model]":
    """Find the class of models that ``config`` configures: the one that ``model.py`` in its folder defines."""
    from diffusion.families.model import Model

    folder = type(config).__module__.split(".")[-2]
    module = import_module(f"diffusion.families.{folder}.model")
    [kind] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Model) and value.__module__ == module.__name__
    ]
    return kind
