"""What the denoising network is, and what it is asked to predict: all one needs to use a trained model."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffusion.config import LARGEST_SIZE, unset
from diffusion.models.kind import DEEPEST, MOST_LEVELS, WIDEST, Kind, Multipliers

Prediction = Literal["noise", "v", "x0", "edm"]


class ModelConfig(Kind):
    """The forward process, the quantity predicted, and the shape of the U-Net: the family ddpm."""

    likelihood: ClassVar[Literal["bound", "exact"] | None] = "bound"
    in_diffusers: ClassVar[bool] = True
    samples_in_steps: ClassVar[bool] = True

    family: Literal["ddpm"] = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """What kind of model it is: a diffusion model, or see diffusion/families/config.py."""
    schedule: Literal["linear", "cosine", "sigmoid", "edm"] = "edm"
    """Noise schedule: linear β (arXiv 2006.11239), cosine ᾱ (2102.09672), sigmoid ᾱ (2212.11972), or EDM's σ from
    0.002 to 80, each step as many times that of the one before (2206.00364)."""
    steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels."""
    zero_terminal: bool = False
    """Whether the schedule is stretched until nothing is left of a picture at its end (arXiv 2305.08891)."""
    prediction: Prediction = "edm"
    """What the network predicts: the noise, v (arXiv 2202.00512), the clean picture, or EDM's mixture of both, which
    depends on the standard deviation of the data set (2206.00364)."""
    learned_variance: bool = Field(False, exclude_if=unset)
    """Whether the network also says how much noise each value of a reverse step gets, between what DDPM takes at least
    and at most: fewer steps of the sampler ddpm then draw from the right distribution (arXiv 2102.09672)."""
    width: int = Field(32, ge=16, le=WIDEST, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    multipliers: Multipliers = (1, 2)
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
    """Share of the values inside each residual block that training sets to 0, chosen by seed and picture."""
    conditional: bool = True
    """Whether the network is told each picture's class, where the data set has several."""
    text: bool = Field(False, exclude_if=unset)
    """Whether the network is told each picture's caption, as a sentence encoder reads it (the extra ``text``)."""
    low_resolution: int | None = Field(None, ge=2, le=LARGEST_SIZE, exclude_if=unset)
    """Height and width, in pixels, of the small picture that the network is shown and learns to draw large (SR3, arXiv
    2104.07636); the data set's size is a multiple of it. It then draws nothing without one, and is told nothing else.
    Null: it is shown none."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=unset)
    """Largest standard deviation of the noise that training adds to the small picture, which is in [−1, 1]; the network
    is told how much of it each has (2106.15282, section 4.3). So it stands pictures that are not quite what it was
    trained on. Null: 0.1; 0: none."""

    autoencoder: str | None = Field(None, exclude_if=unset)
    """Diffusion in the latents of this autoencoder (arXiv 2112.10752), for pictures of 128 pixels and more: the
    final.safetensors of a training with model.family = vae, or models:/NAME@ALIAS. Null: in the pictures themselves."""

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
                "model.low_resolution_noise lies over the small picture, and there is none: set "
                "model.low_resolution, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_an_answer(self) -> "ModelConfig":
        if self.zero_terminal and self.schedule == "edm":
            raise ValueError("model.zero_terminal stretches the other schedules; edm has its own end: leave one out")
        if self.zero_terminal and self.prediction == "noise":
            raise ValueError(
                "model.prediction = noise says nothing of a picture of which nothing is left, as model.zero_terminal "
                "makes them: use v, x0 or edm"
            )
        return self

    @model_validator(mode="after")
    def _works_on_pictures(self) -> "ModelConfig":
        if self.autoencoder is not None and self.learned_variance:
            raise ValueError(
                "model.learned_variance is learned from the likelihood of 8-bit pixels, which the latents of "
                "model.autoencoder are not: leave one out"
            )
        if self.autoencoder is not None and self.low_resolution is not None:
            raise ValueError(
                "model.low_resolution shows the network small pictures beside large ones, and model.autoencoder has it "
                "work on latents: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _levels_exist(self) -> "ModelConfig":
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("model.multipliers needs at least one positive number, for example [1, 2]")
        for level in self.attention:
            if not 0 <= level < len(self.multipliers):
                raise ValueError(
                    f"model.attention names resolution {level}, and there are {len(self.multipliers)}: "
                    f"use 0 to {len(self.multipliers) - 1}"
                )
            if self.width * self.multipliers[level] % self.heads:
                raise ValueError(
                    f"model.heads = {self.heads} does not divide the {self.width * self.multipliers[level]} "
                    f"channels at resolution {level}: change model.heads or model.width"
                )
        return self

    @property
    def max_low_resolution_noise(self) -> float:
        """The largest standard deviation of noise over small pictures."""
        return 0.1 if self.low_resolution_noise is None else self.low_resolution_noise
