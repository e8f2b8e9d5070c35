"""``params.yaml``: one configuration for the command line, the flows' forms, DVC and MLflow."""

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, JsonValue, ValidationError, model_validator

from diffusion.api.config import MODELS, RUNS, STUDENT, ExperimentConfig
from diffusion.common.config import Config, is_unset
from diffusion.common.errors import MAX_QUOTED, UserError
from diffusion.common.files import digest_of
from diffusion.common.parsing import parse_yaml, read_yaml
from diffusion.families.config import FAMILIES, FamilyConfig, ModelConfig
from diffusion.presets import PresetName, complete_from_preset, preset
from diffusion.training.config import MIN_PRODIGY_RATE, earlier_runs

DURATIONS = ("training.images", "training.minutes")
"""Fields of which one replaces the other."""
SECTIONS = ("model", "training")
"""Sections that may vary; data, sampling and evaluation are the same for all, so that metrics are comparable."""
FIXED = ("training.dataset", "training.output", "model.family")
SWEEPS = "sweeps"
"""Folder in a report folder with a folder for each combination of a sweep, and in runs/ with one for each model."""
SHARED: Mapping[str, set[str]] = {
    "training": {
        *("dataset", "images", "minutes", "flip", "seed", "precision", "device", "compile", "checkpoints", "keep"),
        *("cpu_threads", "workers", "prefetch", "cache_bytes", "stream_bytes", "window"),
    },
    "sampling": {"compute_batch", "precision", "device"},
}
"""Settings shared by all families: data, budget and compute; the rest has each family's defaults."""


class RegistryConfig(Config):
    """Model registry."""

    model: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the registered model and of the MLflow experiment; null: the data set's name, with the family as suffix
    unless it is ddpm, such as faces-vae."""
    approval: bool = Field(False, exclude_if=is_unset)
    """Whether a person must approve each promotion in Prefect's UI; without an answer within three days the version is
    held."""


class SamplingBatchConfig(Config):
    """Format of sampling batches on S3, and how the work is distributed."""

    format: Literal["png", "tar"] = "png"
    """png: one file per image. tar: one WebDataset shard per chunk, with KEY.png and KEY.json per image."""
    chunk: int | None = Field(None, ge=1, le=2**14, exclude_if=is_unset)
    """Images per chunk, the work of one worker and one tar; a multiple of sampling.compute_batch, constant within a
    sampling batch. Null: four compute batches; in larger batches more, for 256 chunks of at most 4096 images."""
    runner: Literal["threads", "processes", "ray"] = "threads"
    """What generates chunks: threads or processes of this machine, which share its cores, or a Ray cluster with one
    core per chunk, and one GPU if sampling.device is one. Does not change the images."""
    workers: int = Field(1, ge=1)
    """Number of chunks generated concurrently. One keeps four cores, or a GPU, busy."""


class RetentionConfig(Config):
    """What ``darkroom gc`` keeps, besides everything a registered version, the ledger or a retained batch needs."""

    grace_hours: float = Field(24, ge=0)
    """Hours between setting something aside and deleting its content; a data set push in progress delays deletion for
    as long. Must exceed the longest ingest; 0 only if nothing else runs."""
    data_versions: int = Field(10, ge=1)
    """Number of newest versions of each data set that are kept."""
    data_days: float = Field(90, ge=0)
    """Data set versions recorded within this many days are kept."""
    run_days: float | None = Field(90, ge=0)
    """Runs updated in MLflow within this many days are kept, in MLflow and on this machine; null: all."""
    batch_days: float | None = Field(None, ge=0)
    """Finished sampling batches written within this many days are kept, with their model's run and data; null: all."""
    unfinished_days: float = Field(7, ge=0)
    """Unfinished sampling batches, uploads and ingests on Ray without progress for this many days are deleted."""
    cache_days: float | None = Field(30, ge=0)
    """Cached shards and weights not used on this machine for this many days are deleted; null: never."""

    @property
    def grace(self) -> timedelta:
        """``grace_hours`` as a timedelta."""
        return timedelta(hours=self.grace_hours)


class RetrainingConfig(Config):
    """What ``darkroom retrain`` begins with, unless training.init_from says it."""

    warm_start: bool = True
    """Whether a retraining continues the champion's training, with its optimizer state, where network and data allow,
    and versions keep that state. False: each begins from nothing, and new versions have none."""
    length: float = Field(0.25, gt=0, le=1)
    """Length of a warm start, as a share of training.images or training.minutes, and of training.warmup_images."""
    learning_rate: float = Field(0.5, gt=0, le=1)
    """Peak learning rate of a warm start, as a share of training.learning_rate. The whole rate made the demo's
    champion worse in a quarter of its images; short trainings gained as much at half of it (benchmarks/README.md)."""
    fresh_every: int | None = Field(7, ge=2)
    """One in this many retrainings in a row begins from nothing; null: none for this reason."""
    fresh_after_held: int | None = Field(3, ge=1)
    """After this many warm starts in a row that the gate did not promote, the next one begins from nothing; null: none
    for this reason."""


class MonitorConfig(Config):
    """When ``darkroom monitor`` requests a retraining."""

    false_alarms: float = Field(0.05, gt=0, lt=1)
    """Probability, over all monitoring of a champion, that one is requested although the images did not change."""


class Params(ExperimentConfig):
    """All settings that determine results; server addresses come from the environment."""

    registry: RegistryConfig = RegistryConfig()
    sampling_batch: SamplingBatchConfig = SamplingBatchConfig()
    retention: RetentionConfig = RetentionConfig()
    monitor: MonitorConfig = MonitorConfig()
    retraining: RetrainingConfig = RetrainingConfig()

    @model_validator(mode="after")
    def _chunks_hold_whole_batches(self) -> Self:
        chunk, batch = self.sampling_batch.chunk, self.sampling.compute_batch
        if chunk is not None and chunk % batch:
            raise ValueError(
                f"sampling_batch.chunk = {chunk} cuts compute batches of {batch} images (sampling.compute_batch), "
                f"which cannot be split: use {-(-chunk // batch) * batch}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _warm_starts_can_be_configured(self) -> Self:
        training, share = self.training, self.retraining.learning_rate
        is_warm = self.may_continue and training.init_from is None
        if is_warm and training.optimizer == "prodigy" and training.learning_rate * share < MIN_PRODIGY_RATE:
            raise ValueError(
                f"training.optimizer = prodigy finds the learning rate, and in warm starts training.learning_rate = "
                f"{training.learning_rate:g} times retraining.learning_rate = {share:g} multiplies it: set both to 1"
            )
        return self

    @property
    def report_folders(self) -> list[Path]:
        """Report folders of the data set: of families, students, other runs, combinations of sweeps, single models."""
        folders = [Path("reports", name) for name in self._run_names]
        folders += [path for folder in folders for path in sorted((folder / RUNS).glob("*/"))]
        return folders + [
            path for folder in folders for kind in (MODELS, SWEEPS) for path in sorted((folder / kind).glob("*/"))
        ]

    @property
    def run_folders(self) -> list[Path]:
        """Default folders of the data set's trainings: of families, their students, sweeps, and those set aside."""
        folders = [Path("runs", name) for name in self._run_names]
        sweeps = [Path("runs", SWEEPS, name) for name in dict.fromkeys([self.model_name, *self._run_names])]
        folders += [path for folder in folders for path in earlier_runs(folder)]
        return folders + [path for folder in sweeps for path in sorted(folder.glob("*/"))]

    @property
    def _run_names(self) -> list[str]:
        return [self.run_name(family) + suffix for family in FAMILIES for suffix in ("", STUDENT)]

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return self.registry.model or self.run_name()

    @property
    def champion(self) -> str:
        """URI of the champion of the registered model."""
        return f"models:/{self.model_name}@champion"

    @property
    def may_continue(self) -> bool:
        """Whether a later retraining may continue what is trained, so that its training state is kept."""
        training = self.training
        is_own = training.init_from is None or training.warm_start
        is_whole = training.student is None and training.adapter is None and not self.model.needs_initial_model
        return self.retraining.warm_start and is_own and is_whole and "initial_weights" in self.model.abilities

    def adapt_to_version(self, model: FamilyConfig, name: str) -> Self:
        """Copy to evaluate and promote a version of the registered model ``name`` by itself: see ``adapt_to_model``."""
        registry = self.registry.model_copy(update={"model": name})
        return self.adapt_to_model(model).model_copy(update={"registry": registry})


def registered_autoencoder(params: Params) -> str | None:
    """Model URI in ``model.autoencoder``; None if it is a path or unset."""
    uri = params.model.autoencoder if isinstance(params.model, ModelConfig) else None
    return uri if uri is not None and uri.startswith("models:/") else None


def registered_initial_weights(params: Params) -> str | None:
    """Model URI in ``training.init_from``; None if it is a path or unset."""
    if (start := params.training.init_from) == "champion":
        return params.champion
    return start if start is not None and start.startswith("models:/") else None


def load_params(path: Path, overrides: list[str], options: Mapping[str, tuple[str, Any]] = {}) -> Params:
    """Load ``path`` with overrides; see ``load_with_origins``."""
    return load_with_origins(path, overrides, options)[0]


def load_with_origins(
    path: Path, overrides: list[str], options: Mapping[str, tuple[str, Any]] = {}
) -> tuple[Params, dict[str, str]]:
    """Load ``path`` with overrides; also returns which of them each field is from, by dotted key.

    Args:
        path: Configuration file; the default one may be missing, which means all defaults.
        overrides: ``key=value`` of ``--set``, with dotted keys and YAML values.
        options: Option and value of other options of the command line that set a field, by dotted key.

    Raises:
        UserError: For an invalid configuration, with the file or the option to change.
    """
    tree = _read(path)
    origins = dict.fromkeys(flatten_sections(tree), str(path))
    assignments = [_parse_override(override) for override in overrides]
    assignments += [(f"{option} {value}", key, value) for key, (option, value) in options.items()]
    if {key for _, key, value in assignments if value is not None} >= set(DURATIONS):
        raise UserError(f"--set {' --set '.join(DURATIONS)}: give one of the two, as each determines the other")
    for option, key, value in assignments:
        assign(tree, key, value, option)
        keys = {key, *DURATIONS} if key in DURATIONS else {key}
        origins = {field: origin for field, origin in origins.items() if field not in keys}
        origins |= {field: option.partition("=")[0].partition(" ")[0] for field in flatten_sections(_nest(key, value))}
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{_find_source(error, path, assignments)}: {Params.describe_invalid(error)}") from error
    preset = flatten_sections(complete_from_preset(tree, params.preset)).keys() - flatten_sections(tree).keys()
    origins |= dict.fromkeys(preset, f"preset {params.preset}")
    return params, {key: origins.get(key, "default") for key in flatten_sections(params.model_dump(mode="json"))}


def override_keys(overrides: Sequence[str]) -> list[str]:
    """Dotted keys of the fields that ``key=value`` of ``--set`` set."""
    return [field for override in overrides for field in flatten_sections(_nest(*_parse_override(override)[1:]))]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path) or {}
    except FileNotFoundError as error:
        if path != Path("params.yaml"):
            raise UserError(f"{path} not found: give the path of a configuration to --params") from error
        tree = {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a configuration file to --params") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not plain YAML ({error}): mend it, or begin with a new one by `darkroom init`"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as `training:`, not a {type(tree).__name__}")
    return tree


def _parse_override(override: str) -> tuple[str, str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override[:MAX_QUOTED]}: write it as key=value, for example training.batch_size=64")
    try:
        return f"--set {override[:MAX_QUOTED]}", key.strip(), parse_yaml(text)
    except ValueError as error:
        raise UserError(
            f"--set {key}: {text[:MAX_QUOTED]!r} is not a value in plain YAML ({error}): write it as in params.yaml"
        ) from error


def _nest(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    assign(tree, key, value, key)
    return tree


def _find_source(error: ValidationError, path: Path, assignments: list[tuple[str, str, Any]]) -> str:
    """Source of an invalid configuration: the options that set its key, all options if the file alone is valid.

    With all options, the file is named as well if the message names one of its fields.
    """
    location = [str(part) for part in error.errors()[0]["loc"]]
    if location[:1] == ["model"]:
        del location[1:2]
    dotted_key = f"{'.'.join(location)}."
    options = [option for option, key, _ in assignments if dotted_key.startswith(f"{key}.")]
    if not options and assignments:
        with suppress(ValidationError):
            tree = _read(path)
            Params.model_validate(tree)
            options = [option for option, *_ in assignments]
            message, set_keys = Params.describe_invalid(error), {key for _, key, _ in assignments}
            if any(re.search(rf"\b{re.escape(key)}\b", message) for key in flatten_sections(tree).keys() - set_keys):
                options = [f"{path} with", *options]
    return " ".join(dict.fromkeys(options)) or str(path)


def assign(tree: dict[str, Any], key: str, value: Any, option: str) -> None:
    """Set the value of a dotted ``key`` in ``tree``; raises UserError that names the ``option`` it is from.

    A duration replaces the other one of DURATIONS.
    """
    *sections, name = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"{option}: {section} is a value, not a section")
    if key in DURATIONS and value is not None:
        tree.pop("minutes" if name == "images" else "images", None)
    tree[name] = value


class Combination(Config):
    """A combination of settings, and the resulting configuration."""

    settings: dict[str, JsonValue]
    params: Params
    folder: Path
    digest: str
    """Digest of the parsed model and training sections."""


def parse_over(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``key=value,value`` into YAML values by dotted key; raises UserError for malformed or repeated keys."""
    over: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equal, text = argument.partition("=")
        values: list[Any] = []
        with suppress(ValueError):
            values = parse_yaml(f"[{text}]") if equal else []
        if not values or not key.strip():
            example = "training.learning_rate=1e-3,4e-3"
            raise UserError(f"--over {argument[:MAX_QUOTED]}: write it as key=value,value, for example {example}")
        if key.strip() in over:
            raise UserError(f"--over {argument}: {key.strip()} is given twice; write all its values after one --over")
        over[key.strip()] = values
    return over


def combinations(params: Params, over: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """Every combination of the values in ``over``; raises UserError for an invalid key or value."""
    if not over:
        raise UserError("nothing to vary: say what with --over training.learning_rate=1e-3,4e-3")
    for key in over:
        if key.partition(".")[0] not in SECTIONS or key in FIXED:
            raise UserError(
                f"--over {key}: data, sampling and evaluation must be the same for all; vary fields of "
                f"{' and '.join(SECTIONS)}, but for {', '.join(FIXED)}"
            )
    if "training.guide" in over and not params.sampling.autoguides:
        raise UserError(
            "--over training.guide: runs are ranked as sampling says, without the guide: set sampling.autoguidance, too"
        )
    points = [
        _make_combination(params, dict(zip(over, values, strict=True))) for values in itertools.product(*over.values())
    ]
    # By parsed value: 1e-3 equals 0.001.
    if len({point.digest for point in points}) < len(points):
        raise UserError("--over gives the same value twice: leave one of them out")
    return points


def _make_combination(params: Params, settings: dict[str, Any]) -> Combination:
    tree = params.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        assign(tree, key, value, f"--over {key}")
    try:
        variant = Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"--over with {format_settings(settings)}: {Params.describe_invalid(error)}") from error
    # With the digest, so that settings with equal abbreviations have different folders.
    digest = digest_of({name: getattr(variant, name).model_dump(mode="json") for name in SECTIONS})[:8]
    name = f"{re.sub(r'[^0-9A-Za-z.=,_-]+', '-', format_settings(settings))[:80]}-{digest}"
    training = variant.training.model_copy(update={"output": Path("runs", SWEEPS, params.model_name, name)})
    # Guidance is chosen for the model that is registered, and none of these is. The best of many looks too good on the
    # images that it was chosen by: none is among those of the gate, should it be trained to be registered.
    evaluation = variant.evaluation.model_copy(update={"guidance": None, "seed": variant.evaluation.seed + 3})
    variant = variant.model_copy(update={"training": training, "evaluation": evaluation})
    return Combination(settings=settings, params=variant, folder=params.report_folder / SWEEPS / name, digest=digest)


def format_settings(settings: Mapping[str, object]) -> str:
    """Abbreviated settings, such as ``learning_rate=0.001,width=32``."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def family_variants(params: Params, names: Sequence[str]) -> dict[str, Params]:
    """Configurations of the families in ``names``, by name; of all that train from scratch if there are none.

    The family of ``params`` keeps ``params``; the others have their own defaults with the same images, budget and
    evaluation. Raises UserError for an unknown or repeated family, and for settings that families cannot share.
    """
    names = names or [name for name, kind in FAMILIES.items() if not kind.needs_initial_model]
    if unknown_families := [family for family in names if family not in FAMILIES]:
        raise UserError(f"there is no family {unknown_families[0]!r}: there is {', '.join(FAMILIES)}")
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--family {' --family '.join(names)}: name two families or more, each once")
    for field, value in (("training.output", params.training.output), ("registry.model", params.registry.model)):
        if value is not None:
            raise UserError(f"{field} = {value} is one place, and each family needs its own: leave it out")
    if params.model.low_resolution is not None:
        raise UserError("model.low_resolution makes a super-resolution model, and `compare` ranks generative ones")
    sections: dict[str, Any] = {name: getattr(params, name).model_dump(include=SHARED[name]) for name in SHARED}
    sections |= {"ingest": params.ingest.model_dump(), "evaluation": params.evaluation.model_dump(exclude={"ema_stds"})}
    variants = {name: Params.model_validate(sections | {"model": {"family": name}}) for name in names}
    return variants | {name: params for name in names if name == params.model.family}


def flatten_sections(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, for MLflow parameters."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten_sections(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def params_schema() -> dict[str, Any]:
    """Return the JSON schema of ``params.yaml``, by which editors complete and check it."""
    schema = _use_any_of(Params.model_json_schema())
    defaults = {"family": {"ddpm"}, "sampler": {preset(name)["sampling"]["sampler"] for name in get_args(PresetName)}}
    for kind in schema["$defs"].values():
        for tag, kinds in defaults.items():
            if kind["properties"].get(tag, {}).get("const", next(iter(kinds))) not in kinds:
                kind["required"] = [*kind.get("required", ()), tag]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "params.schema.json", **schema}


def _use_any_of(node: Any) -> Any:
    """Replace oneOf: sections without the field that tells their kind are valid for several kinds."""
    if isinstance(node, dict):
        return {"anyOf" if name == "oneOf" else name: _use_any_of(value) for name, value in node.items()}
    return [_use_any_of(item) for item in node] if isinstance(node, list) else node
