"""``params.yaml``: one configuration for the command line, the flows' forms, DVC and MLflow."""

import difflib
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from diffusion.common.config import LONGEST_NAME, Config, plain_name, unset
from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.gate import GateConfig
from diffusion.models.config import FAMILIES, FamilyConfig, ModelConfig
from diffusion.presets import PresetName, over
from diffusion.process.family_options import ineffective_option, training_conflict
from diffusion.process.samplers import SamplingConfig, describe_error, sampling_config
from diffusion.training.config import TrainingConfig

DEFAULT_PARAMS = Path("params.yaml")
"""The one file that may be missing: then everything has its default."""


class RegistryConfig(Config):
    """Where models are registered."""

    model: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the registered model and of the MLflow experiment; null: the data set's name, with that of a model.family
    other than ddpm, such as faces-vae."""
    approval: bool = Field(False, exclude_if=unset)
    """Whether a person must approve, in Prefect's UI, of what the gate would promote, before it becomes champion; after
    three days without an answer it does not."""


class SamplingBatchConfig(Config):
    """How generated images are written to S3, and how the work is spread."""

    format: Literal["png", "tar"] = "png"
    """png: a file for each image. tar: WebDataset shards, one for each chunk, with KEY.png and KEY.json of each."""
    chunk: int | None = Field(None, ge=1, le=2**14, exclude_if=unset)
    """Images in a chunk, which is one task, and one tar: whole compute batches (sampling.compute_batch), the same for
    all of a sampling batch. Null: four compute batches, and in larger batches as many as make 256 chunks, but no more
    than 4096 images."""
    runner: Literal["threads", "processes", "ray"] = "threads"
    """What draws the chunks: threads or processes of this machine, which share its cores, or a Ray cluster, where each
    has one core. That changes no bits."""
    workers: int = Field(1, ge=1)
    """How many chunks are drawn at the same time. One keeps four cores busy, or a GPU."""


class RetentionConfig(Config):
    """What ``darkroom gc`` leaves, besides all that a registered model version, the ledger or a kept batch leads to."""

    grace_hours: float = Field(24, ge=0)
    """Hours between the step in which something is set aside and the one in which its content goes, and for which
    whoever pushes a data set holds that up. More than the longest ingest takes; 0 only where nothing else runs."""
    data_versions: int = Field(10, ge=1)
    """The newest versions of each data set stay."""
    data_days: float = Field(90, ge=0)
    """Versions of a data set recorded within so many days stay."""
    run_days: float | None = Field(90, ge=0)
    """Runs that MLflow has heard of within so many days stay, here and there; null: all."""
    batch_days: float | None = Field(None, ge=0)
    """Finished sampling batches written within so many days stay, with their version's run and data; null: all."""
    unfinished_days: float = Field(7, ge=0)
    """Sampling batches, and uploads in parts, that have no end and to which nothing was added for so many days go."""
    cache_days: float | None = Field(30, ge=0)
    """Fetched shards and weights not used on this machine for so many days go; null: none."""

    @property
    def grace(self) -> timedelta:
        """``grace_hours`` as a span of time."""
        return timedelta(hours=self.grace_hours)


class Params(Config):
    """Everything that decides what comes out, and nothing about where servers are."""

    preset: PresetName = "fast"
    """Where the fields that are left out of model, training and sampling come from: diffusion/presets/NAME.yaml."""
    ingest: IngestConfig = IngestConfig()
    model: FamilyConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = sampling_config()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    sampling_batch: SamplingBatchConfig = SamplingBatchConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="before")
    @classmethod
    def _over_the_preset(cls, chosen: Any) -> Any:
        # What is no mapping, or names no preset, is for the fields to refuse.
        if isinstance(chosen, dict) and (name := chosen.get("preset", "fast")) in get_args(PresetName):
            return over(chosen, name)
        return chosen

    @model_validator(mode="after")
    def _means_something(self) -> "Params":
        if words := ineffective_option(self.model, "sampling", self.sampling):
            raise ValueError(words)
        return self

    @model_validator(mode="after")
    def _averages_are_kept(self) -> "Params":
        if self.evaluation.ema_stds and self.training.ema_stds is None:
            raise ValueError(
                "evaluation.ema_stds are made of what training.ema_stds keeps: set that, too, say to [0.05, 0.1]"
            )
        return self

    @model_validator(mode="after")
    def _guidance_is_trained(self) -> "Params":
        if self.sampling.guides and self.training.condition_dropout == 0:
            raise ValueError(
                "sampling.guidance leads away from what the network draws when told nothing, which it never learns "
                "with training.condition_dropout = 0: set that to 0.1, or leave guidance out"
            )
        return self

    @model_validator(mode="after")
    def _gate_finds_what_it_asks_for(self) -> "Params":
        if self.gate.class_loss is not None and not self.model.conditional:
            raise ValueError(
                "gate.class_loss is about classes, of which the model is told none (model.conditional = false): leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _model_and_training_agree(self) -> "Params":
        if words := training_conflict(self.model, self.training):
            raise ValueError(words)
        if isinstance(self.model, ModelConfig) and self.model.learned_variance and self.sampling.sampler != "ddpm":
            raise ValueError(
                f"model.learned_variance is what the sampler ddpm draws with, and sampling.sampler = "
                f"{self.sampling.sampler} passes it over: use ddpm, or leave model.learned_variance out"
            )
        return self

    @model_validator(mode="after")
    def _chunks_are_whole(self) -> "Params":
        chunk, batch = self.sampling_batch.chunk, self.sampling.compute_batch
        if chunk is not None and chunk % batch:
            raise ValueError(
                f"sampling_batch.chunk = {chunk} cuts compute batches of {batch} images (sampling.compute_batch), "
                f"which are drawn whole: use {-(-chunk // batch) * batch}, or leave it out"
            )
        return self

    @property
    def dataset_folder(self) -> Path:
        """Where the data set lies."""
        return dataset_folder(self.training.dataset)

    @property
    def run_folder(self) -> Path:
        """Where training writes."""
        return self.training.output or Path("runs") / self._name

    @property
    def report_folder(self) -> Path:
        """Where evaluation writes."""
        return Path("reports") / self._name

    @property
    def report_folders(self) -> list[Path]:
        """Where evaluation writes for the data set, whatever the family."""
        return [Path("reports") / self._name_of(family) for family in FAMILIES]

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return self.registry.model or self._name

    @property
    def _name(self) -> str:
        """The data set's, and the family's where it is another: each has runs, reports and a champion of its own."""
        return self._name_of(self.model.family)

    def _name_of(self, family: str) -> str:
        return self.training.dataset if family == "ddpm" else f"{self.training.dataset}-{family}"


def dataset_folder(name: str) -> Path:
    """Where the data set called ``name`` lies; raises UserError for a name that is no plain folder name."""
    try:
        return Path("data") / plain_name(name)
    except ValueError as error:
        raise UserError(f"data set name {name[:LONGEST_NAME]!r} {error}") from error


def registered(params: Params) -> str | None:
    """The model URI that ``model.autoencoder`` is; None if it is a path, or there is none."""
    uri = params.model.autoencoder if isinstance(params.model, ModelConfig) else None
    return uri if uri is not None and uri.startswith("models:/") else None


def registered_start(params: Params) -> str | None:
    """The model URI that ``training.init_from`` means; None if it is a path, or there is none."""
    start = params.training.init_from
    if start == "champion":
        return f"models:/{params.model_name}@champion"
    return start if start is not None and start.startswith("models:/") else None


def load_params(path: Path, overrides: list[str]) -> Params:
    """``path`` with ``key=value`` overrides (dotted keys, YAML values) applied and everything checked.

    Raises UserError that names the key and how to mend it.
    """
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as error:
        if path != DEFAULT_PARAMS:
            raise UserError(f"{path} not found: give the path of a configuration to --params") from error
        tree = {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a configuration file to --params") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as `training:`, not a {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {in_words(error)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override}: write it as key=value, for example training.batch_size=64")
    *sections, name = key.strip().split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from error
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
    node[name] = value


def in_words(error: ValidationError) -> str:
    """What is wrong with a configuration, and how to mend it."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location[:1] == ["sampling"]:
        return describe_error(first, first["loc"][1:])
    # After "model" stands the family by which its fields were read, which nobody wrote there.
    family = location.pop(1) if location[:1] == ["model"] and len(location) > 1 else None
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = list(FAMILIES[family].model_fields) if family else _fields_at(location[:-1])
        if family and (others := [name for name, other in FAMILIES.items() if location[-1] in other.model_fields]):
            return f"{where} is a field of model.family = {' and '.join(others)}, and this is {family}: leave it out"
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {where}: {hint}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    return f"{where}: {message}{got}" if where else message + got


def _fields_at(location: list[str]) -> list[str]:
    model: Any = Params
    for name in location:
        model = model.model_fields[name].annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, as MLflow's parameters want them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
