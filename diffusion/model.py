"""A trained model: the averaged network with all one needs to know to use it, in one safetensors file."""

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion.config import Config
from diffusion.denoiser import Denoiser
from diffusion.errors import UserError
from diffusion.files import canonical_json, write_atomically
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.objective import Parametrization
from diffusion.process import NoiseSchedule, make_schedule
from diffusion.text import TextEncoder

METADATA_KEY = "darkroom"
"""The one metadata key of our safetensors files: several are written in random order, one is stable."""
AVERAGED = "ema."
"""Prefix of the averaged weights' names, the same in checkpoints and in final models."""
Told = dict[str, Tensor]
"""What a network is told of N pictures: ``label`` and ``text``, or ``low`` and ``level``, as ``UNet.forward`` has them,
as far as it is told any."""


class ModelHeader(Config):
    """What is written beside the weights."""

    format_version: Literal[1] = 1
    model: ModelConfig
    channels: Literal[1, 3]
    size: int
    """Height and width of the pictures, in pixels."""
    dataset: str
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = 1.0
    """Standard deviation of the data set's pictures, as the network sees them."""
    class_histogram: dict[str, int]
    """The data set's classes, sorted, and how many pictures of each it has."""
    encoder: TextEncoder | None = None
    """What read the captions that the network was told; None: it was told none."""
    images: int
    """Pictures seen in training."""
    training: dict[str, Any]
    """The training configuration as it was resolved."""


@dataclass(frozen=True)
class DiffusionModel:
    """A network ready for use."""

    header: ModelHeader
    network: UNet
    schedule: NoiseSchedule

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        return self.header.model

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        return self.header.channels, self.header.size, self.header.size

    @property
    def classes(self) -> list[str]:
        """The classes that it can be asked for; empty if it was not told of any."""
        return classes_of(self.config, self.header.class_histogram)

    def on(self, device: torch.device) -> "DiffusionModel":
        """The same with its network on ``device``; this one stays where it is."""
        if device == next(self.network.parameters()).device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))

    def denoiser(self, told: Told | None = None) -> Denoiser:
        """The model as a function from a noisy picture and its σ to the clean one, ``told`` what they show."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        return Denoiser(
            partial(self.network, **(told or {})),
            self.schedule,
            parametrization,
            learned_variance=self.config.learned_variance,
        )


def classes_of(config: ModelConfig, class_histogram: dict[str, int]) -> list[str]:
    """The classes that a network of this configuration is told of: those of the data set, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []


def to_float(pictures: Tensor) -> Tensor:
    """Stored pictures, uint8, as the network sees them: float32 in [−1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> Tensor:
    """The network's pictures, nominally in [−1, 1], as uint8; what lies outside is clipped."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Write a safetensors file atomically, ``header`` in its metadata; returns the file's SHA-256."""
    metadata = {METADATA_KEY: canonical_json(header)}
    packed = {name: value.detach().contiguous() for name, value in tensors.items()}
    return write_atomically(path, lambda partial: save_file(packed, partial, metadata))


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file written by ``save_tensors``; raises UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    except FileNotFoundError as error:
        raise UserError(f"no model at {path}: train one with `darkroom train`") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a model of ours, or is damaged: train or fetch it again") from error
    return header


def export(checkpoint: Path, path: Path) -> str:
    """Write what ``load_model`` needs of a checkpoint to ``path``; returns the new file's SHA-256."""
    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(AVERAGED)]  # noqa: SIM118 (no mapping)
        tensors = {name: file.get_tensor(name) for name in names}
    return save_tensors(path, tensors, read_header(checkpoint))


def read_model_header(path: Path) -> ModelHeader:
    """What the model in a file says of itself; raises UserError as ``load_model`` does."""
    raw = read_header(path)
    try:
        return ModelHeader.model_validate(raw["model_header"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{path} has a header this version cannot read: use the version that wrote it") from error


def load_model(path: Path) -> DiffusionModel:
    """The averaged network of a final model or of a checkpoint, ready to denoise.

    Nothing is unpickled. Raises UserError if the file is missing, damaged or of another format.
    """
    header = read_model_header(path)
    classes = classes_of(header.model, header.class_histogram)
    network = UNet(header.model, header.channels, header.size, len(classes))
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(AVERAGED)]  # noqa: SIM118 (no mapping)
        weights = {name.removeprefix(AVERAGED): file.get_tensor(name) for name in names}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # torch says it in a page; the cause is always the same
        raise UserError(
            f"{path} was written by another version of the U-Net: load it with the code that its version ships"
        ) from error
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DiffusionModel(header, network, make_schedule(header.model))
