"""Metrics that the gate decides on: of a candidate beside the champion, or of a first version."""

import math
from typing import Literal

from pydantic import Field, FiniteFloat

from diffusion.common.config import Config
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.reports.html import format_count

OwnMetric = Literal["precision", "recall", "coverage", "class agreement"]
"""Metric of a model's images by themselves, which a first version is decided on."""


class Headline(Config):
    """The metric that decides between candidate and champion."""

    name: str
    """Name of the metric and its features, such as kid_efflite0."""
    candidate: Estimate
    champion: Estimate
    difference: Estimate
    """Candidate minus champion, on the same image numbers and the same held-out images."""
    real_baseline: FiniteFloat | None
    """Metric of real images in the place of generated ones; None for PSNR in dB, of which higher is better."""

    @property
    def lead(self) -> Estimate:
        """Return how much better the candidate is."""
        return self.difference.multiply(1 if self.real_baseline is None else -1)

    def required_lead(self, delta: float) -> float:
        """Return the lead that δ requires, in the unit of the metric, for the champion's distance as measured."""
        if self.real_baseline is None:
            return -10 * math.log10(1 - delta)
        return delta * max(self.champion.value - self.real_baseline, 0.0)


class ClassAgreement(Config):
    """How often images of a class are recognised as such: the candidate's, and real ones."""

    name: str
    candidate: Estimate
    real: Estimate


class CopyShare(Config):
    """Share of the candidate's images that look like copies of training images."""

    share: float = Field(ge=0, le=1)
    expected: float = Field(ge=0, le=1)
    """Share for a model that copies nothing."""
    p_value: float = Field(ge=0, le=1)
    """Probability of as many apparent copies if none is one."""

    @property
    def excess(self) -> float:
        """Share of copies among the images that do not look like one by chance, 0 to 1."""
        return max(0.0, (self.share - self.expected) / (1 - self.expected)) if self.expected < 1 else 0.0

    def describe(self, images: int) -> str:
        """Word the share among ``images`` beside chance; gate, ledger, report and model card say it in these words."""
        text, chance = f"{self.share:.2%}", f"{self.expected:.2%}"
        relation = f"{'fewer' if self.share < self.expected else 'more'} than the {chance} that chance gives"
        if text == chance:
            relation = "as many as chance gives"
        return f"copies of training images: {text} of {format_count(images)} generated, {relation}"


class PromptAgreement(Config):
    """How much more images agree with their own prompts than with other images' prompts: differences of cosines."""

    candidate: Estimate
    champion: Estimate
    difference: Estimate
    """Candidate minus champion, on the same prompts."""


class Cost(Config):
    """Cost of generating one image."""

    candidate: float = Field(gt=0, allow_inf_nan=False)
    champion: float = Field(gt=0, allow_inf_nan=False)
    unit: str
    """Unit of the cost, such as network evaluations or seconds."""


class ComparisonMetrics(Config):
    """Metrics that the gate decides on; None for those not measured, which holds the candidate if a rule needs them."""

    basis: Literal["generated", "reconstructed"]
    """Generated images, or held-out ones reconstructed by an autoencoder, to which fewer rules apply."""
    samples: int = Field(ge=1)
    """Number of images evaluated."""
    reference: int = Field(ge=1)
    """Number of held-out images that they were compared with."""
    has_champion: bool
    """Whether there is a champion. If not, only rules that need none apply."""
    incomparable: str | None = None
    """Why the two cannot be compared, which holds the candidate; None if they can."""
    unlike: tuple[str, ...] = Field((), exclude_if=lambda unlike: not unlike)
    """What differs between the two in the conditions of the comparison, each in a sentence; no objection."""
    class_conditional: bool = True
    """Whether both are; else no class is compared by itself."""
    own: dict[OwnMetric, Estimate] = Field({}, exclude_if=lambda own: not own)
    """The candidate's own metrics, which a first version is decided on."""
    own_real: dict[OwnMetric, Estimate] = Field({}, exclude_if=lambda own: not own)
    """The same of as many real images, and for class agreement of the held-out ones."""
    classes: tuple[ClassAgreement, ...] = Field((), exclude_if=lambda classes: not classes)
    """Classes of a first version that have images enough."""
    headline: Headline | None = None
    recall: Estimate | None = None
    """Candidate minus champion, on the same images as the headline."""
    memorized: CopyShare | None = None
    agreement: PromptAgreement | str | None = None
    """Text-image agreement, or why it was not compared; None for models without captions."""
    cost: Cost | None = None
