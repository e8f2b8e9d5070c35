"""Ablation: training on patches with their coordinates (Patch Diffusion, arXiv 2304.12526).

    python benchmarks/patches.py --images emoji.tar.gz --seen 32512 --other-seen 42016 --samples 512

The default network trains on whole images; and, with two more input channels that say where each pixel lies, on whole
images in half of the steps, on patches of half the side in 30 %, and of a quarter in the rest. It generates whole
images. Metric and options are those of ``magnitude_preserving.py``. Darkroom reads no model files of the second
network.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from magnitude_preserving import compare
from torch import Tensor, nn

from diffusion.common.random import uniform
from diffusion.families.ddpm.network import UNet
from diffusion.families.denoising_objective import DenoisingObjective
from diffusion.families.model import Conditioning, TrainingBatch

SHARES = {4: 0.2, 2: 0.3}
"""Share of the steps by how many patches make a side; the rest see whole images (section 3.2)."""


class PatchUNet(UNet):
    """The default network, shown coordinates in [−1, 1] beside the pixels; ``level`` (N, 3) is where patches lie."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        stem = self.stem
        self.stem = nn.Conv2d(stem.in_channels + 2 * self.patch**2, stem.out_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, *args: Any, level: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As the network does, for patches with their top, left and side (in sides of the image); None: whole ones."""
        if level is None:
            level = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(x), 3)
        rows, columns = ((torch.arange(side) + 0.5) / side for side in x.shape[-2:])
        y = (level[:, :1] + level[:, 2:] * rows)[:, None, :, None].expand(-1, 1, -1, x.shape[3])
        z = (level[:, 1:2] + level[:, 2:] * columns)[:, None, None, :].expand(-1, 1, x.shape[2], -1)
        return super().forward(torch.cat([x, 2 * y.to(x) - 1, 2 * z.to(x) - 1], 1), time, *args, **kwargs)


class PatchObjective(DenoisingObjective):
    """Denoising of patches, of one size in each step."""

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Cut a patch out of each image and its noise, but not in a probe."""
        batch = super().make_batch(x0, indices, conditioning, probe)
        step = indices[0] // self.config.images_per_step
        choice, parts = float(uniform(self.config.seed, "patches", [step])[0]), 1
        for each, share in SHARES.items():
            if 0 <= choice < share:
                parts = each
            choice -= share
        if probe is not None or parts == 1:
            return batch
        side = x0.shape[-1] // parts
        corners = torch.stack([uniform(self.config.seed, f"patches/{axis}", indices) for axis in "yx"], 1)
        corners = (corners * (x0.shape[-1] - side + 1)).long()

        def cut(images: Tensor) -> Tensor:
            patches = [x[:, y : y + side, z : z + side] for x, (y, z) in zip(images, corners.tolist(), strict=True)]
            return torch.stack(patches).contiguous(memory_format=torch.channels_last)

        level = torch.cat([corners / x0.shape[-1], torch.full((len(x0), 1), 1 / parts)], 1)
        random = dict(batch.random) | {"noise": cut(batch.random["noise"])}
        return replace(batch, x0=cut(x0), random=random, conditioning=batch.conditioning | {"level": level.float()})


def main() -> None:
    replaced = {
        "diffusion.families.ddpm.model.UNet": PatchUNet,
        "diffusion.families.ddpm.model.DenoisingObjective": PatchObjective,
    }
    compare(__doc__, "default", "patches", replaced, both={"cpu_threads": 1})


if __name__ == "__main__":
    main()
