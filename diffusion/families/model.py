"""Trained models: the averaged network and its header, stored in one safetensors file."""

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
"""Conditioning of N images, as keywords of ``UNet.forward``: ``label`` and ``text``, or ``low`` and ``level``; empty:
unconditional."""


class ModelHeader(Config):
    """Metadata stored with the weights."""

    format_version: Literal[3] = 3
    model: FamilyConfig
    """Configuration of the network, with the digest of the autoencoder's weights in place of its path."""
    channels: Literal[1, 3]
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the images, in pixels."""
    dataset: PlainName
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = Field(1.0, gt=0, le=1e6)
    """Standard deviation of the network's data: images in [−1, 1], residuals of super-resolution, or latents."""
    class_histogram: dict[str, int]
    """Number of images of each class of the data set, sorted by class."""
    encoder: TextEncoder | None = None
    """Text encoder of the captions; None: the network has no captions."""
    latents: LatentSpace | None = Field(None, exclude_if=unset)
    """Latent space of the network; None: it works on pixels."""
    images: int = Field(ge=0, lt=2**63)
    """Images seen in training."""
    training: dict[str, Any]
    """The resolved training configuration."""


class Autoencoder(Protocol):
    """Encoder and decoder between images (N, C, H, W), nominally in [−1, 1], and latents (N, c, h, w)."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Encode images as latents."""

    def decode(self, z: Tensor, /) -> Tensor:
        """Decode latents to images."""


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
    def autoencoder(self) -> Autoencoder | None:
        """Autoencoder between images and latents; None: the model works on pixels."""

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
        """Classes that it is conditioned on; empty: none."""
        return classes_of(self.config, self.header.class_histogram)

    def on(self, device: torch.device) -> Self:
        """Copy the model to ``device``."""
        if device == next(self.network.parameters()).device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))


@dataclass(frozen=True)
class DiffusionModel(Model):
    """Diffusion model of images or of their latents."""

    network: UNet
    schedule: NoiseSchedule
    latents: Latents | None = None
    """Autoencoder of latent diffusion; None: the network works on pixels."""

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        assert isinstance(self.header.model, ModelConfig)
        return self.header.model

    @property
    def autoencoder(self) -> Latents | None:
        """Autoencoder of latent diffusion; None: the network works on pixels."""
        return self.latents

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        return self.header.latents.shape if self.header.latents else self.shape

    def on(self, device: torch.device) -> Self:
        """Copy the model and its autoencoder to ``device``."""
        moved = super().on(device)
        if self.latents is None or self.latents.mean.device == device:
            return moved
        return replace(moved, latents=copy.deepcopy(self.latents).to(device))

    def decoded(self, x: Tensor) -> Tensor:
        """Decode states of the reverse process, (N, *noise_shape), to images (N, C, H, W), nominally in [−1, 1]."""
        return x if self.latents is None else self.latents.decode(x)

    def encoded(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as states of the reverse process, (N, *noise_shape)."""
        return images if self.latents is None else self.latents.encode(images)

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser of the model for batches with ``conditioning``."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        return Denoiser(
            partial(self.network, **(conditioning or {})),
            self.schedule,
            parametrization,
            # Latents are unbounded.
            clip=self.latents is None,
            learned_variance=self.config.learned_variance,
            around=(conditioning or {}).get("low"),
        )


def classes_of(config: FamilyConfig, class_histogram: dict[str, int]) -> list[str]:
    """List the classes that a network is conditioned on: those of the data set, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []


def to_float(images: Tensor) -> Tensor:
    """Convert stored images, uint8, to float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert images, nominally in [−1, 1], to uint8 with clipping."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
