"""Which family a model is of, each with its own configuration: a field of another family is an unknown key."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from diffusion.config import LARGEST_SIZE, Config
from diffusion.models.config import ModelConfig
from diffusion.models.kind import DEEPEST, NOISE_LEVELS, WIDEST, Kind, Multipliers
from diffusion.samplers import SamplingConfig, sampling_config

COMPUTING = {"compute_batch", "precision", "device"}
"""Fields of the section ``sampling`` that have an effect for all families."""


class VAEConfig(Kind):
    """A variational autoencoder (arXiv 1312.6114): pictures squeezed into latents, and drawn from them.

    It is also the first stage of latent diffusion (arXiv 2112.10752): see model.autoencoder.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {
        "training": (*NOISE_LEVELS, "condition_dropout"),
    }
    judged: ClassVar[Literal["drawn", "reconstructed"]] = "reconstructed"
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    conditional: ClassVar[bool] = False
    """Whether the network is told classes."""
    text: ClassVar[bool] = False
    """Whether it is told captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of small pictures that it enlarges: none."""

    family: Literal["vae"] = "vae"
    """What kind of model it is."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    multipliers: Multipliers = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """The highest resolution is of patch×patch pixels folded into channels: 2 is a quarter of the work. With two
    resolutions each latent position then stands for 4×4 pixels, with three for 8×8."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
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


class GANConfig(Kind):
    """Two networks pitted against each other (arXiv 1406.2661), as R3GAN has them (2501.05441).

    A picture is made of noise at few positions, of 32 pixels 4×4, and grows from there; what tells drawn pictures from
    real ones shrinks them in the same steps. Nothing is normalised, and no trick is left but two penalties.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {
        # The loss is relative to an opponent that learns, too: it says nothing from one checkpoint to another. And as
        # the opponent is not in a model, a trained generator has none that it could go on against.
        "training": (*NOISE_LEVELS, "keep_best", "start"),
    }
    text: ClassVar[bool] = False
    """Whether it is told captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of small pictures that it enlarges: none."""

    family: Literal["gan"] = "gan"
    """What kind of model it is."""
    width: int = Field(16, ge=8, le=WIDEST, multiple_of=8)
    """Channels at the highest resolution."""
    multipliers: Multipliers = (1, 2, 4, 8)
    """Channels at each resolution, as multiples of ``width``, from the highest; each halves the one before."""
    patch: Literal[1, 2, 4] = 1
    """The highest resolution is of patch×patch pixels folded into channels: less work for the same width, and at first
    pictures in which the squares can be seen."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks at each resolution of either network."""
    latent: int = Field(64, ge=1, le=4096)
    """Numbers of noise that a picture is made of."""
    gamma: float = Field(0.3, gt=0)
    """γ: half of it times the squared gradient of the opponent's answer, by real pictures (R1) and by drawn ones (R2),
    is what keeps the two from running away from each other. Larger for larger pictures; with 1 the default learned more
    slowly on grey ones of 32 pixels."""
    conditional: bool = True
    """Whether both networks are told each picture's class, where the data set has several."""

    @model_validator(mode="after")
    def _has_levels(self) -> "GANConfig":
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("model.multipliers needs at least one positive number, for example [1, 2]")
        return self

    @property
    def factor(self) -> int:
        """Pixels to a position of the lowest resolution, along each side."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


class AutoregressiveConfig(Kind):
    """Pictures as sequences of pixels: each follows from those above it and to its left (arXiv 1606.05328).

    How probable a picture is, it says exactly. It draws pixel by pixel, so that a picture of S pixels a side takes S²
    steps one after the other: made for pictures of up to about 64 pixels.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {"training": NOISE_LEVELS}
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "exact"
    text: ClassVar[bool] = False
    """Whether it is told captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of small pictures that it enlarges: none."""

    family: Literal["autoregressive"] = "autoregressive"
    """What kind of model it is."""
    width: int = Field(32, ge=8, le=WIDEST, multiple_of=8)
    """Channels of both stacks, of what lies above and of what lies to the left."""
    layers: int = Field(8, ge=1, le=64)
    """Layers; they look 1, 2, 4 and 8 pixels far by turns, so that eight of them see 30 rows."""
    mixtures: int = Field(5, ge=1, le=100)
    """Logistic distributions that each value is drawn from a mixture of (arXiv 1701.05517)."""
    conditional: bool = True
    """Whether the network is told each picture's class, where the data set has several."""


def _family(given: Any) -> str:
    """The tag of what is to become a configuration; what is left out is ddpm, as it was before there were others."""
    if isinstance(given, BaseModel):
        return str(getattr(given, "family", ""))
    return str(given.get("family", "ddpm")) if isinstance(given, dict) else "ddpm"


def meaningless(model: "FamilyConfig", section: Literal["sampling", "training"], given: Config) -> str | None:
    """Which field of ``section`` is set and means nothing to the family of ``model``, in words; None if none does."""
    if section == "training":
        names, default = set(model.passes_over.get(section, ())), type(given)()
    else:
        names, default = (
            set() if model.samples_in_steps else type(given).model_fields.keys() - COMPUTING,
            sampling_config(),
        )
    for name in sorted(names):
        if getattr(given, name) != getattr(default, name, None):
            return f"{section}.{name} means nothing to model.family = {model.family}: leave it out"
    return None


def meaning(model: "FamilyConfig", sampling: SamplingConfig) -> SamplingConfig:
    """``sampling`` as far as it means anything to the family of ``model``: the rest has its defaults."""
    return sampling if model.samples_in_steps else sampling_config(**sampling.model_dump(include=COMPUTING))


class LatentSpace(Config):
    """What a latent diffusion model draws in."""

    autoencoder: VAEConfig
    """What leads to pictures and back; its weights lie beside the model's own."""
    digest: str
    """SHA-256 of those weights, by which the autoencoder is known wherever it lies."""
    channels: int = Field(ge=1, le=64)
    """Numbers at each position."""
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width, in positions."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        return self.channels, self.size, self.size


FamilyConfig: TypeAlias = Annotated[
    Annotated[ModelConfig, Tag("ddpm")]
    | Annotated[VAEConfig, Tag("vae")]
    | Annotated[GANConfig, Tag("gan")]
    | Annotated[AutoregressiveConfig, Tag("autoregressive")],
    Discriminator(
        _family,
        custom_error_type="unknown_family",
        custom_error_message="family is ddpm, the default, vae, gan or autoregressive",
    ),
]
"""The section ``model`` of a configuration."""

FAMILIES: Mapping[str, type[Kind]] = {
    "ddpm": ModelConfig,
    "vae": VAEConfig,
    "gan": GANConfig,
    "autoregressive": AutoregressiveConfig,
}
"""What configures each."""
