"""Ablation: a transformer of large patches that predicts the clean image (JiT, arXiv 2511.13720), instead of a U-Net.

    python benchmarks/transformer.py --images emoji.tar.gz --seen 32512 --other-seen 16640 --samples 512

Both train on pixels. The transformer folds patches of an eighth of the width into tokens, of few numbers at first, and
predicts x₀ under a loss on v, whose weight is bounded as in the paper. Metric and options are those of
``magnitude_preserving.py``. Darkroom reads no model files of the second network.
"""

from typing import Any

import torch
from magnitude_preserving import compare
from torch import Tensor, nn
from torch.nn import functional

from diffusion.families.ddpm.config import ModelConfig
from diffusion.families.ddpm.network import TIMES, sinusoidal
from diffusion.process.objective import Weight

WIDTH, DEPTH, HEADS, BOTTLENECK = 256, 6, 4, 64
SMALLEST = 0.05
"""The weight is that of this σ below it (the paper's clipping of 1 − t)."""


class Block(nn.Module):
    """Attention and a gated feed-forward layer, both modulated by the time (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.norm_query, self.norm_key = (nn.RMSNorm(WIDTH // HEADS) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        hidden = WIDTH * 8 // 3 // 32 * 32
        self.inner, self.outer = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(N, tokens, WIDTH) to the same."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        qkv = torch.unflatten(self.qkv(self.norm1(x) * (1 + scale1) + shift1), -1, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(self.norm_query(query), self.norm_key(key), value)
        x = x + gate1 * self.out(attended.transpose(1, 2).flatten(2))
        value, gate = self.inner(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        out: Tensor = x + gate2 * self.outer(functional.silu(gate) * value)
        return out


class Transformer(nn.Module):
    """In the place of the U-Net: 8×8 tokens, whatever the size."""

    level, dropout, gradient_checkpointing = None, 0.0, False

    def __init__(self, config: ModelConfig, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        self.fold, self.no_class, self.time_scale = size // 8, classes, TIMES / config.steps
        self.bottleneck = nn.Linear(channels * self.fold**2, BOTTLENECK, bias=False)
        self.stem, self.positions = nn.Linear(BOTTLENECK, WIDTH), nn.Parameter(0.02 * torch.randn(1, 64, WIDTH))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.classes = nn.Embedding(classes + 1, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, channels * self.fold**2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, **_: Any) -> Tensor:
        """As ``UNet.forward``."""
        label = torch.full_like(time, self.no_class, dtype=torch.long) if label is None else label
        embedding = self.time(sinusoidal(time * self.time_scale, WIDTH)) + self.classes(label)
        tokens = functional.pixel_unshuffle(x, self.fold).flatten(2).transpose(1, 2)
        h = self.stem(self.bottleneck(tokens)) + self.positions
        for layer in self.layers:
            h = layer(h, embedding)
        out = torch.unflatten(self.head(self.norm(h)).transpose(1, 2), 2, (8, 8))
        return functional.pixel_shuffle(out, self.fold)

    def matrices(self) -> list[nn.Parameter]:
        """List what Muon trains."""
        return [parameter for parameter in self.layers.parameters() if parameter.ndim > 1]

    def blocks(self) -> list[nn.Module]:
        """List the layers."""
        return list(self.layers)


def bounded_weight(sigma_data: float) -> Weight:
    """Make EDM's weight, that of v up to a factor, bounded for small σ."""
    return lambda sigma: sigma.clamp(min=SMALLEST) ** -2 + sigma_data**-2


def main() -> None:
    replaced = {
        "diffusion.families.ddpm.model.UNet": Transformer,
        "diffusion.process.objective.make_edm_weight": bounded_weight,
    }
    settings = {"model": {"prediction": "sample"}, "weighting": "edm"}
    compare(__doc__, "default", "transformer", replaced, settings, both={"cpu_threads": 1})


if __name__ == "__main__":
    main()
