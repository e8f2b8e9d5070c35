"""Settings of low-rank adaptation, of ``training.lora``; ``fine_tuning`` applies it. Loads without torch."""

from typing import Annotated

from pydantic import Field

from diffusion.common.config import Config
from diffusion.common.rules import needs


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
    text_encoder: Annotated[bool, needs("text_encoder_adapters")] = False
    """Whether the text encoder of a pretrained pipeline is adapted as well."""

    @property
    def scale(self) -> float:
        """α/r, the factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
