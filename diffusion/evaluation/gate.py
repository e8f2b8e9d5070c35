"""The gate: whether a challenger takes the champion's place, decided from evidence with its errors.

Three verdicts. Promote: better by more than δ, and within all limits, each with confidence c. Reject: surely worse than
the champion, or surely beyond a limit. Hold: the evidence says neither, or lacks a figure that a rule asks for. So
chance promotes a model that is not better by δ in at most 1 − c of all cases.
"""

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Literal

from pydantic import Field, FiniteFloat

from diffusion.config import Config, unset
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.pages import count, counted, signed, with_error

ENOUGH = 5000
"""Pictures of each side from which on the Fréchet distance leads: below, its bias outweighs differences."""
POWER = 0.8
"""Chance to tell what there is, for which pictures are counted that would be needed."""
MOST = 10**9
"""Pictures beyond which nothing is promised."""


class GateConfig(Config):
    """When a challenger becomes champion. Null switches a rule off."""

    headline: Literal["auto", "kid", "fd"] = "auto"
    """The distance that must fall. auto: KID where either side has under 5,000 pictures, else the Fréchet distance.
    Autoencoders are judged by the PSNR of held-out pictures, whatever is said here."""
    delta: float = Field(0.05, ge=0, lt=1)
    """δ, the smallest improvement that counts: the share of the way from the champion to real pictures that the
    challenger must go. A share, as nobody knows what 0.0003 of KID is worth, and it means the same for every distance,
    data set and feature network. Of autoencoders: the share by which squared error must fall, 0.05 being 0.22 dB."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """c, of each statement by itself, one-sided: 0.95 lets one in twenty models that are no better by δ through."""
    recall_loss: float | None = Field(0.1, ge=0, le=1)
    """How much recall, from 0 to 1, may fall: a model may not buy fidelity by drawing only the easy pictures."""
    memorised: float | None = Field(0.05, ge=0, le=1)
    """The largest share of drawn pictures that may be copies of training pictures, beyond those that look like copies
    by chance. Holds for first versions, too."""
    class_loss: float | None = Field(None, ge=0)
    """By what share the distance of the worst class may grow, of models told classes: 0.5 is by half."""
    cost: float | None = Field(2.0, gt=0)
    """How many times what the champion's pictures cost the challenger's may cost."""
    across_families: bool = Field(False, exclude_if=unset)
    """Whether a champion of another family (``model.family``) may be beaten, by what both draw, autoencoders too; if
    not, the challenger is held. Two families meet where registry.model gives both one name."""

    def figure(self, samples: int, reference: int) -> Literal["kid", "fd"]:
        """The distance that leads for so many pictures of either side."""
        if self.headline != "auto":
            return self.headline
        return "fd" if min(samples, reference) >= ENOUGH else "kid"


class Headline(Config):
    """The figure by which challenger and champion are told better from worse."""

    name: str
    """With that of its features, such as kid_efflite0."""
    challenger: Estimate
    champion: Estimate
    difference: Estimate
    """Challenger less champion, on the same picture numbers and the same held-out pictures."""
    floor: FiniteFloat | None
    """What real pictures get in the place of drawn ones. None: it is no distance but a PSNR in dB, higher is better."""

    @property
    def lead(self) -> Estimate:
        """How much better the challenger is."""
        return self.difference.times(1 if self.floor is None else -1)

    def smallest(self, delta: float) -> float:
        """The lead that δ is, in the figure's own unit.

        That the champion's distance has an error itself is left out: it counts only δ times.
        """
        if self.floor is None:
            return -10 * math.log10(1 - delta)
        return delta * max(self.champion.value - self.floor, 0.0)


class Copies(Config):
    """How many of the challenger's pictures are copies of training pictures."""

    share: float = Field(ge=0, le=1)
    """Of its pictures, beyond those that look like copies by chance."""
    p_value: float = Field(ge=0, le=1)
    """How probable so many that look like copies are if none is one."""


class WorstClass(Config):
    """The class farthest from real pictures of it, for either model."""

    challenger: Estimate
    """Its distance."""
    champion: Estimate
    challenger_class: str
    """Its name."""
    champion_class: str


class Cost(Config):
    """What drawing one picture costs."""

    challenger: float = Field(gt=0, allow_inf_nan=False)
    champion: float = Field(gt=0, allow_inf_nan=False)
    unit: str
    """Such as network evaluations, or seconds."""


class Evidence(Config):
    """All that the gate goes by. None: not measured, which holds back a model if a rule asks for it."""

    judged: Literal["drawn", "reconstructed"]
    """Pictures drawn, or held-out ones brought back by an autoencoder; rules about drawn ones do not ask for these."""
    samples: int = Field(ge=1)
    """Pictures judged."""
    reference: int = Field(ge=1)
    """Held-out pictures they were compared with."""
    has_champion: bool
    """Whether there is one. If not, only rules that need none are asked."""
    incomparable: str | None = None
    """Why the two cannot be compared, which holds the challenger back; None: they can."""
    headline: Headline | None = None
    recall: Estimate | None = None
    """Challenger less champion, paired likewise."""
    memorised: Copies | None = None
    worst_class: WorstClass | None = None
    cost: Cost | None = None


Rule = Literal["headline", "recall", "memorised", "worst class", "cost"]


class Verdict(StrEnum):
    """What becomes of the challenger."""

    promote = "promote"
    hold = "hold"
    reject = "reject"


class Finding(Config):
    """What one rule says."""

    rule: Rule
    verdict: Verdict
    """Promote: nothing against it."""
    reason: str
    pictures: int | None = None
    """Pictures to be drawn to tell with a chance of 80 %, held-out ones growing likewise; None: none are needed, or no
    number would do."""


class Decision(Config):
    """The gate's verdict: the worst that any rule gives."""

    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Those of the verdict, in words and figures."""
        return tuple(each.reason for each in self.findings if each.verdict == self.verdict)


def decide(evidence: Evidence, config: GateConfig) -> Decision:
    """The verdict on ``evidence`` under the rules of ``config``."""
    findings = tuple(_findings(evidence, config))
    found = {each.verdict for each in findings}
    worst = next(each for each in (Verdict.reject, Verdict.hold, Verdict.promote) if each in found)
    return Decision(verdict=worst, findings=findings)


def _findings(evidence: Evidence, config: GateConfig) -> Iterator[Finding]:
    drawn = evidence.judged == "drawn"
    compared = drawn and evidence.has_champion and evidence.incomparable is None
    if not evidence.has_champion:
        yield Finding(rule="headline", verdict=Verdict.promote, reason="first version: there was no champion")
    elif evidence.incomparable is not None:
        yield Finding(rule="headline", verdict=Verdict.hold, reason=evidence.incomparable)
    elif evidence.headline is None:
        yield _unmeasured("headline", "its difference from the champion")
    else:
        yield _headline(evidence.headline, evidence, config)
    if drawn and config.memorised is not None:
        yield _memorised(evidence.memorised, evidence, config.memorised, config.confidence)
    if compared and config.recall_loss is not None:
        yield _recall(evidence.recall, evidence, config.recall_loss, config.confidence)
    if compared and config.class_loss is not None:
        yield _worst_class(evidence.worst_class, evidence, config.class_loss, config.confidence)
    if compared and config.cost is not None:
        yield _cost(evidence.cost, config.cost)


def _headline(headline: Headline, evidence: Evidence, config: GateConfig) -> Finding:
    lead, smallest, c = headline.lead, headline.smallest(config.delta), config.confidence
    unit = " dB" if headline.floor is None else ""
    low, high = lead.at_least(c), lead.at_most(c)
    measured = (
        f"{headline.name} {_figure(headline.challenger)}{unit}, the champion's {_figure(headline.champion)}{unit}, on "
        f"{_pictures(evidence)}: better by {_figure(lead)}{unit}, at least {signed(low)} and at most {signed(high)}, "
        f"each with confidence {c:g}; δ = {config.delta:g} is {signed(smallest)}{unit}"
    )
    if low > smallest:
        return Finding(rule="headline", verdict=Verdict.promote, reason=f"better by more than δ: {measured}")
    if high < 0:
        return Finding(rule="headline", verdict=Verdict.reject, reason=f"worse than the champion: {measured}")
    if high < smallest:
        reason = f"not better by δ, as more pictures would only confirm: {measured}"
        return Finding(rule="headline", verdict=Verdict.hold, reason=reason)
    beyond = lead.value - smallest if lead.value > smallest else smallest
    needed = pictures_needed(evidence.samples, lead, beyond, c)
    what = "this lead" if lead.value > smallest else "a lead of 2δ"
    return Finding(
        rule="headline",
        verdict=Verdict.hold,
        reason=f"not surely better by δ: {measured}{_advice(what, needed, evidence)}",
        pictures=needed,
    )


def _memorised(copies: Copies | None, evidence: Evidence, limit: float, confidence: float) -> Finding:
    """Over the limit it is never promoted; and rejected only if so many are no chance, as may be of few pictures."""
    if copies is None:
        return _unmeasured("memorised", "the share of copies of training pictures")
    drawn = count(evidence.samples)
    words = f"copies of training pictures: {copies.share:.2%} of {drawn} drawn, allowed are {limit:.2%}"
    if copies.share <= limit:
        return Finding(rule="memorised", verdict=Verdict.promote, reason=words)
    if copies.p_value <= 1 - confidence:
        return Finding(rule="memorised", verdict=Verdict.reject, reason=words)
    reason = (
        f"{words}; so many may look like copies by chance (p = {copies.p_value:.2g}): hold more pictures out "
        "(ingest.held_out), or draw more (evaluation.samples)"
    )
    return Finding(rule="memorised", verdict=Verdict.hold, reason=reason)


def _recall(recall: Estimate | None, evidence: Evidence, limit: float, confidence: float) -> Finding:
    if recall is None:
        return _unmeasured("recall", "its difference from the champion's")
    words = (
        f"recall {_figure(recall)} higher than the champion's on {_pictures(evidence)}, allowed is a loss of {limit:g}"
    )
    return _limited("recall", recall.times(-1).less(limit), words, evidence, confidence)


def _worst_class(worst: WorstClass | None, evidence: Evidence, limit: float, confidence: float) -> Finding:
    if worst is None:
        return _unmeasured("worst class", "the distance of each class")
    words = (
        f"worst class {worst.challenger_class!r} at {_figure(worst.challenger)}, the champion's "
        f"{worst.champion_class!r} at {_figure(worst.champion)}, allowed are {1 + limit:g} times as much"
    )
    return _limited("worst class", worst.challenger.less(worst.champion.times(1 + limit)), words, evidence, confidence)


def _cost(cost: Cost | None, limit: float) -> Finding:
    if cost is None:
        return _unmeasured("cost", "what drawing a picture costs")
    verdict = Verdict.promote if cost.challenger <= limit * cost.champion else Verdict.reject
    reason = (
        f"a picture costs {cost.challenger:,.4g} {cost.unit}, of the champion {cost.champion:,.4g}, allowed are "
        f"{limit:g} times as much"
    )
    return Finding(rule="cost", verdict=verdict, reason=reason)


def _limited(rule: Rule, excess: Estimate, words: str, evidence: Evidence, confidence: float) -> Finding:
    """Whether what goes beyond a limit is surely nothing, surely something, or neither."""
    if excess.at_most(confidence) <= 0:
        return Finding(rule=rule, verdict=Verdict.promote, reason=words)
    if excess.at_least(confidence) > 0:
        reason = f"beyond the limit with confidence {confidence:g}: {words}"
        return Finding(rule=rule, verdict=Verdict.reject, reason=reason)
    needed = pictures_needed(evidence.samples, excess, abs(excess.value), confidence)
    reason = f"not surely within the limit: {words}{_advice('that', needed, evidence)}"
    return Finding(rule=rule, verdict=Verdict.hold, reason=reason, pictures=needed)


def pictures_needed(pictures: int, estimate: Estimate, distance: float, confidence: float) -> int | None:
    """How many pictures, in place of ``pictures``, tell the true value from one at this ``distance`` of it.

    With ``confidence``, and a chance of 80 %. Errors fall as 1/√n if the held-out pictures grow by the same factor, so
    n ((t_c + t_0.8) · error / distance)². Two significant digits, rounded up. None if that is above 10⁹.
    """
    times = estimate.reach(confidence) + estimate.reach(POWER)
    if times * math.sqrt(pictures / MOST) >= distance:
        return None
    exact = max(pictures * (times / distance) ** 2, 1)
    unit: int = 10 ** max(0, math.floor(math.log10(exact)) - 1)
    return math.ceil(exact / unit) * unit


def _unmeasured(rule: Rule, what: str) -> Finding:
    return Finding(rule=rule, verdict=Verdict.hold, reason=f"not measured: {what}")


def _advice(what: str, needed: int | None, evidence: Evidence) -> str:
    if needed is None:
        return ""
    times = f"{needed / evidence.samples:,.1f}"
    return f"; to tell {what} would take about {count(needed)} pictures, {times} times as many, of held-out ones, too"


def _pictures(evidence: Evidence) -> str:
    if evidence.judged == "reconstructed":
        return counted(evidence.samples, "held-out picture")
    return f"{counted(evidence.samples, 'drawn picture')} and {count(evidence.reference)} held-out"


def _figure(estimate: Estimate) -> str:
    return with_error(estimate.value, estimate.error).replace("-", "−")
