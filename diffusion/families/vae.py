"""The family vae: variational autoencoders (arXiv 1312.6114), whose loss is the evidence lower bound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.common.random import GaussianNoise
from diffusion.families.model import (
    Conditioning,
    ConditioningBatch,
    Model,
    ModelHeader,
    TrainingBatch,
    TrainingObjective,
    to_uint8,
)
from diffusion.models.config import ObjectiveConfig, VAEConfig
from diffusion.models.vae import VAE, Latents
from diffusion.process.likelihood import HALF_A_LEVEL, Terms, log_likelihood
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
        mean, log_variance = network.posterior(torch.empty(1, *shape))
        return network.decode(mean).sum() + log_variance.sum() + network.log_scale

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig, latents: Latents | None) -> TrainingObjective:
        """Build the evidence lower bound."""
        assert isinstance(header.model, VAEConfig)
        return EvidenceObjective(header.model, training.seed, header.size)

    @property
    def autoencoder(self) -> VAE:
        """The network."""
        return self.network

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        assert isinstance(self.header.model, VAEConfig)
        return latent_shape(self.header.model, self.header.size)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Decode latents from N(0, I)."""
        return to_uint8(self.network.decode(batch.noise()))

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List one pass through the decoder."""
        return [(1, lambda: self.network.decode(torch.zeros(1, *self.noise_shape)))]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute the bound: the training loss with weight 1 of the KL term, for rounded values."""
        noise = GaussianNoise(0, "probe/held_out", indices, self.noise_shape)().to(x0.device)
        reconstruction, mean, log_variance = self.network(x0, noise)
        # Not the density of the training loss, which can exceed the probability of a level.
        rounded = log_likelihood(x0.double(), reconstruction.double(), self.network.log_scale.double().exp())
        nats = kl_divergence(mean, log_variance).double() - rounded.flatten(1).sum(1)
        return Terms.without_levels(nats / x0[0].numel() / math.log(2), len(x0))


def latent_shape(config: VAEConfig, size: int) -> tuple[int, int, int]:
    """Compute (c, h, w) of the latents of images of ``size`` pixels."""
    return config.latent_channels, size // config.factor, size // config.factor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute KL(N(mean, exp(log_variance)) ‖ N(0, I)) of each image, (N,) from (N, …) (1312.6114, appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def negative_log_likelihood(x: Tensor, reconstruction: Tensor, log_scale: Tensor) -> Tensor:
    """Compute −ln p(x | z) of each image, (N,), for Gaussian values around the reconstruction, (N, …).

    ``log_scale``, the logarithm of their standard deviation, is learned, so that the weight of the divergence does not
    depend on the contrast of the images (σ-VAE, arXiv 2006.13202). It is at least half a level, pixels' precision.
    """
    log_scale = log_scale.clamp(min=math.log(HALF_A_LEVEL))
    error = (x - reconstruction) * (-log_scale).exp()
    return (0.5 * error**2 + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


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
        noise = GaussianNoise(seed, stream, indices, latent_shape(self.config, self.size))()
        return TrainingBatch(x0, conditioning, {"noise": noise})

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute −log₂ p(x | z) + β KL of each image, divided by the number of its values."""
        assert isinstance(network, VAE)
        reconstruction, mean, log_variance = network(batch.x0, batch.random["noise"])
        misfit = negative_log_likelihood(batch.x0, reconstruction, network.log_scale)
        nats = (misfit + self.config.kl_weight * kl_divergence(mean, log_variance)) / batch.x0[0].numel()
        # A unit of the network's values is 127.5 levels: see ``to_float``.
        return nats / math.log(2) + math.log2(127.5)

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute the PSNR of reconstructions and the bits per value in the latents."""
        assert isinstance(network, VAE)
        reconstruction, mean, log_variance = network(batch.x0, batch.random["noise"])
        # 4 is the square of the range of values.
        ratio = 4 / (batch.x0 - reconstruction.clamp(-1, 1)).square().mean((1, 2, 3))
        return {
            "held_out_psnr_ema": (10 * ratio.log10()).mean().item(),
            "held_out_kl_ema": kl_divergence(mean, log_variance).mean().item() / batch.x0[0].numel() / math.log(2),
        }
