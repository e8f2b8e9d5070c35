"""What a trial found."""

from diffusion.config import Config
from diffusion.evaluation.gate import Decision, Evidence, GateConfig
from diffusion.evaluation.results import EvaluationConditions, Floor, Measured, ModelEvaluation, flat


class Side(Config):
    """One of those who are compared."""

    evaluation: ModelEvaluation
    figures: dict[str, Measured]
    """Distances and shares by name, such as kid_efflite0; none: there are too few pictures for errors."""

    def named(self) -> dict[str, float]:
        """All figures under names that say what they are; ends of intervals end in _low and _high."""
        return self.evaluation.named() | flat(self.figures)


class Trial(Config):
    """Two models compared, and the verdict."""

    conditions: EvaluationConditions
    key: str
    """``conditions.key``: figures compare only where it is equal."""
    gate: GateConfig
    challenger: Side
    champion: Side | None
    """None: there was none, or it could not be evaluated."""
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
