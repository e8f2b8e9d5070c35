"""What the denoising network is, and what it is asked to predict: all one needs to use a trained model."""

from typing import Literal

from pydantic import Field, model_validator

from diffusion.config import Config

Prediction = Literal["noise", "v", "x0"]


class ModelConfig(Config):
    """The forward process, the quantity predicted, and the shape of the U-Net."""

    schedule: Literal["linear", "cosine"] = "cosine"
    """Noise schedule: linear β (arXiv 2006.11239) or cosine ᾱ (arXiv 2102.09672)."""
    steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels."""
    prediction: Prediction = "v"
    """What the network predicts: the noise, v (arXiv 2202.00512), or the clean picture."""
    width: int = Field(32, ge=16, multiple_of=16)
    """Channels at the highest resolution; a multiple of 16, the channels normalised together."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution, as multiples of ``width``; each halves the one before."""
    blocks: int = Field(1, ge=1)
    """Residual blocks per resolution on the way down; one more on the way up."""
    attention: tuple[int, ...] = (1,)
    """Which resolutions have self-attention, counted from 0, the highest."""
    heads: int = Field(2, ge=1)
    """Attention heads; they share the channels."""
    patch: Literal[1, 2, 4] = 2
    """The network works on patch×patch pixels folded into channels: 2 means half resolution, a quarter of
    the work."""
    conditional: bool = True
    """Whether the network is told each picture's class, where the data set has several."""

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
