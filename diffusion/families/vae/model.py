"""The family vae: variational autoencoders (arXiv 1312.6114), whose loss is the evidence lower bound."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.common.random import GaussianNoise
from diffusion.families.header import ModelHeader
from diffusion.families.model import Conditioning, ConditioningBatch, Model, TrainingBatch, TrainingObjective, to_uint8
from diffusion.families.vae.config import VAEConfig
from diffusion.families.vae.network import VAE, Autoencoder, latent_shape
from diffusion.process.config import ObjectiveConfig
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import SamplingConfig


@dataclass(frozen=True)
class VAEModel(Model):
    """Variational autoencoder, which encodes images and generates them."""

    network: VAE

    @staticmethod
    def make_network(config: VAEConfig, shape: tuple[int, int, int], classes: int) -> VAE:
        """Build the autoencoder, which has no classes."""
        return VAE(config, shape[0], shape[-1])

    @staticmethod
    def forward(network: VAE, shape: tuple[int, int, int]) -> Tensor:
        """Encode, decode and sum."""
        misfit, divergence, _ = network(torch.empty(1, *shape), torch.empty(1, *noise_shape(network.config, shape[-1])))
        bound: Tensor = (misfit + divergence).sum()
        return bound

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> TrainingObjective:
        """Build the evidence lower bound."""
        assert isinstance(header.model, VAEConfig)
        return EvidenceObjective(header.model, training.seed, header.size)

    @property
    def autoencoder(self) -> Autoencoder:
        """The part without the prior."""
        return self.network.autoencoder

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(G + c·h·w, 1, 1): the noise of the global latent and of the latents."""
        return noise_shape(self.network.config, self.header.size)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Decode latents that are sampled from their prior."""
        return to_uint8(self.network.generate(batch.noise()))

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List one pass through prior and decoder."""
        return [(1, lambda: self.network.generate(torch.zeros(1, *self.noise_shape)))]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute the bound: the training loss with weight 1 of the KL term, for rounded values."""
        noise = GaussianNoise(0, "probe/held_out", indices, self.noise_shape)().to(x0.device)
        misfit, divergence, _ = self.network(x0, noise)
        return Terms.without_levels((misfit + divergence).double() / x0[0].numel() / math.log(2), len(x0))


def noise_shape(config: VAEConfig, size: int) -> tuple[int, int, int]:
    """Compute (G + c·h·w, 1, 1), the shape of the noise of an image of ``size`` pixels."""
    return config.global_latent + math.prod(latent_shape(config, size, size)), 1, 1


@dataclass(frozen=True)
class EvidenceObjective(TrainingObjective):
    """The negative evidence lower bound, in bits per 8-bit value, with one sample of the posterior."""

    config: VAEConfig
    seed: int
    size: int
    """Height and width of the images, in pixels."""

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Sample the posterior's noise."""
        seed, stream = (self.seed, "posterior") if probe is None else (0, f"probe/{probe}")
        noise = GaussianNoise(seed, stream, indices, noise_shape(self.config, self.size))()
        return TrainingBatch(x0, conditioning, {"noise": noise})

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute −log₂ p(x | z) + β KL of each image, divided by the number of its values."""
        assert isinstance(network, VAE)
        misfit, divergence, _ = network(batch.x0, batch.random["noise"])
        bits: Tensor = (misfit + self.config.kl_weight * divergence) / batch.x0[0].numel() / math.log(2)
        return bits

    def validation_metrics(
        self, network: nn.Module, parts: Iterable[TrainingBatch], losses: Tensor
    ) -> dict[str, float]:
        """Compute the PSNR of reconstructions and the bits per value in the latents."""
        assert isinstance(network, VAE)
        psnr, bits = list[Tensor](), list[Tensor]()
        for part in parts:
            _, divergence, reconstruction = network(part.x0, part.random["noise"])
            # 4 is the square of the range of values.
            psnr.append(10 * (4 / (part.x0 - reconstruction.clamp(-1, 1)).square().mean((1, 2, 3))).log10())
            bits.append(divergence / part.x0[0].numel() / math.log(2))
        return {
            "held_out_psnr_ema": torch.cat(psnr).mean().item(),
            "held_out_kl_ema": torch.cat(bits).mean().item(),
        }
