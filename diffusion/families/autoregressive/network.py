"""The gated PixelCNN (arXiv 1606.05328): each pixel's distribution from the pixels above it and to its left.

Two stacks of causal convolutions leave no blind spot: the vertical stack sees all rows above, the horizontal stack the
pixels to the left in the same row, and the output of the vertical stack. Dilations cycle through 1, 2, 4 and 8
(1511.07122). The output is PixelCNN++'s discretized mixture of logistics, in which the channels of a pixel are
autoregressive (1701.05517, sections 2.1, 2.2): values lie on equidistant levels from −1 to 1, each with the probability
of the continuous mixture between the midpoints to its neighbours; the first and the last include the tails.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.families.autoregressive.config import AutoregressiveConfig

REACH = (1, 2, 4, 8)
"""Dilations of the layers, repeated in this order."""
LEVELS = 256
"""Number of values of stored pixels."""
LOG_SCALE = -7.0
"""Smallest log-scale: less than a quarter of one of 256 levels."""


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
        return above + from_above, beside + self.out(gate_activation(from_beside + self.link(from_above)))

    def class_bias(self, label: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Biases of both stacks for classes ``label`` (N,), (N, C) and (N, 2C); None for an unconditional layer."""
        if self.classes is None or label is None:
            return None
        vertical, horizontal = self.classes(label).tensor_split([self.out.in_channels], dim=1)
        return vertical, horizontal


class PixelCNN(nn.Module):
    """Gated PixelCNN: each pixel's distribution given those before it in raster order, and ``classes`` (0: none)."""

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
        assert self.head.bias is not None
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            # Means are spread evenly over all values, with scales about as large as the distance between them. On the
            # CPU even if the weights are meta tensors, as when diffusion.checkpoints checks a header.
            means = torch.linspace(-1, 1, config.mixtures + 2, device="cpu")[1:-1].repeat(channels)
            self.head.bias[config.mixtures : config.mixtures + len(means)] = means
            self.head.bias[config.mixtures + len(means) : config.mixtures + 2 * len(means)] = -1.0

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict the parameters of each pixel's mixture, (N, ``parameter_count``, H, W), for images in [−1, 1].

        ``label`` is the class of each image or ``no_class``, (N,) integers; None: ``no_class``.
        """
        label = self.labels(label, x)
        inputs = append_ones(x)
        above = self.above(functional.pad(inputs, (1, 1, 1, 0))[..., :-1, :])
        beside = self.beside(functional.pad(inputs, (1, 0, 0, 0))[..., :-1])
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
    """Incremental evaluation of a PixelCNN for images of ``height`` × ``width`` that are sampled pixel by pixel.

    The vertical stack is evaluated once per row, the horizontal stack once per pixel: the work of one forward pass.
    """

    def __init__(self, network: PixelCNN, count: int, height: int, width: int, label: Tensor | None) -> None:
        weight = network.head.weight
        self.network, self.width = network, width
        self.images = weight.new_zeros(count, network.channels, height, width)
        self.layers = [layer for layer in network.layers if isinstance(layer, Layer)]
        channels = network.above.out_channels
        label = network.labels(label, self.images)
        self.biases = [layer.class_bias(label) for layer in self.layers]
        # Cached inputs of each layer: all rows of the vertical stack, the current row of the horizontal stack.
        self.above = [weight.new_zeros(count, channels, height, width) for _ in self.layers]
        self.beside = [weight.new_zeros(width, count, channels) for _ in self.layers]
        self.links: list[Tensor] = []
        # Both taps in one matrix: a single product for each pixel.
        self.taps = [layer.beside.weight[:, :, 0].transpose(1, 2).flatten(1) for layer in self.layers]

    def begin_row(self, y: int) -> None:
        """Evaluate the vertical stack for row ``y``; all rows above it must be sampled."""
        edge = self.images.new_zeros(len(self.images), self.network.channels + 1, 1, self.width)
        last_row = edge if y == 0 else append_ones(self.images[:, :, y - 1 : y])
        row = self.network.above(functional.pad(last_row, (1, 1, 0, 0)))
        self.links = []
        for layer, bias, cache in zip(self.layers, self.biases, self.above, strict=True):
            cache[:, :, y : y + 1] = row
            upper = y - layer.reach
            taps = torch.cat([cache[:, :, upper : upper + 1] if upper >= 0 else torch.zeros_like(row), row], dim=2)
            padded_taps = functional.pad(taps, (layer.reach, layer.reach, 0, 0))
            h = functional.conv2d(padded_taps, layer.above.weight, layer.above.bias, dilation=(1, layer.reach))
            if bias is not None:
                h = h + bias[0][..., None, None]
            h = functional.silu(h)
            links = layer.link(h)
            if bias is not None:
                links = links + bias[1][..., None, None]
            # (W, N, 2C): the values of a pixel are contiguous.
            self.links.append(links[:, :, 0].permute(2, 0, 1).contiguous())
            row = row + h

    def parameters(self, y: int, x: int) -> Tensor:
        """Predict the mixture parameters (N, ``parameter_count``) of pixel ``x`` in row ``y``, the current row."""
        neighbour = self.images[:, :, y, x - 1] if x else None
        count, channels = len(self.images), self.network.channels
        inputs = self.images.new_zeros(count, channels + 1) if neighbour is None else append_ones(neighbour)
        h = functional.linear(inputs, self.network.beside.weight.flatten(1), self.network.beside.bias)
        for layer, taps, cache, links in zip(self.layers, self.taps, self.beside, self.links, strict=True):
            cache[x] = h
            tap = cache[x - layer.reach] if x >= layer.reach else torch.zeros_like(h)
            update = functional.linear(torch.cat([tap, h], dim=1), taps, layer.beside.bias) + links[x]
            h = h + functional.linear(gate_activation(update), layer.out.weight.flatten(1), layer.out.bias)
        return self.network.output(h[..., None, None])[..., 0, 0]


def sample_images(network: PixelCNN, noise: Tensor, label: Tensor | None = None, levels: int = LEVELS) -> Tensor:
    """Sample images (N, C, H, W) from Gaussian ``noise`` (N, C + 1, H, W), with values on the ``levels``."""
    count, _, height, width = noise.shape
    sampler = PixelSampler(network, count, height, width, label)
    for y in range(height):
        sampler.begin_row(y)
        for x in range(width):
            mixtures = mixtures_of(sampler.parameters(y, x), network.channels)
            sampler.images[:, :, y, x] = sample_pixels(mixtures, noise[:, :, y, x], levels)
    return sampler.images


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of K logistics for pixels of C values; all values of a pixel share one component."""

    logits: Tensor
    """(…, K): unnormalised log-probabilities of the components."""
    means: Tensor
    """(…, C, K)."""
    log_scales: Tensor
    """(…, C, K)."""
    slopes: Tensor
    """(…, C, C, K): coefficients of the preceding channels in the mean of a channel; strictly lower triangular."""


def parameter_count(channels: int, mixtures: int) -> int:
    """Count the parameters of a pixel's mixture."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixtures_of(numbers: Tensor, channels: int) -> Mixtures:
    """Convert a network's output (…, ``parameter_count``) to mixtures."""
    pairs = channels * (channels - 1) // 2
    count = numbers.shape[-1] // parameter_count(channels, 1)
    parts = [count, count * channels, count * channels, count * pairs]
    logits, means, log_scales, slopes = torch.split(numbers.float(), parts, dim=-1)
    indices = torch.tril_indices(channels, channels, -1, device=numbers.device)
    square = numbers.new_zeros(*numbers.shape[:-1], channels, channels, count, dtype=torch.float32)
    square[..., indices[0], indices[1], :] = torch.unflatten(slopes, -1, (pairs, count)).tanh()
    return Mixtures(
        logits,
        torch.unflatten(means, -1, (channels, count)),
        torch.unflatten(log_scales, -1, (channels, count)).clamp(min=LOG_SCALE),
        square,
    )


def log_probability(mixtures: Mixtures, x: Tensor, levels: int = LEVELS) -> Tensor:
    """Compute ln p of pixels ``x`` (…, C), each value on one of the ``levels``: (…,) float32."""
    means = mixtures.means + (mixtures.slopes * x[..., None, :, None]).sum(-2)
    values = log_logistic(x[..., None], means, mixtures.log_scales, levels)
    return (values.sum(-2) + mixtures.logits.log_softmax(-1)).logsumexp(-1)


def log_logistic(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int = LEVELS) -> Tensor:
    """Compute ln p of values ``x``, each on one of the ``levels``, under discretized logistics, all of one shape."""
    half, inverse = 1 / (levels - 1), (-log_scale).exp()
    upper, lower = (x - mean + half) * inverse, (x - mean - half) * inverse
    # σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l − u)), computed without cancellation.
    log_below, log_above = functional.logsigmoid(upper), functional.logsigmoid(-lower)
    log_inside = log_below + log_above + torch.log(-torch.expm1(-2 * half * inverse))
    return torch.where(x <= -1 + half, log_below, torch.where(x >= 1 - half, log_above, log_inside))


def sample_pixels(mixtures: Mixtures, noise: Tensor, levels: int = LEVELS) -> Tensor:
    """Sample pixels (…, C) from Gaussian ``noise`` (…, C + 1), whose last value selects the component, by inversion."""
    quantile = torch.special.ndtr(noise[..., -1:])
    component = (mixtures.logits.softmax(-1).cumsum(-1) < quantile).sum(-1).clamp(max=mixtures.logits.shape[-1] - 1)

    def select(values: Tensor) -> Tensor:
        index = component[(..., *(None,) * (values.ndim - component.ndim))].expand(*values.shape[:-1], 1)
        return values.gather(-1, index).squeeze(-1)

    means, log_scales, slopes = (select(field) for field in (mixtures.means, mixtures.log_scales, mixtures.slopes))
    # The logistic quantile ln u − ln (1 − u) at u = Φ(noise).
    spread = torch.special.log_ndtr(noise[..., :-1]) - torch.special.log_ndtr(-noise[..., :-1])
    steps = (levels - 1) / 2
    values: list[Tensor] = []
    for channel in range(means.shape[-1]):
        mean = means[..., channel]
        for previous, value in enumerate(values):
            mean = mean + slopes[..., channel, previous] * value
        value = mean + log_scales[..., channel].exp() * spread[..., channel]
        values.append(((value + 1) * steps).round().clamp(0, levels - 1) / steps - 1)
    return torch.stack(values, -1)


def gate_activation(x: Tensor) -> Tensor:
    """Gated activation, (N, 2C, …) to (N, C, …): tanh of the first half times the sigmoid of the second."""
    values, gates = x.chunk(2, dim=1)
    return values.tanh() * gates.sigmoid()


def append_ones(x: Tensor) -> Tensor:
    """Append a channel of ones to ``x`` (N, C, …)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
