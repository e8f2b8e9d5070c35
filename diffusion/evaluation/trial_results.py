"""What a trial found, and under which circumstances."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, FiniteFloat

from diffusion.config import Config, unset
from diffusion.config_sampling import SamplingConfig
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate, Interval
from diffusion.evaluation.gate import Decision, Evidence, GateConfig
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.portrait import Portrait
from diffusion.files import digest_of

CONFIDENCE = 0.95
"""Of intervals, two-sided."""


class Circumstances(Config):
    """All that two models have in common in a trial."""

    format_version: Literal[2] = 2
    """Grows when preprocessing, the choice of pictures or a formula changes."""
    content_digest: str
    """Of the data set, whose held-out pictures are the reference."""
    extractor: str
    extractor_digest: str
    preprocessing: str
    evaluation: EvaluationConfig
    """With the seed of the trial, which is 1 more than that by which checkpoints are chosen."""
    sampling: SamplingConfig
    low_resolution: int | None = Field(None, exclude_if=unset)
    """Height and width of the held-out pictures that models were shown, to enlarge them; None: they were shown none."""

    @property
    def key(self) -> str:
        """Digest of the circumstances."""
        return digest_of(self.model_dump(mode="json", exclude_none=True))


class Measured(Config):
    """A figure with its error."""

    value: FiniteFloat
    error: FiniteFloat
    """Its standard error, over other pictures drawn and held out."""
    interval: Interval

    @classmethod
    def of(cls, estimate: Estimate) -> "Measured":
        """What ``estimate`` says, with confidence CONFIDENCE."""
        return cls(value=estimate.value, error=estimate.error, interval=estimate.interval(CONFIDENCE))


def flat(figures: Mapping[str, Measured]) -> dict[str, float]:
    """``figures`` with the ends of their intervals, under names that end in _low and _high."""
    found: dict[str, float] = {}
    for name, each in figures.items():
        found |= {name: each.value, f"{name}_low": each.interval.low, f"{name}_high": each.interval.high}
    return found


class Side(Config):
    """One of those who are compared."""

    portrait: Portrait
    figures: dict[str, Measured]
    """Distances and shares by name, such as kid_efflite0; none: there are too few pictures for errors."""

    def named(self) -> dict[str, float]:
        """All figures under names that say what they are; ends of intervals end in _low and _high."""
        return self.portrait.named() | flat(self.figures)


class Floor(Config):
    """What training pictures get in the place of drawn ones."""

    scores: Scores
    figures: dict[str, Measured]
    """As a side has them."""

    def named(self) -> dict[str, float]:
        """Likewise."""
        return self.scores.named() | flat(self.figures)


class Trial(Config):
    """Two models compared, and the verdict."""

    circumstances: Circumstances
    key: str
    """``circumstances.key``: figures compare only where it is equal."""
    gate: GateConfig
    challenger: Side
    champion: Side | None
    """None: there was none, or it could not be portrayed."""
    floor: Floor
    evidence: Evidence
    decision: Decision

    @property
    def reason(self) -> str:
        """Those of the verdict, in words and figures."""
        return "; ".join(self.decision.reasons)

    def named(self) -> dict[str, float]:
        """The challenger's figures, and under prefixes the champion's and the floor's."""
        figures = self.challenger.named()
        if self.champion is not None:
            figures |= {f"champion_{name}": value for name, value in self.champion.named().items()}
        return figures | {f"floor_{name}": value for name, value in self.floor.named().items()}
