"""Latent diffusion without conditions."""

from typing import ClassVar

from diffusion.families.pretrained.pipeline import Pipeline


class LDMPipeline(Pipeline):
    """Latent diffusion (arXiv 2112.10752)."""

    kinds: ClassVar = {"unet": ("UNet2DModel",), "vqvae": ("VQModel", "AutoencoderKL")}
    autoencoder_name = "vqvae"
