"""Convolutional variational autoencoder after arXiv 2112.10752: images to lower-resolution latents, and back."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.common.errors import UserError
from diffusion.models.config import LatentSpace, VAEConfig
from diffusion.models.unet import Grow, normalisation

LOG_VARIANCE = (-20.0, 10.0)
"""Range of a posterior's log-variance; values beyond it make no difference in float32."""
SCALE = 0.1
"""Initial standard deviation of the likelihood. Starting at the error of an untrained decoder would make latents cost
more than they gain, and the network would learn to ignore them (posterior collapse, arXiv 1511.06349)."""


class Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = normalisation(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = normalisation(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        out: Tensor = self.skip(x) + h
        return out


class VAE(nn.Module):
    """Encoder and decoder of images with ``channels`` and ``size`` pixels; UserError if the factor does not divide."""

    def __init__(self, config: VAEConfig, channels: int, size: int) -> None:
        super().__init__()
        if size % config.factor:
            raise UserError(
                f"model.patch = {config.patch} and {len(config.channel_mult)} resolutions make a latent position of "
                f"{config.factor}×{config.factor} pixels, and {config.factor} does not divide the images' {size}: "
                "ingest them at a multiple of it (ingest.size), or take a number out of model.channel_mult"
            )
        widths = [config.width * multiplier for multiplier in config.channel_mult]
        self.patch = config.patch
        folded = channels * config.patch**2
        latent, blocks = config.latent_channels, config.blocks
        self.encoder = _layers(folded, widths, blocks, 2 * latent, lambda c: nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.decoder = _layers(latent, widths[::-1], blocks + 1, folded, Grow)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        """Logarithm of the standard deviation of images' values, in [−1, 1], around their reconstructions."""

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as the means of their posteriors, (N, c, H/f, W/f)."""
        return self.posterior(x)[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (N, C, H, W) in [−1, 1] as mean and log-variance of the posterior, (N, c, H/f, W/f) each."""
        mean, log_variance = self.encoder(functional.pixel_unshuffle(x, self.patch)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (N, c, H/f, W/f) to images (N, C, H, W), nominally in [−1, 1]."""
        out: Tensor = functional.pixel_shuffle(self.decoder(z), self.patch).float()
        return out

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``x`` from latents sampled with ``noise``; also returns their mean and log-variance."""
        mean, log_variance = self.posterior(x)
        return self.decode(reparameterize(mean, log_variance, noise)), mean, log_variance


class Latents(nn.Module):
    """Autoencoder of ``space`` for images (C, H, W), with the mean and standard deviation of its latents, (1, c, 1, 1).

    Latents are normalised to mean 0 and standard deviation 1 for a diffusion model (arXiv 2112.10752, appendix G).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: LatentSpace, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.space = space
        self.network = VAE(space.autoencoder, shape[0], shape[-1])
        self.register_buffer("mean", torch.zeros(1, space.channels, 1, 1))
        self.register_buffer("std", torch.ones(1, space.channels, 1, 1))

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as latents (N, c, h, w): the posterior means, without its noise."""
        return ((self.network.encode(x) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (N, c, h, w) to images (N, C, H, W), nominally in [−1, 1]."""
        return self.network.decode(z * self.std + self.mean)


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Sample latents from the posterior with standard Gaussian ``noise``, all (N, …) (arXiv 1312.6114, section 2.4)."""
    return mean + (0.5 * log_variance).exp() * noise


def _layers(
    inputs: int, widths: list[int], blocks: int, outputs: int, resample: Callable[[int], nn.Module]
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
    current = widths[0]
    for resolution, width in enumerate(widths):
        if resolution:
            layers.append(resample(current))
        for _ in range(blocks):
            layers.append(Block(current, width))
            current = width
    return nn.Sequential(*layers, normalisation(current), nn.SiLU(), nn.Conv2d(current, outputs, 3, padding=1))
