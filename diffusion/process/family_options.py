"""Checks of the sampling and training options against the family of models."""

from typing import Literal

from diffusion.common.config import Config
from diffusion.models.config import FamilyConfig, ModelConfig
from diffusion.process.objective_config import ObjectiveConfig
from diffusion.process.samplers import SamplingConfig, sampling_config

COMPUTING = {"compute_batch", "precision", "device"}
"""Fields of the section ``sampling`` that have an effect for all families."""


def ineffective_option(model: FamilyConfig, section: Literal["sampling", "training"], given: Config) -> str | None:
    """Describe a field that is set in ``section`` without effect for the family of ``model``; None if there is none."""
    if section == "training":
        names, default = set(model.ineffective_fields.get(section, ())), type(given)()
    else:
        names, default = (
            set() if model.samples_in_steps else type(given).model_fields.keys() - COMPUTING,
            sampling_config(),
        )
    for name in sorted(names):
        if getattr(given, name) != getattr(default, name, None):
            return f"{section}.{name} means nothing to model.family = {model.family}: leave it out"
    return None


def effective_sampling(model: FamilyConfig, sampling: SamplingConfig) -> SamplingConfig:
    """Reset the fields of ``sampling`` without effect for the family of ``model`` to their defaults."""
    return sampling if model.samples_in_steps else sampling_config(**sampling.model_dump(include=COMPUTING))


def training_conflict(model: FamilyConfig, training: ObjectiveConfig) -> str | None:
    """Describe why ``model`` cannot be trained with ``training``, and what to change; None if it can."""
    if problem := ineffective_option(model, "training", training):
        return problem
    if not isinstance(model, ModelConfig) or not model.learned_variance:
        return None
    if training.timestep_sampling != "uniform":
        return (
            "model.learned_variance is learned at whole steps of the schedule, and training.timestep_sampling = "
            f"{training.timestep_sampling} samples levels between them: use uniform, or leave model.learned_variance "
            "out"
        )
    if training.learned_uncertainty:
        return (
            "model.learned_variance is learned from a sum over all levels, of which training.learned_uncertainty would "
            "divide each by another number: leave one out"
        )
    return None
