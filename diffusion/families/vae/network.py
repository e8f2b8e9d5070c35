"""Convolutional variational autoencoder after arXiv 2112.10752, with a learned, hierarchical prior of its latents."""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.common.errors import UserError
from diffusion.families.autoregressive.network import log_logistic
from diffusion.families.layers import Upsample, normalisation
from diffusion.families.vae.config import LatentSpace, VAEConfig

LOG_VARIANCE = (-20.0, 10.0)
"""Range of a posterior's log-variance; values beyond it make no difference in float32."""
SCALE = 0.1
"""Initial scale of the likelihood. Starting at the error of an untrained decoder would make latents cost
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


class Autoencoder(nn.Module):
    """Encoder and decoder of images with ``channels``, of any height and width that the factor divides."""

    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.channel_mult]
        self.config = config
        inputs = channels * config.patch**2
        latent, blocks = config.latent_channels, config.blocks
        self.encoder = _layers(inputs, widths, blocks, 2 * latent, lambda c: nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.decoder = _layers(latent, widths[::-1], blocks + 1, inputs, Upsample)
        self.log_scale = nn.Parameter(torch.full((1, channels, 1, 1), math.log(SCALE)))
        """Logarithm of the scale of the discretized logistic around reconstructions, in [−1, 1], of each channel.

        It is learned, so that the weight of the divergence does not depend on contrast (σ-VAE, arXiv 2006.13202).
        """

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as the means of their posteriors, (N, c, H/f, W/f)."""
        return self.posterior(x)[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (N, C, H, W) in [−1, 1] as mean and log-variance of the posterior, (N, c, H/f, W/f) each."""
        return _moments(self.encoder(functional.pixel_unshuffle(x, self.config.patch)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (N, c, H/f, W/f) to images (N, C, H, W), nominally in [−1, 1]."""
        out: Tensor = functional.pixel_shuffle(self.decoder(z), self.config.patch).float()
        return out


class Prior(nn.Module):
    """Prior of latents z (N, c, h, w): a vector g ~ N(0, I), and each channel of z given g and the channels before it.

    With the posterior of g, a VAE of latents (arXiv 1903.05789): g holds what is global, and channels are the groups of
    a hierarchical VAE (2011.10650), but of one resolution, so that latent diffusion has one z to model.
    """

    def __init__(self, config: VAEConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, width = shape[0], config.width * config.channel_mult[-1]
        self.size, self.shape, self.hidden = config.global_latent, shape, (width, *shape[1:])
        numbers = math.prod(self.hidden)
        self.encoder = nn.Sequential(
            _layers(channels, [width], 1, width, Upsample), nn.Flatten(), nn.Linear(numbers, 2 * self.size)
        )
        self.begin = nn.Linear(self.size, numbers)
        self.blocks = nn.ModuleList(Block(width, width) for _ in range(channels))
        self.heads = nn.ModuleList(_head(width, 2) for _ in range(channels))
        self.channels = nn.ModuleList(nn.Conv2d(1, width, 3, padding=1) for _ in range(channels - 1))

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Split noise of images, (N, G + c·h·w, 1, 1), into the noise of g, (N, G), and of z, (N, c, h, w)."""
        global_noise, latent_noise = noise.flatten(1).tensor_split([self.size], dim=1)
        return global_noise, torch.unflatten(latent_noise, 1, self.shape)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Encode latents (N, c, h, w) as mean and log-variance of the posterior of g, (N, G) each."""
        return _moments(self.encoder(z))

    def forward(self, g: Tensor, value: Callable[[int, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute mean and log-variance of z given g (N, G), and z, (N, c, h, w) each.

        ``value`` gives each channel of z, (N, 1, h, w), from its number, mean and log-variance.
        """
        h = torch.unflatten(self.begin(g), 1, self.hidden)
        outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            h = block(h if number == 0 else h + self.channels[number - 1](outputs[-1][2]))
            mean, log_variance = _moments(head(h))
            outputs.append((mean, log_variance, value(number, mean, log_variance)))
        mean, log_variance, z = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
        return mean, log_variance, z


class VAE(nn.Module):
    """Hierarchical VAE of images with ``channels`` and ``size`` pixels: an autoencoder and the prior of its latents."""

    def __init__(self, config: VAEConfig, channels: int, size: int) -> None:
        super().__init__()
        self.config, self.autoencoder = config, Autoencoder(config, channels)
        self.prior = Prior(config, latent_shape(config, size, size))

    def generate(self, noise: Tensor) -> Tensor:
        """Generate images (N, C, H, W), nominally in [−1, 1], from Gaussian ``noise`` (N, G + c·h·w, 1, 1)."""
        g, latent_noise = self.prior.split(noise)

        def sample_channel(number: int, mean: Tensor, log_variance: Tensor) -> Tensor:
            return reparameterize(mean, log_variance, latent_noise[:, number : number + 1])

        _, _, z = self.prior(g, sample_channel)
        return self.autoencoder.decode(z)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute both parts of the negative evidence lower bound of images (N, C, H, W) in [−1, 1], in nats, (N,).

        They are −ln p(x | z), of 8-bit values, and KL(q(z | x) ‖ p(z | g)) + KL(q(g | z) ‖ N(0, I)), for z and g
        sampled from their posteriors with Gaussian ``noise`` (N, G + c·h·w, 1, 1). Also returns the reconstructions.
        """
        global_noise, latent_noise = self.prior.split(noise)
        posterior = self.autoencoder.posterior(x)
        z = reparameterize(*posterior, latent_noise)
        moments = self.prior.posterior(z)
        g = reparameterize(*moments, global_noise)
        mean, log_variance, _ = self.prior(g, lambda number, *_: z[:, number : number + 1])
        reconstruction = self.autoencoder.decode(z)
        misfit = -log_logistic(x, reconstruction, self.autoencoder.log_scale).flatten(1).sum(1)
        divergence = kl_divergence(*posterior, mean, log_variance)
        zero = torch.zeros_like(moments[0])
        return misfit, divergence + kl_divergence(*moments, zero, zero), reconstruction


class Latents(nn.Module):
    """Autoencoder of ``space`` for images of ``channels``, with mean and standard deviation of latents, (1, c, 1, 1).

    Latents are normalised to mean 0 and standard deviation 1 for a diffusion model (arXiv 2112.10752, appendix G).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: LatentSpace, channels: int) -> None:
        super().__init__()
        self.space = space
        self.network = Autoencoder(space.autoencoder, channels)
        self.register_buffer("mean", torch.zeros(1, space.channels, 1, 1))
        self.register_buffer("std", torch.ones(1, space.channels, 1, 1))

    @classmethod
    def copy_of(
        cls, autoencoder: Autoencoder, channels: int, digest: str, size: int, shapes: Sequence[tuple[int, int]]
    ) -> Self:
        """Copy an ``autoencoder`` for images of ``shapes`` (H, W); raises UserError as ``latent_shape``."""
        config = autoencoder.config
        for shape in shapes:
            latent_shape(config, *shape)
        c, side, _ = latent_shape(config, size, size)
        latents = cls(LatentSpace(autoencoder=config, digest=digest, channels=c, size=side), channels)
        latents.network.load_state_dict(autoencoder.state_dict())
        return latents

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as latents (N, c, h, w): the posterior means, without its noise."""
        return ((self.network.encode(x) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (N, c, h, w) to images (N, C, H, W), nominally in [−1, 1]."""
        return self.network.decode(z * self.std + self.mean)


def latent_shape(config: VAEConfig, height: int, width: int) -> tuple[int, int, int]:
    """Compute (c, h, w) of the latents of images; raises UserError if the factor does not divide height or width."""
    if misfits := [side for side in (height, width) if side % config.factor]:
        raise UserError(
            f"model.patch = {config.patch} and {len(config.channel_mult)} resolutions make a latent position of "
            f"{config.factor}×{config.factor} pixels, and {config.factor} does not divide the images' {misfits[0]}: "
            "use images at a multiple of it (ingest.size), or take a number out of model.channel_mult"
        )
    return config.latent_channels, height // config.factor, width // config.factor


def kl_divergence(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """Compute the divergence of a Gaussian posterior from a Gaussian prior, of each image: (N,) from (N, …) each."""
    distance = (mean - prior_mean) ** 2 + log_variance.exp()
    return 0.5 * (distance * (-prior_log_variance).exp() - 1 - log_variance + prior_log_variance).flatten(1).sum(1)


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Sample latents from the posterior with standard Gaussian ``noise``, all (N, …) (arXiv 1312.6114, section 2.4)."""
    return mean + (0.5 * log_variance).exp() * noise


def _moments(numbers: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = numbers.float().chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE)


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
    return nn.Sequential(*layers, _head(current, outputs))


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(normalisation(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
