"""The section ``model`` of the family ddpm; loads without torch."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from diffusion.common.config import MAX_SIZE, is_unset
from diffusion.common.rules import find_conflict, given, only, unless
from diffusion.families.base import (
    MAX_BLOCKS,
    MAX_RESOLUTIONS,
    MAX_WIDTH,
    Ability,
    BaseFamilyConfig,
    ChannelMult,
    Likelihood,
)
from diffusion.process.config import Prediction

LOWEST = 8
"""About the height and width of the lowest resolution by default, in positions: more make attention costly, and fewer
were no better."""

TEXT_TOKENS = 32
"""Tokens of each caption that a network attends to by default: few captions of one line have more."""


class ModelConfig(BaseFamilyConfig):
    """The family ddpm: forward process, prediction, and architecture of the U-Net."""

    abilities: ClassVar[frozenset[Ability]] = frozenset(get_args(Ability)) - {
        "quantized_bases",
        "scheduler",
        "text_encoder_adapters",
    }
    likelihood: ClassVar[Likelihood | None] = "bound"

    family: Literal["ddpm"] = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """The family of models: diffusion models; the other families are vae, gan and autoregressive."""
    schedule: Literal["linear", "cosine", "sigmoid", "edm"] = "edm"
    """Noise schedule: linear β (arXiv 2006.11239), cosine ᾱ (2102.09672), sigmoid ᾱ (2212.11972), or EDM's σ from
    0.002 to 80 in a geometric sequence (2206.00364), which goes higher for images of more than 3×32×32 values."""
    steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels."""
    zero_terminal_snr: Annotated[
        bool,
        unless(
            "model.schedule",
            "edm",
            because="model.zero_terminal_snr stretches the other schedules; edm has its own end: leave one out",
        ),
        unless(
            "model.prediction",
            "epsilon",
            because="model.prediction = epsilon says nothing of an image of which nothing is left, as "
            "model.zero_terminal_snr makes them: use v_prediction, sample or edm",
        ),
    ] = False
    """Whether the schedule is rescaled to zero SNR at its last step (arXiv 2305.08891)."""
    prediction: Annotated[
        Prediction,
        unless(
            "training.student",
            value="sample",
            because="model.prediction = sample says nothing of small noise, and a student must leave images without "
            "noise as they are: distil a model of another prediction",
        ),
    ] = "edm"
    """Prediction of the network: the noise (epsilon), v (arXiv 2202.00512), the clean image (sample), or EDM's mixture
    of both, which depends on the standard deviation of the data set (2206.00364)."""
    variance: Annotated[
        Literal["fixed", "learned_range"],
        only(
            "training.timestep_sampling",
            "uniform",
            because="model.variance is learned at whole steps of the schedule, and training.timestep_sampling samples "
            "levels between them: use uniform, or leave model.variance out",
        ),
        unless(
            "training.learned_uncertainty",
            because="model.variance is learned from a sum over all levels, of which training.learned_uncertainty would "
            "divide each by another number: leave one out",
        ),
        unless(
            "training.mask",
            because="model.variance is learned from the likelihood of whole images, and training.mask weights their "
            "pixels: leave one of them out",
        ),
    ] = Field("fixed", exclude_if=lambda variance: variance == "fixed")
    """Variance of each value in a reverse step: fixed, or predicted by the network between the two bounds of DDPM, so
    that the sampler ddpm needs fewer steps (arXiv 2102.09672)."""
    width: int = Field(48, ge=16, le=MAX_WIDTH, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    channel_mult: ChannelMult | None = None
    """Channels at each resolution, as multiples of ``width``; each halves the one before. Null: ones, as many as bring
    the lowest resolution to about 8×8 positions: with ``patch`` = 2 [1, 1] for 32 pixels and less, [1, 1, 1] for 64."""
    blocks: int = Field(1, ge=1, le=MAX_BLOCKS)
    """Residual blocks per resolution of the downward path; the upward path has one more."""
    attention: tuple[int | Literal["middle"], ...] = Field(("middle",), max_length=MAX_RESOLUTIONS)
    """Layers with self-attention: middle, the block between the downward and the upward path, or indices of the
    resolutions in ``channel_mult``, of which 0 is the highest and the lowest includes that block."""
    heads: int = Field(2, ge=1, le=MAX_WIDTH)
    """Attention heads, among which the channels are divided."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels: 2 means half the resolution, a quarter of the work."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate inside each residual block; the choice depends on seed and image alone."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""
    text: bool = Field(False, exclude_if=is_unset)
    """Whether the network is conditioned on captions, embedded by a sentence encoder (the extra ``text``)."""
    text_tokens: Annotated[
        int | None,
        given(
            "model.text",
            "model.text_tokens says how captions are read, and the network has none: set model.text, or leave it out",
        ),
    ] = Field(None, ge=0, le=256, exclude_if=is_unset)
    """Tokens of each caption that layers with attention, and the middle block, attend to (arXiv 2112.10752, section
    3.3), beside the sentence vector, which the training captions centre and scale; 0.8 KB on disk for each and
    caption. 0: the vector alone and as it is, as in models of before. Null: 32."""
    low_resolution: Annotated[
        int | None,
        unless(
            "model.conditional",
            because="model.low_resolution conditions the network on small images, and on nothing besides: leave out "
            "model.conditional",
        ),
        unless(
            "model.text",
            because="model.low_resolution conditions the network on small images, and on nothing besides: leave out "
            "model.text",
        ),
    ] = Field(None, ge=2, le=MAX_SIZE, exclude_if=is_unset)
    """Super-resolution (SR3, arXiv 2104.07636): height and width, in pixels, of the small image that alone
    conditions the network; the data set's size is a multiple of it. Null: no super-resolution."""
    low_resolution_noise: Annotated[
        float | None,
        given(
            "model.low_resolution",
            "model.low_resolution_noise lies over the small image, and there is none: set model.low_resolution, or "
            "leave it out",
        ),
    ] = Field(None, ge=0, exclude_if=is_unset)
    """Largest standard deviation of the noise that training adds to the small image, in [−1, 1]; the network is
    conditioned on its level (noise conditioning augmentation, 2106.15282, section 4.3), which makes it robust to small
    images unlike those of training. Null: 0.1; 0: none."""

    autoencoder: Annotated[
        str | None,
        only(
            "model.variance",
            "fixed",
            because="model.variance = learned_range is learned from the likelihood of 8-bit pixels, which the latents "
            "of model.autoencoder are not: leave one out",
        ),
        unless(
            "model.low_resolution",
            because="model.low_resolution shows the network small images beside large ones, and model.autoencoder has "
            "it work on latents: leave one out",
        ),
    ] = Field(None, exclude_if=is_unset)
    """Diffusion in the latents of this autoencoder (arXiv 2112.10752), for images of 128 pixels and more: the
    final.safetensors of a model with model.family = vae, or of a model in such latents, or models:/NAME@ALIAS. Null: in
    pixels."""

    @model_validator(mode="before")
    @classmethod
    def _default_conditional(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("low_resolution") is not None:
            return {"conditional": False} | fields
        return fields

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> "ModelConfig":
        if conflict := find_conflict(model=self):
            raise ValueError(conflict)
        if self.channel_mult is None and set(self.attention) - {"middle"}:
            raise ValueError(
                "model.attention names resolutions, whose number depends on the images unless model.channel_mult is "
                "set: set both, or use middle"
            )
        # All resolutions have the same channels by default.
        channel_mult = self.channel_mult or (1,)
        lowest = len(channel_mult) - 1
        for place in (*self.attention, "middle") if self.tokens else self.attention:
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
    def tokens(self) -> int:
        """Tokens of each caption that the network attends to; 0: none."""
        if not self.text:
            return 0
        return TEXT_TOKENS if self.text_tokens is None else self.text_tokens

    def identity(self) -> dict[str, Any]:
        """List what determines the weights: the sentence vector alone is what all captions were once read as."""
        tokens = {"text_tokens": self.tokens} if self.tokens else {}
        return self.model_dump(mode="json", exclude={"text_tokens"}) | tokens

    @property
    def max_low_resolution_noise(self) -> float:
        """Largest standard deviation of the noise that training adds to small images."""
        return 0.1 if self.low_resolution_noise is None else self.low_resolution_noise

    @property
    def can_have_guide(self) -> bool:
        """Whether training can keep a guide for autoguidance; models for super-resolution have none."""
        return self.low_resolution is None

    def default_batch_size(self, size: int) -> int:
        """Compute ``training.batch_size`` for images of ``size`` pixels.

        A few large images estimate a gradient as well as many small ones, and smaller batches are more steps
        (benchmarks/README.md, image quality).
        """
        if self.autoencoder is not None:
            return 64
        return int(min(max(2 ** round(math.log2(64 * 32 / size)), 16), 64))

    def resolve(self, size: int) -> Self:
        """Set ``channel_mult`` for images, or latents, of ``size``, and ``text_tokens``."""
        channel_mult = self.channel_mult or default_channel_mult(self.patch, size)
        text_tokens = self.tokens if self.text else None
        return self.model_copy(update={"channel_mult": channel_mult, "text_tokens": text_tokens})


def default_channel_mult(patch: int, size: int) -> tuple[int, ...]:
    """Compute ``model.channel_mult`` of a diffusion model of images, or latents, of ``size`` pixels."""
    halvings = max(1, round(math.log2(size / patch / LOWEST)))
    return (1,) * (1 + halvings)
