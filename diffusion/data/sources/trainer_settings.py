"""What was read of another trainer's configuration: settings, folders with their repeats, and the duration."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffusion.data.sources.conventions import parse_folder

MAX_EPOCHS = 1e9
MAX_NAMES = 1000
"""Maximum number of settings that are named as not taken over."""


@dataclass
class TrainerConfig:
    """What was read of the configuration of a trainer."""

    trainer: str
    """Name of the trainer."""
    folders: dict[str, float] = field(default_factory=dict)
    """Folders of images, and how often the images of each are repeated."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of our settings, by dotted name."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of training.adapter, which needs the base model."""
    base: str | None = None
    """The model that it trains."""
    steps: int | None = None
    epochs: float | None = None
    """Duration; None: not given."""
    prefers_epochs: bool = False
    """Whether epochs count where both are given."""
    repeats_in_names: bool = False
    """Whether folders below the only one are repeated as their names say, 10_cat."""
    warmup_steps: int = 0
    micro_batch: int | None = None
    """Images of a step before accumulation."""
    accumulation: int = 1
    left: dict[str, str] = field(default_factory=dict)
    """Names of what is not taken over, with the value or the reason."""

    def set(self, name: str, value: Any) -> None:
        """Set one of our settings; raises ValueError if it has another value already, of another folder, say."""
        if self.settings.setdefault(name, value) != value:
            raise ValueError("given twice")

    def leave(self, name: str, why: object) -> None:
        """Name a setting that is not taken over."""
        if len(self.left) < MAX_NAMES:
            self.left.setdefault(name, why if isinstance(why, str) else json.dumps(why, default=str)[:80])

    def finish(self, images: int, counts: Mapping[str, int] = MappingProxyType({})) -> None:
        """Turn steps or epochs into images, of which the source has ``images``, and ``counts`` by folder in it."""
        if self.micro_batch is not None:
            self.settings["training.batch_size"] = self.micro_batch * self.accumulation
            if self.accumulation > 1:
                self.settings["training.micro_batch"] = self.micro_batch
        batch_size = (self.micro_batch or 1) * self.accumulation
        epoch_images = self._count_epoch(images, counts)
        if self.steps and not (self.prefers_epochs and self.epochs):  # 0 stands for none
            self.settings["training.images"] = self.steps * batch_size
        elif self.epochs is not None and not 0 < self.epochs < MAX_EPOCHS:
            self.leave("epochs", f"{self.epochs:g}: set training.images")
        elif self.epochs is not None and epoch_images is not None:
            self.settings["training.images"] = max(1, round(self.epochs * epoch_images))
        elif self.epochs is not None:
            self.leave("epochs", f"{self.epochs:g} of folders with different repeats: set training.images")
        if self.warmup_steps:
            self.settings["training.warmup_images"] = self.warmup_steps * batch_size

    def _count_epoch(self, images: int, counts: Mapping[str, int]) -> float | None:
        """Count the images of an epoch, in which each is seen as often as its folder is repeated; None: unknown."""
        if self.repeats_in_names:
            repeats = {folder: parse_folder(folder.rpartition("/")[2])[0] or 1 for folder in counts}
            return sum(count * repeats[folder] for folder, count in counts.items()) if counts else images
        if len(set(self.folders.values())) <= 1:
            return images * next(iter(self.folders.values()), 1)
        names = {pattern.removesuffix("/*"): weight for pattern, weight in self.weights.items()}
        weights = {
            folder: next((weight for name, weight in names.items() if f"{folder}/".startswith(f"{name}/")), None)
            for folder in counts
        }
        if not any(weights.values()):  # the images are of another source
            return None
        return sum(count * (weights[folder] or 1) for folder, count in counts.items())

    @property
    def source(self) -> str | None:
        """The folder with all images: the only one, or the one in which all others lie; None if there is none."""
        if len(self.folders) < 2:
            return next(iter(self.folders), None)
        parents = {os.path.dirname(os.path.normpath(folder)) or "." for folder in self.folders}  # noqa: PTH120
        return parents.pop() if len(parents) == 1 else None

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the images by patterns of their names in ``source``; empty if all are equal."""
        if self.source is None or len(set(self.folders.values())) < 2:
            return {}
        names = {folder: os.path.relpath(folder, self.source) for folder in self.folders}
        return {f"{names[folder]}/*": repeats for folder, repeats in self.folders.items() if names[folder] != "."}
