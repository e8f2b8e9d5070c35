"""The gated PixelCNN (arXiv 1606.05328): each pixel's distribution from the pixels above it and to its left.

Two stacks of causal convolutions leave no blind spot: the vertical stack sees all rows above, the horizontal stack the
pixels to the left in the same row, and the output of the vertical stack. Dilations cycle through 1, 2, 4 and 8
(1511.07122). The output is PixelCNN++'s mixture of logistics, in which the channels of a pixel are autoregressive
(1701.05517).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.models.config import AutoregressiveConfig
from diffusion.models.discretized_logistics import LEVELS, mixtures_of, parameter_count, sample_pixels

REACH = (1, 2, 4, 8)
"""Dilations of the layers, repeated in this order."""


class Layer(nn.Module):
    """A layer of both stacks; ``reach`` is its dilation: how many pixels up and to the left it sees."""

    def __init__(self, channels: int, reach: int, classes: int) -> None:
        super().__init__()
        self.reach = reach
        self.above = nn.Conv2d(channels, channels, (2, 3), dilation=reach)
        self.beside = nn.Conv2d(channels, 2 * channels, (1, 2), dilation=(1, reach))
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        self.classes = nn.Embedding(classes + 1, 3 * channels) if classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.1)

    def forward(self, above: Tensor, beside: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Update the features of the vertical and of the horizontal stack, (N, C, H, W) each."""
        reach, bias = self.reach, self.class_bias(label)
        from_above = self.above(functional.pad(above, (reach, reach, reach, 0)))
        from_beside = self.beside(functional.pad(beside, (reach, 0, 0, 0)))
        if bias is not None:
            from_above, from_beside = from_above + bias[0][..., None, None], from_beside + bias[1][..., None, None]
        from_above = functional.silu(from_above)
        return above + from_above, beside + self.out(gated(from_beside + self.link(from_above)))

    def class_bias(self, label: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Biases of both stacks for classes ``label`` (N,), (N, C) and (N, 2C); None for an unconditional layer."""
        if self.classes is None or label is None:
            return None
        one, other = self.classes(label).tensor_split([self.out.in_channels], dim=1)
        return one, other


class PixelCNN(nn.Module):
    """Gated PixelCNN: the distribution of each pixel given the pixels before it in raster order.

    ``classes`` is the number of classes that it is conditioned on; 0: unconditional.
    """

    def __init__(self, config: AutoregressiveConfig, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.channels, self.no_class = channels, classes
        # An additional channel of ones distinguishes the padding from values of 0.
        self.above = nn.Conv2d(channels + 1, config.width, (1, 3))
        self.beside = nn.Conv2d(channels + 1, config.width, 1)
        self.layers = nn.ModuleList(
            Layer(config.width, REACH[number % len(REACH)], classes) for number in range(config.layers)
        )
        self.inner = nn.Conv2d(config.width, 2 * config.width, 1)
        self.head = nn.Conv2d(2 * config.width, parameter_count(channels, config.mixtures), 1)
        _init_head(self.head, channels, config.mixtures)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict the parameters of each pixel's mixture, (N, ``parameter_count``, H, W).

        Args:
            x: Images, (N, C, H, W) in [−1, 1].
            label: Class of each image or ``no_class``, (N,) integers; None: ``no_class``.
        """
        label = self.labels(label, x)
        marked = with_ones(x)
        above = self.above(functional.pad(marked, (1, 1, 1, 0))[..., :-1, :])
        beside = self.beside(functional.pad(marked, (1, 0, 0, 0))[..., :-1])
        for layer in self.layers:
            above, beside = layer(above, beside, label)
        return self.output(beside)

    def output(self, beside: Tensor) -> Tensor:
        """Apply the output layers, which are pointwise."""
        out: Tensor = self.head(functional.silu(self.inner(functional.silu(beside)))).float()
        return out

    def labels(self, label: Tensor | None, x: Tensor) -> Tensor | None:
        """Fill in ``no_class`` for a missing ``label``; None for an unconditional network."""
        if not self.no_class:
            return None
        return torch.full((len(x),), self.no_class, device=x.device) if label is None else label


class PixelSampler:
    """Incremental evaluation of a PixelCNN for images of ``size`` pixels that are sampled pixel by pixel.

    The features of both stacks are cached: the vertical stack is evaluated once per row, the horizontal stack once per
    pixel. Together that is the work of one forward pass.
    """

    def __init__(self, network: PixelCNN, count: int, size: int, label: Tensor | None) -> None:
        weight = network.head.weight
        self.network, self.size = network, size
        self.images = weight.new_zeros(count, network.channels, size, size)
        self.layers = [layer for layer in network.layers if isinstance(layer, Layer)]
        channels = network.above.out_channels
        label = network.labels(label, self.images)
        self.biases = [layer.class_bias(label) for layer in self.layers]
        # Cached inputs of each layer: all rows of the vertical stack, the current row of the horizontal stack.
        self.above = [weight.new_zeros(count, channels, size, size) for _ in self.layers]
        self.beside = [weight.new_zeros(size, count, channels) for _ in self.layers]
        self.linked: list[Tensor] = []
        # Both taps in one matrix: a single product for each pixel.
        self.taps = [layer.beside.weight[:, :, 0].transpose(1, 2).flatten(1) for layer in self.layers]

    def begin_row(self, y: int) -> None:
        """Evaluate the vertical stack for row ``y``; all rows above it must be sampled."""
        edge = self.images.new_zeros(len(self.images), self.network.channels + 1, 1, self.size)
        last = edge if y == 0 else with_ones(self.images[:, :, y - 1 : y])
        row = self.network.above(functional.pad(last, (1, 1, 0, 0)))
        self.linked = []
        for layer, bias, cached in zip(self.layers, self.biases, self.above, strict=True):
            cached[:, :, y : y + 1] = row
            before = y - layer.reach
            taps = torch.cat([cached[:, :, before : before + 1] if before >= 0 else torch.zeros_like(row), row], dim=2)
            padded = functional.pad(taps, (layer.reach, layer.reach, 0, 0))
            h = functional.conv2d(padded, layer.above.weight, layer.above.bias, dilation=(1, layer.reach))
            if bias is not None:
                h = h + bias[0][..., None, None]
            h = functional.silu(h)
            linked = layer.link(h)
            if bias is not None:
                linked = linked + bias[1][..., None, None]
            # (W, N, 2C): the values of a pixel are contiguous.
            self.linked.append(linked[:, :, 0].permute(2, 0, 1).contiguous())
            row = row + h

    def parameters(self, y: int, x: int) -> Tensor:
        """Predict the mixture parameters (N, ``parameter_count``) of pixel ``x`` in row ``y``, the current row."""
        left = self.images[:, :, y, x - 1] if x else None
        count, channels = len(self.images), self.network.channels
        marked = self.images.new_zeros(count, channels + 1) if left is None else with_ones(left)
        h = functional.linear(marked, self.network.beside.weight.flatten(1), self.network.beside.bias)
        for layer, taps, cached, linked in zip(self.layers, self.taps, self.beside, self.linked, strict=True):
            cached[x] = h
            before = cached[x - layer.reach] if x >= layer.reach else torch.zeros_like(h)
            update = functional.linear(torch.cat([before, h], dim=1), taps, layer.beside.bias) + linked[x]
            h = h + functional.linear(gated(update), layer.out.weight.flatten(1), layer.out.bias)
        return self.network.output(h[..., None, None])[..., 0, 0]


def sample_images(network: PixelCNN, noise: Tensor, label: Tensor | None = None, levels: int = LEVELS) -> Tensor:
    """Sample images (N, C, S, S) from Gaussian ``noise`` (N, C + 1, S, S), with values on the ``levels``."""
    size = noise.shape[-1]
    sampler = PixelSampler(network, len(noise), size, label)
    for y in range(size):
        sampler.begin_row(y)
        for x in range(size):
            mixtures = mixtures_of(sampler.parameters(y, x), network.channels)
            sampler.images[:, :, y, x] = sample_pixels(mixtures, noise[:, :, y, x], levels)
    return sampler.images


def gated(x: Tensor) -> Tensor:
    """Gated activation, (N, 2C, …) to (N, C, …): tanh of the first half times the sigmoid of the second."""
    one, other = x.chunk(2, dim=1)
    return one.tanh() * other.sigmoid()


def with_ones(x: Tensor) -> Tensor:
    """Append a channel of ones to ``x`` (N, C, …)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def _init_head(head: nn.Conv2d, channels: int, mixtures: int) -> None:
    """Spread the means evenly over all values, with scales about as large as the distance between them."""
    assert head.bias is not None
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        # On the CPU even if the weights are meta tensors, as when diffusion.checkpoints checks a header.
        means = torch.linspace(-1, 1, mixtures + 2, device="cpu")[1:-1].repeat(channels)
        head.bias[mixtures : mixtures + len(means)] = means
        head.bias[mixtures + len(means) : mixtures + 2 * len(means)] = -1.0
