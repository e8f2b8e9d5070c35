"""Configuration of everything between images and an evaluated model, and the folders where its results lie.

``params.yaml`` is this, and what operations add (``flows.config.Params``).
"""

from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator

from diffusion.common.config import Config, dataset_folder
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.curation.config import CurationConfig
from diffusion.data.ingest.config import IngestConfig
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.gate import GateConfig
from diffusion.families.config import (
    FAMILIES,
    FamilyConfig,
    effective_sampling,
    sampling_conflict,
    shape_conflict,
    training_conflict,
)
from diffusion.families.ddpm.config import ModelConfig
from diffusion.presets import PresetName, complete_from_preset
from diffusion.process.samplers import SamplingConfig, describe_error, sampling_config
from diffusion.training.config import DistillationConfig, TrainingConfig

MODELS = "models"
"""Folder in a report folder, with a folder for each model file that was evaluated by itself."""
RUNS = "runs"
"""Folder in the data set's report folder, with a folder for each training in a run folder of another name."""
STUDENT = "-student"
"""Suffix of the folders of a student, which has its own beside its teacher's."""


class ExperimentConfig(Config):
    """All settings that determine a model and its evaluation."""

    preset: PresetName = "fast"
    """Source of the fields left out of model, training and sampling: diffusion/presets/NAME.yaml."""
    ingest: IngestConfig = IngestConfig()
    curation: CurationConfig = CurationConfig()
    model: FamilyConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = sampling_config()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    distillation: DistillationConfig = DistillationConfig()

    @classmethod
    def parse(cls, sections: dict[str, Any]) -> Self:
        """Validate ``sections``; raises UserError that names the field and the fix."""
        try:
            return cls.model_validate(sections)
        except ValidationError as error:
            raise UserError(cls.describe_invalid(error)) from error

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, tree: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        # Anything but a mapping with a known preset fails in the validation of the fields.
        if isinstance(tree, dict) and (name := tree.get("preset", "fast")) in get_args(PresetName):
            tree = complete_from_preset(tree, name)
        return validate(tree)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if conflict := sampling_conflict(self.model, self.sampling) or training_conflict(self.model, self.training):
            raise ValueError(conflict)
        if self.ingest.fit == "bucket":
            shapes = self.ingest.shapes if self.ingest.buckets else []
            if conflict := shape_conflict(self.model, self.ingest.size, shapes):
                raise ValueError(conflict)
        if self.evaluation.ema_stds and self.training.ema_stds is None:
            raise ValueError("evaluation.ema_stds needs the snapshots that training.ema_stds saves: set it to [0.05]")
        if self.sampling.guides and self.training.condition_dropout == 0:
            raise ValueError(
                "sampling.guidance needs an unconditional prediction, which the network never learns "
                "with training.condition_dropout = 0: set that to 0.1, or leave guidance out"
            )
        if self.sampling.autoguides and self.training.guide is None and self.training.init_from is None:
            raise ValueError(
                "sampling.autoguidance leads away from a guide, which training.guide = null leaves out: set that to "
                "0.25, or leave autoguidance out"
            )
        if isinstance(self.model, ModelConfig) and self.model.variance != "fixed" and self.sampling.sampler != "ddpm":
            raise ValueError(
                f"model.variance = learned_range is used by the sampler ddpm alone, and sampling.sampler = "
                f"{self.sampling.sampler} ignores it: use ddpm, or leave model.variance out"
            )
        return self

    @property
    def dataset_folder(self) -> Path:
        """Folder of the data set."""
        return dataset_folder(self.training.dataset)

    @property
    def run_folder(self) -> Path:
        """Folder that training writes to."""
        folder = self.training.output or Path("runs", self.run_name())
        return folder.with_name(folder.name + self._student)

    @property
    def dataset_report_folder(self) -> Path:
        """Folder of the reports on the data set's versions and its usual training; all others lie below it."""
        return Path("reports", self.run_name() + self._student)

    @property
    def report_folder(self) -> Path:
        """Folder that evaluation writes to."""
        return self.run_report_folder(self.run_folder)

    def run_report_folder(self, run: Path) -> Path:
        """Folder for the evaluation of the training in the folder ``run``: no other replaces its report."""
        usual = self.dataset_report_folder
        return usual if run.name == usual.name else usual / RUNS / run.name

    def model_report_folder(self, sha256: str) -> Path:
        """Folder for the evaluation of one model file with this digest, below the training's."""
        return self.report_folder / MODELS / sha256[:8]

    def run_name(self, family: str | None = None) -> str:
        """Name of the data set, with the ``family`` as suffix unless it is ddpm: each family has its own runs."""
        family = family or self.model.family
        return self.training.dataset if family == "ddpm" else f"{self.training.dataset}-{family}"

    @property
    def _student(self) -> str:
        return "" if self.training.student is None else STUDENT

    def resolve_sampling(self, model: FamilyConfig) -> SamplingConfig:
        """Sampling of a model file, whatever the section model: what the preset for such a model says.

        Fields in which this configuration differs from the preset for its own model have its values.
        """
        preset = self.preset if model.family == "ddpm" else "fast"
        usual = {name: field.default for name, field in type(self.sampling).model_fields.items()}
        usual |= complete_sampling(self.model, {}, self.preset).model_dump()
        fields = {name: value for name, value in self.sampling.model_dump().items() if value != usual[name]}
        return effective_sampling(model, complete_sampling(model, fields, preset))

    def adapt_to_model(self, model: FamilyConfig) -> Self:
        """Copy to evaluate a model file by itself.

        Sampling is as its family samples. No guidance is tried: its file does not change, and it has its own, or none.
        """
        evaluation = self.evaluation.model_copy(update={"guidance": None, "ema_stds": ()})
        return self.model_copy(update={"evaluation": evaluation, "sampling": self.resolve_sampling(model)})

    @classmethod
    def describe_invalid(cls, error: ValidationError) -> str:
        """Describe the first error of an invalid configuration: the key, the problem and the fix."""
        detail = error.errors()[0]
        location = [str(part) for part in detail["loc"]]
        if location[:1] == ["sampling"]:
            return describe_error(detail, detail["loc"][1:])
        # Pydantic inserts the family, the tag of the union, after "model".
        family = location.pop(1) if location[:1] == ["model"] and len(location) > 1 else None
        key = ".".join(location)
        if detail["type"] != "extra_forbidden":
            return describe_validation_error(detail, key)
        section: Any = FAMILIES[family] if family else cls
        for name in () if family else location[:-1]:
            section = section.model_fields[name].annotation
        families = [name for name, config_class in FAMILIES.items() if location[-1] in config_class.model_fields]
        if family and families:
            names = " and ".join(families)
            other = f"replace the section by --set 'model={{family: {family}}}'"
            return f"{key} is a field of model.family = {names}, and this is {family}: leave it out, or {other}"
        if len(location) == 1:
            sections = {name: getattr(field.annotation, "model_fields", ()) for name, field in cls.model_fields.items()}
            if homes := [f"{name}.{key}" for name, names in sections.items() if key in names]:
                return f"unknown key {key}: did you mean {' or '.join(homes)}?"
        return describe_validation_error(detail, key, getattr(section, "model_fields", ()))


def complete_sampling(model: FamilyConfig, fields: dict[str, Any], preset: PresetName = "fast") -> SamplingConfig:
    """Complete ``fields`` of the section ``sampling`` from the ``preset`` for ``model``."""
    sections = complete_from_preset({"model": model.model_dump(), "sampling": fields}, preset)
    return sampling_config(**sections["sampling"])
