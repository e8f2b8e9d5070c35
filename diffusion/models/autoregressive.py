"""The gated PixelCNN (arXiv 1606.05328): each pixel's distribution from the pixels above it and to its left.

Two stacks of masked convolutions, so that nothing stays unseen: one of all rows above, the other of the own row, to the
left, which is told of the first. Their layers look 1, 2, 4, 8, 1, 2 … pixels far (1511.07122). What they end in are
PixelCNN++'s mixtures of logistics, in which the colours of a pixel follow one another (1701.05517).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.models.config import AutoregressiveConfig
from diffusion.models.discretized_logistics import LEVELS, drawn, mixtures_of, width

REACH = (1, 2, 4, 8)
"""How far layers look, by turns."""


class Layer(nn.Module):
    """A layer of both stacks; ``reach``: how many pixels up and to the left it looks."""

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
        """What is known of the rows above, and of those and the pixels to the left, (N, C, H, W) each; likewise."""
        reach, told = self.reach, self.told(label)
        from_above = self.above(functional.pad(above, (reach, reach, reach, 0)))
        from_beside = self.beside(functional.pad(beside, (reach, 0, 0, 0)))
        if told is not None:
            from_above, from_beside = from_above + told[0][..., None, None], from_beside + told[1][..., None, None]
        from_above = functional.silu(from_above)
        return above + from_above, beside + self.out(gated(from_beside + self.link(from_above)))

    def told(self, label: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What the classes ``label`` (N,) add to either stack, (N, C) and (N, 2C); None: it knows no classes."""
        if self.classes is None or label is None:
            return None
        one, other = self.classes(label).tensor_split([self.out.in_channels], dim=1)
        return one, other


class PixelCNN(nn.Module):
    """Says of each pixel of images with ``channels`` how it is distributed, given those before it row by row.

    ``classes``: how many there are to be told of, 0: none.
    """

    def __init__(self, config: AutoregressiveConfig, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.channels, self.no_class = channels, classes
        # A channel of ones besides, by which an image's edge is told from a value of 0.
        self.above = nn.Conv2d(channels + 1, config.width, (1, 3))
        self.beside = nn.Conv2d(channels + 1, config.width, 1)
        self.layers = nn.ModuleList(
            Layer(config.width, REACH[number % len(REACH)], classes) for number in range(config.layers)
        )
        self.inner = nn.Conv2d(config.width, 2 * config.width, 1)
        self.head = nn.Conv2d(2 * config.width, width(channels, config.mixtures), 1)
        _begun_evenly(self.head, channels, config.mixtures)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) in [−1, 1] to the numbers (N, ``logistics.width``, H, W) that say each pixel's mixture.

        ``label`` (N,) are integers: a class, or ``no_class``, which is also what None means.
        """
        label = self.labels(label, x)
        marked = with_ones(x)
        above = self.above(functional.pad(marked, (1, 1, 1, 0))[..., :-1, :])
        beside = self.beside(functional.pad(marked, (1, 0, 0, 0))[..., :-1])
        for layer in self.layers:
            above, beside = layer(above, beside, label)
        return self.ended(beside)

    def ended(self, beside: Tensor) -> Tensor:
        """The last layers, of each pixel by itself."""
        out: Tensor = self.head(functional.silu(self.inner(functional.silu(beside)))).float()
        return out

    def labels(self, label: Tensor | None, x: Tensor) -> Tensor | None:
        """What the layers are told of images ``x``; None: they know no classes."""
        if not self.no_class:
            return None
        return torch.full((len(x),), self.no_class, device=x.device) if label is None else label


class Walk:
    """Images of ``size`` pixels as they are drawn one pixel after the other, without looking at any twice.

    Of both stacks everything is kept: the rows above are gone through once for each row, as a whole, and a pixel costs
    one column of the stack beside it. All columns together are one pass through the network.
    """

    def __init__(self, network: PixelCNN, count: int, size: int, label: Tensor | None) -> None:
        weight = network.head.weight
        self.network, self.size = network, size
        self.images = weight.new_zeros(count, network.channels, size, size)
        self.layers = [layer for layer in network.layers if isinstance(layer, Layer)]
        channels = network.above.out_channels
        label = network.labels(label, self.images)
        self.told = [layer.told(label) for layer in self.layers]
        # What goes into each layer: of the stack above in all rows, of the stack beside in the present row.
        self.above = [weight.new_zeros(count, channels, size, size) for _ in self.layers]
        self.beside = [weight.new_zeros(size, count, channels) for _ in self.layers]
        self.linked: list[Tensor] = []
        # Both taps side by side: one matrix product for each pixel.
        self.taps = [layer.beside.weight[:, :, 0].transpose(1, 2).flatten(1) for layer in self.layers]

    def begin_row(self, y: int) -> None:
        """Go through the stack above for row ``y``; all rows above it are drawn."""
        edge = self.images.new_zeros(len(self.images), self.network.channels + 1, 1, self.size)
        last = edge if y == 0 else with_ones(self.images[:, :, y - 1 : y])
        row = self.network.above(functional.pad(last, (1, 1, 0, 0)))
        self.linked = []
        for layer, told, kept in zip(self.layers, self.told, self.above, strict=True):
            kept[:, :, y : y + 1] = row
            before = y - layer.reach
            seen = torch.cat([kept[:, :, before : before + 1] if before >= 0 else torch.zeros_like(row), row], dim=2)
            padded = functional.pad(seen, (layer.reach, layer.reach, 0, 0))
            found = functional.conv2d(padded, layer.above.weight, layer.above.bias, dilation=(1, layer.reach))
            if told is not None:
                found = found + told[0][..., None, None]
            found = functional.silu(found)
            linked = layer.link(found)
            if told is not None:
                linked = linked + told[1][..., None, None]
            # (W, N, 2C): what a pixel's column needs lies together.
            self.linked.append(linked[:, :, 0].permute(2, 0, 1).contiguous())
            row = row + found

    def numbers(self, y: int, x: int) -> Tensor:
        """Those (N, ``logistics.width``) that say the mixture of pixel ``x`` in row ``y``, which was begun."""
        left = self.images[:, :, y, x - 1] if x else None
        count, channels = len(self.images), self.network.channels
        marked = self.images.new_zeros(count, channels + 1) if left is None else with_ones(left)
        h = functional.linear(marked, self.network.beside.weight.flatten(1), self.network.beside.bias)
        for layer, taps, kept, linked in zip(self.layers, self.taps, self.beside, self.linked, strict=True):
            kept[x] = h
            before = kept[x - layer.reach] if x >= layer.reach else torch.zeros_like(h)
            found = functional.linear(torch.cat([before, h], dim=1), taps, layer.beside.bias) + linked[x]
            h = h + functional.linear(gated(found), layer.out.weight.flatten(1), layer.out.bias)
        return self.network.ended(h[..., None, None])[..., 0, 0]


def draw(network: PixelCNN, noise: Tensor, label: Tensor | None = None, levels: int = LEVELS) -> Tensor:
    """Images (N, C, S, S) from Gaussian ``noise`` (N, C + 1, S, S), every value on one of the ``levels``."""
    size = noise.shape[-1]
    walk = Walk(network, len(noise), size, label)
    for y in range(size):
        walk.begin_row(y)
        for x in range(size):
            found = mixtures_of(walk.numbers(y, x), network.channels)
            walk.images[:, :, y, x] = drawn(found, noise[:, :, y, x], levels)
    return walk.images


def gated(x: Tensor) -> Tensor:
    """(N, 2C, …) to (N, C, …): tanh of one half, as far as the sigmoid of the other lets it through."""
    one, other = x.chunk(2, dim=1)
    return one.tanh() * other.sigmoid()


def with_ones(x: Tensor) -> Tensor:
    """``x`` (N, C, …) with a channel of ones."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def _begun_evenly(head: nn.Conv2d, channels: int, mixtures: int) -> None:
    """Means that lie evenly over all values, each logistic as wide as the way to the next: a start without a bias."""
    assert head.bias is not None
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        # On the processor also where weights have no memory: see diffusion.families.model.
        means = torch.linspace(-1, 1, mixtures + 2, device="cpu")[1:-1].repeat(channels)
        head.bias[mixtures : mixtures + len(means)] = means
        head.bias[mixtures + len(means) : mixtures + 2 * len(means)] = -1.0
