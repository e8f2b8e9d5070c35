"""Adapters: small trained parts on top of a model's frozen weights, and their settings, ``training.adapter``.

An adapter is a class in a file beside this module, imported below: peft trains it, and its ``merge`` computes the
weights that generate. This package loads without torch.
"""

from typing import Annotated, TypeAlias

from diffusion.common.config import OneOf, classes_in
from diffusion.families.adapters.base import BaseAdapterConfig as BaseAdapterConfig
from diffusion.families.adapters.base import BaseWeights as BaseWeights

# isort: off
from diffusion.families.adapters.lora import LoRAConfig as LoRAConfig
from diffusion.families.adapters.lora import DoRAConfig as DoRAConfig
from diffusion.families.adapters.lokr import LoKrConfig as LoKrConfig
from diffusion.families.adapters.oft import OFTConfig as OFTConfig
# isort: on

AdapterConfig: TypeAlias = Annotated[
    BaseAdapterConfig, OneOf("kind", classes_in(globals(), BaseAdapterConfig), default="lora")
]
"""An adapter of any kind; options of other kinds are unknown keys."""
