"""The section ``model`` of the configuration: one class for each family of models, and ``FamilyConfig``, their union.

A field of another family is an unknown key. Nothing here loads torch.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from diffusion.common.config import LARGEST_SIZE, Config, unset

Prediction = Literal["epsilon", "v_prediction", "sample", "edm"]
WIDEST, DEEPEST, MOST_LEVELS = 4096, 64, 12
"""Channels, blocks of a resolution, and resolutions at most: a file that says of itself more than that is refused
before anything is built of it."""
ChannelMult = Annotated[tuple[Annotated[int, Field(le=64)], ...], Field(max_length=MOST_LEVELS)]
"""Channels at each resolution, as multiples of the width."""
NOISE_LEVELS = (
    "weighting",
    "min_snr_gamma",
    "learned_uncertainty",
    "timestep_sampling",
    "log_sigma_mean",
    "log_sigma_std",
    "stratified_timesteps",
    "gradient_checkpointing",
    "shard",
)
"""Fields of the section ``training`` that mean nothing to who learns no noise, or are made for the U-Net."""


class Kind(Config):
    """The section ``model`` of one family; class variables are the same for all models of the family."""

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {}
    """Fields of other sections that mean nothing to it."""
    samples_in_steps: ClassVar[bool] = False
    """Whether it samples by a reverse process; otherwise of the section ``sampling`` only how work is computed counts.
    """
    judged: ClassVar[Literal["drawn", "reconstructed"]] = "drawn"
    """Whether it is evaluated by generated images, or by reconstructions of held-out ones."""
    likelihood: ClassVar[Literal["bound", "exact"] | None] = None
    """Whether its likelihood is a lower bound or exact; None: it has none."""
    in_diffusers: ClassVar[bool] = False
    """Whether diffusers has a counterpart to which it can be exported."""


class ModelConfig(Kind):
    """The forward process, the quantity predicted, and the shape of the U-Net: the family ddpm."""

    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    in_diffusers: ClassVar[bool] = True
    samples_in_steps: ClassVar[bool] = True

    family: Literal["ddpm"] = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """The family of models: diffusion models; see the other classes of diffusion/models/config.py for others."""
    schedule: Literal["linear", "cosine", "sigmoid", "edm"] = "edm"
    """Noise schedule: linear β (arXiv 2006.11239), cosine ᾱ (2102.09672), sigmoid ᾱ (2212.11972), or EDM's σ from
    0.002 to 80, each step as many times that of the one before (2206.00364)."""
    steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels."""
    zero_terminal_snr: bool = False
    """Whether the schedule is stretched until nothing is left of an image at its end (arXiv 2305.08891)."""
    prediction: Prediction = "edm"
    """What the network predicts: the noise (epsilon), v (arXiv 2202.00512), the clean image (sample), or EDM's mixture
    of both, which depends on the standard deviation of the data set (2206.00364)."""
    learned_variance: bool = Field(False, exclude_if=unset)
    """Whether the network also predicts the variance of each value in a reverse step, between the two bounds of DDPM:
    fewer steps of the sampler ddpm then sample the right distribution (arXiv 2102.09672)."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks per resolution on the way down; one more on the way up."""
    attention: tuple[int, ...] = Field((1,), max_length=MOST_LEVELS)
    """Which resolutions have self-attention, counted from 0, the highest."""
    heads: int = Field(2, ge=1, le=WIDEST)
    """Attention heads; they share the channels."""
    patch: Literal[1, 2, 4] = 2
    """The network works on patch×patch pixels folded into channels: 2 means half resolution, a quarter of
    the work."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the values inside each residual block that training sets to 0, chosen by seed and image."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""
    text: bool = Field(False, exclude_if=unset)
    """Whether the network is conditioned on the caption, as a sentence encoder embeds it (the extra ``text``)."""
    low_resolution: int | None = Field(None, ge=2, le=LARGEST_SIZE, exclude_if=unset)
    """Super-resolution (SR3, arXiv 2104.07636): height and width, in pixels, of the small image that the network is
    conditioned on, and on nothing else; the data set's size is a multiple of it. Null: no super-resolution."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=unset)
    """Largest standard deviation of the noise that training adds to the small image, which is in [−1, 1]; the network
    is conditioned on how much each has (noise conditioning augmentation, 2106.15282, section 4.3), and copes with
    images unlike those of training. Null: 0.1; 0: none."""

    autoencoder: str | None = Field(None, exclude_if=unset)
    """Diffusion in the latents of this autoencoder (arXiv 2112.10752), for images of 128 pixels and more: the
    final.safetensors of a training with model.family = vae, or models:/NAME@ALIAS. Null: in pixels."""

    @model_validator(mode="before")
    @classmethod
    def _shown_is_enough(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("low_resolution") is not None:
            return {"conditional": False} | given
        return given

    @model_validator(mode="after")
    def _has_an_effect(self) -> "ModelConfig":
        if self.low_resolution is not None and (self.conditional or self.text):
            raise ValueError(
                "model.low_resolution shows the network what to draw, and it is told nothing besides: leave out "
                f"model.{'conditional' if self.conditional else 'text'}"
            )
        if self.low_resolution is None and self.low_resolution_noise is not None:
            raise ValueError(
                "model.low_resolution_noise lies over the small image, and there is none: set "
                "model.low_resolution, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_an_answer(self) -> "ModelConfig":
        if self.zero_terminal_snr and self.schedule == "edm":
            raise ValueError(
                "model.zero_terminal_snr stretches the other schedules; edm has its own end: leave one out"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "model.prediction = epsilon says nothing of an image of which nothing is left, as "
                "model.zero_terminal_snr makes them: use v_prediction, sample or edm"
            )
        return self

    @model_validator(mode="after")
    def _works_on_images(self) -> "ModelConfig":
        if self.autoencoder is not None and self.learned_variance:
            raise ValueError(
                "model.learned_variance is learned from the likelihood of 8-bit pixels, which the latents of "
                "model.autoencoder are not: leave one out"
            )
        if self.autoencoder is not None and self.low_resolution is not None:
            raise ValueError(
                "model.low_resolution shows the network small images beside large ones, and model.autoencoder has it "
                "work on latents: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _levels_exist(self) -> "ModelConfig":
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError("model.channel_mult needs at least one positive number, for example [1, 2]")
        for level in self.attention:
            if not 0 <= level < len(self.channel_mult):
                raise ValueError(
                    f"model.attention names resolution {level}, and there are {len(self.channel_mult)}: "
                    f"use 0 to {len(self.channel_mult) - 1}"
                )
            if self.width * self.channel_mult[level] % self.heads:
                raise ValueError(
                    f"model.heads = {self.heads} does not divide the {self.width * self.channel_mult[level]} "
                    f"channels at resolution {level}: change model.heads or model.width"
                )
        return self

    @property
    def max_low_resolution_noise(self) -> float:
        """The largest standard deviation of noise over small images."""
        return 0.1 if self.low_resolution_noise is None else self.low_resolution_noise


class VAEConfig(Kind):
    """A variational autoencoder (arXiv 1312.6114): images encoded into latents, and generated from them.

    It is also the autoencoder of latent diffusion (arXiv 2112.10752): see model.autoencoder.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {
        "training": (*NOISE_LEVELS, "condition_dropout"),
    }
    judged: ClassVar[Literal["drawn", "reconstructed"]] = "reconstructed"
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    conditional: ClassVar[bool] = False
    """Whether the network is conditioned on classes."""
    text: ClassVar[bool] = False
    """Whether it is conditioned on captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of the images that it upscales: none."""

    family: Literal["vae"] = "vae"
    """What kind of model it is."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """The highest resolution is of patch×patch pixels folded into channels: 2 is a quarter of the work. With two
    resolutions each latent position then stands for 4×4 pixels, with three for 8×8."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = Field(4, ge=1, le=64)
    """Numbers at each position of the latents."""
    kl_weight: float = Field(1.0, ge=0)
    """β, how much the divergence of the posterior from N(0, I) counts (β-VAE, Higgins et al., ICLR 2017). 1 is the
    evidence lower bound; the less, the closer images come back, and the harder latents are to learn. Measured on
    emoji at 64 pixels: 0.01 gave 0.3 dB more, and diffusion in those latents, as long, a KID higher by 15 %."""

    @property
    def factor(self) -> int:
        """Pixels to a latent position, along each side."""
        return int(self.patch * 2 ** (len(self.channel_mult) - 1))

    @model_validator(mode="after")
    def _shrinks(self) -> "VAEConfig":
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError("model.channel_mult needs at least one positive number, for example [1, 2]")
        if self.factor == 1:
            raise ValueError("model.patch = 1 and one resolution make latents as large as images: add to either")
        return self


class GANConfig(Kind):
    """A generative adversarial network (arXiv 1406.2661) after R3GAN (2501.05441).

    The generator grows an image from few positions, 4×4 for 32 pixels; the discriminator shrinks it in the same steps.
    Nothing is normalised, and two gradient penalties are the only regularization.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {
        # The loss is relative to a discriminator that learns, too: it says nothing from one checkpoint to another. And
        # as the discriminator is not in a model, a trained generator has none that it could go on against.
        "training": (*NOISE_LEVELS, "keep_best", "init_from"),
    }
    text: ClassVar[bool] = False
    """Whether it is conditioned on captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of the images that it upscales: none."""

    family: Literal["gan"] = "gan"
    """What kind of model it is."""
    width: int = Field(16, ge=8, le=WIDEST, multiple_of=8)
    """Channels at the highest resolution."""
    channel_mult: ChannelMult = (1, 2, 4, 8)
    """Channels at each resolution, as multiples of ``width``, from the highest; each halves the one before."""
    patch: Literal[1, 2, 4] = 1
    """The highest resolution is of patch×patch pixels folded into channels: less work for the same width, and at first
    images in which the squares can be seen."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks at each resolution of either network."""
    latent: int = Field(64, ge=1, le=4096)
    """Numbers in a latent."""
    gamma: float = Field(0.3, gt=0)
    """γ: half of it times the squared gradient of the discriminator, at real images (R1) and at generated ones (R2),
    is what makes training converge. Larger for larger images; with 1 the default learned more
    slowly on grey ones of 32 pixels."""
    conditional: bool = True
    """Whether both networks are conditioned on the class, where the data set has several."""

    @model_validator(mode="after")
    def _has_levels(self) -> "GANConfig":
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError("model.channel_mult needs at least one positive number, for example [1, 2]")
        return self

    @property
    def factor(self) -> int:
        """Pixels to a position of the lowest resolution, along each side."""
        return int(self.patch * 2 ** (len(self.channel_mult) - 1))


class AutoregressiveConfig(Kind):
    """Images as sequences of pixels: each follows from those above it and to its left (arXiv 1606.05328).

    The likelihood is exact. It generates pixel by pixel, so that an image of S pixels a side takes S²
    steps one after the other: made for images of up to about 64 pixels.
    """

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {"training": NOISE_LEVELS}
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "exact"
    text: ClassVar[bool] = False
    """Whether it is conditioned on captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of the images that it upscales: none."""

    family: Literal["autoregressive"] = "autoregressive"
    """What kind of model it is."""
    width: int = Field(32, ge=8, le=WIDEST, multiple_of=8)
    """Channels of both stacks, of what lies above and of what lies to the left."""
    layers: int = Field(8, ge=1, le=64)
    """Layers; they look 1, 2, 4 and 8 pixels far by turns, so that eight of them see 30 rows."""
    mixtures: int = Field(5, ge=1, le=100)
    """Logistic distributions in the mixture of each value (arXiv 1701.05517)."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""


def _family(given: Any) -> str:
    """The tag of what is to become a configuration; what is left out is ddpm, as it was before there were others."""
    if isinstance(given, BaseModel):
        return str(getattr(given, "family", ""))
    return str(given.get("family", "ddpm")) if isinstance(given, dict) else "ddpm"


class LatentSpace(Config):
    """The latent space of a latent diffusion model."""

    autoencoder: VAEConfig
    """The autoencoder; its weights lie beside the model's own."""
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
