"""What is done with a value of another trainer's configuration: handlers, which set what it means here."""

import math
from collections.abc import Callable
from typing import Any

from diffusion.data.sources.trainer_settings import TrainerConfig

EXTENSIONS = {".txt": "txt", ".caption": "caption", ".json": "json"}
Handler = Callable[[TrainerConfig, Any], None]


def convert(kind: type, value: Any) -> Any:
    """Convert a value, which may be a number in a text; raises ValueError if it is of another kind."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("another kind of value")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not a whole number")
    result = kind(value)
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError("not finite")
    return result


def setting(name: str, kind: type = float) -> Handler:
    """Make the handler of a value that a setting of this name takes as it is."""

    def take(result: TrainerConfig, value: Any) -> None:
        result.set(name, convert(kind, value))

    return take


def attribute(name: str, kind: type = float) -> Handler:
    """Make the handler of a value that is kept until more is known."""

    def take(result: TrainerConfig, value: Any) -> None:
        number = convert(kind, value)
        if getattr(result, name) not in (None, number, getattr(TrainerConfig, name, None)):
            raise ValueError("given twice")
        setattr(result, name, number)

    return take


def adapter(name: str, kind: type = float) -> Handler:
    """Make the handler of a field of an adapter."""

    def take(result: TrainerConfig, value: Any) -> None:
        result.adapter[name] = convert(kind, value)

    return take


def take_adapter_kind(result: TrainerConfig, value: Any) -> None:
    """Take the kind of an adapter by its name in ai-toolkit, LyCORIS or OneTrainer."""
    if (kind := ADAPTERS[convert(str, value).lower()]) != "lora":
        result.adapter["kind"] = kind


def take_decomposition(result: TrainerConfig, value: Any) -> None:
    """Take whether magnitudes are adapted apart, which is DoRA."""
    if value in (True, "True", "true"):
        if result.adapter.get("kind", "lora") not in ("lora", "dora"):
            raise ValueError("DoRA of another kind")
        result.adapter["kind"] = "dora"


def take_factor(result: TrainerConfig, value: Any) -> None:
    """Take the factor of LoKr; −1 is none."""
    if (factor := convert(int, value)) > 1:
        result.adapter["factor"] = factor


def take_optimizer(result: TrainerConfig, value: Any) -> None:
    """Take AdamW of 8 bits, or Prodigy; adapters are trained by AdamW otherwise."""
    name = convert(str, value).lower().replace("_", "").replace("adamw8bit", "adamw_8bit")
    if name not in ("adamw", "adamw_8bit", "prodigy"):
        raise ValueError("another optimizer")
    if name != "adamw":
        result.set("training.optimizer", name)


def take_decay(result: TrainerConfig, value: Any) -> None:
    """Take a schedule of the learning rate."""
    if (decay := convert(str, value).lower().removesuffix("_with_warmup")) not in ("cosine", "linear", "constant"):
        raise ValueError("another schedule")
    if decay != "cosine":
        result.set("training.learning_rate_decay", decay)


def take_max_epochs(result: TrainerConfig, value: Any) -> None:
    """Take a number of epochs that counts more than steps and other epochs, unless it is 0."""
    if (epochs := convert(float, value)) < 0:
        raise ValueError("negative")
    if epochs > 0:
        result.epochs, result.prefers_epochs = epochs, True


def take_epochs(result: TrainerConfig, value: Any) -> None:
    """Take a number of epochs where no steps are given."""
    epochs = convert(float, value)
    if not result.prefers_epochs:
        result.epochs = epochs


def take_resolution(result: TrainerConfig, value: Any) -> None:
    """Take a resolution: a number, a list of the sides of a rectangle, or text of either."""
    sides = value.replace("x", ",").split(",") if isinstance(value, str) else value
    numbers = [convert(int, side) for side in sides] if isinstance(sides, list) else [convert(int, sides)]
    if not numbers or min(numbers) <= 0:
        raise ValueError("not a size")
    result.set("ingest.size", round(math.prod(numbers) ** (1 / len(numbers))))


def take_buckets(result: TrainerConfig, value: Any) -> None:
    """Take whether images keep their shapes."""
    result.set("ingest.fit", "bucket" if convert(bool, value) else "crop")


def take_extension(result: TrainerConfig, value: Any) -> None:
    """Take the extension of captions."""
    name = convert(str, value).lower()
    result.set("ingest.captions", EXTENSIONS[name if name.startswith(".") else f".{name}"])


def take_prefix(result: TrainerConfig, value: Any) -> None:
    """Take words before each caption as the trigger."""
    if text := convert(str, value).strip(" ,"):
        result.set("ingest.trigger", text)


def skip(result: TrainerConfig, value: Any) -> None:
    """Take nothing: it is of no meaning elsewhere, such as the name of the job, or another setting covers it."""


def take_module(result: TrainerConfig, value: Any) -> None:
    """Take networks of sd-scripts, and of LyCORIS, whose kind is one of its arguments."""
    if convert(str, value) not in ("networks.lora", "lycoris.kohya"):
        raise ValueError("another module")


TAGS: dict[str, Handler] = {
    "shuffle": setting("training.tags.shuffle", bool),
    "keep": setting("training.tags.keep", int),
    "dropout": setting("training.tags.dropout"),
}


ADAPTERS = {**dict.fromkeys(("lora", "locon"), "lora"), "dora": "dora", "lokr": "lokr"}
"""Kinds of adapters by the names of other trainers, whose OFT rotates what layers put out and not what they take in."""
