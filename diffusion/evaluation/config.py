"""How checkpoints are judged."""

from typing import Annotated, Literal

from pydantic import Field

from diffusion.config import Config
from diffusion.training.config import LONGEST


class EvaluationConfig(Config):
    """What is drawn, what it is compared with, and on which features."""

    samples: int = Field(500, ge=10)
    """Pictures drawn from each checkpoint, and real training pictures behind the floor."""
    ema_lengths: tuple[Annotated[float, Field(gt=0, lt=LONGEST)], ...] = ()
    """Averages of the weights over these shares of training are judged, too: see training.ema_lengths."""
    reference: int = Field(10_000, ge=10)
    """Held-out pictures compared with: at most this many, the first by key."""
    extractor: Literal["efflite0"] = "efflite0"
    """The feature network: EfficientNet-Lite0 trained on ImageNet."""
    extractor_size: int = Field(64, ge=32, le=1024, multiple_of=32)
    """Height and width, in pixels, that pictures get for it. Scores of two sizes do not compare."""
    kid_subsets: int = Field(100, ge=10)
    """Random subsets over which KID is averaged."""
    kid_subset_size: int = Field(1000, ge=5)
    """Pictures per subset, of each side; at most half of the smaller side is used."""
    seed: int = Field(0, ge=0)
    """Seed of the drawn pictures and of the choice of training pictures; KID's subsets are fixed."""
