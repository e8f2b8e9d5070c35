"""Latents as a diffusion model sees them: of mean 0 and standard deviation 1 (arXiv 2112.10752, appendix G)."""

import torch
from torch import Tensor, nn

from diffusion.models.vae import VAE


class Latents(nn.Module):
    """An autoencoder that is trained no more, and the moments of its latents, each (1, c, 1, 1)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: VAE, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [−1, 1] to latents (N, c, h, w).

        The posterior's mean: its noise is nothing that a diffusion model need learn to draw.
        """
        return ((self.network.encode(x) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, c, h, w) to pictures (N, C, H, W), nominally in [−1, 1]."""
        return self.network.decode(z * self.std + self.mean)
