"""What a family of models says of itself in its configuration, where nothing heavy need be loaded to know it."""

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from diffusion.config import Config

WIDEST, DEEPEST, MOST_LEVELS = 4096, 64, 12
"""Channels, blocks of a resolution, and resolutions at most: a file that says of itself more than that is refused
before anything is built of it."""
Multipliers = Annotated[tuple[Annotated[int, Field(le=64)], ...], Field(max_length=MOST_LEVELS)]
"""Channels at each resolution, as multiples of the width."""
NOISE_LEVELS = (
    "weighting",
    "min_snr_gamma",
    "learned_uncertainty",
    "times",
    "log_sigma_mean",
    "log_sigma_std",
    "stratified",
    "recompute",
    "shard",
)
"""Fields of the section ``training`` that mean nothing to who learns no noise, or are made for the U-Net."""


class Kind(Config):
    """The section ``model`` of one family; what of it is the same for all models of the family is not in the file."""

    passes_over: ClassVar[Mapping[str, Collection[str]]] = {}
    """Fields of other sections that mean nothing to it."""
    samples_in_steps: ClassVar[bool] = False
    """Whether it samples by a reverse process; otherwise of the section ``sampling`` only how work is computed counts.
    """
    judged: ClassVar[Literal["drawn", "reconstructed"]] = "drawn"
    """By what it draws, or by how held-out pictures come back, which then are seen in the pictures kept of it."""
    likelihood: ClassVar[Literal["bound", "exact"] | None] = None
    """What it says of how probable a picture is: at least so much, or exactly; None: nothing."""
    in_diffusers: ClassVar[bool] = False
    """Whether diffusers has a counterpart to which it can be exported."""
