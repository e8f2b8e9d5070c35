"""The section ``model`` of the family gan; loads without torch."""

from typing import ClassVar, Literal

from pydantic import Field

from diffusion.families.base import MAX_BLOCKS, MAX_WIDTH, Ability, ChannelMult, OneStepConfig


class GANConfig(OneStepConfig):
    """The family gan: a generative adversarial network (arXiv 1406.2661) after R3GAN (2501.05441).

    The generator upsamples from a low resolution, 4×4 for 32 pixels; the discriminator downsamples in the same steps.
    There is no normalisation, and two gradient penalties are the only regularization.
    """

    # The loss is relative to a discriminator that learns as well, so it does not compare between checkpoints. Models do
    # not contain the discriminator, so training cannot start from one.
    abilities: ClassVar[frozenset[Ability]] = frozenset({"dropped_conditions"})

    family: Literal["gan"] = "gan"
    """The family of models."""
    width: int = Field(32, ge=8, le=MAX_WIDTH, multiple_of=8)
    """Channels at the highest resolution."""
    channel_mult: ChannelMult = (1, 2, 4)
    """Channels at each resolution, as multiples of ``width``, from the highest; each halves the one before."""
    patch: Literal[1, 2, 4] = 2
    """Size of the patches of pixels folded into channels. With 1 and a resolution more at the top, width 16 and
    channel_mult [1, 2, 4, 8], an image takes 2.4 times as long in training."""
    blocks: int = Field(1, ge=1, le=MAX_BLOCKS)
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

    @property
    def one_shape(self) -> str:
        """Why its network takes images of one square shape alone."""
        return "its generator begins with a linear layer onto the positions of a square"
