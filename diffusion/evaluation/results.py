"""What an evaluation found, and under which conditions."""

from typing import Literal

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.metrics import Scores
from diffusion.files import digest_of
from diffusion.fingerprint import Fingerprint


class Conditions(Config):
    """All that two models must have in common for their scores to be compared."""

    format_version: Literal[1] = 1
    """Grows when preprocessing, the choice of pictures or a formula changes."""
    content_digest: str
    """Digest of the data set whose held-out pictures are the reference."""
    extractor_digest: str
    """SHA-256 of the feature network's weights."""
    evaluation: EvaluationConfig
    sampling: SamplingConfig

    @property
    def key(self) -> str:
        """Digest of the conditions; a model's scores depend on it, on the weights, and within floating-point
        error on the fingerprint."""
        # Which averages are judged besides changes no score, and neither does an option that is not used.
        return digest_of(self.model_dump(mode="json", exclude={"evaluation": {"ema_lengths"}}, exclude_none=True))


class Judged(Config):
    """A model file with its scores."""

    file: str
    """Where it lies."""
    sha256: str
    """Of the file."""
    images: int
    """Pictures it had seen in training."""
    scores: Scores
    fingerprint: Fingerprint
    """Of the machine that drew its pictures."""


class Evaluation(Config):
    """Scores of a run's checkpoints under equal conditions."""

    dataset: str
    """Name of the data set."""
    conditions: Conditions
    eval_key: str
    """``conditions.key``: compare models only where it is equal."""
    floor: Scores
    """Real training pictures, judged as if a model had drawn them."""
    best: Judged
    """The checkpoint with the lowest KID."""
    checkpoints: list[Judged]
    """All of them, by images seen."""

    def metrics(self) -> dict[str, float]:
        """The best checkpoint's figures beside the floor's, flat and under names that say what they are."""
        floor = {f"floor_{name}": value for name, value in self.floor.named().items()}
        return {"images": self.best.images, **self.best.scores.named(), **floor}
