"""Parts of networks that families share."""

from torch import Tensor, nn
from torch.nn import functional

from diffusion.common.errors import UserError

GROUP = 16
"""Channels per normalisation group; with fewer, bfloat16 kernels fall back to scalar code."""


class Upsample(nn.Module):
    """Upsampling by a factor of 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2H, 2W)."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def pixels_per_position(patch: int, resolutions: int, size: int) -> int:
    """Compute the pixels along each side of a position at the lowest resolution; UserError if above ``size``."""
    pixels: int = patch * 2 ** (resolutions - 1)
    if pixels > size:
        raise UserError(
            f"model.patch = {patch} and {resolutions} resolutions fold {pixels} pixels into one, and the images have "
            f"{size}: take a number out of model.channel_mult, or lower model.patch"
        )
    return pixels


def normalisation(channels: int) -> nn.GroupNorm:
    """Make a group normalisation with ``GROUP`` channels per group."""
    return nn.GroupNorm(channels // GROUP, channels)
