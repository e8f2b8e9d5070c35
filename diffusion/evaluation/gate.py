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
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field, FiniteFloat

from diffusion.common.config import Config, is_unset
from diffusion.common.escaping import pluralize
from diffusion.evaluation.estimate import Estimate, sequential_confidences
from diffusion.evaluation.reports.html import format_count, format_signed, format_with_error

OwnMetric = Literal["precision", "recall", "coverage", "class agreement"]
"""Metric of a model's images by themselves, which a first version is decided on."""
MIN_FRECHET_IMAGES = 4 * 1280
"""Images of either side from which the Fréchet distance decides, four for each feature of the default network: below,
its bias outweighs differences."""
POWER = 0.8
"""Statistical power for which the number of images needed is computed."""
MAX_LOOK_FACTOR = 4
"""Times as many images as the last look would have; if a decision needs more, no further look is taken."""
MAX_NEEDED_IMAGES = 10**9
"""Largest number of needed images that is reported."""
MAX_CLASSES_NAMED = 5
"""Classes that a reason names."""
LOOK_AT_THEM = "look at its samples, and if they suffice, make it champion by `darkroom promote --to`"


class GateConfig(Config):
    """Rules by which a candidate becomes champion. Null disables a rule."""

    headline: Literal["auto", "kid", "fd"] = "auto"
    """Distance that must decrease. auto: KID where either side has under 5,120 images, else the Fréchet distance.
    Autoencoders are always compared by the PSNR of held-out images."""
    delta: float = Field(0.05, ge=0, lt=1)
    """δ, the smallest improvement that counts: the share of the distance between champion and real images that the
    candidate must close. A share means the same for every distance, data set and feature network. For autoencoders: the
    share by which squared error must fall; 0.05 is 0.22 dB."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """c, the one-sided confidence of each statement: 0.95 promotes at most one in twenty models that are not better by
    δ."""
    recall_loss: float | None = Field(0.1, ge=0, le=1)
    """Largest loss of recall, from 0 to 1: fidelity must not come from generating only easy images."""
    min_precision: float | None = Field(0.6, ge=0, lt=1)
    """Precision that a first version must surely have, as a share of what as many real images reach; 0 or null: any.
    Without a champion nothing else would keep out models whose images are half noise, blurred or averages."""
    min_recall: float | None = Field(0.1, ge=0, lt=1)
    """Recall that a first version must surely have, as a share of what as many real images reach: little, as guidance
    lowers it; 0 or null: any."""
    min_coverage: float | None = Field(0.5, ge=0, lt=1)
    """Coverage that a first version must surely have, as a share of what as many real images reach: a model of one
    class or of few images lacks it; 0 or null: any."""
    min_class_agreement: float | None = Field(0.5, ge=0, lt=1)
    """Share of a first version's images that a classifier must surely recognise as their class, as a share of what real
    images reach. Applies if model and data set have classes in common. No class may surely lie below it of which 20
    images or more are generated and held out; smaller ones count among all. 0 or null: any."""
    memorized: float | None = Field(0.05, ge=0, le=1)
    """Largest share of generated images that may be copies of training images, beyond chance. Applies to first
    versions, too."""
    class_loss: float | None = Field(None, ge=0)
    """Largest relative increase of the worst class's distance, for class-conditional models: 0.5 is by half."""
    agreement_loss: float | None = Field(0.1, ge=0, le=1)
    """Largest loss of text-image agreement, for models of captions where evaluation.text_image_encoder is set: as a
    share of what the champion's images agree with their prompts more than with those of others."""
    cost: float | None = Field(2.0, gt=0)
    """Largest ratio of the candidate's cost per image to the champion's."""
    saving: float | None = Field(2.0, gt=1)
    """k: a candidate whose images cost at most 1/k of the champion's need not be better. It is promoted if it is, with
    confidence c, not worse by δ: the share of the distance between champion and real images that it may add. Cost is
    that of all network passes of an image in floating-point operations, which mean the same for every family. Null: it
    must be better."""
    looks: int = Field(3, ge=1, le=8)
    """Times that the two are compared at most, 1 to 8. Where a comparison holds the candidate and more images may tell,
    both generate twice as many. Each look promotes at a higher confidence (O'Brien and Fleming), so that all together
    err no more often than one would. 1: evaluation.samples decide."""
    across_families: bool = Field(False, exclude_if=is_unset)
    """Whether a champion of another family (``model.family``) may be replaced, compared by generated images,
    autoencoders too. Otherwise the candidate is held. Two families are compared if registry.model gives both the same
    name."""

    def metric(self, samples: int, reference: int) -> Literal["kid", "fd"]:
        """Return the distance that decides for these numbers of images."""
        if self.headline != "auto":
            return self.headline
        return "fd" if min(samples, reference) >= MIN_FRECHET_IMAGES else "kid"

    def promotion_confidence(self, look: int, looks: int) -> float:
        """Return the confidence that a promotion takes at one of ``looks`` looks, counted from 1."""
        return sequential_confidences(looks, self.confidence)[look - 1]


class Headline(Config):
    """The metric that decides between candidate and champion."""

    name: str
    """Name of the metric with that of its features, such as kid_efflite0."""
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

    def smallest(self, delta: float) -> float:
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


class WorstClass(Config):
    """The class with the largest distance to real images, for either model."""

    candidate: Estimate
    champion: Estimate
    """Distances of the worst class of either."""
    candidate_class: str
    champion_class: str


class PromptAgreement(Config):
    """How much more images agree with their own prompts than with those of others: differences of cosines."""

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
    worst_class: WorstClass | None = None
    agreement: PromptAgreement | str | None = None
    """Text-image agreement, or why it was not compared; None for models without captions."""
    cost: Cost | None = None


Rule = OwnMetric | Literal["headline", "conditions", "memorized", "worst class", "text-image agreement", "cost"]


class Verdict(StrEnum):
    """The gate's verdict on a candidate."""

    promote = "promote"
    hold = "hold"
    reject = "reject"


class Finding(Config):
    """The result of one rule."""

    rule: Rule
    verdict: Verdict
    """The rule's verdict; ``promote`` means no objection."""
    reason: str
    images: int | None = None
    """Number of generated images, with held-out ones increased by the same factor, needed to decide with a power of 80
    %; None if none are needed or no number suffices."""


class Decision(Config):
    """The gate's decision: the worst verdict of any rule."""

    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def images_needed(self) -> int | None:
        """Number of images that decide; None unless want of images is all that holds."""
        counts = [finding.images for finding in self.findings if finding.verdict == Verdict.hold]
        return None if self.verdict != Verdict.hold or None in counts else max(filter(None, counts))

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
class _Confidences:
    """One-sided confidences of the statements of one look."""

    rejection: float
    """c, of what rejects or holds."""
    promotion: float
    """Of what promotes at this look."""
    last: float
    """Of what promotes at the last look, for which the number of images needed is computed."""


def decide(metrics: ComparisonMetrics, config: GateConfig, look: int = 1, looks: int = 1) -> Decision:
    """Decide on ``metrics`` by the rules of ``config``, at one of ``looks`` looks, counted from 1."""
    promotion, last = (config.promotion_confidence(number, looks) for number in (look, looks))
    confidences = _Confidences(config.confidence, promotion, last)
    generated = metrics.basis == "generated"
    findings = [_headline(metrics, config, confidences)]
    if generated and not metrics.has_champion:
        findings += _first_version(metrics, config)
    if generated and config.memorized is not None:
        findings.append(_memorization(metrics, config.memorized, config.confidence))
    if generated and metrics.has_champion and metrics.incomparable is None:
        if config.recall_loss is not None:
            findings.append(_recall(metrics, config.recall_loss, confidences))
        if config.class_loss is not None and metrics.class_conditional:
            findings.append(_worst_class(metrics, config.class_loss, confidences))
        if config.cost is not None:
            findings.append(_cost(metrics.cost, config.cost))
        if metrics.unlike:
            findings.append(_finding("conditions", Verdict.promote, "; ".join(metrics.unlike)))
    if generated and metrics.agreement is not None and config.agreement_loss is not None:
        findings.append(_agreement(metrics.agreement, config.agreement_loss, metrics, confidences))
    verdicts = {finding.verdict for finding in findings}
    worst = next(verdict for verdict in (Verdict.reject, Verdict.hold, Verdict.promote) if verdict in verdicts)
    return Decision(verdict=worst, findings=tuple(findings))


def _finding(rule: Rule, verdict: Verdict, reason: str, images: int | None = None) -> Finding:
    return Finding(rule=rule, verdict=verdict, reason=reason, images=images)


def _headline(metrics: ComparisonMetrics, config: GateConfig, confidences: _Confidences) -> Finding:
    headline = metrics.headline
    if not metrics.has_champion:
        return _finding("headline", Verdict.promote, "first version: there was no champion")
    if metrics.incomparable is not None:
        return _finding("headline", Verdict.hold, metrics.incomparable)
    if headline is None:
        return _finding("headline", Verdict.hold, "not measured: its difference from the champion")
    lead, smallest = headline.lead, headline.smallest(config.delta)
    unit = " dB" if headline.real_baseline is None else ""
    low, high = lead.lower_bound(confidences.promotion), lead.upper_bound(confidences.rejection)
    figures = (
        f"{headline.name} {_figure(headline.candidate)}{unit}, the champion's {_figure(headline.champion)}{unit}, on "
        f"{_images(metrics)}: better by {_figure(lead)}{unit}, at least {format_signed(low)} with "
        f"confidence {confidences.promotion:.4g} and at most {format_signed(high)} with {config.confidence:g}; "
        f"δ = {config.delta:g} is {format_signed(smallest)}{unit}"
    )
    cost = metrics.cost
    if config.saving is not None and cost is not None and cost.candidate * config.saving <= cost.champion:
        words = f"at {cost.candidate / cost.champion:.2g} of the champion's cost"
        # Its distance sets the limit, too, and both errors have one sign: a champion that seems worse than it is makes
        # the lead larger and the limit laxer.
        error = lead.error if headline.real_baseline is None else lead.error + config.delta * headline.champion.error
        margin = lead.model_copy(update={"value": lead.value + smallest, "error": error})
        if margin.lower_bound(confidences.promotion) > 0:
            return _finding("headline", Verdict.promote, f"not worse by δ {words}: {figures}")
        if margin.upper_bound(confidences.rejection) < 0:
            return _finding("headline", Verdict.reject, f"worse by more than δ {words}: {figures}")
        images = images_needed(metrics.samples, margin, margin.value, confidences.last) if margin.value > 0 else None
        advice = _advice("this difference", images, metrics)
        return _finding("headline", Verdict.hold, f"not surely as good within δ {words}: {figures}{advice}", images)
    if low > smallest:
        return _finding("headline", Verdict.promote, f"better by more than δ: {figures}")
    if high < 0:
        return _finding("headline", Verdict.reject, f"worse than the champion: {figures}")
    if high < smallest:
        return _finding("headline", Verdict.hold, f"not better by δ, as more images would only confirm: {figures}")
    is_ahead = lead.value > smallest
    images = images_needed(metrics.samples, lead, lead.value - smallest if is_ahead else smallest, confidences.last)
    advice = _advice("this lead" if is_ahead else "a lead of 2δ", images, metrics)
    return _finding("headline", Verdict.hold, f"not surely better by δ: {figures}{advice}", images)


def _first_version(metrics: ComparisonMetrics, config: GateConfig) -> list[Finding]:
    """Hold a first version unless each of its own metrics is surely above its share of what real images reach."""
    shares: dict[OwnMetric, float | None] = {
        "precision": config.min_precision,
        "recall": config.min_recall,
        "coverage": config.min_coverage,
        "class agreement": config.min_class_agreement if metrics.class_conditional else None,
    }
    # A share of 0 could never be surely exceeded by a metric of 0.
    findings = [_own_metric(name, share, metrics, config) for name, share in shares.items() if share]
    if not (share := shares["class agreement"]):
        return findings
    # Each of K classes at 1 − (1 − c)/K: one that is recognised just often enough rarely holds the model by chance.
    confidence = 1 - (1 - config.confidence) / max(len(metrics.classes), 1)
    lost_classes = [
        f"{scores.name!r} {_figure(scores.candidate)}, real ones {scores.real.value:.2f}"
        for scores in metrics.classes
        if scores.candidate.subtract(scores.real.multiply(share)).upper_bound(confidence) < 0
    ]
    if lost_classes:
        names = "; ".join(lost_classes[:MAX_CLASSES_NAMED]) + "; …" * (len(lost_classes) > MAX_CLASSES_NAMED)
        reason = (
            f"images of {pluralize(len(lost_classes), 'class', 'classes')} are surely recognised too rarely (required "
            f"{share:g} of what real images reach): {names}; {LOOK_AT_THEM}"
        )
        findings.append(_finding("class agreement", Verdict.hold, reason))
    return findings


def _own_metric(name: OwnMetric, share: float, metrics: ComparisonMetrics, config: GateConfig) -> Finding:
    """Hold a first version unless its metric is surely above ``share`` of what real images reach."""
    if name not in metrics.own or name not in metrics.own_real:
        return _finding(name, Verdict.hold, f"not measured: {name} of a first version")
    value, real = metrics.own[name], metrics.own_real[name]
    excess = value.subtract(real.multiply(share))
    words = f"{name} {_figure(value)} (required {share * real.value:.3g}, {share:g} of what real images reach)"
    if excess.lower_bound(config.confidence) > 0:
        return _finding(name, Verdict.promote, words)
    if excess.upper_bound(config.confidence) < 0:
        reason = f"surely too low by {_figure(excess.multiply(-1))} on {_images(metrics)}: {words}; {LOOK_AT_THEM}"
        return _finding(name, Verdict.hold, reason)
    side = "above" if excess.value > 0 else "below"
    images = images_needed(metrics.samples, excess, abs(excess.value), config.confidence)
    reason = f"{side} what is required by {_figure(excess.multiply(1 if excess.value > 0 else -1))}, but not surely"
    advice = _advice("that", images, metrics)
    return _finding(name, Verdict.hold, f"{reason}, on {_images(metrics)}: {words}{advice}", images)


def _memorization(metrics: ComparisonMetrics, limit: float, confidence: float) -> Finding:
    """Apply the limit on copies: above it a model is held, and rejected if chance cannot explain the excess."""
    if (copies := metrics.memorized) is None:
        return _finding("memorized", Verdict.hold, "not measured: the share of copies of training images")
    words = copies.describe(metrics.samples)
    words += (
        f": {copies.excess:.2%} beyond it, limit {limit:.2%}" if copies.excess else f"; limit {limit:.2%} beyond it"
    )
    if copies.excess <= limit:
        return _finding("memorized", Verdict.promote, words)
    if copies.p_value <= 1 - confidence:
        return _finding("memorized", Verdict.reject, words)
    reason = (
        f"{words}; so many may look like copies by chance (p = {copies.p_value:.2g}): hold more images out "
        "(ingest.held_out), or generate more (evaluation.samples)"
    )
    return _finding("memorized", Verdict.hold, reason)


def _recall(metrics: ComparisonMetrics, limit: float, confidences: _Confidences) -> Finding:
    if (recall := metrics.recall) is None:
        return _finding("recall", Verdict.hold, "not measured: its difference from the champion's")
    words = f"recall {_figure(recall)} higher than the champion's on {_images(metrics)}, allowed is a loss of {limit:g}"
    loss = recall.multiply(-1)
    return _compare_with_limit("recall", loss, loss.subtract(limit), words, metrics, confidences)


def _worst_class(metrics: ComparisonMetrics, limit: float, confidences: _Confidences) -> Finding:
    if (worst := metrics.worst_class) is None:
        return _finding("worst class", Verdict.hold, "not measured: the distance of each class")
    words = (
        f"worst class {worst.candidate_class!r} at {_figure(worst.candidate)}, the champion's "
        f"{worst.champion_class!r} at {_figure(worst.champion)}, limit {1 + limit:g} times as much"
    )
    loss, excess = (worst.candidate.subtract(worst.champion.multiply(factor)) for factor in (1, 1 + limit))
    return _compare_with_limit("worst class", loss, excess, words, metrics, confidences)


def _agreement(
    agreement: PromptAgreement | str, limit: float, metrics: ComparisonMetrics, confidences: _Confidences
) -> Finding:
    rule: Rule = "text-image agreement"
    if isinstance(agreement, str):
        return _finding(rule, Verdict.promote, agreement)
    words = (
        f"its images agree with their prompts by {_figure(agreement.candidate)} more than with those of others, the "
        f"champion's by {_figure(agreement.champion)}, allowed is a loss of {limit:.0%}"
    )
    loss, allowance = agreement.difference.multiply(-1), agreement.champion.multiply(limit)
    # Both errors come from the same images, so they are added as if they had one sign, which is the most they can be.
    excess = loss.model_copy(update={"value": loss.value - allowance.value, "error": loss.error + allowance.error})
    return _compare_with_limit(rule, loss, excess, words, metrics, confidences)


def _cost(cost: Cost | None, limit: float) -> Finding:
    if cost is None:
        return _finding("cost", Verdict.hold, "not measured: the cost of generating an image")
    costs = f"an image costs {cost.candidate:,.4g} {cost.unit}, of the champion {cost.champion:,.4g}"
    verdict = Verdict.promote if cost.candidate <= limit * cost.champion else Verdict.reject
    return _finding("cost", verdict, f"{costs}, limit {limit:g} times as much")


def _compare_with_limit(
    rule: Rule, loss: Estimate, excess: Estimate, words: str, metrics: ComparisonMetrics, confidences: _Confidences
) -> Finding:
    """Reject a loss that is surely beyond the limit; hold one that is sure and may be beyond it."""
    # A loss that chance explains is no objection: few samples would otherwise hold models that are as good.
    if loss.lower_bound(confidences.rejection) <= 0 or excess.upper_bound(confidences.promotion) <= 0:
        return _finding(rule, Verdict.promote, words)
    if excess.lower_bound(confidences.rejection) > 0:
        reason = f"beyond the limit with confidence {confidences.rejection:g}: {words}"
        return _finding(rule, Verdict.reject, reason)
    images = images_needed(metrics.samples, excess, abs(excess.value), confidences.last)
    reason = f"not surely within the limit: {words}{_advice('that', images, metrics)}"
    return _finding(rule, Verdict.hold, reason, images)


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


def _advice(subject: str, images: int | None, metrics: ComparisonMetrics) -> str:
    if images is None:
        return ""
    return f"; to decide on {subject} takes about {_describe_needed(images, metrics)}"


def _describe_needed(images: int, metrics: ComparisonMetrics) -> str:
    """Word how many images of both kinds that is, as both grow by the same factor."""
    factor = images / metrics.samples
    held_out = math.ceil(metrics.reference * factor)
    generated = f"{format_count(images)} generated (evaluation.samples) and " if metrics.basis == "generated" else ""
    more = format_count(held_out - metrics.reference)
    return f"{factor:,.1f} times as many images: {generated}{format_count(held_out)} held out, {more} more"


def _images(metrics: ComparisonMetrics) -> str:
    if metrics.basis == "reconstructed":
        return pluralize(metrics.samples, "held-out image")
    return f"{pluralize(metrics.samples, 'generated image')} and {format_count(metrics.reference)} held-out"


def _figure(estimate: Estimate) -> str:
    return format_with_error(estimate.value, estimate.error).replace("-", "−")
