"""The family vae: an encoder and a decoder learn to bring pictures through narrow latents (arXiv 1312.6114)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.terms import Terms
from diffusion.families.base import Batch, Data, Family, Learner
from diffusion.fingerprint import autocast
from diffusion.grids import above, save_png
from diffusion.model import Model, ModelHeader, Told, to_uint8
from diffusion.models.config import VAEConfig
from diffusion.models.vae import VAE, Latents
from diffusion.random import GaussianNoise
from diffusion.sampling import reconstructed
from diffusion.training.config import TrainingConfig, disagreement
from diffusion.training.drawn import Drawn
from diffusion.variance import HALF_A_LEVEL, log_likelihood

LEVELS_TO_ONE = 127.5
"""Levels of a stored pixel to one of the network's units: see ``diffusion.model.to_float``."""


@dataclass(frozen=True)
class VAEModel(Model):
    """An autoencoder, which also draws by itself."""

    network: VAE

    @property
    def coder(self) -> VAE:
        """The network."""
        return self.network

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        assert isinstance(self.header.model, VAEConfig)
        return latent_shape(self.header.model, self.header.size)


def latent_shape(config: VAEConfig, size: int) -> tuple[int, int, int]:
    """(c, h, w) of the latents of pictures of ``size`` pixels."""
    return config.latent_channels, size // config.factor, size // config.factor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, I)) of each picture, (N,), of (N, …) each (1312.6114, appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def negative_log_likelihood(x: Tensor, reconstruction: Tensor, log_scale: Tensor) -> Tensor:
    """−ln p(x | z) of each picture, (N,): every value Gaussian about its reconstruction, (N, …), with one deviation.

    ``log_scale``, its logarithm, is learned with the rest: at its best it is the reconstruction's own error, so that
    the weight of the divergence means the same whatever the contrast of the pictures (σ-VAE, arXiv 2006.13202). Half a
    level is the least: pixels are no more exact, and what comes back exactly would drive it to 0.
    """
    log_scale = log_scale.clamp(min=math.log(HALF_A_LEVEL))
    error = (x - reconstruction) * (-log_scale).exp()
    return (0.5 * error**2 + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


@dataclass(frozen=True)
class BoundLearner(Learner):
    """Draws the posterior's noise; the loss is the negative evidence lower bound, in bits a value.

    Those are of values rounded as stored pixels are: the density times the width of a level.
    """

    config: VAEConfig
    seed: int
    size: int
    """Of the pictures, in pixels."""

    def drawn(self, x0: Tensor, indices: range, told: Told) -> Drawn:
        """The posterior's noise."""
        return Drawn(x0, None, self._noise(self.seed, "posterior", indices), None, told)

    def probed(self, x0: Tensor, split: str, indices: Sequence[int], told: Told) -> Drawn:
        """Noise of a seed of its own."""
        return Drawn(x0, None, self._noise(0, f"probe/{split}", indices), None, told)

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """−log₂ p(x | z) + β KL of each picture, over the number of its values."""
        assert isinstance(network, VAE)
        reconstruction, mean, log_variance = network(drawn.x0, drawn.noise)
        misfit = negative_log_likelihood(drawn.x0, reconstruction, network.log_scale)
        nats = (misfit + self.config.kl_weight * kl_divergence(mean, log_variance)) / drawn.x0[0].numel()
        return nats / math.log(2) + math.log2(LEVELS_TO_ONE)

    def figures(self, network: nn.Module, drawn: Drawn, losses: Tensor) -> dict[str, float]:
        """How close pictures come back, and how much latents say of them."""
        assert isinstance(network, VAE)
        reconstruction, mean, log_variance = network(drawn.x0, drawn.noise)
        # 4 is the square of the range of values.
        ratio = 4 / (drawn.x0 - reconstruction.clamp(-1, 1)).square().mean((1, 2, 3))
        return {
            "held_out_psnr_ema": (10 * ratio.log10()).mean().item(),
            "held_out_kl_ema": kl_divergence(mean, log_variance).mean().item() / drawn.x0[0].numel() / math.log(2),
        }

    def _noise(self, seed: int, stream: str, indices: Sequence[int]) -> Tensor:
        return GaussianNoise(seed, stream, indices, latent_shape(self.config, self.size))()


class VAEFamily:
    """Builds, trains and draws from variational autoencoders."""

    edits = False

    def network(self, config: VAEConfig, shape: tuple[int, int, int], classes: int) -> VAE:
        """The autoencoder, which is told no classes."""
        return VAE(config, shape[0], shape[-1])

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """There and back."""
        assert isinstance(network, VAE)
        mean, log_variance = network.posterior(torch.empty(1, *shape))
        return network.decode(mean).sum() + log_variance.sum() + network.log_scale

    def learner(self, config: VAEConfig, training: TrainingConfig, data: Data) -> Learner:
        """Learns the evidence lower bound; UserError if ``training`` says something that means nothing to it."""
        if words := disagreement(config, training):
            raise UserError(words)
        return BoundLearner(config, training.seed, data.shape[-1])

    def model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> VAEModel:
        """It is its own autoencoder."""
        assert isinstance(network, VAE)
        return VAEModel(header, network)

    def sample(self, model: VAEModel, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Latents from N(0, I), decoded."""
        with torch.inference_mode(), autocast(config.precision, device):
            return to_uint8(model.network.decode(batch.noise())).cpu()

    def passes(self, model: VAEModel, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """One through the decoder."""
        return [(1, lambda: model.network.decode(torch.zeros(1, *model.noise_shape)))]

    def terms(self, model: VAEModel, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
        """The bound, which is its loss in training but for the weight of the divergence, and for values as they are."""
        assert isinstance(model.config, VAEConfig)
        learner = BoundLearner(model.config, 0, model.header.size)
        drawn = learner.probed(x0, "held_out", indices, told).on(x0.device)
        reconstruction, mean, log_variance = model.network(drawn.x0, drawn.noise)
        # Not the density that it learns by, which near a value may say more than a level holds.
        rounded = log_likelihood(drawn.x0.double(), reconstruction.double(), model.network.log_scale.double().exp())
        nats = kl_divergence(mean, log_variance).double() - rounded.flatten(1).sum(1)
        bits = nats / drawn.x0[0].numel() / math.log(2)
        return Terms.without_levels(bits, len(bits))

    def illustrations(self, model: VAEModel, told: Told | None) -> dict[str, Image.Image]:
        """None: it draws in one go."""
        return {}

    def explain(self, model: VAEModel, picture: Tensor, output: Path, seed: int) -> list[Path]:
        """The picture above its reconstruction."""
        path = output / "reconstruction.png"
        save_png(path, above(picture[None], reconstructed(model, picture[None], SamplingConfig()), scale=4))
        return [path]


FAMILY: Family[VAEConfig, VAEModel] = VAEFamily()
