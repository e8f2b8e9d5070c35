"""The section ``model`` of the family autoregressive; loads without torch."""

from typing import ClassVar, Literal

from pydantic import Field

from diffusion.families.base import MAX_WIDTH, Ability, Likelihood, OneStepConfig


class AutoregressiveConfig(OneStepConfig):
    """The family autoregressive: each pixel is conditioned on those above it and to its left (arXiv 1606.05328).

    The likelihood is exact. Sampling goes pixel by pixel, S² sequential steps for an image of S×S pixels, so it suits
    images of up to about 64 pixels.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset({"comparable_losses", "initial_weights", "dropped_conditions"})
    likelihood: ClassVar[Likelihood | None] = "exact"

    family: Literal["autoregressive"] = "autoregressive"
    """The family of models."""
    width: int = Field(32, ge=8, le=MAX_WIDTH, multiple_of=8)
    """Channels of the vertical and of the horizontal stack."""
    layers: int = Field(8, ge=1, le=64)
    """Layers, with dilations 1, 2, 4 and 8 in turn, so that eight of them see 30 rows."""
    mixtures: int = Field(5, ge=1, le=100)
    """Logistic distributions in the mixture of each value (arXiv 1701.05517)."""
    conditional: bool = True
    """Whether the network is conditioned on the class, where the data set has several."""
