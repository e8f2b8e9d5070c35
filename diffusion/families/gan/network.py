"""Generator and discriminator after R3GAN (arXiv 2501.05441): residual blocks without normalisation.

Blocks are initialised as the identity (Fixup, 1901.09321), and classes are projected (1802.05637).
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.families.gan.config import GANConfig
from diffusion.families.layers import pixels_per_position

SLOPE = 0.2
"""Negative slope of the leaky ReLU."""
GROUP = 8
"""Channels per group of the 3×3 convolutions."""
AUGMENTING = 10
"""Random numbers that augment an image."""
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class GANBlock(nn.Module):
    """Residual block: an inverted bottleneck around a grouped convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = _initialize(nn.Conv2d(channels, hidden, 1))
        self.mix = _initialize(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden // GROUP))
        self.contract = nn.Conv2d(hidden, channels, 1, bias=False)
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        out: Tensor = x + self.contract(_active(self.mix(_active(self.expand(x)))))
        return out


class GANResample(nn.Module):
    """Pointwise convolution with upsampling before it or downsampling after it, by a factor of 2."""

    def __init__(self, inputs: int, outputs: int, up: bool) -> None:
        super().__init__()
        self.conv, self.up = _initialize(nn.Conv2d(inputs, outputs, 1, bias=False), gain=1), up

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, 2H, 2W), or (N, outputs, H/2, W/2)."""
        if self.up:
            return functional.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")
        out: Tensor = self.conv(functional.avg_pool2d(x, 2))
        return out


class Generator(nn.Module):
    """Generator of images with ``channels`` and ``size`` pixels from noise, conditioned on ``classes`` (0: none).

    A size that patch and resolutions do not divide is rounded up inside. Raises UserError as ``pixels_per_position``.
    """

    def __init__(self, config: GANConfig, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        self.config, self.size, self.patch = config, size, config.patch
        low = math.ceil(size / pixels_per_position(config.patch, len(config.channel_mult), size))
        widths = [config.width * factor for factor in config.channel_mult[::-1]]
        self.no_class = classes
        """Index of the unconditional class."""
        self.classes = nn.Embedding(classes + 1, config.latent) if classes else None
        self.begin = _initialize(
            nn.Linear(config.latent * (2 if classes else 1), widths[0] * low**2, bias=False), gain=1
        )
        self.shape = (widths[0], low, low)
        self.layers = _layers(widths, config.blocks, up=True)
        self.end = _initialize(nn.Conv2d(widths[-1], channels * config.patch**2, 3, padding=1), gain=1)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Generate images (N, C, H, W), nominally in [−1, 1], from noise ``z`` (N, latent, 1, 1).

        ``label`` is the class of each image or ``no_class``, (N,) integers; None: ``no_class``.
        """
        z = z.flatten(1)
        if self.classes is not None:
            z = torch.cat([z, self.classes(_labels(label, z, self.no_class))], dim=1)
        h = self.begin(z).unflatten(1, self.shape).contiguous(memory_format=torch.channels_last)
        out: Tensor = functional.pixel_shuffle(self.end(self.layers(h)), self.patch).float()
        return out[..., : self.size, : self.size]


class Discriminator(nn.Module):
    """Discriminator of images with ``channels`` and ``size`` pixels, conditioned on ``classes`` (0: none)."""

    def __init__(self, config: GANConfig, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        pixels, widths = (
            pixels_per_position(config.patch, len(config.channel_mult), size),
            [config.width * factor for factor in config.channel_mult],
        )
        low = math.ceil(size / pixels)
        self.patch, self.padding = config.patch, -size % pixels
        self.no_class = classes
        self.begin = _initialize(nn.Conv2d(channels * config.patch**2, widths[0], 3, padding=1), gain=1)
        self.layers = _layers(widths, config.blocks, up=False)
        self.gather = _initialize(nn.Conv2d(widths[-1], widths[-1], low, groups=widths[-1], bias=False), gain=1)
        self.head = _initialize(nn.Linear(widths[-1], config.latent if classes else 1, bias=False), gain=1)
        self.classes = nn.Embedding(classes + 1, config.latent) if classes else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Score images (N, C, H, W) as (N,) float32: higher is more real; only differences are meaningful."""
        if self.padding:
            x = functional.pad(x, (0, self.padding, 0, self.padding))
        h = self.layers(self.begin(functional.pixel_unshuffle(x, self.patch)))
        scores: Tensor = self.head(self.gather(h).flatten(1)).float()
        if self.classes is None:
            return scores.squeeze(1)
        direction: Tensor = self.classes(_labels(label, scores, self.no_class))
        return (scores * direction).sum(1) / math.sqrt(direction.shape[1])


def augment(x: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Recolour, translate and cut holes into images (N, C, S, S), each with probability ``rate``; differentiable by x.

    After DiffAugment (arXiv 2006.10738), but edges are repeated. ``uniform`` are the random numbers of each image,
    (N, AUGMENTING) in [0, 1). A rate below 1 keeps the generator from learning to augment (2006.06676, section 2.2).
    """
    size, places = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    recolour, translate, cut = (uniform[:, :3] < rate).unbind(1)
    colours = torch.where(recolour[:, None], uniform[:, 3:6], 0.5)[..., None, None, None]
    brightness, saturation, contrast = colours.unbind(1)
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)
    shift = torch.where(translate[:, None], (uniform[:, 6:8] - 0.5) * size / 4, 0).round()
    # Products with matrices of zeros and ones, whose gradients are deterministic on every device.
    rows, columns = ((places[:, None] + shift[..., None, None]).clamp(0, size - 1) == places).to(x).unbind(1)
    x = rows[:, None] @ x @ columns[:, None].mT
    hole = ((places - uniform[:, 8:, None] * size).abs() < size / 4) & cut[:, None, None]
    return x.masked_fill((hole[:, 0, :, None] & hole[:, 1, None, :])[:, None], 0)


def _labels(label: Tensor | None, like: Tensor, no_class: int) -> Tensor:
    return torch.full((len(like),), no_class, device=like.device) if label is None else label


def _layers(widths: list[int], blocks: int, up: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        if number:
            layers.append(GANResample(widths[number - 1], width, up))
        layers += [GANBlock(width) for _ in range(blocks)]
    return nn.Sequential(*layers)


def _active(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, SLOPE)


def _initialize(layer: Layer, gain: float = math.sqrt(2 / (1 + SLOPE**2))) -> Layer:
    """Initialise ``layer`` with He weights (1502.01852), scaled by ``gain``, and zero bias."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
