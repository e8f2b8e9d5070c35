"""The gate: decides whether a candidate takes the champion's place, from metrics with their errors.

Three verdicts. Promote: better by more than δ, and within all limits, each with confidence c. Reject: surely worse than
the champion, or surely beyond a limit. Hold: the metrics say neither, or one that a rule needs is missing. So
chance promotes a model that is not better by δ in at most 1 − c of all cases.
"""

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Literal

from pydantic import Field, FiniteFloat

from diffusion.common.config import Config, unset
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.reports.html import count, counted, signed, with_error

ENOUGH = 5000
"""Images of each side from which on the Fréchet distance leads: below, its bias outweighs differences."""
POWER = 0.8
"""Chance to tell what there is, for which images are counted that would be needed."""
MOST = 10**9
"""Images beyond which nothing is promised."""


class GateConfig(Config):
    """When a candidate becomes champion. Null switches a rule off."""

    headline: Literal["auto", "kid", "fd"] = "auto"
    """The distance that must fall. auto: KID where either side has under 5,000 images, else the Fréchet distance.
    Autoencoders are compared by the PSNR of held-out images, whatever is set here."""
    delta: float = Field(0.05, ge=0, lt=1)
    """δ, the smallest improvement that counts: the share of the way from the champion to real images that the
    candidate must go. A share, as nobody knows what 0.0003 of KID is worth, and it means the same for every distance,
    data set and feature network. Of autoencoders: the share by which squared error must fall, 0.05 being 0.22 dB."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """c, of each statement by itself, one-sided: 0.95 lets one in twenty models that are no better by δ through."""
    recall_loss: float | None = Field(0.1, ge=0, le=1)
    """How much recall, from 0 to 1, may fall: a model may not buy fidelity by generating only the easy images."""
    memorized: float | None = Field(0.05, ge=0, le=1)
    """The largest share of generated images that may be copies of training images, beyond those that look like copies
    by chance. Holds for first versions, too."""
    class_loss: float | None = Field(None, ge=0)
    """By what share the distance of the worst class may grow, of class-conditional models: 0.5 is by half."""
    cost: float | None = Field(2.0, gt=0)
    """How many times what the champion's images cost the candidate's may cost."""
    across_families: bool = Field(False, exclude_if=unset)
    """Whether a champion of another family (``model.family``) may be beaten, by generated images, autoencoders too.
    If not, the candidate is held. Two families meet where registry.model gives both one name."""

    def metric(self, samples: int, reference: int) -> Literal["kid", "fd"]:
        """The distance that leads for so many images of either side."""
        if self.headline != "auto":
            return self.headline
        return "fd" if min(samples, reference) >= ENOUGH else "kid"


class Headline(Config):
    """The metric that decides between candidate and champion."""

    name: str
    """With that of its features, such as kid_efflite0."""
    candidate: Estimate
    champion: Estimate
    difference: Estimate
    """Candidate less champion, on the same image numbers and the same held-out images."""
    real_baseline: FiniteFloat | None
    """The metric of real images in the place of generated ones. None: the metric is a
    PSNR in dB, of which higher is better."""

    @property
    def lead(self) -> Estimate:
        """How much better the candidate is."""
        return self.difference.times(1 if self.real_baseline is None else -1)

    def smallest(self, delta: float) -> float:
        """The lead that δ is, in the metric's own unit.

        That the champion's distance has an error itself is left out: it counts only δ times.
        """
        if self.real_baseline is None:
            return -10 * math.log10(1 - delta)
        return delta * max(self.champion.value - self.real_baseline, 0.0)


class CopyShare(Config):
    """How many of the candidate's images are copies of training images."""

    share: float = Field(ge=0, le=1)
    """Of its images, beyond those that look like copies by chance."""
    p_value: float = Field(ge=0, le=1)
    """How probable so many that look like copies are if none is one."""


class WorstClass(Config):
    """The class farthest from real images of it, for either model."""

    candidate: Estimate
    """Its distance."""
    champion: Estimate
    candidate_class: str
    """Its name."""
    champion_class: str


class Cost(Config):
    """Cost of generating one image."""

    candidate: float = Field(gt=0, allow_inf_nan=False)
    champion: float = Field(gt=0, allow_inf_nan=False)
    unit: str
    """Such as network evaluations, or seconds."""


class ComparisonMetrics(Config):
    """What the gate decides by. A value of None was not measured, which holds the candidate if a rule needs it."""

    basis: Literal["generated", "reconstructed"]
    """Generated images, or held-out ones reconstructed by an autoencoder, to which fewer rules apply."""
    samples: int = Field(ge=1)
    """Images evaluated."""
    reference: int = Field(ge=1)
    """Held-out images they were compared with."""
    has_champion: bool
    """Whether there is one. If not, only rules that need none apply."""
    incomparable: str | None = None
    """Why the two cannot be compared, which holds the candidate back; None: they can."""
    headline: Headline | None = None
    recall: Estimate | None = None
    """Candidate less champion, paired likewise."""
    memorized: CopyShare | None = None
    worst_class: WorstClass | None = None
    cost: Cost | None = None


Rule = Literal["headline", "recall", "memorized", "worst class", "cost"]


class Verdict(StrEnum):
    """What becomes of the candidate."""

    promote = "promote"
    hold = "hold"
    reject = "reject"


class Finding(Config):
    """What one rule says."""

    rule: Rule
    verdict: Verdict
    """Promote: nothing against it."""
    reason: str
    images: int | None = None
    """Images to generate to tell with a chance of 80 %, held-out ones growing likewise; None: none are needed, or no
    number would do."""


class Decision(Config):
    """The gate's verdict: the worst that any rule gives."""

    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for the verdict, with numbers."""
        return tuple(each.reason for each in self.findings if each.verdict == self.verdict)


def decide(metrics: ComparisonMetrics, config: GateConfig) -> Decision:
    """Decide on ``metrics`` by the rules of ``config``."""
    findings = tuple(_findings(metrics, config))
    found = {each.verdict for each in findings}
    worst = next(each for each in (Verdict.reject, Verdict.hold, Verdict.promote) if each in found)
    return Decision(verdict=worst, findings=findings)


def _findings(metrics: ComparisonMetrics, config: GateConfig) -> Iterator[Finding]:
    generated = metrics.basis == "generated"
    both = generated and metrics.has_champion and metrics.incomparable is None
    if not metrics.has_champion:
        yield Finding(rule="headline", verdict=Verdict.promote, reason="first version: there was no champion")
    elif metrics.incomparable is not None:
        yield Finding(rule="headline", verdict=Verdict.hold, reason=metrics.incomparable)
    elif metrics.headline is None:
        yield _unmeasured("headline", "its difference from the champion")
    else:
        yield _headline(metrics.headline, metrics, config)
    if generated and config.memorized is not None:
        yield _memorized(metrics.memorized, metrics, config.memorized, config.confidence)
    if both and config.recall_loss is not None:
        yield _recall(metrics.recall, metrics, config.recall_loss, config.confidence)
    if both and config.class_loss is not None:
        yield _worst_class(metrics.worst_class, metrics, config.class_loss, config.confidence)
    if both and config.cost is not None:
        yield _cost(metrics.cost, config.cost)


def _headline(headline: Headline, metrics: ComparisonMetrics, config: GateConfig) -> Finding:
    lead, smallest, c = headline.lead, headline.smallest(config.delta), config.confidence
    unit = " dB" if headline.real_baseline is None else ""
    low, high = lead.at_least(c), lead.at_most(c)
    measured = (
        f"{headline.name} {_figure(headline.candidate)}{unit}, the champion's {_figure(headline.champion)}{unit}, on "
        f"{_images(metrics)}: better by {_figure(lead)}{unit}, at least {signed(low)} and at most {signed(high)}, "
        f"each with confidence {c:g}; δ = {config.delta:g} is {signed(smallest)}{unit}"
    )
    if low > smallest:
        return Finding(rule="headline", verdict=Verdict.promote, reason=f"better by more than δ: {measured}")
    if high < 0:
        return Finding(rule="headline", verdict=Verdict.reject, reason=f"worse than the champion: {measured}")
    if high < smallest:
        reason = f"not better by δ, as more images would only confirm: {measured}"
        return Finding(rule="headline", verdict=Verdict.hold, reason=reason)
    beyond = lead.value - smallest if lead.value > smallest else smallest
    needed = images_needed(metrics.samples, lead, beyond, c)
    what = "this lead" if lead.value > smallest else "a lead of 2δ"
    return Finding(
        rule="headline",
        verdict=Verdict.hold,
        reason=f"not surely better by δ: {measured}{_advice(what, needed, metrics)}",
        images=needed,
    )


def _memorized(copies: CopyShare | None, metrics: ComparisonMetrics, limit: float, confidence: float) -> Finding:
    """Over the limit it is never promoted; and rejected only if so many are no chance, as may be of few images."""
    if copies is None:
        return _unmeasured("memorized", "the share of copies of training images")
    words = (
        f"copies of training images: {copies.share:.2%} of {count(metrics.samples)} generated, allowed are {limit:.2%}"
    )
    if copies.share <= limit:
        return Finding(rule="memorized", verdict=Verdict.promote, reason=words)
    if copies.p_value <= 1 - confidence:
        return Finding(rule="memorized", verdict=Verdict.reject, reason=words)
    reason = (
        f"{words}; so many may look like copies by chance (p = {copies.p_value:.2g}): hold more images out "
        "(ingest.held_out), or generate more (evaluation.samples)"
    )
    return Finding(rule="memorized", verdict=Verdict.hold, reason=reason)


def _recall(recall: Estimate | None, metrics: ComparisonMetrics, limit: float, confidence: float) -> Finding:
    if recall is None:
        return _unmeasured("recall", "its difference from the champion's")
    words = f"recall {_figure(recall)} higher than the champion's on {_images(metrics)}, allowed is a loss of {limit:g}"
    return _limited("recall", recall.times(-1).less(limit), words, metrics, confidence)


def _worst_class(worst: WorstClass | None, metrics: ComparisonMetrics, limit: float, confidence: float) -> Finding:
    if worst is None:
        return _unmeasured("worst class", "the distance of each class")
    words = (
        f"worst class {worst.candidate_class!r} at {_figure(worst.candidate)}, the champion's "
        f"{worst.champion_class!r} at {_figure(worst.champion)}, allowed are {1 + limit:g} times as much"
    )
    return _limited("worst class", worst.candidate.less(worst.champion.times(1 + limit)), words, metrics, confidence)


def _cost(cost: Cost | None, limit: float) -> Finding:
    if cost is None:
        return _unmeasured("cost", "the cost of generating an image")
    verdict = Verdict.promote if cost.candidate <= limit * cost.champion else Verdict.reject
    reason = (
        f"an image costs {cost.candidate:,.4g} {cost.unit}, of the champion {cost.champion:,.4g}, allowed are "
        f"{limit:g} times as much"
    )
    return Finding(rule="cost", verdict=verdict, reason=reason)


def _limited(rule: Rule, excess: Estimate, words: str, metrics: ComparisonMetrics, confidence: float) -> Finding:
    """Whether what goes beyond a limit is surely nothing, surely something, or neither."""
    if excess.at_most(confidence) <= 0:
        return Finding(rule=rule, verdict=Verdict.promote, reason=words)
    if excess.at_least(confidence) > 0:
        reason = f"beyond the limit with confidence {confidence:g}: {words}"
        return Finding(rule=rule, verdict=Verdict.reject, reason=reason)
    needed = images_needed(metrics.samples, excess, abs(excess.value), confidence)
    reason = f"not surely within the limit: {words}{_advice('that', needed, metrics)}"
    return Finding(rule=rule, verdict=Verdict.hold, reason=reason, images=needed)


def images_needed(images: int, estimate: Estimate, distance: float, confidence: float) -> int | None:
    """How many images, in place of ``images``, tell the true value from one at this ``distance`` of it.

    With ``confidence``, and a chance of 80 %. Errors fall as 1/√n if the held-out images grow by the same factor, so
    n ((t_c + t_0.8) · error / distance)². Two significant digits, rounded up. None if that is above 10⁹.
    """
    times = estimate.reach(confidence) + estimate.reach(POWER)
    if times * math.sqrt(images / MOST) >= distance:
        return None
    exact = max(images * (times / distance) ** 2, 1)
    unit: int = 10 ** max(0, math.floor(math.log10(exact)) - 1)
    return math.ceil(exact / unit) * unit


def _unmeasured(rule: Rule, what: str) -> Finding:
    return Finding(rule=rule, verdict=Verdict.hold, reason=f"not measured: {what}")


def _advice(what: str, needed: int | None, metrics: ComparisonMetrics) -> str:
    if needed is None:
        return ""
    times = f"{needed / metrics.samples:,.1f}"
    return f"; to tell {what} would take about {count(needed)} images, {times} times as many, of held-out ones, too"


def _images(metrics: ComparisonMetrics) -> str:
    if metrics.basis == "reconstructed":
        return counted(metrics.samples, "held-out image")
    return f"{counted(metrics.samples, 'generated image')} and {count(metrics.reference)} held-out"


def _figure(estimate: Estimate) -> str:
    return with_error(estimate.value, estimate.error).replace("-", "−")
