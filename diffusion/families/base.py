"""What the configurations of all families share; loads without torch.

A family is a folder beside this module, with its configuration, network and model, and a line in
``diffusion.families.config``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from diffusion.common.config import Config

MAX_WIDTH, MAX_BLOCKS, MAX_RESOLUTIONS = 4096, 64, 12
"""Limits of channels, blocks per resolution, and resolutions; files that exceed them are rejected before a network is
built."""
Ability = Literal[
    "noise_levels",  # it is a diffusion model
    "gradient_checkpointing",
    "sharding",
    "muon",
    "adapters",
    "text_encoder_adapters",
    "quantized_bases",  # frozen weights with fewer bits
    "guide",  # autoguidance
    "distillation",
    "comparable_losses",  # between checkpoints
    "initial_weights",  # training can start from a model
    "dropped_conditions",
    "scheduler",  # of its own
]
"""What some families can do, and what fields of other sections apply to (``diffusion.common.rules``)."""
Likelihood = Literal["bound", "exact"]


def _positive(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if not numbers or min(numbers) < 1:
        raise ValueError("needs at least one positive number, for example [1, 2]")
    return numbers


ChannelMult = Annotated[
    tuple[Annotated[int, Field(le=64)], ...], Field(max_length=MAX_RESOLUTIONS), AfterValidator(_positive)
]
"""Channels at each resolution, as multiples of the width."""


class BaseFamilyConfig(Config):
    """The section ``model`` of one family; class variables hold for all models of the family."""

    abilities: ClassVar[frozenset[Ability]] = frozenset()
    """What the family can do; fields of other sections that need more have no effect."""
    evaluated_by: ClassVar[Literal["samples", "reconstructions"]] = "samples"
    """Whether it is evaluated by generated images, or by reconstructions of held-out ones."""
    likelihood: ClassVar[Likelihood | None] = None
    """Whether its likelihood is a lower bound or exact; None: it has no likelihood."""
    needs_initial_model: ClassVar[bool] = False
    """Whether it has no network of its own, so that training begins with a model."""

    family: str
    """The family of models."""

    if TYPE_CHECKING:  # fields of some families, and constants of others

        @property
        def conditional(self) -> bool:
            """Whether the network is conditioned on classes."""

        @property
        def text(self) -> bool:
            """Whether the network is conditioned on captions."""

        @property
        def low_resolution(self) -> int | None:
            """Height and width, in pixels, of the images that it enlarges; None: it generates from noise."""

        @property
        def autoencoder(self) -> str | None:
            """File or digest of the autoencoder in whose latents it works; None: it has none."""

    @property
    def one_shape(self) -> str | None:
        """Why its network takes images of one square shape alone; None: it takes any height and width."""
        return None

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of square images, if the network takes no others; None: as the data set's."""
        return None

    @property
    def has_null_class(self) -> bool:
        """Whether the network predicts without a class, too, as guidance needs."""
        return True

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is shown the scale of guidance, instead of being evaluated twice."""
        return False

    @property
    def needs_own_scheduler(self) -> bool:
        """Whether only a scheduler of its own knows what the network predicts."""
        return False

    @property
    def can_have_guide(self) -> bool:
        """Whether training can keep a guide for autoguidance."""
        return False

    @property
    def max_low_resolution_noise(self) -> float:
        """Largest standard deviation of the noise that training adds to small images."""
        return 0.0

    def default_batch_size(self, size: int) -> int:
        """Compute ``training.batch_size`` for images of ``size`` pixels."""
        return 64

    def resolve(self, size: int) -> Self:
        """Set what depends on the ``size`` of the network's square inputs, as a file says what its network is."""
        return self

    def identity(self) -> dict[str, Any]:
        """List what determines the weights that training leads to, besides the section ``training``."""
        return self.model_dump(mode="json")


def classes_of(config: BaseFamilyConfig, class_histogram: Mapping[str, int]) -> list[str]:
    """List the classes that a network is conditioned on: the data set's, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []


class OneStepConfig(BaseFamilyConfig):
    """The section ``model`` of a family without noise levels, captions and super-resolution."""

    text: ClassVar[bool] = False
    low_resolution: ClassVar[None] = None
    autoencoder: ClassVar[None] = None
