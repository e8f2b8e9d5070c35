"""Diffusion of pixels by a U-Net."""

from typing import ClassVar

from diffusion.families.pretrained.pipeline import Pipeline


class DDPMPipeline(Pipeline):
    """DDPM (arXiv 2006.11239)."""

    kinds: ClassVar = {"unet": ("UNet2DModel",)}


class DDIMPipeline(DDPMPipeline):
    """The same network with DDIM's scheduler (arXiv 2010.02502), whichever its files name."""

    scheduler_kind = "DDIMScheduler"
