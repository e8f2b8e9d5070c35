"""The section ``model`` of the configuration, one class per family of models, and the training objective's options.

This module loads without torch.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, model_validator

from diffusion.common.config import LARGEST_SIZE, Config, is_unset
from diffusion.common.shapes import Shape, shape_name

Prediction = Literal["epsilon", "v_prediction", "sample", "edm"]
SchedulerPrediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""Predictions of imported networks, as schedulers of diffusers name them; the last is ε − x_0, of flow matching."""
WIDEST, DEEPEST, MOST_LEVELS = 4096, 64, 12
"""Limits of channels, blocks per resolution, and resolutions; files that exceed them are rejected before a network is
built."""
LOWEST = 8
"""About the height and width of the lowest resolution by default, in positions: more make attention costly, and fewer
were no better."""


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
    "guide",
    "lora",
)
"""Fields of the section ``training`` that have an effect only for diffusion models."""


LORA_INEFFECTIVE = ("optimizer", "shard", "student", "guide")
"""Fields of the section ``training`` that have no effect with ``training.lora``."""


class LoRAConfig(Config):
    """Low-rank adaptation (arXiv 2106.09685): W + α/r · B A with frozen W.

    W are the weights of training.init_from; A, (r, in), and B, (out, r) and at first 0, are trained by AdamW.
    """

    rank: int = Field(8, ge=1, le=1024)
    """r, the number of rows of each A and columns of each B."""
    alpha: float | None = Field(None, gt=0, le=65536)
    """α, which scales the product by α/r; null: the rank, a scale of 1."""
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, max_length=256)
    """Names of the adapted linear and convolutional layers, or ends of their names behind a dot, such as qkv. Null: all
    hidden layers of a network of the family ddpm."""
    text_encoder: bool = False
    """Whether the text encoder of a pretrained pipeline is adapted as well."""

    @property
    def scale(self) -> float:
        """α/r, the factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class StudentConfig(Config):
    """What a student is distilled for; `darkroom distill` sets it."""

    steps: int = Field(ge=1, le=8)
    """Network evaluations in which it generates."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of guidance of the teacher, which the student learns to need no more. Null: none."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=is_unset)
    """Noise levels σ at which the teacher is guided. Null: all."""
    autoguidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance of the teacher, instead. Null: none."""

    @model_validator(mode="after")
    def _guides_in_one_way(self) -> "StudentConfig":
        if self.guidance is not None and self.autoguidance is not None:
            raise ValueError("training.student.guidance and autoguidance are two kinds of guidance: leave one out")
        return self


class ObjectiveConfig(Config):
    """The part of the section ``training`` that defines the objective: noise levels, their weights, and the seed."""

    batch_size: int | None = Field(None, ge=1, le=2**20)
    """Images per optimizer step. Null: 64, whatever the preset says; for diffusion models of images 32 from about
    48×48 pixels on, and 16 from about 96×96; doubled until there is one for each of training.cpu_threads."""
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
    timestep_sampling: Literal["uniform", "lognormal", "scheduler"] = "lognormal"
    """Distribution of noise levels: uniform over the steps of the schedule, or normal in ln σ (2206.00364). For
    pipelines of diffusers also scheduler, their own: normal logits of t for flow matching (2403.03206), shifted as the
    scheduler's, and uniform for all others."""
    log_sigma_mean: float | None = None
    """Mean of ln σ for timestep_sampling = lognormal; null: −1.2, EDM's, and higher for images of more than 3×32×32
    values, by the logarithm of the root of their ratio (2301.11093)."""
    log_sigma_std: float | None = Field(None, gt=0)
    """Standard deviation of ln σ for timestep_sampling = lognormal; null: 1.2, EDM's."""
    student: StudentConfig | None = Field(None, exclude_if=is_unset)
    """Distil training.init_from into a student of few evaluations, as `darkroom distill` does. Null: train to
    denoise."""
    stratified_timesteps: bool = True
    """Whether the times of a batch's N images are stratified: one in each N-th of the distribution."""

    @property
    def images_per_step(self) -> int:
        """``batch_size``, which is a number once the data set is known."""
        assert self.batch_size is not None
        return self.batch_size

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
    one_shape: ClassVar[str | None] = None
    """Why its network takes images of one square shape alone; None: it takes any height and width."""


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
    width: int = Field(48, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult | None = None
    """Channels at each resolution, as multiples of ``width``; each halves the one before. Null: ones, as many as bring
    the lowest resolution to about 8×8 positions: with ``patch`` = 2 [1, 1] for 32 pixels and less, [1, 1, 1] for 64."""
    blocks: int = Field(1, ge=1, le=DEEPEST)
    """Residual blocks per resolution of the downward path; the upward path has one more."""
    attention: tuple[int | Literal["middle"], ...] = Field(("middle",), max_length=MOST_LEVELS)
    """Layers with self-attention: middle, the block between the downward and the upward path, or indices of the
    resolutions in ``channel_mult``, of which 0 is the highest and the lowest includes that block."""
    heads: int = Field(2, ge=1, le=WIDEST)
    """Attention heads, among which the channels are divided."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels: 2 means half the resolution, a quarter of the work."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate inside each residual block; the choice depends on seed and image alone."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""
    text: bool = Field(False, exclude_if=is_unset)
    """Whether the network is conditioned on captions, embedded by a sentence encoder (the extra ``text``)."""
    low_resolution: int | None = Field(None, ge=2, le=LARGEST_SIZE, exclude_if=is_unset)
    """Super-resolution (SR3, arXiv 2104.07636): height and width, in pixels, of the small image that alone
    conditions the network; the data set's size is a multiple of it. Null: no super-resolution."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=is_unset)
    """Largest standard deviation of the noise that training adds to the small image, in [−1, 1]; the network is
    conditioned on its level (noise conditioning augmentation, 2106.15282, section 4.3), which makes it robust to small
    images unlike those of training. Null: 0.1; 0: none."""

    autoencoder: str | None = Field(None, exclude_if=is_unset)
    """Diffusion in the latents of this autoencoder (arXiv 2112.10752), for images of 128 pixels and more: the
    final.safetensors of a model with model.family = vae, or models:/NAME@ALIAS. Null: in pixels."""

    @model_validator(mode="before")
    @classmethod
    def _default_conditional(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("low_resolution") is not None:
            return {"conditional": False} | fields
        return fields

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
        if self.channel_mult is None and set(self.attention) - {"middle"}:
            raise ValueError(
                "model.attention names resolutions, whose number depends on the images unless model.channel_mult is "
                "set: set both, or use middle"
            )
        # All resolutions have the same channels by default.
        channel_mult = self.channel_mult or (1,)
        lowest = len(channel_mult) - 1
        for place in self.attention:
            level = lowest if place == "middle" else place
            if not 0 <= level <= lowest:
                raise ValueError(
                    f"model.attention names resolution {level}, and there are {lowest + 1}: use 0 to {lowest}, or "
                    "middle"
                )
            if self.width * channel_mult[level] % self.heads:
                raise ValueError(
                    f"model.heads = {self.heads} does not divide the {self.width * channel_mult[level]} "
                    f"channels at resolution {level}: change model.heads or model.width"
                )
        return self

    @property
    def max_low_resolution_noise(self) -> float:
        """Largest standard deviation of the noise that training adds to small images."""
        return 0.1 if self.low_resolution_noise is None else self.low_resolution_noise


def default_batch_size(model: "FamilyConfig", size: int) -> int:
    """Compute ``training.batch_size`` for images of ``size`` pixels.

    A few large images estimate a gradient as well as many small ones, and smaller batches are more steps
    (benchmarks/README.md, image quality).
    """
    if not isinstance(model, ModelConfig) or model.autoencoder is not None:
        return 64
    return int(min(max(2 ** round(math.log2(64 * 32 / size)), 16), 64))


def default_channel_mult(patch: int, size: int) -> tuple[int, ...]:
    """Compute ``model.channel_mult`` of a diffusion model of images, or latents, of ``size`` pixels."""
    halvings = max(1, round(math.log2(size / patch / LOWEST)))
    return (1,) * (1 + halvings)


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
    one_shape: ClassVar[str | None] = "the prior of its latents has linear layers over all positions of a square"
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
    one_shape: ClassVar[str | None] = "its generator begins with a linear layer onto the positions of a square"

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


SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
CLIP_TOKENIZERS, T5_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
PIPELINES: Mapping[str, Mapping[str, Collection[str]]] = {
    "DDPMPipeline": {"unet": ("UNet2DModel",)},
    "DDIMPipeline": {"unet": ("UNet2DModel",)},
    "LDMPipeline": {"unet": ("UNet2DModel",), "vqvae": ("VQModel", "AutoencoderKL")},
    "DiTPipeline": {"transformer": ("DiTTransformer2DModel",), "vae": ("AutoencoderKL",)},
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
    },
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_TOKENIZERS,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": T5_TOKENIZERS,
    },
}
"""The allow-list of pipelines of diffusers: the classes of each component; a scheduler is one of ``SCHEDULERS``."""
OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""Components that a pipeline may do without."""
GUIDANCE: Mapping[str, float] = {
    "DiTPipeline": 4.0,
    "StableDiffusionPipeline": 7.5,
    "StableDiffusion3Pipeline": 7.0,
}
"""Scale of guidance by which diffusers' pipelines sample unless another one is given."""
LARGEST_INTEGER, LONGEST_LIST, LONGEST_STRING = 2**18, 2**14, 4096
"""Limits of a component's configuration; files that exceed them are rejected before a network is built."""
SIDES = {"sample_size": LARGEST_SIZE, "pos_embed_max_size": LARGEST_SIZE, "max_position_embeddings": 2**14}
"""Lower limits of sizes of which tables are made, some of their squares."""


def _within_limits(config: Any, name: str = "", depth: int = 0) -> Any:
    """Return the JSON value ``config``; raises ValueError if it is too large to build a network by."""
    if depth > 4:
        raise ValueError(f"{name} is nested too deeply")
    is_depth = "layers" in name or "blocks" in name
    limit = SIDES.get(name, DEEPEST * 4 if is_depth else LARGEST_INTEGER)
    match config:
        case dict():
            if len(config) > 1000:
                raise ValueError(f"{name or 'it'} has {len(config)} keys")
            for key, value in config.items():
                _within_limits(value, str(key), depth + 1)
        case list() | tuple():
            if len(config) > (LONGEST_LIST if name == "trained_betas" else MOST_LEVELS * 8):
                raise ValueError(f"{name} has {len(config)} entries")
            for value in config:
                _within_limits(value, name, depth + 1)
        case str() if len(config) > LONGEST_STRING:
            raise ValueError(f"{name} has {len(config)} characters")
        case bool() | str() | None:
            pass
        case int() if abs(config) > limit:
            raise ValueError(f"{name} = {config} is beyond {limit}")
        case float() if not abs(config) < 1e30:  # not a number, too
            raise ValueError(f"{name} = {config} is no finite number")
    return config


class Component(Config):
    """A component of a pipeline: its class and the configuration that it is built by."""

    kind: str
    """Name of the class, one of the allow-list."""
    config: Annotated[dict[str, Any], AfterValidator(_within_limits)] = Field(default_factory=dict)
    """Its configuration, without what begins with an underscore; empty for a tokenizer."""


class DiffusersConfig(Kind):
    """The family diffusers: an imported pipeline of diffusers, and what is trained from one (training.init_from)."""

    ineffective: ClassVar[Collection[str]] = ("optimizer", "shard", "student", "guide")
    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    low_resolution: ClassVar[None] = None
    """Height and width of the images that it upscales: none."""
    autoencoder: ClassVar[None] = None
    """A Darkroom autoencoder: none, as the pipeline has its own."""

    family: Literal["diffusers"] = "diffusers"
    """The family of models."""
    pipeline: str | None = None
    """Class of the pipeline. Null: that of training.init_from."""
    components: dict[str, Component] = Field(default_factory=dict)
    """Its components by name. Empty: those of training.init_from."""
    class_ids: tuple[int, ...] = Field((), max_length=LARGEST_INTEGER)
    """The network's number of each class, in the sorted order of the classes' names. Empty: no classes."""

    @model_validator(mode="after")
    def _is_on_the_allow_list(self) -> "DiffusersConfig":
        if self.pipeline is None:
            if self.components or self.class_ids:
                raise ValueError("components belong to a pipeline, which model.pipeline names: leave all of it out")
            return self
        if self.pipeline not in PIPELINES:
            raise ValueError(f"a {self.pipeline} is not supported: one of {', '.join(PIPELINES)} is")
        kinds = {**PIPELINES[self.pipeline], "scheduler": SCHEDULERS}
        for name, component in self.components.items():
            if component.kind not in kinds.get(name, ()):
                raise ValueError(
                    f"{name} is a {component.kind}, and in a {self.pipeline} "
                    + (f"only {', '.join(kinds[name])} is supported" if name in kinds else "there is none")
                )
        if missing_names := sorted(kinds.keys() - self.components.keys() - {*OPTIONAL}):
            raise ValueError(f"a {self.pipeline} needs {missing_names[0]}, and there is none")
        self._check_network()
        return self

    def _check_network(self) -> None:
        config, out = self.denoiser.config, self.denoiser.config.get("out_channels")
        size, channels = config.get("sample_size"), config.get("in_channels")
        if not isinstance(size, int) or not isinstance(channels, int) or size < 1 or channels < 1:
            raise ValueError("sample_size and in_channels of its network are no whole numbers: one square is supported")
        classes, widths = self.network_classes, self.latents and self.latents.config.get("block_out_channels", ())
        if not isinstance(classes, int | None) or not isinstance(widths, list | tuple | None):
            raise ValueError("its classes are no number, or block_out_channels of its autoencoder no list")
        if self.text and classes is not None:
            raise ValueError("its network is conditioned on classes beside captions, which is not supported")
        if out not in (None, channels) and not (self.pipeline == "DiTPipeline" and out == 2 * channels):
            raise ValueError(f"its network has {channels} channels in and {out} out, and only as many are supported")
        unsupported_fields = ("time_cond_proj_dim", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type")
        for name in (*unsupported_fields, "quantization_config", "auto_map"):
            for component_name, component in self.components.items():
                if component.config.get(name) is not None:
                    raise ValueError(f"{component_name} has {name}, which is not supported")
        latents = self.latents
        if latents is not None and latents.config.get("latent_channels", channels) != channels:
            raise ValueError(
                f"its network has {channels} channels and its autoencoder {latents.config['latent_channels']}: "
                "networks that are shown more than the latents are not supported"
            )
        if (count := self.network_classes) is not None and not all(0 <= index < count for index in self.class_ids):
            raise ValueError(f"its network has {count} classes, and a number beyond them is named")

    @property
    def denoiser_name(self) -> str:
        """Name of the component that denoises."""
        return "unet" if "unet" in self.components else "transformer"

    @property
    def denoiser(self) -> Component:
        """The component that denoises."""
        return self.components[self.denoiser_name]

    @property
    def latents_name(self) -> str:
        """Name of the component between images and latents."""
        return "vqvae" if "vqvae" in self.components else "vae"

    @property
    def latents(self) -> Component | None:
        """The component between images and latents; None: the network works on pixels."""
        return self.components.get(self.latents_name)

    @property
    def scheduler(self) -> Component:
        """The pipeline's scheduler."""
        return self.components["scheduler"]

    @property
    def one_shape(self) -> str | None:  # type: ignore[override]
        """Why its network takes images of one square shape alone; None: it takes any height and width."""
        return "a DiT arranges its patches in a square" if self.pipeline == "DiTPipeline" else None

    @property
    def factor(self) -> int:
        """Pixels per position of the network's inputs along each side."""
        if self.latents is None:
            return 1
        return int(2 ** (len(self.latents.config.get("block_out_channels", (64,))) - 1))

    @property
    def fold(self) -> int:
        """Pixels of which height and width of images are multiples."""
        config = self.denoiser.config
        levels = 2 ** (len(config.get("block_out_channels", ())) - 1) if self.denoiser_name == "unet" else 1
        return self.factor * int(levels * config.get("patch_size", 1))

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's inputs for square images."""
        channels, size = (self.denoiser.config[name] for name in ("in_channels", "sample_size"))
        return channels, size, size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of square images."""
        channels, size, _ = self.noise_shape
        if self.latents is not None:
            channels = self.latents.config.get("out_channels", 3)
        return channels, size * self.factor, size * self.factor

    @property
    def prediction(self) -> SchedulerPrediction | None:
        """Prediction of the network; None: it is no denoiser of a kind that is known, and has its own scheduler."""
        if self.scheduler.kind == "FlowMatchEulerDiscreteScheduler":
            return "flow_prediction"
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        is_known = self.scheduler.kind != "LCMScheduler" and kind in get_args(SchedulerPrediction)
        return kind if is_known else None

    @property
    def network_classes(self) -> int | None:
        """Number of classes that the network has embeddings of; None: it is not conditioned on classes."""
        name = "num_embeds_ada_norm" if self.pipeline == "DiTPipeline" else "num_class_embeds"
        return self.denoiser.config.get(name)

    @property
    def has_null_class(self) -> bool:
        """Whether the network was trained without a class, too, as guidance needs."""
        return self.pipeline == "DiTPipeline"

    @property
    def conditional(self) -> bool:
        """Whether the network is conditioned on classes."""
        return len(self.class_ids) > 1

    @property
    def text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return "text_encoder" in self.components


def tag(fields: Any, key: str, default: str) -> str:
    """Return the value of ``key`` in a configuration or in its fields; the ``default`` if none is given."""
    if isinstance(fields, BaseModel):
        return str(getattr(fields, key, ""))
    return str(fields.get(key, default)) if isinstance(fields, dict) else default


class LatentSpace(Config):
    """The latent space of a latent diffusion model."""

    autoencoder: VAEConfig
    """Configuration of the autoencoder; its weights lie in the same file as the model's."""
    digest: str
    """SHA-256 of the autoencoder's weights, which identifies it."""
    channels: int = Field(ge=1, le=64)
    """Channels of the latents."""
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the latents of square images."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images."""
        return self.channels, self.size, self.size


FamilyConfig: TypeAlias = Annotated[
    Annotated[ModelConfig, Tag("ddpm")]
    | Annotated[VAEConfig, Tag("vae")]
    | Annotated[GANConfig, Tag("gan")]
    | Annotated[AutoregressiveConfig, Tag("autoregressive")]
    | Annotated[DiffusersConfig, Tag("diffusers")],
    Discriminator(
        lambda fields: tag(fields, "family", "ddpm"),
        custom_error_type="unknown_family",
        custom_error_message="family is ddpm, the default, vae, gan, autoregressive or diffusers",
    ),
]
"""The section ``model`` of a configuration."""

FAMILIES: Mapping[str, type[Kind]] = {
    "ddpm": ModelConfig,
    "vae": VAEConfig,
    "gan": GANConfig,
    "autoregressive": AutoregressiveConfig,
    "diffusers": DiffusersConfig,
}
"""The configuration class of each family."""


def training_conflict(model: FamilyConfig, training: ObjectiveConfig) -> str | None:
    """Describe why ``model`` cannot be trained with ``training``, and what to change; None if it can."""
    for name in sorted(model.ineffective):
        if getattr(training, name) != type(training).model_fields[name].default:
            return f"training.{name} means nothing to model.family = {model.family}: leave it out"
    if lora := getattr(training, "lora", None):
        for name in LORA_INEFFECTIVE:
            if getattr(training, name) != type(training).model_fields[name].default:
                return f"training.{name} means nothing to training.lora, whose matrices AdamW trains: leave it out"
        if getattr(training, "init_from", None) is None:
            return "training.lora adapts the weights of training.init_from, and there are none: name a model there"
        if lora.text_encoder and isinstance(model, ModelConfig):
            return (
                "training.lora.text_encoder adapts the encoder of a pretrained pipeline, and that of the family ddpm "
                "is fixed: leave it out"
            )
    if not isinstance(model, ModelConfig):
        return None
    if training.timestep_sampling == "scheduler":
        return "training.timestep_sampling = scheduler is of pipelines of diffusers: use uniform or lognormal"
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


def shape_conflict(model: FamilyConfig, size: int, shapes: Sequence[Shape]) -> str | None:
    """Describe why ``model`` cannot be trained on ``shapes`` (H, W) of about ``size``² pixels; None if it can."""
    if [*shapes] == [(size, size)]:
        return None
    if model.one_shape is not None:
        return (
            f"model.family = {model.family} takes square images of one size alone, since {model.one_shape}: set "
            "ingest.fit to crop, or use the family ddpm or autoregressive"
        )
    if (low := model.low_resolution) is not None and (
        misfits := [shape for shape in shapes if any(side % (size // low) for side in shape)]
    ):
        return (
            f"model.low_resolution = {low} enlarges {size // low} times, which does not divide the sides of bucket "
            f"{shape_name(misfits[0])}: name multiples of it in ingest.buckets, or change model.low_resolution"
        )
    return None


def classes_of(config: FamilyConfig, class_histogram: dict[str, int]) -> list[str]:
    """List the classes that a network is conditioned on: those of the data set, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []
