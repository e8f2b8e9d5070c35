"""Configurations of other trainers: what of them is taken over, and the names of the rest.

A class for each trainer, listed in ``TRAINERS``. Files are parsed as data and never run.
"""

import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusion.common.errors import UserError
from diffusion.common.parsing import parse_json, parse_yaml
from diffusion.data.sources.trainer_handlers import (
    TAGS,
    Handler,
    adapter,
    attribute,
    convert,
    setting,
    skip,
    take_adapter_kind,
    take_buckets,
    take_decay,
    take_decomposition,
    take_epochs,
    take_extension,
    take_factor,
    take_max_epochs,
    take_module,
    take_optimizer,
    take_prefix,
    take_resolution,
)
from diffusion.data.sources.trainer_settings import TrainerConfig

MAX_BYTES = 2**20
"""Maximum size of a configuration file."""


class Trainer(ABC):
    """A trainer whose configuration is read."""

    name: ClassVar[str]
    handlers: ClassVar[Mapping[str, Handler]]
    """What is done with a value, by the last part of its name."""

    @abstractmethod
    def recognises(self, tree: Any, suffix: str) -> bool:
        """Return whether a file with this suffix and content is one of this trainer."""

    @abstractmethod
    def read(self, tree: Any, path: Path, result: TrainerConfig) -> None:
        """Fill ``result``."""

    def take(
        self, result: TrainerConfig, values: Mapping[str, Any], where: str = "", handlers: Mapping[str, Handler] = {}
    ) -> None:
        """Take over ``values`` as the handlers say, by default this trainer's; the names of the others are listed."""
        for key, value in values.items():
            if value is None or value == "":
                continue
            if (handler := (handlers or self.handlers).get(key)) is None:
                if value is not False and value != [] and value != {}:
                    result.leave(f"{where}{key}", value)
                continue
            try:
                handler(result, value)
            except (ValueError, TypeError, KeyError, OverflowError):
                result.leave(f"{where}{key}", value)


class Kohya(Trainer):
    """sd-scripts of kohya: ``dataset_config.toml``, or the arguments of a training in TOML, or JSON of its GUI."""

    name = "sd-scripts (kohya)"
    handlers: ClassVar = {
        "resolution": take_resolution,
        "max_resolution": take_resolution,
        "enable_bucket": take_buckets,
        "batch_size": attribute("micro_batch", int),
        "train_batch_size": attribute("micro_batch", int),
        "gradient_accumulation_steps": attribute("accumulation", int),
        "max_train_steps": attribute("steps", int),
        "max_train_epochs": take_max_epochs,
        "epoch": take_epochs,
        "lr_warmup_steps": attribute("warmup_steps", int),
        "learning_rate": setting("training.learning_rate"),
        "unet_lr": setting("training.learning_rate"),
        "max_grad_norm": setting("training.max_grad_norm"),
        "seed": setting("training.seed", int),
        "optimizer_type": take_optimizer,
        "lr_scheduler": take_decay,
        "network_module": take_module,
        "network_args": skip,
        "network_dim": adapter("rank", int),
        "network_alpha": adapter("alpha"),
        "pretrained_model_name_or_path": attribute("base", str),
        "caption_extension": take_extension,
        "caption_prefix": take_prefix,
        "class_tokens": setting("ingest.default_caption", str),
        "shuffle_caption": TAGS["shuffle"],
        "keep_tokens": TAGS["keep"],
        "caption_tag_dropout_rate": TAGS["dropout"],
        "caption_dropout_rate": setting("training.condition_dropout"),
        "flip_aug": setting("training.flip", bool),
    }

    def recognises(self, tree: Any, suffix: str) -> bool:
        """Return whether it has data sets, or a folder to train on."""
        names = {"datasets", "train_data_dir", "dataset_config", "network_dim", "pretrained_model_name_or_path"}
        return isinstance(tree, dict) and (suffix == ".toml" or bool(names & tree.keys()))

    def read(self, tree: Any, path: Path, result: TrainerConfig) -> None:
        """Read the data sets with what is above them, and the arguments, in whatever section they stand."""
        general, sets = _section(tree.get("general")), _sections(tree.get("datasets"))
        arguments = {key: value for key, value in tree.items() if key not in ("general", "datasets")}
        for key, value in [*arguments.items()]:
            if isinstance(value, dict):
                arguments |= arguments.pop(key)
        folder = arguments.pop("train_data_dir", None)
        if isinstance(folder, str) and folder:
            result.folders[folder], result.repeats_in_names = 1, True
        self.take(result, arguments)
        self._take_network(result, arguments.get("network_args"))
        several = len(sets) > 1 and len({json.dumps(each.get("resolution"), default=str) for each in sets}) > 1
        for number, each in enumerate(sets):
            options = general | {key: value for key, value in each.items() if key != "subsets"}
            if several and number:
                result.leave(f"datasets[{number}].resolution", each.get("resolution", ""))
                options.pop("resolution", None)
            subsets = _sections(each.get("subsets"))
            words = {str(subset.get("class_tokens", "")) for subset in subsets if not subset.get("is_reg")}
            listed = set[str]()
            for place, subset in enumerate(subsets):
                where = f"subsets[{place}]."
                repeats = subset.pop("num_repeats", options.get("num_repeats", 1))
                folder = subset.pop("image_dir", None)
                if subset.pop("is_reg", False):
                    result.leave(f"{where}is_reg", f"images of regularization in {folder}")
                    continue
                if str(folder) in listed:  # sd-scripts uses the first of a data set alone
                    result.leave(f"{where}image_dir", f"{folder} is listed before in its data set")
                    continue
                listed.add(str(folder))
                _add_folder(result, folder, repeats, where)
                if len(words) > 1 and (word := subset.pop("class_tokens", None)):
                    result.leave(f"{where}class_tokens", f"{word}: name its folder 1_{word}, and see ingest.folders")
                # What is nearer to the folder counts.
                self.take(result, {key: value for key, value in options.items() if key not in subset})
                self.take(result, subset, where)
        result.left.pop("num_repeats", None)

    def _take_network(self, result: TrainerConfig, arguments: Any) -> None:
        """Take the arguments of the network, texts such as algo=lokr, as a list or as the text of a command line."""
        words = arguments.split() if isinstance(arguments, str) else arguments
        pairs = (word.partition("=") for word in words if isinstance(word, str)) if isinstance(words, list) else ()
        ordered = sorted(pairs, key=lambda pair: pair[0])  # the algorithm is known before what is of it
        values = {name: value.strip("\"'") or "no value" for name, _, value in ordered}
        handlers = {"algo": take_adapter_kind, "factor": take_factor, "dora_wd": take_decomposition}
        self.take(result, values, "network_args.", handlers)


class AiToolkit(Trainer):
    """ai-toolkit of Ostris: a job in YAML or JSON."""

    name = "ai-toolkit"
    handlers: ClassVar = {
        "resolution": take_resolution,
        "trigger_word": take_prefix,
        "linear": adapter("rank", int),
        "linear_alpha": adapter("alpha"),
        "lokr_factor": take_factor,
        "optimizer": take_optimizer,
        "lr_scheduler": take_decay,
        "batch_size": attribute("micro_batch", int),
        "steps": attribute("steps", int),
        "gradient_accumulation_steps": attribute("accumulation", int),
        "gradient_accumulation": attribute("accumulation", int),
        "lr": setting("training.learning_rate"),
        "max_grad_norm": setting("training.max_grad_norm"),
        "name_or_path": attribute("base", str),
        "caption_ext": take_extension,
        "default_caption": setting("ingest.default_caption", str),
        "caption_dropout_rate": setting("training.condition_dropout"),
        "shuffle_tokens": TAGS["shuffle"],
        "keep_tokens": TAGS["keep"],
        "token_dropout_rate": TAGS["dropout"],
        "flip_x": setting("training.flip", bool),
        "buckets": take_buckets,
        "gradient_checkpointing": setting("training.gradient_checkpointing", bool),
        "device": skip,
        "type": skip,
        "training_folder": skip,
    }

    def recognises(self, tree: Any, suffix: str) -> bool:
        """Return whether it has a job with a process."""
        return isinstance(tree, dict) and "process" in _section(tree.get("config"))

    def read(self, tree: Any, path: Path, result: TrainerConfig) -> None:
        """Read the first process of the job."""
        process, *others = _sections(tree["config"]["process"]) or [{}]
        if others:
            result.leave("config.process", f"{len(others)} more processes")
        for number, each in enumerate(_sections(process.pop("datasets", None))):
            where, repeats = f"datasets[{number}].", each.pop("num_repeats", 1)
            folder = each.pop("folder_path", None) or each.pop("dataset_path", None)
            if each.pop("is_reg", False):
                result.leave(f"{where}is_reg", f"images of regularization in {folder}")
                continue
            _add_folder(result, folder, repeats, where)
            sizes = each.pop("resolution", None)
            if isinstance(sizes, list) and sizes:
                if len(sizes) > 1:
                    result.leave(f"{where}resolution", f"{sizes}: images are stored in one size, the first")
                sizes = sizes[0]
            self.take(result, ({} if "ingest.size" in result.settings else {"resolution": sizes}) | each, where)
        for name in ("network", "train", "model", "save", "sample"):
            if (section := process.pop(name, None)) is None:
                continue
            if name in ("save", "sample"):
                result.leave(name, "when to save, and what to sample")
            else:
                if name == "network":
                    self._take_kind(result, _section(section))
                self.take(result, _section(section), f"{name}.")
        self.take(result, process)

    def _take_kind(self, result: TrainerConfig, network: Mapping[str, Any]) -> None:
        try:
            take_adapter_kind(result, network.get("type") or "lora")
        except (ValueError, KeyError):
            result.leave("network.type", network["type"])


class OneTrainer(Trainer):
    """OneTrainer: its configuration in JSON, or its list of concepts."""

    name = "OneTrainer"
    handlers: ClassVar = {
        "resolution": take_resolution,
        "aspect_ratio_bucketing": take_buckets,
        "batch_size": attribute("micro_batch", int),
        "gradient_accumulation_steps": attribute("accumulation", int),
        "epochs": attribute("epochs"),
        "learning_rate": setting("training.learning_rate"),
        "learning_rate_warmup_steps": attribute("warmup_steps", int),
        "clip_grad_norm": setting("training.max_grad_norm"),
        "weight_decay": setting("training.weight_decay"),
        "learning_rate_scheduler": take_decay,
        "peft_type": take_adapter_kind,
        "lora_decompose": take_decomposition,
        "lora_rank": adapter("rank", int),
        "lora_alpha": adapter("alpha"),
        "base_model_name": attribute("base", str),
        "enable_random_flip": setting("training.flip", bool),
        "enable_tag_shuffling": TAGS["shuffle"],
        "keep_tags_count": TAGS["keep"],
        "tag_dropout_probability": TAGS["dropout"],
    }

    def recognises(self, tree: Any, suffix: str) -> bool:
        """Return whether it is a list of concepts, or has one."""
        if isinstance(tree, list):
            return bool(tree) and all(isinstance(each, dict) and "path" in each for each in tree)
        names = {"concepts", "concept_file_name", "training_method", "base_model_name"}
        return isinstance(tree, dict) and bool(names & tree.keys())

    def read(self, tree: Any, path: Path, result: TrainerConfig) -> None:
        """Read the configuration, and its concepts, which may lie in a file of their own."""
        options = {} if isinstance(tree, list) else dict(tree)
        concepts = _sections(tree if isinstance(tree, list) else options.pop("concepts", None))
        file = options.pop("concept_file_name", None)
        if not concepts and isinstance(file, str) and file:
            found = next((place for place in (Path(file), path.parent / file) if place.is_file()), None)
            if found is None:
                result.leave("concept_file_name", f"{file} is not here: give it as --from")
            else:
                concepts = _sections(_parse(found))
        if options.pop("training_method", "LORA") != "LORA":
            for name in ("lora_rank", "lora_alpha", "lora_decompose", "peft_type"):
                options.pop(name, None)
        self.take(result, options)
        for number, concept in enumerate(concepts):
            where, folder = f"concepts[{number}].", concept.pop("path", None)
            if concept.pop("enabled", True) is False:
                continue
            if concept.pop("validation_concept", False) or concept.pop("type", "STANDARD") not in ("STANDARD", ""):
                result.leave(where.rstrip("."), f"{folder} is not of images to train on")
                continue
            repeats = concept.pop("balancing", concept.pop("repeats", 1))
            if concept.pop("balancing_strategy", "REPEATS") != "REPEATS":
                result.leave(f"{where}balancing_strategy", repeats)
                repeats = 1
            _add_folder(result, folder, repeats, where)
            text, image = _section(concept.pop("text", None)), _section(concept.pop("image", None))
            if text.pop("tag_dropout_enable", False) is not True:
                text.pop("tag_dropout_probability", None)
            if text.get("enable_tag_shuffling") is not True and "tag_dropout_probability" not in text:
                text.pop("keep_tags_count", None)
            if text.get("prompt_source", "sample") == "sample":
                text.pop("prompt_source", None)
            for name, standard in STANDARD.items():
                for section in (text, image, concept):
                    if section.get(name) == standard:
                        section.pop(name)
            self.take(result, image, f"{where}image.")
            self.take(result, text, f"{where}text.")
            for name in ("name", "seed", "include_subdirectories"):
                concept.pop(name, None)
            self.take(result, concept, where)


STANDARD: dict[str, object] = {
    **{"tag_delimiter": ",", "tag_dropout_mode": "FULL", "tag_dropout_special_tags_mode": "NONE"},
    **{"caps_randomize_mode": "capslock, title, first, random", "caps_randomize_probability": 0.0},
    **{"image_variations": 1, "text_variations": 1, "loss_weight": 1.0, "resolution_override": "512"},
    **dict.fromkeys(("random_rotate_max_angle", "random_brightness_max_strength", "random_contrast_max_strength"), 0.0),
    **dict.fromkeys(("random_saturation_max_strength", "random_hue_max_strength"), 0.0),
}
"""Values of OneTrainer that change nothing, and stand in each of its concepts."""
TRAINERS: tuple[Trainer, ...] = (AiToolkit(), OneTrainer(), Kohya())
"""All trainers; the first that recognises a file reads it."""


def read_trainer_config(path: Path) -> TrainerConfig:
    """Read the configuration of another trainer; raises UserError if it is not one, or too large."""
    tree = _parse(path)
    for trainer in TRAINERS:
        if trainer.recognises(tree, path.suffix.lower()):
            result = TrainerConfig(trainer.name)
            trainer.read(tree, path, result)
            if not result.settings.get("training.tags.shuffle") and not result.settings.get("training.tags.dropout"):
                for name in [name for name in result.settings if name.startswith("training.tags.")]:
                    del result.settings[name]
            return result
    names = ", ".join(trainer.name for trainer in TRAINERS)
    raise UserError(f"{path} is not a configuration of {names}: give its dataset_config.toml, job or concepts")


def _parse(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES} bytes")
        text = data.decode("utf-8-sig")
        suffix = path.suffix.lower()
        if suffix == ".toml":
            return tomllib.loads(text)
        return parse_yaml(text) if suffix in (".yaml", ".yml") else parse_json(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "give TOML, YAML or JSON, named .toml, .yaml or .json"
        raise UserError(f"{path} cannot be read ({reason}): {hint}") from error


def _add_folder(result: TrainerConfig, folder: Any, repeats: Any, where: str) -> None:
    if not isinstance(folder, str) or not folder:
        result.leave(f"{where}folder", "it names no folder of images")
        return
    try:
        number = convert(float, repeats)
        if not 0.01 <= number <= 10_000:
            raise ValueError("out of range")
    except (ValueError, TypeError):
        result.leave(f"{where}repeats", repeats)
        number = 1.0
    number += result.folders.get(folder, 0)  # of several data sets each is trained on
    result.folders[folder] = int(number) if number.is_integer() else number


def _section(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _sections(value: Any) -> list[dict[str, Any]]:
    return [_section(each) for each in value if isinstance(each, dict)] if isinstance(value, Sequence) else []
