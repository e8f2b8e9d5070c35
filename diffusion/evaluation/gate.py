"""The gate: decides whether a candidate replaces the champion, from metrics with their errors.

There are three verdicts. Promote: better by more than δ with confidence c, and no limit is overstepped; or as good,
which is with confidence c not worse by δ, and much cheaper. Reject: worse than the champion, or beyond a limit, with
confidence c. Hold: neither is certain, or a required metric is missing.

Several looks at growing numbers of images share the error of a promotion, so that each takes more than c. A rejection
takes c at every look. Its error adds up, too, but a wrong rejection changes nothing: like a hold it keeps the champion,
and costs one candidate. Three looks reject one in nine equals, which would be held otherwise, and one or two in ten
thousand of the candidates that are better by two errors of the first look. Corrected, they would reject a worse one
more rarely than a single look does.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.escaping import pluralize
from diffusion.evaluation.estimate import Estimate, sequential_confidences
from diffusion.evaluation.gate_metrics import ComparisonMetrics, Headline, OwnMetric
from diffusion.evaluation.reports.html import format_count, format_signed, format_with_error

MIN_FRECHET_IMAGES = 4 * 1280
"""Images of either side from which the Fréchet distance decides, four for each feature of the default network: below,
its bias outweighs differences."""
POWER = 0.8
"""Statistical power for which the number of images needed is computed."""
MAX_LOOK_FACTOR = 4
"""Times as many images as the last look would have; if a decision needs more, no further look is taken."""
MAX_NEEDED_IMAGES = 10**9
"""Largest number of needed images that is reported."""
REQUIRED_SHARES: dict[OwnMetric, float] = {"precision": 0.6, "recall": 0.1, "coverage": 0.5, "class agreement": 0.5}
"""Shares of what real images reach that a first version must surely exceed; little recall, as guidance lowers it."""
SAVING = 2
"""A candidate whose images cost at most one part in so many of the champion's need only be surely not worse by δ."""
MAX_AGREEMENT_LOSS = 0.1
"""Largest loss of text-image agreement, as a share of what the champion's images agree with their prompts more than
with those of others: a candidate must not ignore its prompts."""
MAX_CLASSES_NAMED = 5
"""Classes that a reason names."""
LOOK_AT_THEM = "look at its samples, and if they suffice, make it champion by `darkroom promote --to`"


class GateConfig(Config):
    """Rules by which a candidate becomes champion. Null disables a rule."""

    delta: float = Field(0.05, ge=0, lt=1)
    """δ, the smallest improvement that counts: the share of the distance between champion and real images that the
    candidate must close. A share means the same for every distance, data set and feature network. For autoencoders: the
    share by which squared error must fall; 0.05 is 0.22 dB."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """c, the one-sided confidence of each statement: 0.95 promotes at most one in twenty models that are not better by
    δ."""
    recall_loss: float | None = Field(0.1, ge=0, le=1)
    """Largest loss of recall, from 0 to 1: fidelity must not come from generating only easy images."""
    first_version: bool = True
    """Whether a first version must surely reach shares of what real images reach: 0.6 of their precision, 0.1 of their
    recall, 0.5 of their coverage and of how often a classifier recognises their class. Without a champion nothing else
    would keep out models whose images are half noise, blurred, averages, or of one class."""
    memorized: float | None = Field(0.05, ge=0, le=1)
    """Largest share of generated images that may be copies of training images, beyond chance. Applies to first
    versions, too."""
    cost: float | None = Field(2.0, gt=0)
    """Largest ratio of the candidate's cost per image to the champion's."""
    looks: int = Field(3, ge=1, le=8)
    """Times that the two are compared at most, 1 to 8. Where a comparison holds the candidate and more images may tell,
    both generate twice as many. Each look promotes at a higher confidence (O'Brien and Fleming), so that all together
    err no more often than one would. 1: evaluation.samples decide."""
    across_families: bool = Field(False, exclude_if=is_unset)
    """Whether a champion of another family (``model.family``) may be replaced, compared by generated images,
    autoencoders too. Otherwise the candidate is held. Two families are compared if registry.model gives both the same
    name."""

    def promotion_confidence(self, look: int, looks: int) -> float:
        """Return the confidence that a promotion takes at one of ``looks`` looks, counted from 1."""
        return sequential_confidences(looks, self.confidence)[look - 1]


Rule = OwnMetric | Literal["headline", "conditions", "memorized", "text-image agreement", "cost"]


class GateVerdict(StrEnum):
    """The gate's verdict on a candidate."""

    promote = "promote"
    hold = "hold"
    reject = "reject"


class Finding(Config):
    """The result of one rule."""

    rule: Rule
    verdict: GateVerdict
    """The rule's verdict; ``promote`` means no objection."""
    reason: str
    images: int | None = None
    """Number of generated images, with held-out ones increased by the same factor, needed to decide with a power of 80
    %; None if none are needed or no number suffices."""


class GateDecision(Config):
    """The gate's decision: the worst verdict of any rule."""

    verdict: GateVerdict
    findings: tuple[Finding, ...]

    @property
    def images_needed(self) -> int | None:
        """Number of images that decide; None unless want of images is all that holds."""
        counts = [finding.images for finding in self.findings if finding.verdict == GateVerdict.hold]
        return None if self.verdict != GateVerdict.hold or None in counts else max(filter(None, counts))

    def worth_another_look(self, limit: int) -> bool:
        """Return whether more images, ``limit`` at most, may decide."""
        return self.images_needed is not None and self.images_needed <= MAX_LOOK_FACTOR * limit

    def describe_shortage(self, metrics: ComparisonMetrics) -> str | None:
        """Say how many images the verdict on ``metrics`` lacks; None unless want of images is all that holds."""
        if self.images_needed is None:
            return None
        return (
            f"{format_count(metrics.reference)} held-out images are too few for a verdict, which takes about "
            f"{_describe_needed(self.images_needed, metrics)}: ingest more, or raise ingest.held_out in a new data "
            f"set; or {LOOK_AT_THEM}"
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return the reasons for the verdict, with numbers."""
        return tuple(finding.reason for finding in self.findings if finding.verdict == self.verdict)


@dataclass(frozen=True)
class _Case:
    """What the rules decide on, and the one-sided confidences of their statements at one look."""

    metrics: ComparisonMetrics
    config: GateConfig
    confidence: float
    """c, of what rejects or holds."""
    promotion: float
    """Confidence of what promotes at this look."""
    last: float
    """Confidence of what promotes at the last look, for which the number of images needed is computed."""

    @property
    def is_comparison(self) -> bool:
        """Return whether generated images of two models were compared."""
        metrics = self.metrics
        return metrics.basis == "generated" and metrics.has_champion and metrics.incomparable is None

    def compare_with_limit(self, rule: Rule, loss: Estimate, excess: Estimate, words: str) -> Finding:
        """Reject a loss that is surely beyond the limit; hold one that is sure and may be beyond it."""
        # A loss that chance explains does not count: few samples would otherwise hold models that are as good.
        if loss.lower_bound(self.confidence) <= 0 or excess.upper_bound(self.promotion) <= 0:
            return _promote(rule, f"beyond the limit, but not surely a loss: {words}" if excess.value > 0 else words)
        if excess.lower_bound(self.confidence) > 0:
            return _reject(rule, f"beyond the limit with confidence {self.confidence:g}: {words}")
        images, advice = self.advise("that", excess, abs(excess.value), self.last)
        return _hold(rule, f"not surely within the limit: {words}{advice}", images)

    def advise(self, subject: str, estimate: Estimate, distance: float, confidence: float) -> tuple[int | None, str]:
        """Compute how many images decide, by ``images_needed``, and say so; nothing is said if no number suffices."""
        images = images_needed(self.metrics.samples, estimate, distance, confidence) if distance > 0 else None
        if images is None:
            return None, ""
        return images, f"; to decide on {subject} takes about {_describe_needed(images, self.metrics)}"

    @property
    def images(self) -> str:
        """Word the numbers of images."""
        metrics = self.metrics
        if metrics.basis == "reconstructed":
            return pluralize(metrics.samples, "held-out image")
        return f"{pluralize(metrics.samples, 'generated image')} and {format_count(metrics.reference)} held-out"


def decide(metrics: ComparisonMetrics, config: GateConfig, look: int = 1, looks: int = 1) -> GateDecision:
    """Decide on ``metrics`` by the rules of ``config``, at one of ``looks`` looks, counted from 1."""
    promotion, last = (config.promotion_confidence(number, looks) for number in (look, looks))
    case = _Case(metrics, config, config.confidence, promotion, last)
    findings = tuple(finding for rule in RULES for finding in rule(case))
    verdicts = {finding.verdict for finding in findings}
    order = GateVerdict.reject, GateVerdict.hold, GateVerdict.promote
    return GateDecision(verdict=next(verdict for verdict in order if verdict in verdicts), findings=findings)


def _promote(rule: Rule, reason: str) -> Finding:
    return Finding(rule=rule, verdict=GateVerdict.promote, reason=reason)


def _hold(rule: Rule, reason: str, images: int | None = None) -> Finding:
    return Finding(rule=rule, verdict=GateVerdict.hold, reason=reason, images=images)


def _reject(rule: Rule, reason: str) -> Finding:
    return Finding(rule=rule, verdict=GateVerdict.reject, reason=reason)


def _headline(case: _Case) -> Iterator[Finding]:
    """Compare the distances of the two, or without a champion say so."""
    metrics, headline, cost = case.metrics, case.metrics.headline, case.metrics.cost
    if not metrics.has_champion:
        yield _promote("headline", "first version: there was no champion")
    elif metrics.incomparable is not None:
        yield _hold("headline", metrics.incomparable)
    elif headline is None:
        yield _hold("headline", "not measured: its difference from the champion")
    elif cost is not None and cost.candidate * SAVING <= cost.champion:
        # It costs so little that it need not be better.
        yield _cheap_headline(case, headline)
    else:
        yield _better_headline(case, headline)


def _describe_headline(case: _Case, headline: Headline) -> str:
    config, lead, unit = case.config, headline.lead, " dB" if headline.real_baseline is None else ""
    low, high = lead.lower_bound(case.promotion), lead.upper_bound(case.confidence)
    return (
        f"{headline.name} {_figure(headline.candidate)}{unit}, the champion's {_figure(headline.champion)}{unit}, on "
        f"{case.images}: {'worse' if lead.value < 0 else 'better'} by {_size(lead)}{unit}, a lead of at least "
        f"{format_signed(low)} with confidence {case.promotion:.4g} and at most {format_signed(high)} with "
        f"{config.confidence:g}; δ = {config.delta:g} is {format_signed(headline.required_lead(config.delta))}{unit}"
    )


def _cheap_headline(case: _Case, headline: Headline) -> Finding:
    """Promote a candidate that is surely not worse by δ."""
    assert case.metrics.cost is not None
    delta, lead, figures = case.config.delta, headline.lead, _describe_headline(case, headline)
    words = f"at {case.metrics.cost.candidate / case.metrics.cost.champion:.2g} of the champion's cost"
    # The champion's distance sets the limit, too, and both errors have one sign: a champion that seems worse than it
    # is makes the lead larger and the limit laxer.
    error = lead.error if headline.real_baseline is None else lead.error + delta * headline.champion.error
    margin = lead.model_copy(update={"value": lead.value + headline.required_lead(delta), "error": error})
    if margin.lower_bound(case.promotion) > 0:
        return _promote("headline", f"not worse by δ {words}: {figures}")
    if margin.upper_bound(case.confidence) < 0:
        return _reject("headline", f"worse by more than δ {words}: {figures}")
    images, advice = case.advise("this difference", margin, margin.value, case.last)
    return _hold("headline", f"not surely as good within δ {words}: {figures}{advice}", images)


def _better_headline(case: _Case, headline: Headline) -> Finding:
    """Promote a candidate that is surely better by δ."""
    lead, required, figures = (
        headline.lead,
        headline.required_lead(case.config.delta),
        _describe_headline(case, headline),
    )
    if lead.lower_bound(case.promotion) > required:
        return _promote("headline", f"better by more than δ: {figures}")
    high = lead.upper_bound(case.confidence)
    if high < 0:
        return _reject("headline", f"worse than the champion: {figures}")
    if high < required:
        return _hold("headline", f"not better by δ, as more images would only confirm: {figures}")
    subject, distance = ("this lead", lead.value - required) if lead.value > required else ("a lead of 2δ", required)
    images, advice = case.advise(subject, lead, distance, case.last)
    return _hold("headline", f"not surely better by δ: {figures}{advice}", images)


def _first_version(case: _Case) -> Iterator[Finding]:
    """Hold a first version unless each of its own metrics is surely above its share of what real images reach."""
    metrics, config, shares = case.metrics, case.config, _required_shares(case)
    yield from (_own_metric(case, name, share) for name, share in shares.items())
    if (share := shares.get("class agreement")) is None:
        return
    # Each of K classes at 1 − (1 − c)/K: one that is recognised just often enough rarely holds the model by chance.
    confidence = 1 - (1 - config.confidence) / max(len(metrics.classes), 1)
    lost_classes = [
        f"{scores.name!r} {_figure(scores.candidate)}, real ones {scores.real.value:.2f}"
        for scores in metrics.classes
        if scores.candidate.subtract(scores.real.multiply(share)).upper_bound(confidence) < 0
    ]
    if lost_classes:
        names = "; ".join(lost_classes[:MAX_CLASSES_NAMED]) + "; …" * (len(lost_classes) > MAX_CLASSES_NAMED)
        yield _hold(
            "class agreement",
            f"images of {pluralize(len(lost_classes), 'class', 'classes')} are surely recognised too rarely (required "
            f"{share:g} of what real images reach): {names}; {LOOK_AT_THEM}",
        )


def _required_shares(case: _Case) -> dict[OwnMetric, float]:
    """Return the shares of what real images reach that metrics of a first version must exceed; empty for another."""
    metrics = case.metrics
    if not case.config.first_version or metrics.has_champion or metrics.basis != "generated":
        return {}
    return {
        name: share for name, share in REQUIRED_SHARES.items() if name != "class agreement" or metrics.class_conditional
    }


def _excess(case: _Case, name: OwnMetric, share: float) -> Estimate | None:
    """By how much a metric exceeds ``share`` of what real images reach; None if it was not measured."""
    own, real = case.metrics.own.get(name), case.metrics.own_real.get(name)
    return None if own is None or real is None else own.subtract(real.multiply(share))


def _own_metric(case: _Case, name: OwnMetric, share: float) -> Finding:
    """Hold a first version unless its metric is surely above ``share`` of what real images reach."""
    metrics, confidence = case.metrics, case.confidence
    if (excess := _excess(case, name, share)) is None:
        return _hold(name, f"not measured: {name} of a first version")
    value, real = metrics.own[name], metrics.own_real[name]
    words = f"{name} {_figure(value)} (required {share * real.value:.3g}, {share:g} of what real images reach)"
    if excess.lower_bound(confidence) > 0:
        return _promote(name, words)
    size = _size(excess)
    if excess.upper_bound(confidence) < 0:
        return _hold(name, f"surely too low by {size} on {case.images}: {words}; {LOOK_AT_THEM}")
    side = "above" if excess.value > 0 else "below"
    images, advice = case.advise("that", excess, abs(excess.value), confidence)
    return _hold(name, f"{side} what is required by {size}, but not surely, on {case.images}: {words}{advice}", images)


def _memorization(case: _Case) -> Iterator[Finding]:
    """Apply the limit on copies: above it a model is held, and rejected if chance cannot explain the excess."""
    copies, limit = case.metrics.memorized, case.config.memorized
    if limit is None or case.metrics.basis != "generated":
        return
    if copies is None:
        yield _hold("memorized", "not measured: the share of copies of training images")
        return
    words = copies.describe(case.metrics.samples)
    words += (
        f": {copies.excess:.2%} beyond it, limit {limit:.2%}" if copies.excess else f"; limit {limit:.2%} beyond it"
    )
    if copies.excess <= limit:
        yield _promote("memorized", words)
    elif copies.p_value > 1 - case.confidence:
        yield _hold(
            "memorized",
            f"{words}; so many may look like copies by chance (p = {copies.p_value:.2g}): hold more images out "
            "(ingest.held_out), or generate more (evaluation.samples)",
        )
    elif any(
        excess is not None and excess.upper_bound(case.confidence) < 0
        for excess in (_excess(case, name, share) for name, share in _required_shares(case).items())
    ):
        # Noise and blur resemble plain training images more than real images do.
        yield _hold("memorized", f"{words}; images that are unlike real ones may look copied: see to that first")
    else:
        yield _reject("memorized", words)


def _recall(case: _Case) -> Iterator[Finding]:
    recall, limit = case.metrics.recall, case.config.recall_loss
    if limit is None or not case.is_comparison:
        return
    if recall is None:
        yield _hold("recall", "not measured: its difference from the champion's")
        return
    relation = "lower" if recall.value < 0 else "higher"
    words = f"recall {_size(recall)} {relation} than the champion's on {case.images}, allowed is a loss of {limit:g}"
    loss = recall.multiply(-1)
    yield case.compare_with_limit("recall", loss, loss.subtract(limit), words)


def _cost(case: _Case) -> Iterator[Finding]:
    cost, limit = case.metrics.cost, case.config.cost
    if limit is None or not case.is_comparison:
        return
    if cost is None:
        yield _hold("cost", "not measured: the cost of generating an image")
        return
    costs = f"an image costs {cost.candidate:,.4g} {cost.unit}, of the champion {cost.champion:,.4g}"
    find = _promote if cost.candidate <= limit * cost.champion else _reject
    yield find("cost", f"{costs}, limit {limit:g} times as much")


def _conditions(case: _Case) -> Iterator[Finding]:
    """Say what differs between the conditions of the two, which does not hold a candidate."""
    if case.is_comparison and case.metrics.unlike:
        yield _promote("conditions", "; ".join(case.metrics.unlike))


def _agreement(case: _Case) -> Iterator[Finding]:
    rule: Rule = "text-image agreement"
    agreement = case.metrics.agreement
    if agreement is None or case.metrics.basis != "generated":
        return
    if isinstance(agreement, str):
        yield _promote(rule, agreement)
        return
    words = (
        f"its images agree with their prompts by {_figure(agreement.candidate)} more than with those of others, the "
        f"champion's by {_figure(agreement.champion)}, allowed is a loss of {MAX_AGREEMENT_LOSS:.0%}"
    )
    loss, allowance = agreement.difference.multiply(-1), agreement.champion.multiply(MAX_AGREEMENT_LOSS)
    # Both errors come from the same images, so they are added as if they had one sign, which is the most they can be.
    excess = loss.model_copy(update={"value": loss.value - allowance.value, "error": loss.error + allowance.error})
    yield case.compare_with_limit(rule, loss, excess, words)


RULES: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _headline,
    _first_version,
    _memorization,
    _recall,
    _cost,
    _conditions,
    _agreement,
)
"""Rules in the order of their findings; one that does not apply finds nothing."""


def deciding_distance(samples: int, reference: int) -> Literal["kid", "fd"]:
    """Return the distance that decides for these numbers of images."""
    return "fd" if min(samples, reference) >= MIN_FRECHET_IMAGES else "kid"


def images_needed(images: int, estimate: Estimate, distance: float, confidence: float) -> int | None:
    """Compute how many images, instead of ``images``, distinguish the true value from one at this ``distance``.

    For ``confidence`` and a power of 80 %. Errors fall as 1/√n if the held-out images grow by the same factor, so n
    ((t_c + t_0.8) · error / distance)². Rounded up to two significant digits. None if that is above 10⁹.
    """
    times = estimate.error_bound(confidence) + estimate.error_bound(POWER)
    if times * math.sqrt(images / MAX_NEEDED_IMAGES) >= distance:
        return None
    exact = max(images * (times / distance) ** 2, 1)
    unit: int = 10 ** max(0, math.floor(math.log10(exact)) - 1)
    return math.ceil(exact / unit) * unit


def _describe_needed(images: int, metrics: ComparisonMetrics) -> str:
    """Word how many images of both kinds that is, as both grow by the same factor."""
    factor = images / metrics.samples
    held_out = math.ceil(metrics.reference * factor)
    generated = f"{format_count(images)} generated (evaluation.samples) and " if metrics.basis == "generated" else ""
    more = format_count(held_out - metrics.reference)
    return f"{factor:,.1f} times as many images: {generated}{format_count(held_out)} held out, {more} more"


def _figure(estimate: Estimate) -> str:
    return format_with_error(estimate.value, estimate.error)


def _size(estimate: Estimate) -> str:
    """Word the size of a difference whose sign stands in words beside it."""
    return format_with_error(abs(estimate.value), estimate.error)
