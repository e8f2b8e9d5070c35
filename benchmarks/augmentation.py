"""Ablation: non-leaking augmentation (arXiv 2206.00364, appendix F.2) for small sets.

    python benchmarks/augmentation.py --images emoji.tar.gz --seen 83328 --samples 512

The default network trains twice on as many images: as they are, and mirrored, scaled, turned, stretched and shifted,
each with a probability of 12 %. The network is conditioned on it, and generates with none. Metric and options are
those of ``magnitude_preserving.py``. Darkroom reads no model files of the second network.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from magnitude_preserving import compare
from torch import Tensor, nn
from torch.nn import functional

from diffusion.common.random import GaussianNoise, uniform
from diffusion.families.ddpm.network import UNet
from diffusion.families.denoising_objective import DenoisingObjective
from diffusion.families.model import Conditioning, TrainingBatch

PROBABILITY = 0.12
"""Of each transformation."""
SPREAD = 0.2
"""Standard deviation of the binary logarithm of scalings and stretchings."""
SHIFT = 0.125
"""Standard deviation of shifts, in widths."""
LABELS = 8


def transformations(seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sample a transformation for each image: the matrices of ``affine_grid``, (N, 2, 3), and labels, (N, LABELS)."""
    choices = [uniform(seed, f"augmentation/{number}", indices) < PROBABILITY for number in range(5)]
    turn, direction = ((2 * uniform(seed, f"augmentation/{n}", indices) - 1) * math.pi for n in ("turn", "stretched"))
    normal = GaussianNoise(seed, "augmentation/normal", indices, (4, 1, 1))().flatten(1)
    mirrored = choices[0] & (uniform(seed, "augmentation/mirror", indices) < 0.5)
    scale, turn, stretch = SPREAD * normal[:, 0] * choices[1], turn * choices[2], SPREAD * normal[:, 1] * choices[3]
    shifts = SHIFT * normal[:, 2:] * choices[4][:, None]
    ones, zeros = torch.ones_like(turn), torch.zeros_like(turn)

    def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack([a, b, c, d], 1).view(-1, 2, 2)

    def rotation(angle: Tensor) -> Tensor:
        return matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

    stretching = rotation(direction) @ matrix(stretch.exp2(), zeros, zeros, (-stretch).exp2()) @ rotation(-direction)
    whole = rotation(turn) @ stretching * scale.exp2()[:, None, None] @ matrix(1 - 2.0 * mirrored, zeros, zeros, ones)
    labels = [mirrored.float(), scale, turn.cos() - 1, turn.sin(), stretch * direction.cos(), stretch * direction.sin()]
    # Positions are in [−1, 1].
    return torch.cat([whole, 2 * shifts[..., None]], 2).float(), torch.cat([torch.stack(labels, 1), shifts], 1).float()


class AugmentedUNet(UNet):
    """The default network with the labels of the transformation as a condition, in the place of ``level``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.augmentation = nn.Linear(LABELS, 4 * self.width, bias=False)
        nn.init.zeros_(self.augmentation.weight)

    def _embedding(self, time: Tensor, label: Tensor | None, text: Tensor | None, level: Tensor | None) -> Tensor:
        embedding = super()._embedding(time, label, text, None)
        return embedding if level is None else embedding + self.augmentation(level)


class AugmentedObjective(DenoisingObjective):
    """Denoising of transformed images."""

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Transform the images, but not those of a probe."""
        batch = super().make_batch(x0, indices, conditioning, probe)
        if probe is not None:
            return batch
        matrices, labels = transformations(self.config.seed, indices)
        grid = functional.affine_grid(matrices, list(x0.shape), align_corners=False)
        moved = functional.grid_sample(x0, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)
        is_moved = labels.any(1)[:, None, None, None]
        return replace(batch, x0=torch.where(is_moved, moved, x0), conditioning=batch.conditioning | {"level": labels})


def main() -> None:
    replaced = {
        "diffusion.families.ddpm.model.UNet": AugmentedUNet,
        "diffusion.families.ddpm.model.DenoisingObjective": AugmentedObjective,
    }
    compare(__doc__, "as-they-are", "augmented", replaced)


if __name__ == "__main__":
    main()
