"""The denoising U-Net (after arXiv 2006.11239 and 2105.05233)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffusion.common.errors import UserError
from diffusion.families.ddpm.config import ModelConfig, default_channel_mult
from diffusion.families.layers import Upsample, normalisation, pixels_per_position
from diffusion.families.text_encoder import WIDTH

LAYER, GOLDEN = 0x9E3779B97F4A7, -0x61C8864680B583EB
"""Odd multipliers that separate the dropout random numbers of layers and of values."""
LEVEL_SCALE = 1000
"""Factor from the noise level of small images, below 1, to the range of time steps that the embedding expects."""
TIMES = 1000
"""Range of times that the embedding tells apart; times of schedules with other numbers of steps are scaled to it."""
WRITTEN_OUT = (64, 256)
"""Most positions for which attention is computed without the fused kernel, in float32 and in bfloat16: below, its
backward pass takes longer on CPUs, up to six times in bfloat16."""


class ResidualBlock(nn.Module):
    """Residual block with adaptive group norm (arXiv 2105.05233, section 3.1), and attention if ``heads`` is not 0.

    If ``text_heads`` is not 0, it attends to the tokens of captions (arXiv 2112.10752, section 3.3).
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, heads: int, dropout: float = 0.0, text_heads: int = 0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = normalisation(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = normalisation(outputs)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs, heads) if heads else nn.Identity()
        self.text_attention = TextAttention(outputs, text_heads) if text_heads else None

    def forward(
        self, x: Tensor, embedding: Tensor, draws: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """(N, inputs, H, W) and (N, embedding) to (N, outputs, H, W); the others are as in ``UNet.forward``."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = functional.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        if draws is not None:
            h = seeded_dropout(h, draws, self.dropout)
        h = self.skip(x) + self.conv2(h)
        out: Tensor = self.attention(h)
        return out if self.text_attention is None else self.text_attention(out, tokens)


class SelfAttention(nn.Module):
    """Self-attention over all positions."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = normalisation(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        # In channels-last memory format this order of dimensions needs no copy.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(attend(query, key, value).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))
        return x + out


class TextAttention(nn.Module):
    """Attention of all positions to the tokens of a caption, and to a learned one that means nothing."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = normalisation(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(WIDTH, 2 * channels)
        self.nothing = nn.Parameter(torch.zeros(2 * channels))
        """Key and value of the learned token, all that there is to attend to without a caption."""
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """(N, C, H, W) and (N, L, 384) to (N, C, H, W)."""
        n, c, h, w = x.shape
        query = self.query(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, self.heads, c // self.heads)
        key_value, mask = self.nothing.to(query.dtype).expand(n, 1, 2 * c), None
        if tokens is not None:
            known = self.key_value(functional.layer_norm(tokens.to(self.key_value.weight.dtype), (WIDTH,)))
            key_value = torch.cat([key_value, known.to(query.dtype)], dim=1)
            mask = functional.pad(tokens.any(-1), (1, 0), value=True)[:, None, None]
        key, value = key_value.view(n, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = attend(query.transpose(1, 2), key, value, mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))
        return x + out


class Downsample(nn.Module):
    """Downsampling by a factor of 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(
        self, x: Tensor, embedding: Tensor, draws: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """(N, C, H, W) to (N, C, H/2, W/2); independent of the embedding and the rest."""
        out: Tensor = self.conv(x)
        return out


class UNet(nn.Module):
    """U-Net for images with ``channels`` and ``size`` pixels, conditioned on ``classes`` (0: none).

    It takes images of any height and width: those that patch and resolutions do not divide are padded inside, and
    ``size`` is the side of the square of their area. Raises UserError as ``pixels_per_position``.
    """

    def __init__(self, config: ModelConfig, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        channel_mult = config.channel_mult or default_channel_mult(config.patch, size)
        self.fold = pixels_per_position(config.patch, len(channel_mult), size)
        if config.low_resolution is not None and (config.low_resolution >= size or size % config.low_resolution):
            divisors = [str(divisor) for divisor in range(2, size) if size % divisor == 0]
            raise UserError(
                f"model.low_resolution = {config.low_resolution} and the images have {size} pixels, which is no "
                "multiple of it: " + (f"use {' or '.join(divisors)}" if divisors else "ingest them at another size")
            )
        self.patch, self.width = config.patch, config.width
        self.time_scale = TIMES / config.steps
        self.dropout, self.gradient_checkpointing = config.dropout, False
        """Whether activations inside layers are recomputed in the backward pass instead of stored."""
        embedding = 4 * config.width
        self.time = nn.Sequential(nn.Linear(config.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.has_tokens = config.tokens > 0
        if not self.has_tokens:
            self.time.append(nn.SiLU())
        self.no_class = classes
        """Index of the unconditional class."""
        self.classes = nn.Embedding(classes + 1, embedding) if classes else None
        self.text = nn.Linear(WIDTH, embedding) if config.text else None
        self.no_text = nn.Parameter(torch.zeros(embedding)) if config.text else None
        """Embedding of a missing or dropped caption."""
        self.level = nn.Linear(config.width, embedding) if config.low_resolution is not None else None
        inputs = channels * (1 if config.low_resolution is None else 2)
        self.stem = nn.Conv2d(inputs * config.patch**2, config.width, 3, padding=1)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        current, skips = config.width, [config.width]

        def block(inputs: int, resolution: int, attention: bool, text: bool = False) -> ResidualBlock:
            nonlocal current
            current = config.width * channel_mult[resolution]
            heads, text_heads = (config.heads if wanted else 0 for wanted in (attention, attention or text))
            text_heads = text_heads if self.has_tokens else 0
            return ResidualBlock(inputs, current, embedding, heads, config.dropout, text_heads)

        lowest = len(channel_mult) - 1
        middle_attention = "middle" in config.attention or lowest in config.attention
        for resolution in range(lowest + 1):
            for _ in range(config.blocks):
                self.down.append(block(current, resolution, resolution in config.attention))
                skips.append(current)
            if resolution < lowest:
                self.down.append(Downsample(current))
                skips.append(current)
        self.middle.extend([block(current, lowest, middle_attention, text=True), block(current, lowest, False)])
        for resolution in range(lowest, -1, -1):
            for _ in range(config.blocks + 1):
                self.up.append(block(current + skips.pop(), resolution, resolution in config.attention))
            if resolution > 0:
                self.up.append(Upsample(current))

        self.norm = normalisation(current)
        # The prediction, and with a learned variance as many channels for v.
        outputs = channels * (2 if config.variance == "learned_range" else 1)
        self.head = _zero(nn.Conv2d(current, outputs * config.patch**2, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        draws: Tensor | None = None,
        low: Tensor | None = None,
        level: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy images: (N, C, H, W), or (N, 2C, H, W) with v of a learned variance in the second half.

        Args:
            x: Noisy images, (N, C, H, W).
            time: Time steps from 0 to T−1, (N,).
            label: Class of each image or ``no_class``, (N,) integers; None: ``no_class``.
            text: Caption embeddings, (N, 384), zeros for no caption; None: no captions.
            draws: Dropout seeds, (N,) int64 below 2^62; None: no dropout, as outside of training.
            low: For super-resolution, small images enlarged to (N, C, H, W).
            level: Standard deviation of the noise in ``low``, (N,).
            tokens: States of the captions' tokens, (N, L, 384), zeros for none; None: no captions.
        """
        if not self.dropout:
            draws = None
        if self.level is not None:
            assert low is not None
            x = torch.cat([x, low], dim=1)
        height, width = x.shape[-2:]
        # Half-precision weights, as diffusers may load them, need inputs of their type; under autocast all are float32.
        x = x.to(self.stem.weight.dtype)
        pad_bottom, pad_right = -height % self.fold, -width % self.fold
        if pad_bottom or pad_right:
            x = functional.pad(x, (0, pad_right, 0, pad_bottom), mode="replicate")
        embedding = self._embedding(time, label, text, level)
        h = self.stem(functional.pixel_unshuffle(x, self.patch))
        skips = [h]
        depth = 0

        def apply(layer: Callable[..., Tensor], h: Tensor) -> Tensor:
            nonlocal depth
            depth += 1
            # Each layer has its own random numbers.
            layer_draws = None if draws is None else draws + depth * LAYER
            if self.gradient_checkpointing and self.training:
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            return layer(h, embedding, layer_draws, tokens)

        for layer in self.down:
            h = apply(layer, h)
            skips.append(h)
        for layer in self.middle:
            h = apply(layer, h)
        for layer in self.up:
            h = layer(h) if isinstance(layer, Upsample) else apply(layer, torch.cat([h, skips.pop()], dim=1))
        output: Tensor = self.head(functional.silu(self.norm(h)))
        image = functional.pixel_shuffle(output, self.patch)
        return image[..., :height, :width] if pad_bottom or pad_right else image

    def matrices(self) -> list[nn.Parameter]:
        """List the weights between layers, without those that read images and conditions or write predictions."""
        layers = [*self.down, *self.middle, *self.up]
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim > 1]

    def blocks(self) -> list[nn.Module]:
        """List the residual blocks, in the order of ``modules``."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def _embedding(self, time: Tensor, label: Tensor | None, text: Tensor | None, level: Tensor | None) -> Tensor:
        """Embed the time and all other conditioning, (N, embedding)."""
        dtype = self.stem.weight.dtype
        embedding: Tensor = self.time(sinusoidal(time * self.time_scale, self.width).to(dtype))
        if self.classes is not None:
            label = torch.full_like(time, self.no_class, dtype=torch.long) if label is None else label
            embedding = embedding + self.classes(label)
        if self.text is not None and self.no_text is not None:
            captions: Tensor = self.no_text
            if text is not None:
                # Embeddings of length 1 are scaled to unit variance, which the initial weights of a layer assume.
                projection = self.text(text.to(dtype) * WIDTH**0.5)
                captions = torch.where(text.any(1, keepdim=True), projection, captions)
            embedding = embedding + captions
        if self.level is not None and level is not None:
            embedding = embedding + self.level(sinusoidal(level * LEVEL_SCALE, self.width).to(dtype))
        # Classes and captions change what times mean only if they are added before the nonlinearity, as in ADM.
        return functional.silu(embedding) if self.has_tokens else embedding


def seeded_dropout(h: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Dropout: set a share ``rate`` of the values of ``h`` (N, …) to 0 and scale up the rest (arXiv 1207.0580).

    The choice depends on ``draws`` (N,) int64 alone: each value's index is hashed with it (SplitMix64's finalizer).
    """
    numbers = torch.arange(h[0].numel(), device=h.device).view(1, *h.shape[1:])
    hashes = (numbers + 1) * GOLDEN + draws.view(-1, *(1,) * (h.ndim - 1))
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        hashes = (hashes ^ (hashes >> shift & (1 << (64 - shift)) - 1)) * factor
    mask = (hashes >> 33 & 2**31 - 1) >= rate * 2**31
    return h * mask.to(h.dtype) / (1 - rate)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute scaled dot-product attention over (N, heads, positions, channels), to keys where ``mask`` is true."""
    if query.shape[-2] > WRITTEN_OUT[query.dtype != torch.float32]:
        return functional.scaled_dot_product_attention(query, key, value, mask)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.matmul(scores.softmax(-1), value)


def sinusoidal(time: Tensor, width: int) -> Tensor:
    """Compute the sinusoidal embedding of ``time`` (N,) as (N, width), with periods from 2,000 to 2,000/128 ≈ 16.

    Each frequency tells times from 0 to 1,000 apart: of the usual ones, made for positions of words (arXiv 1706.03762),
    a third hardly changes over that range.
    """
    frequencies = 2 * math.pi / 2000 * 128 ** torch.linspace(0, 1, width // 2, device=time.device)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Initialise a layer with zeros, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
