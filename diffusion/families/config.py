"""Which family a model is of, each with its own configuration: a field of another family is an unknown key."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.models.config import ModelConfig


class VAEConfig(Config):
    """A variational autoencoder (arXiv 1312.6114): pictures squeezed into latents, and drawn from them.

    It is also the first stage of latent diffusion (arXiv 2112.10752): see model.autoencoder.
    """

    conditional: ClassVar[bool] = False
    """Whether the network is told classes."""
    text: ClassVar[bool] = False
    """Whether it is told captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of small pictures that it enlarges: none."""
    passes_over: ClassVar[Mapping[str, Collection[str]]] = {
        "training": (
            "weighting",
            "min_snr_gamma",
            "learned_uncertainty",
            "times",
            "log_sigma_mean",
            "log_sigma_std",
            "stratified",
            "condition_dropout",
            "recompute",
            "shard",
        ),
        "sampling": SamplingConfig.model_fields.keys() - {"compute_batch", "precision", "device"},
    }
    """Fields of other sections that mean nothing to it."""

    family: Literal["vae"] = "vae"
    """What kind of model it is."""
    width: int = Field(32, ge=16, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """The highest resolution is of patch×patch pixels folded into channels: 2 is a quarter of the work. With two
    resolutions each latent position then stands for 4×4 pixels, with three for 8×8."""
    blocks: int = Field(1, ge=1)
    """Residual blocks at each resolution of the encoder; the decoder, which draws, has one more."""
    latent_channels: int = Field(4, ge=1, le=64)
    """Numbers at each position of the latents."""
    kl_weight: float = Field(1.0, ge=0)
    """β, how much the divergence of the posterior from N(0, I) counts (β-VAE, Higgins et al., ICLR 2017). 1 is the
    evidence lower bound; the less, the closer pictures come back, and the harder latents are to learn. Measured on
    emoji at 64 pixels: 0.01 gave 0.3 dB more, and diffusion in those latents, as long, a KID higher by 15 %."""

    @property
    def factor(self) -> int:
        """Pixels to a latent position, along each side."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    @model_validator(mode="after")
    def _shrinks(self) -> "VAEConfig":
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("model.multipliers needs at least one positive number, for example [1, 2]")
        if self.factor == 1:
            raise ValueError("model.patch = 1 and one resolution make latents as large as pictures: add to either")
        return self


def _family(given: Any) -> str:
    """The tag of what is to become a configuration; what is left out is ddpm, as it was before there were others."""
    if isinstance(given, BaseModel):
        return str(getattr(given, "family", ""))
    return str(given.get("family", "ddpm")) if isinstance(given, dict) else "ddpm"


def meaningless(model: "FamilyConfig", section: str, given: Config) -> str | None:
    """Which field of ``section`` is set and means nothing to the family of ``model``, in words; None if none does."""
    for name in sorted(model.passes_over.get(section, ())):
        if getattr(given, name) != type(given).model_fields[name].get_default(call_default_factory=True):
            return f"{section}.{name} means nothing to model.family = {model.family}: leave it out"
    return None


class LatentSpace(Config):
    """What a latent diffusion model draws in."""

    autoencoder: VAEConfig
    """What leads to pictures and back; its weights lie beside the model's own."""
    digest: str
    """SHA-256 of those weights, by which the autoencoder is known wherever it lies."""
    channels: int
    """Numbers at each position."""
    size: int
    """Height and width, in positions."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        return self.channels, self.size, self.size


FamilyConfig: TypeAlias = Annotated[
    Annotated[ModelConfig, Tag("ddpm")] | Annotated[VAEConfig, Tag("vae")],
    Discriminator(
        _family,
        custom_error_type="unknown_family",
        custom_error_message="family is ddpm, the default, or vae",
    ),
]
"""The section ``model`` of a configuration."""

FAMILIES: Mapping[str, type[ModelConfig | VAEConfig]] = {"ddpm": ModelConfig, "vae": VAEConfig}
"""What configures each."""
