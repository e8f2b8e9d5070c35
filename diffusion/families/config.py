"""The section ``model`` of a configuration: the table of families, and what it has to do with other sections.

Each class of configuration that is imported here is a family; its network and model lie in the same folder. This module
loads without torch.
"""

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from diffusion.common.config import OneOf, classes_in
from diffusion.common.rules import find_conflict, names_without_effect
from diffusion.common.shapes import Shape, shape_name
from diffusion.families.base import BaseFamilyConfig
from diffusion.families.base import classes_of as classes_of

# isort: off
from diffusion.families.ddpm.config import ModelConfig as ModelConfig
from diffusion.families.vae.config import VAEConfig as VAEConfig
from diffusion.families.gan.config import GANConfig as GANConfig
from diffusion.families.autoregressive.config import AutoregressiveConfig as AutoregressiveConfig
from diffusion.families.pretrained.config import DiffusersConfig as DiffusersConfig

# isort: on
from diffusion.process.config import ObjectiveConfig
from diffusion.process.samplers import COMPUTING, SamplingConfig, sampling_config, with_sampler

_FAMILIES = OneOf("family", classes_in(globals(), BaseFamilyConfig), default="ddpm")
FAMILIES: dict[str, type[BaseFamilyConfig]] = _FAMILIES.by_name
"""The configuration class of each family."""
FamilyConfig: TypeAlias = Annotated[BaseFamilyConfig, _FAMILIES]
"""The section ``model`` of a configuration."""


def training_conflict(model: FamilyConfig, training: ObjectiveConfig) -> str | None:
    """Describe why ``model`` cannot be trained with ``training``, and what to change; None if it can."""
    return find_conflict(model=model, training=training)


def sampling_conflict(model: FamilyConfig, sampling: SamplingConfig) -> str | None:
    """Describe a field of ``sampling`` that has no effect for the family of ``model``; None if there is none."""
    if "noise_levels" in model.abilities and sampling.sampler == "scheduler":
        return None  # beside what is trained, which it does not fit, imported versions are sampled
    actual, effective = sampling.model_dump(), effective_sampling(model, sampling).model_dump()
    for name, value in sorted(actual.items()):
        if value != effective.get(name):
            return f"sampling.{name} means nothing to model.family = {model.family}: leave it out"
    return None


def effective_sampling(model: FamilyConfig, sampling: SamplingConfig) -> SamplingConfig:
    """Reset the fields of ``sampling`` without effect for the family of ``model`` to their defaults."""
    if "noise_levels" not in model.abilities:
        return sampling_config(**sampling.model_dump(include=COMPUTING))
    if sampling.sampler == "scheduler" and "scheduler" not in model.abilities:
        return with_sampler(sampling, sampling_config().sampler)
    missing = names_without_effect("sampling", ("model.abilities",), model=model, sampling=sampling)
    return sampling.with_changes(dict.fromkeys(missing)) if missing else sampling


def shape_conflict(model: FamilyConfig, size: int, shapes: Sequence[Shape]) -> str | None:
    """Describe why ``model`` cannot be trained on ``shapes`` (H, W) of about ``size``² pixels; None if it can."""
    if [*shapes] == [(size, size)]:
        return None
    if model.one_shape is not None:
        return (
            f"model.family = {model.family} takes square images of one size alone, since {model.one_shape}: set "
            "ingest.fit to crop, or use the family ddpm or autoregressive"
        )
    if (low := model.low_resolution) is not None and (
        misfits := [shape for shape in shapes if any(side % (size // low) for side in shape)]
    ):
        return (
            f"model.low_resolution = {low} enlarges {size // low} times, which does not divide the sides of bucket "
            f"{shape_name(misfits[0])}: name multiples of it in ingest.buckets, or change model.low_resolution"
        )
    return None
