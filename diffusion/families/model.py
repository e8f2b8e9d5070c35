"""A trained model: the averaged network with all one needs to know to use it, in one safetensors file."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion.common.config import LARGEST_SIZE, Config, PlainName, unset
from diffusion.models.config import FamilyConfig, LatentSpace, ModelConfig
from diffusion.models.text_encoder import TextEncoder
from diffusion.models.unet import UNet
from diffusion.models.vae import Latents
from diffusion.process.denoiser import Denoiser
from diffusion.process.parametrization import Parametrization
from diffusion.process.schedules import NoiseSchedule

Conditioning = dict[str, Tensor]
"""What the network is conditioned on, of N images: ``label`` and ``text``, or ``low`` and ``level``, as keywords of
``UNet.forward``; empty: nothing."""


class ModelHeader(Config):
    """What is written beside the weights."""

    format_version: Literal[3] = 3
    model: FamilyConfig
    """Instead of the path of its autoencoder, if it has one, the digest of that one's weights."""
    channels: Literal[1, 3]
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the images, in pixels."""
    dataset: PlainName
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = Field(1.0, gt=0, le=1e6)
    """Standard deviation of what the network works on: the data set's images in [−1, 1], what they have beyond small
    ones that it is shown, or latents."""
    class_histogram: dict[str, int]
    """The data set's classes, sorted, and how many images of each it has."""
    encoder: TextEncoder | None = None
    """The text encoder of the captions that the network is conditioned on; None: on none."""
    latents: LatentSpace | None = Field(None, exclude_if=unset)
    """What the network works on; None: the images themselves."""
    images: int = Field(ge=0, lt=2**63)
    """Images seen in training."""
    training: dict[str, Any]
    """The training configuration as it was resolved."""


class Autoencoder(Protocol):
    """Images (N, C, H, W), nominally in [−1, 1], to latents (N, c, h, w) and back."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Images to latents."""

    def decode(self, z: Tensor, /) -> Tensor:
        """Latents to images."""


@dataclass(frozen=True)
class Model(ABC):
    """A network of some family, ready for use."""

    header: ModelHeader
    network: nn.Module

    @property
    def config(self) -> FamilyConfig:
        """Configuration of the network."""
        return self.header.model

    @property
    @abstractmethod
    def coder(self) -> Autoencoder | None:
        """What it has between images and latents; None: it works on images."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that an image is generated from."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.header.channels, self.header.size, self.header.size

    @property
    def classes(self) -> list[str]:
        """The classes that it is conditioned on; empty: on none."""
        return classes_of(self.config, self.header.class_histogram)

    def on(self, device: torch.device) -> Self:
        """The same with its network on ``device``; this one stays where it is."""
        if device == next(self.network.parameters()).device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))


@dataclass(frozen=True)
class DiffusionModel(Model):
    """A network that takes noise away, from images or from their latents."""

    network: UNet
    schedule: NoiseSchedule
    latents: Latents | None = None
    """Where the network works on latents, what leads there and back."""

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        assert isinstance(self.header.model, ModelConfig)
        return self.header.model

    @property
    def coder(self) -> Latents | None:
        """What leads to latents and back, if the network works on latents."""
        return self.latents

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        return self.header.latents.shape if self.header.latents else self.shape

    def on(self, device: torch.device) -> Self:
        """The same with its networks on ``device``; this one stays where it is."""
        moved = super().on(device)
        if self.latents is None or self.latents.mean.device == device:
            return moved
        return replace(moved, latents=copy.deepcopy(self.latents).to(device))

    def decoded(self, x: Tensor) -> Tensor:
        """What the reverse process holds, (N, *noise_shape), as images (N, C, H, W), nominally in [−1, 1]."""
        return x if self.latents is None else self.latents.decode(x)

    def encoded(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [−1, 1] as the reverse process would hold them, (N, *noise_shape)."""
        return images if self.latents is None else self.latents.encode(images)

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """The model as a function from a noisy image and its σ to the clean one, ``conditioning`` as of one batch."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        return Denoiser(
            partial(self.network, **(conditioning or {})),
            self.schedule,
            parametrization,
            # Latents have no range.
            clip=self.latents is None,
            learned_variance=self.config.learned_variance,
            around=(conditioning or {}).get("low"),
        )


def classes_of(config: FamilyConfig, class_histogram: dict[str, int]) -> list[str]:
    """The classes that a network of this configuration is conditioned on: the data set's, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []


def to_float(images: Tensor) -> Tensor:
    """Stored images, uint8, as the network sees them: float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The network's images, nominally in [−1, 1], as uint8; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
