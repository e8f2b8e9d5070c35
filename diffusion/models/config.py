"""The section ``model`` of the configuration, one class per family of models, and the training objective's options.

This module loads without torch.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, model_validator

from diffusion.common.config import LARGEST_SIZE, Config, unset

Prediction = Literal["epsilon", "v_prediction", "sample", "edm"]
WIDEST, DEEPEST, MOST_LEVELS = 4096, 64, 12
"""Limits of channels, blocks per resolution, and resolutions; files that exceed them are rejected before a network is
built."""


def _positive(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if not numbers or min(numbers) < 1:
        raise ValueError("needs at least one positive number, for example [1, 2]")
    return numbers


ChannelMult = Annotated[
    tuple[Annotated[int, Field(le=64)], ...], Field(max_length=MOST_LEVELS), AfterValidator(_positive)
]
"""Channels at each resolution, as multiples of the width."""
DIFFUSION_ONLY = (
    "weighting",
    "min_snr_gamma",
    "learned_uncertainty",
    "timestep_sampling",
    "log_sigma_mean",
    "log_sigma_std",
    "stratified_timesteps",
    "gradient_checkpointing",
    "shard",
    "optimizer",
    "student",
)
"""Fields of the section ``training`` that have an effect only for diffusion models."""


class StudentConfig(Config):
    """What a student is distilled for; `darkroom distill` sets it."""

    steps: int = Field(ge=1, le=8)
    """Network evaluations in which it generates."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=unset)
    """Scale of guidance of the teacher, which the student learns to need no more. Null: none."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=unset)
    """Noise levels σ at which the teacher is guided. Null: all."""


class ObjectiveConfig(Config):
    """The part of the section ``training`` that defines the objective: noise levels, their weights, and the seed."""

    batch_size: int = Field(64, ge=1, le=2**20)
    """Images per optimizer step."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, order of images, time steps and noise."""
    weighting: Literal["plain", "min_snr", "soft_min_snr", "edm"] = "edm"
    """Loss weight of each noise level: plain squared error of the prediction (arXiv 2006.11239), min-SNR-γ
    (2303.09556), soft min-SNR (2401.11605) or EDM's (2206.00364). The last two use the standard deviation of data."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """γ of min_snr; null: 5."""
    learned_uncertainty: bool = False
    """Whether a small network learns the size of the error at each level, by which the loss is divided (2312.02696,
    equation 21), so that all levels have equal weight."""
    timestep_sampling: Literal["uniform", "lognormal"] = "lognormal"
    """Distribution of noise levels: uniform over the steps of the schedule, or normal in ln σ (2206.00364)."""
    log_sigma_mean: float | None = None
    """Mean of ln σ for timestep_sampling = lognormal; null: −1.2, EDM's, and higher for images of more than 3×32×32
    values, by the logarithm of the root of their ratio (2301.11093)."""
    log_sigma_std: float | None = Field(None, gt=0)
    """Standard deviation of ln σ for timestep_sampling = lognormal; null: 1.2, EDM's."""
    student: StudentConfig | None = Field(None, exclude_if=unset)
    """Distil training.init_from into a student of few evaluations, as `darkroom distill` does. Null: train to
    denoise."""
    stratified_timesteps: bool = True
    """Whether the times of a batch's N images are stratified: one in each N-th of the distribution."""

    @model_validator(mode="after")
    def _noise_levels_have_an_effect(self) -> "ObjectiveConfig":
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError(f"training.min_snr_gamma means nothing to weighting = {self.weighting}: use min_snr")
        if self.timestep_sampling != "lognormal" and (self.log_sigma_mean, self.log_sigma_std) != (None, None):
            raise ValueError(
                f"training.log_sigma_* mean nothing to timestep_sampling = {self.timestep_sampling}: use lognormal"
            )
        return self


class Kind(Config):
    """The section ``model`` of one family; class variables hold for all models of the family."""

    ineffective: ClassVar[Collection[str]] = ()
    """Fields of the section ``training`` that have no effect for the family."""
    evaluated_by: ClassVar[Literal["samples", "reconstructions"]] = "samples"
    """Whether it is evaluated by generated images, or by reconstructions of held-out ones."""
    likelihood: ClassVar[Literal["bound", "exact"] | None] = None
    """Whether its likelihood is a lower bound or exact; None: it has no likelihood."""


class ModelConfig(Kind):
    """The family ddpm: forward process, prediction, and architecture of the U-Net."""

    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"

    family: Literal["ddpm"] = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """The family of models: diffusion models; the other families are vae, gan and autoregressive."""
    schedule: Literal["linear", "cosine", "sigmoid", "edm"] = "edm"
    """Noise schedule: linear β (arXiv 2006.11239), cosine ᾱ (2102.09672), sigmoid ᾱ (2212.11972), or EDM's σ from
    0.002 to 80 in a geometric sequence (2206.00364), which goes higher for images of more than 3×32×32 values."""
    steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled to zero SNR at its last step (arXiv 2305.08891)."""
    prediction: Prediction = "edm"
    """Prediction of the network: the noise (epsilon), v (arXiv 2202.00512), the clean image (sample), or EDM's mixture
    of both, which depends on the standard deviation of the data set (2206.00364)."""
    variance: Literal["fixed", "learned_range"] = Field("fixed", exclude_if=lambda variance: variance == "fixed")
    """Variance of each value in a reverse step: fixed, or predicted by the network between the two bounds of DDPM, so
    that the sampler ddpm needs fewer steps (arXiv 2102.09672)."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks per resolution of the downward path; the upward path has one more."""
    attention: tuple[int, ...] = Field((1,), max_length=MOST_LEVELS)
    """Indices of the resolutions with self-attention; 0 is the highest resolution."""
    heads: int = Field(2, ge=1, le=WIDEST)
    """Attention heads, among which the channels are divided."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels: 2 means half the resolution, a quarter of the work."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate inside each residual block; the choice depends on seed and image alone."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""
    text: bool = Field(False, exclude_if=unset)
    """Whether the network is conditioned on captions, embedded by a sentence encoder (the extra ``text``)."""
    low_resolution: int | None = Field(None, ge=2, le=LARGEST_SIZE, exclude_if=unset)
    """Super-resolution (SR3, arXiv 2104.07636): height and width, in pixels, of the small image that alone
    conditions the network; the data set's size is a multiple of it. Null: no super-resolution."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=unset)
    """Largest standard deviation of the noise that training adds to the small image, in [−1, 1]; the network is
    conditioned on its level (noise conditioning augmentation, 2106.15282, section 4.3), which makes it robust to small
    images unlike those of training. Null: 0.1; 0: none."""

    autoencoder: str | None = Field(None, exclude_if=unset)
    """Diffusion in the latents of this autoencoder (arXiv 2112.10752), for images of 128 pixels and more: the
    final.safetensors of a model with model.family = vae, or models:/NAME@ALIAS. Null: in pixels."""

    @model_validator(mode="before")
    @classmethod
    def _default_conditional(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("low_resolution") is not None:
            return {"conditional": False} | given
        return given

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> "ModelConfig":
        if self.low_resolution is not None and (self.conditional or self.text):
            raise ValueError(
                "model.low_resolution conditions the network on small images, and on nothing besides: leave out "
                f"model.{'conditional' if self.conditional else 'text'}"
            )
        if self.low_resolution is None and self.low_resolution_noise is not None:
            raise ValueError(
                "model.low_resolution_noise lies over the small image, and there is none: set "
                "model.low_resolution, or leave it out"
            )
        if self.autoencoder is not None and self.variance == "learned_range":
            raise ValueError(
                "model.variance = learned_range is learned from the likelihood of 8-bit pixels, which the latents of "
                "model.autoencoder are not: leave one out"
            )
        if self.autoencoder is not None and self.low_resolution is not None:
            raise ValueError(
                "model.low_resolution shows the network small images beside large ones, and model.autoencoder has it "
                "work on latents: leave one out"
            )
        if self.zero_terminal_snr and self.schedule == "edm":
            raise ValueError(
                "model.zero_terminal_snr stretches the other schedules; edm has its own end: leave one out"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "model.prediction = epsilon says nothing of an image of which nothing is left, as "
                "model.zero_terminal_snr makes them: use v_prediction, sample or edm"
            )
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
        """Largest standard deviation of the noise that training adds to small images."""
        return 0.1 if self.low_resolution_noise is None else self.low_resolution_noise


class NonDiffusionConfig(Kind):
    """The section ``model`` of a family other than ddpm, which has neither captions nor super-resolution."""

    text: ClassVar[bool] = False
    """Whether the network is conditioned on captions."""
    low_resolution: ClassVar[None] = None
    """Height and width of the images that it upscales: none."""


class VAEConfig(NonDiffusionConfig):
    """The family vae: a variational autoencoder (arXiv 1312.6114), which also encodes images into latents.

    It serves as the autoencoder of latent diffusion (arXiv 2112.10752), too: see model.autoencoder.
    """

    ineffective: ClassVar[Collection[str]] = (*DIFFUSION_ONLY, "condition_dropout")
    evaluated_by: ClassVar[Literal["samples", "reconstructions"]] = "reconstructions"
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    conditional: ClassVar[bool] = False
    """Whether the network is conditioned on classes."""

    family: Literal["vae"] = "vae"
    """The family of models."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels: 2 means a quarter of the work. With two resolutions a latent
    position then stands for 4×4 pixels, with three for 8×8."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
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
    def factor(self) -> int:
        """Downsampling factor: pixels per latent position along each side."""
        return int(self.patch * 2 ** (len(self.channel_mult) - 1))

    @model_validator(mode="after")
    def _latents_are_smaller(self) -> "VAEConfig":
        if self.factor == 1:
            raise ValueError("model.patch = 1 and one resolution make latents as large as images: add to either")
        return self


class GANConfig(NonDiffusionConfig):
    """The family gan: a generative adversarial network (arXiv 1406.2661) after R3GAN (2501.05441).

    The generator upsamples from a low resolution, 4×4 for 32 pixels; the discriminator downsamples in the same steps.
    There is no normalisation, and two gradient penalties are the only regularization.
    """

    # The loss is relative to a discriminator that learns as well, so it does not compare between checkpoints. Models do
    # not contain the discriminator, so training cannot start from one.
    ineffective: ClassVar[Collection[str]] = (*DIFFUSION_ONLY, "keep_best", "init_from")

    family: Literal["gan"] = "gan"
    """The family of models."""
    width: int = Field(32, ge=8, le=WIDEST, multiple_of=8)
    """Channels at the highest resolution."""
    channel_mult: ChannelMult = (1, 2, 4)
    """Channels at each resolution, as multiples of ``width``, from the highest; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels. With 1 and a resolution more at the top, width 16 and
    channel_mult [1, 2, 4, 8], an image takes 2.4 times as long in training."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks per resolution in each of the two networks."""
    latent: int = Field(64, ge=1, le=4096)
    """Dimensions of a latent."""
    gamma: float = Field(0.3, gt=0)
    """γ, weight of the gradient penalties: γ/2 times the squared gradient of the discriminator at real images (R1) and
    at generated ones (R2). Larger images need a larger γ; with 1 the default learned more slowly on grey images of 32
    pixels."""
    augment: float = Field(0.5, ge=0, le=1)
    """Probability of each augmentation of real and generated images alike before the discriminator: colour, translation
    and a hole (DiffAugment, arXiv 2006.10738). On 300 digits 0.5 gave a KID lower by 6 % than 0, no augmentation."""
    conditional: bool = True
    """Whether both networks are conditioned on the class, where the data set has several."""


class AutoregressiveConfig(NonDiffusionConfig):
    """The family autoregressive: each pixel is conditioned on those above it and to its left (arXiv 1606.05328).

    The likelihood is exact. Sampling goes pixel by pixel, S² sequential steps for an image of S×S pixels, so it suits
    images of up to about 64 pixels.
    """

    ineffective: ClassVar[Collection[str]] = DIFFUSION_ONLY
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "exact"

    family: Literal["autoregressive"] = "autoregressive"
    """The family of models."""
    width: int = Field(32, ge=8, le=WIDEST, multiple_of=8)
    """Channels of the vertical and of the horizontal stack."""
    layers: int = Field(8, ge=1, le=64)
    """Layers, with dilations 1, 2, 4 and 8 in turn, so that eight of them see 30 rows."""
    mixtures: int = Field(5, ge=1, le=100)
    """Logistic distributions in the mixture of each value (arXiv 1701.05517)."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""


def tag(given: Any, key: str, default: str) -> str:
    """Return the value of ``key`` in a configuration or in its fields; the ``default`` if none is given."""
    if isinstance(given, BaseModel):
        return str(getattr(given, key, ""))
    return str(given.get(key, default)) if isinstance(given, dict) else default


class LatentSpace(Config):
    """The latent space of a latent diffusion model."""

    autoencoder: VAEConfig
    """Configuration of the autoencoder; its weights lie in the same file as the model's."""
    digest: str
    """SHA-256 of the autoencoder's weights, which identifies it."""
    channels: int = Field(ge=1, le=64)
    """Channels of the latents."""
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the latents."""

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
        lambda given: tag(given, "family", "ddpm"),
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
"""The configuration class of each family."""


def training_conflict(model: FamilyConfig, training: ObjectiveConfig) -> str | None:
    """Describe why ``model`` cannot be trained with ``training``, and what to change; None if it can."""
    for name in sorted(model.ineffective):
        if getattr(training, name) != type(training).model_fields[name].default:
            return f"training.{name} means nothing to model.family = {model.family}: leave it out"
    if not isinstance(model, ModelConfig):
        return None
    if getattr(training, "shard", False) and getattr(training, "optimizer", None) == "muon":
        return (
            "training.shard gives each process a part of each matrix, and Muon needs whole ones: set "
            "training.optimizer to adamw"
        )
    if training.student is not None and model.prediction == "sample":
        return (
            "model.prediction = sample says nothing of small noise, and a student must leave images without noise as "
            "they are: distil a model of another prediction"
        )
    if model.variance == "fixed":
        return None
    if training.timestep_sampling != "uniform":
        return (
            "model.variance is learned at whole steps of the schedule, and training.timestep_sampling = "
            f"{training.timestep_sampling} samples levels between them: use uniform, or leave model.variance out"
        )
    if training.learned_uncertainty:
        return (
            "model.variance is learned from a sum over all levels, of which training.learned_uncertainty would "
            "divide each by another number: leave one out"
        )
    return None


def classes_of(config: FamilyConfig, class_histogram: dict[str, int]) -> list[str]:
    """List the classes that a network is conditioned on: those of the data set, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []
