"""The section ``model`` of the family vae; loads without torch."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from diffusion.common.config import MAX_SIZE, Config
from diffusion.families.base import MAX_BLOCKS, MAX_WIDTH, Ability, ChannelMult, Likelihood, OneStepConfig


class VAEConfig(OneStepConfig):
    """The family vae: a variational autoencoder (arXiv 1312.6114), which also encodes images into latents.

    It serves as the autoencoder of latent diffusion (arXiv 2112.10752), too: see model.autoencoder.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset({"comparable_losses", "initial_weights"})
    evaluated_by: ClassVar[Literal["samples", "reconstructions"]] = "reconstructions"
    likelihood: ClassVar[Likelihood | None] = "bound"
    conditional: ClassVar[bool] = False

    family: Literal["vae"] = "vae"
    """The family of models."""
    width: int = Field(32, ge=16, le=MAX_WIDTH, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels: 2 means a quarter of the work. With two resolutions a latent
    position then stands for 4×4 pixels, with three for 8×8."""
    blocks: int = Field(1, ge=1, le=MAX_BLOCKS)
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = Field(4, ge=1, le=64)
    """Channels of the latents."""
    global_latent: int = Field(64, ge=1, le=4096)
    """Dimensions of the global latent, a vector that the prior of the latents is conditioned on."""
    kl_weight: float = Field(1.0, ge=0)
    """β, weight of the divergence of the posterior from the prior (β-VAE, Higgins et al., ICLR 2017). 1 is the evidence
    lower bound; a lower β gives closer reconstructions and latents that are harder to model. Measured on digits: 0.3
    gave 1.2 dB more, and samples with a KID of 0.66 instead of 0.35."""

    @property
    def one_shape(self) -> str:
        """Why its network takes images of one square shape alone."""
        return "the prior of its latents has linear layers over all positions of a square"

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per latent position along each side."""
        return int(self.patch * 2 ** (len(self.channel_mult) - 1))

    @model_validator(mode="after")
    def _latents_are_smaller(self) -> "VAEConfig":
        if self.factor == 1:
            raise ValueError("model.patch = 1 and one resolution make latents as large as images: add to either")
        return self


class LatentSpace(Config):
    """The latent space of a latent diffusion model."""

    autoencoder: VAEConfig
    """Configuration of the autoencoder; its weights lie in the same file as the model's."""
    digest: str
    """SHA-256 of the autoencoder's weights, which identifies it."""
    channels: int = Field(ge=1, le=64)
    """Channels of the latents."""
    size: int = Field(ge=1, le=MAX_SIZE)
    """Height and width of the latents of square images."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images."""
        return self.channels, self.size, self.size
