"""The family ddpm: a U-Net that denoises images (arXiv 2006.11239) or latents (2112.10752)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from diffusion.common.errors import UserError
from diffusion.common.shapes import shape_name
from diffusion.families.ddpm.config import ModelConfig
from diffusion.families.ddpm.distillation import ConsistencyObjective
from diffusion.families.ddpm.network import UNet
from diffusion.families.denoising_objective import DenoisingObjective
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.fine_tuning import select_layers
from diffusion.families.header import ModelHeader
from diffusion.families.model import Conditioning, TrainingObjective
from diffusion.families.text_encoder import ENCODER, CaptionEncoder, TextEncoder, mini_lm
from diffusion.families.vae.network import Latents, latent_shape
from diffusion.process.config import ObjectiveConfig
from diffusion.process.denoiser import Denoiser
from diffusion.process.objective import make_objective
from diffusion.process.parametrization import Parametrization
from diffusion.process.schedules import make_schedule


@dataclass(frozen=True)
class DDPMModel(DiffusionModel):
    """Diffusion model that was trained here."""

    network: UNet

    @staticmethod
    def make_network(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> UNet:
        """Build the U-Net."""
        return UNet(config, shape[0], shape[-1], classes)

    @staticmethod
    def forward(network: UNet, shape: tuple[int, int, int]) -> Tensor:
        """Predict at time 0 and sum."""
        x = torch.empty(1, *shape)
        out: Tensor = network(x, torch.zeros(1), low=None if network.level is None else x).sum()
        return out

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> TrainingObjective:
        """Build the denoising objective of images, or of latents where there is an autoencoder."""
        assert isinstance(header.model, ModelConfig)
        shape = header.latents.shape if header.latents else header.square
        objective = make_objective(header.model, training, header.sigma_data, shape)
        # EDM's coefficients are derived for data of zero mean (arXiv 2206.00364, appendix B.6).
        center = header.mean if header.model.prediction == "edm" else None
        return DenoisingObjective(training, objective, center)

    @classmethod
    def make_model(cls, header: ModelHeader, network: UNet, autoencoder: Latents | None) -> Self:
        """Wrap the network with the schedule that it was trained on."""
        assert isinstance(header.model, ModelConfig)
        shape = header.latents.shape if header.latents else header.square
        return cls(header, network, make_schedule(header.model, shape), autoencoder).with_size(None)

    @classmethod
    def text_encoder(cls, config: ModelConfig) -> TextEncoder | None:
        """Name the encoder of the captions."""
        return ENCODER if config.text else None

    @classmethod
    def own_caption_encoder(cls, config: ModelConfig) -> CaptionEncoder:
        """Encode captions as sentence vectors, and as tokens if the network attends to any."""
        return mini_lm(config.tokens)

    @classmethod
    def data_mean(cls, config: ModelConfig, mean: Sequence[float]) -> tuple[float, ...] | None:
        """Work around the mean of the images: where there are no latents, nor small images."""
        return tuple(mean) if config.autoencoder is None and config.low_resolution is None else None

    @staticmethod
    def checkpoint_gradients(network: nn.Module) -> None:
        """Recompute the activations inside the layers of the U-Net."""
        assert isinstance(network, UNet)
        network.gradient_checkpointing = True

    def adapter_layers(self, layers: set[str], targets: Sequence[str] | None, text_encoder: bool) -> set[str]:
        """Choose all hidden layers by default."""
        hidden = [name for name in layers if name.startswith(("down.", "middle.", "up."))]
        return select_layers(layers, targets, hidden)

    def make_student_objective(
        self, training: ObjectiveConfig, header: ModelHeader, images: int, device: torch.device
    ) -> TrainingObjective:
        """Build the consistency objective."""
        return ConsistencyObjective(training, self.to(device), header, images)

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        assert isinstance(self.header.model, ModelConfig)
        return self.header.model

    def check_size(self) -> None:
        """Raise UserError if its autoencoder, or the network, does not take images of this height and width."""
        factor = 1 if self.header.latents is None else self.header.latents.autoencoder.factor
        if any(side % factor for side in self.shape[1:]):
            raise UserError(
                f"the model's autoencoder takes images whose sides are multiples of {factor} pixels, and "
                f"{shape_name(self.shape[1:])} is not such a size: choose another one"
            )
        fold = self.network.fold * factor
        if min(self.shape[1:]) < fold:
            raise UserError(
                f"the model's network takes images of {fold} pixels and more along each side, and "
                f"{shape_name(self.shape[1:])} has fewer: choose a larger size"
            )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        space = self.header.latents
        return self.shape if space is None else latent_shape(space.autoencoder, *self.shape[1:])

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser of the model for batches with ``conditioning``."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        conditioning, mean = conditioning or {}, self.header.mean
        return Denoiser(
            partial(self.network, **conditioning),
            self.schedule,
            parametrization,
            # Latents are unbounded.
            clip=self.latents is None,
            learned_variance=self.config.variance == "learned_range",
            around=conditioning.get("low", mean if self.config.prediction == "edm" else None),
        )

    def forward_pass(self) -> Tensor:
        """Evaluate the network once, for one image."""
        x = torch.zeros(1, *self.noise_shape)
        out: Tensor = self.network(x, torch.zeros(1), low=None if self.network.level is None else x)
        return out
