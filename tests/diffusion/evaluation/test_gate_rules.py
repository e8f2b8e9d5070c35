"""What each rule of the gate makes of given figures."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.comparison import distance_headline, psnr_headline
from diffusion.evaluation.estimate import Estimate, share_estimate
from diffusion.evaluation.gate import (
    REQUIRED_SHARES,
    GateConfig,
    GateDecision,
    GateVerdict,
    decide,
    deciding_distance,
)
from diffusion.evaluation.gate_metrics import (
    ClassAgreement,
    ComparisonMetrics,
    CopyShare,
    Cost,
    Headline,
    PromptAgreement,
)
from tests.builders import HEADLINE_ALONE
from tests.builders.gaussian_distances import sample_gaussian
from tests.builders.one_metric import kid_replicates, share_replicates

HALF_THE_COST = Cost(candidate=2, champion=4, unit="network evaluations")
FULL: dict[str, Any] = {
    "basis": "generated",
    "samples": 500,
    "reference": 1000,
    "has_champion": True,
    "recall": Estimate(value=0.01, error=0.02, freedom=100),
    "memorized": CopyShare(share=0.01, expected=0, p_value=0.2),
    "cost": Cost(candidate=39, champion=39, unit="network evaluations"),
}


def headline(difference: float, error: float = 0.001, champion: float = 0.021, baseline: float = 0.001) -> Headline:
    return Headline(
        name="kid_efflite0",
        candidate=Estimate(value=champion + difference, error=0.0015, freedom=100),
        champion=Estimate(value=champion, error=0.0015, freedom=100),
        difference=Estimate(value=difference, error=error, freedom=100),
        real_baseline=baseline,
    )


def copies(share: float, p_value: float = 0.001, expected: float = 0) -> CopyShare:
    return CopyShare(share=share, expected=expected, p_value=p_value)


def decided(config: dict[str, Any] | None = None, **changes: Any) -> GateDecision:
    metrics = ComparisonMetrics(**{**FULL, "headline": headline(-0.008), **changes})
    return decide(metrics, GateConfig(**(config or {})))


def test_a_better_model_within_all_limits_is_promoted() -> None:
    decision = decided()
    assert decision.verdict == GateVerdict.promote
    assert [each.rule for each in decision.findings] == ["headline", "memorized", "recall", "cost"]
    assert decision.reasons[0] == (
        "better by more than δ: kid_efflite0 0.0130 ± 0.0015, the champion's 0.0210 ± 0.0015, on 500 generated images "
        "and 1,000 held-out: better by 0.0080 ± 0.0010, a lead of at least 0.00634 with confidence 0.95 and at most "
        "0.00966 with 0.95; δ = 0.05 is 0.00100"
    )
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision


@pytest.mark.parametrize(("look", "looks"), [(1, 1), (1, 3), (3, 3), (1, 8)])
def test_several_looks_make_no_objection_weaker(look: int, looks: int) -> None:
    sure_of_one = Estimate(value=-0.15, error=0.08, freedom=100)
    metrics = ComparisonMetrics(**{**FULL, "headline": headline(-0.02), "recall": sure_of_one})
    decision = decide(metrics, GateConfig(), look, looks)
    assert decision.verdict == GateVerdict.hold
    assert [each.rule for each in decision.findings if each.verdict == GateVerdict.hold] == ["recall"]


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"headline": headline(-0.0030)}, "promote", "better by more than δ: kid_efflite0"),
        ({"headline": headline(-0.0020)}, "hold", "not surely better by δ: kid_efflite0"),
        ({"headline": headline(0.0010)}, "hold", "not better by δ, as more images would only confirm: kid_efflite0"),
        ({"headline": headline(0.0020)}, "reject", "worse than the champion: kid_efflite0"),
        (
            {"memorized": copies(0.051)},
            "reject",
            "5.10% of 500 generated, more than the 0.00% that chance gives: 5.10% beyond it, limit 5.00%",
        ),
        ({"memorized": copies(0.051, 0.06)}, "hold", "so many may look like copies by chance (p = 0.06)"),
        ({"memorized": copies(0.05)}, "promote", "copies of training images: 5.00%"),
        (
            {"memorized": copies(0.008, expected=0.048)},
            "promote",
            "0.80% of 500 generated, fewer than the 4.80% that chance gives; limit 5.00% beyond",
        ),
        (
            {"memorized": copies(0.048, expected=0.048)},
            "promote",
            "4.80% of 500 generated, as many as chance gives; limit 5.00% beyond it",
        ),
        (
            {"memorized": copies(0.08, expected=0.048)},
            "promote",
            "8.00% of 500 generated, more than the 4.80% that chance gives: 3.36% beyond it",
        ),
        (
            {"memorized": copies(0.1, expected=0.048)},
            "reject",
            "10.00% of 500 generated, more than the 4.80% that chance gives: 5.46% beyond it",
        ),
        (
            {"headline": headline(-0.02), "memorized": copies(0.06)},
            "reject",
            "copies of training images: 6.00% of 500 generated",
        ),
        (
            {"recall": Estimate(value=-0.2, error=0.02)},
            "hold",
            "not surely within the limit: recall 0.200 ± 0.020 lower",
        ),
        ({"recall": Estimate(value=-0.2, error=0.02, freedom=99)}, "reject", "beyond the limit with confidence 0.95"),
        ({"recall": Estimate(value=-0.08, error=0.02, freedom=99)}, "hold", "about"),
        ({"recall": Estimate(value=-0.06, error=0.02, freedom=99)}, "promote", "recall"),
        ({"cost": Cost(candidate=79, champion=39, unit="network evaluations")}, "reject", "79 network evaluations"),
        ({"cost": Cost(candidate=78, champion=39, unit="network evaluations")}, "promote", "78"),
    ],
)
def test_each_rule_promotes_holds_or_rejects_with_a_reason(changes: dict[str, Any], verdict: str, words: str) -> None:
    decision = decided(**changes)
    assert decision.verdict == verdict
    assert any(words in reason for reason in decision.reasons)
    if verdict == "reject":
        assert len(decision.reasons) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"headline": headline(0.0020)}, "worse by 0.0020 ± 0.0010, a lead of at least −0.00366"),
        ({"recall": Estimate(value=-0.06, error=0.02, freedom=99)}, "recall 0.060 ± 0.020 lower than the champion's"),
        ({"recall": Estimate(value=0.06, error=0.02, freedom=99)}, "recall 0.060 ± 0.020 higher than the champion's"),
        (
            {"recall": Estimate(value=-0.16, error=0.11, freedom=99)},
            "beyond the limit, but not surely a loss: recall 0.16 ± 0.11 lower",
        ),
    ],
)
def test_differences_say_their_direction_in_words(changes: dict[str, Any], words: str) -> None:
    assert any(words in finding.reason for finding in decided(**changes).findings)


@pytest.mark.parametrize(
    ("difference", "cost", "verdict", "words"),
    [
        (0.0, HALF_THE_COST, "promote", "not worse by δ at 0.5 of the champion's cost"),
        (0.001, HALF_THE_COST, "promote", "not worse by δ"),
        (0.004, HALF_THE_COST, "hold", "not surely as good within δ"),
        (0.008, HALF_THE_COST, "reject", "worse by more than δ"),
        (0.0, Cost(candidate=2.1, champion=4, unit="s"), "hold", "better by"),
        (-0.008, HALF_THE_COST, "promote", "not worse by δ"),
    ],
)
def test_much_cheaper_candidate_need_not_be_better(difference: float, cost: Cost, verdict: str, words: str) -> None:
    decision = decided({"delta": 0.2}, headline=headline(difference), cost=cost)
    assert decision.verdict == verdict
    assert any(words in reason for reason in decision.reasons)


def test_held_model_reports_how_many_images_would_decide() -> None:
    finding = decided(headline=headline(-0.002)).findings[0]
    # n ((t₀.₉₅ + t₀.₈) · 0.001 / (0.002 − 0.001))², with Student's quantiles at 100 degrees of freedom.
    exact = 500 * (1.6602 + 0.8452) ** 2
    assert finding.images is not None
    assert exact < finding.images == 3200 < exact + 100
    assert finding.reason.endswith(
        "to decide on this lead takes about 6.4 times as many images: 3,200 generated (evaluation.samples) and "
        "6,400 held out, 5,400 more"
    )
    worse = decided(headline=headline(-0.0005)).findings[0]
    assert "to decide on a lead of 2δ" in worse.reason
    assert worse.images == 3200


@pytest.mark.parametrize("lead", [headline(0.0, error=0.0), headline(-0.0005, error=0.0001)])
def test_no_number_of_images_promotes_what_is_surely_not_better(lead: Headline) -> None:
    decision = decided({"delta": 0} if not lead.difference.value else {}, headline=lead)
    assert decision.verdict == GateVerdict.hold
    assert decision.findings[0].images is None


def test_delta_is_a_share_of_what_the_champion_lacks() -> None:
    near, far = headline(-0.002, champion=0.003), headline(-0.002, champion=0.021)
    assert near.required_lead(0.1) == pytest.approx(0.0002)
    assert far.required_lead(0.1) == pytest.approx(0.002)
    assert headline(-0.002, champion=0.0005).required_lead(0.1) == 0


@given(st.floats(1e-4, 1e4), st.floats(-0.02, 0.02), st.floats(1e-5, 0.02), st.floats(0, 0.5))
def test_the_verdict_does_not_depend_on_the_unit(unit: float, difference: float, error: float, delta: float) -> None:
    def scaled(estimate: Estimate) -> Estimate:
        return estimate.multiply(unit)

    here = headline(difference, error)
    there = Headline(
        name=here.name,
        candidate=scaled(here.candidate),
        champion=scaled(here.champion),
        difference=scaled(here.difference),
        real_baseline=0.001 * unit,
    )
    verdicts = {decided({"delta": delta}, headline=each).verdict for each in (here, there)}
    margin = min(
        abs(bound - here.required_lead(delta)) for bound in (here.lead.lower_bound(0.95), here.lead.upper_bound(0.95))
    )
    if min(margin, abs(here.lead.upper_bound(0.95))) > 1e-9:  # rounding decides what lies nearer
        assert len(verdicts) == 1


@given(st.floats(-0.02, 0.02), st.floats(0, 0.01), st.floats(0, 0.5), st.floats(0.51, 0.999))
def test_only_leads_measured_above_delta_are_promoted(
    difference: float, error: float, delta: float, confidence: float
) -> None:
    comparison_headline = headline(difference, error)
    decision = decided({"delta": delta, "confidence": confidence}, headline=comparison_headline)
    if decision.verdict == GateVerdict.promote:
        assert -difference > comparison_headline.required_lead(delta)


def agreeing(candidate: float, champion: float, error: float) -> PromptAgreement:
    each = {"candidate": candidate, "champion": champion, "difference": candidate - champion}
    return PromptAgreement(**{name: Estimate(value=value, error=error, freedom=200) for name, value in each.items()})


@pytest.mark.parametrize(
    ("candidate", "error", "verdict"),
    [
        (0.12, 0.002, "promote"),  # more
        (0.097, 0.002, "promote"),  # less by chance
        (0.095, 0.001, "promote"),  # surely less, and surely within the tenth
        (0.089, 0.002, "hold"),
        (0.08, 0.002, "reject"),
        (0.05, 0.05, "promote"),  # nobody knows
    ],
)
def test_text_image_agreement_may_fall_by_a_share(candidate: float, error: float, verdict: str) -> None:
    decision = decided(agreement=agreeing(candidate, 0.1, error))
    [finding] = [each for each in decision.findings if each.rule == "text-image agreement"]
    assert decision.verdict == finding.verdict == verdict
    assert (finding.images is not None) == (verdict == "hold")


def test_unmeasured_agreement_and_unlike_conditions_do_not_hold() -> None:
    decision = decided(agreement="not measured", unlike=("one", "other"), class_conditional=False)
    assert decision.verdict == "promote"
    reasons = {each.rule: each.reason for each in decision.findings}
    assert reasons["text-image agreement"] == "not measured"
    assert reasons["conditions"] == "one; other"


@pytest.mark.parametrize("missing", ["headline", "recall", "memorized", "cost"])
def test_unmeasured_metric_of_a_rule_holds_the_candidate(missing: str) -> None:
    assert decided().verdict == GateVerdict.promote
    decision = decided(**{missing: None})
    assert decision.verdict == GateVerdict.hold
    (reason,) = decision.reasons
    assert reason.startswith("not measured: ")


def test_disabled_rules_require_no_metrics() -> None:
    decision = decided(HEADLINE_ALONE, recall=None, memorized=None, cost=None)
    assert decision.verdict == GateVerdict.promote
    assert len(decision.findings) == 1


FIRST: dict[str, Any] = {"has_champion": False, "headline": None, "recall": None, "cost": None}
OWN = ("precision", "recall", "coverage", "class agreement")


def own(value: float, error: float = 0.05, **others: float) -> dict[str, Estimate]:
    return {name: Estimate(value=others.get(name, value), error=error, freedom=100) for name in OWN}


def test_a_first_version_is_promoted_unless_it_copies() -> None:
    first = FIRST | {"own": own(0.7), "own_real": own(0.8)}
    decision = decided(**first)
    assert decision.verdict == GateVerdict.promote
    assert decision.reasons[0] == "first version: there was no champion"
    assert "precision 0.700 ± 0.050 (required 0.48, 0.6 of what real images reach)" in decision.reasons
    assert decided(**first | {"memorized": copies(0.3)}).verdict == GateVerdict.reject
    assert decided(**first | {"memorized": None}).verdict == GateVerdict.hold


def test_noise_is_held_as_unlike_real_images_before_as_copied() -> None:
    noise = {"own": own(0.7, 0.01, coverage=0.01, recall=0.0), "own_real": own(0.8), "memorized": copies(0.3)}
    decision = decided(**FIRST | noise)
    assert decision.verdict == GateVerdict.hold
    assert [reason.partition(" by ")[0] for reason in decision.reasons[:2]] == ["surely too low"] * 2
    assert "unlike real ones" in decision.reasons[-1]


@pytest.mark.parametrize("weak", ["precision", "coverage", "class agreement"])
def test_a_first_version_is_held_unless_surely_above_each_bar(weak: str) -> None:
    share, real = REQUIRED_SHARES[weak], own(0.8, error=0.02)
    # 1.66 standard errors, of both sides, are needed.
    for excess, verdict in ((-0.2, "hold"), (-0.01, "hold"), (0.07, "hold"), (0.1, "promote")):
        values = own(0.75) | {weak: Estimate(value=0.8 * share + excess, error=0.05, freedom=100)}
        first = FIRST | {"own": values, "own_real": real}
        decision = decided(**first)
        assert decision.verdict == verdict, excess
        without = first | {"own": values | {weak: Estimate(value=0)}}
        assert decided({"first_version": False}, **without).verdict == GateVerdict.promote
        if verdict == "hold":
            [finding] = [finding for finding in decision.findings if finding.verdict == "hold"]
            assert finding.rule == weak
            # Where more images would not change it, none are asked for.
            assert (finding.images is None) == (excess == -0.2)
    for missing in ("own", "own_real"):
        values = {"own": own(0.75), "own_real": real}
        del values[missing][weak]
        assert decided(**FIRST, **values).verdict == GateVerdict.hold, "not measured"


def test_a_bar_follows_what_real_images_reach() -> None:
    for real, verdict in ((0.8, "hold"), (0.5, "promote")):
        first = FIRST | {"own": own(0.4, error=0.01), "own_real": own(real, error=0.01)}
        assert decided(**first).verdict == verdict


def test_held_first_version_reports_how_many_images_decide() -> None:
    first = FIRST | {"own": own(0.75, precision=0.54), "own_real": own(0.8, error=0.0)}
    [finding] = [finding for finding in decided(**first).findings if finding.verdict == "hold"]
    # 500 ((t₀.₉₅ + t₀.₈) · 0.05 / 0.06)², with Student's quantiles at 100 degrees of freedom.
    exact = 500 * ((1.6602 + 0.8452) * 0.05 / 0.06) ** 2
    assert finding.images is not None
    assert exact < finding.images < exact + 100
    assert "above what is required by 0.060 ± 0.050, but not surely" in finding.reason


def test_a_verdict_that_lacks_images_says_how_many_more() -> None:
    first = FIRST | {"own": own(0.75, precision=0.54), "own_real": own(0.8, error=0.0), "reference": 18}
    decision, compared = decided(**first), ComparisonMetrics(**FULL | first)
    [finding] = [finding for finding in decision.findings if finding.verdict == "hold"]
    assert finding.images is not None
    held_out = math.ceil(18 * finding.images / compared.samples)
    shortage = decision.describe_shortage(compared)
    assert shortage is not None
    assert shortage.startswith("18 held-out images are too few")
    assert f"{held_out} held out, {held_out - 18} more" in shortage
    # Surely too low, or promoted: more images would not help.
    for values in (own(0.75, precision=0.2), own(0.75)):
        other = first | {"own": values}
        assert decided(**other).describe_shortage(ComparisonMetrics(**FULL | other)) is None


def class_agreements(*values: float) -> tuple[ClassAgreement, ...]:
    return tuple(
        ClassAgreement(name=str(number), candidate=share_estimate(value, 50), real=share_estimate(0.9, 50))
        for number, value in enumerate(values)
    )


def test_a_first_version_is_held_by_an_unrecognised_class() -> None:
    first = FIRST | {"own": own(0.75), "own_real": own(0.8)}
    assert decided(**first, classes=class_agreements(*[0.9] * 9, 0.4)).verdict == GateVerdict.promote, "not surely"
    lost = FIRST | {"own": own(0.75), "own_real": own(0.8), "classes": class_agreements(*[0.9] * 9, 0.1)}
    decision = decided(**lost)
    assert decision.verdict == GateVerdict.hold
    [reason] = decision.reasons
    assert "'9' 0.100" in reason
    assert "'8'" not in reason
    assert decided({"first_version": False}, **lost).verdict == GateVerdict.promote


def test_class_agreement_is_not_required_without_classes() -> None:
    values = {
        name: {metric: each for metric, each in own(0.75).items() if metric in OWN[:3]} for name in ("own", "own_real")
    }
    assert decided(**FIRST, **values).verdict == GateVerdict.hold
    assert decided(**FIRST, **values, class_conditional=False).verdict == GateVerdict.promote


def test_a_first_autoencoder_has_no_bars() -> None:
    reconstructed = FIRST | {"basis": "reconstructed", "memorized": None}
    assert decided(**reconstructed).verdict == GateVerdict.promote


def test_incomparable_candidate_is_held_and_rejected_if_it_copies() -> None:
    unlike = {"incomparable": "they are of two families", "headline": None, "recall": None, "cost": None}
    decision = decided(**unlike)
    assert (decision.verdict, decision.reasons) == (GateVerdict.hold, ("they are of two families",))
    assert decided(**unlike | {"memorized": copies(0.3)}).verdict == GateVerdict.reject


def test_headline_metric_is_kid_below_four_images_per_feature() -> None:
    figures = {(5119, 60_000): "kid", (10_000, 5119): "kid", (5120, 5120): "fd"}
    assert {counts: deciding_distance(*counts) for counts in figures} == figures


def test_comparison_metrics_use_replicates_of_the_same_images() -> None:
    candidate, champion, baseline = (
        sample_gaussian(100, 4, 0, 0.2),
        sample_gaussian(100, 4, 1, 0.5),
        sample_gaussian(100, 4, 2),
    )
    figures = share_replicates([candidate, champion, baseline], sample_gaussian(90, 4, 3), splits=10)
    assert (
        difference(figures[0]["recall"], figures[1]["recall"]).value
        == figures[0]["recall"].whole - figures[1]["recall"].whole
    )
    replicates = kid_replicates([candidate, champion, baseline], sample_gaussian(90, 4, 3), splits=10)
    gathered = distance_headline(*({"kid": each} for each in replicates), "efflite0", "kid")
    assert gathered.name == "kid_efflite0"
    assert gathered.real_baseline == replicates[2].whole
    assert gathered.lead.value == pytest.approx(replicates[1].whole - replicates[0].whole)


def test_autoencoders_are_evaluated_by_psnr_gain_per_image() -> None:
    champion = 25 + 4 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(300, generator=torch.Generator().manual_seed(1))
    config = {"delta": 0.05}
    for gain, verdict in ((0.3, "promote"), (0.21, "hold"), (0.0, "hold"), (-0.1, "reject")):
        gain_headline = psnr_headline(champion + gain + 0.2 * noise, champion)
        fields = {
            "basis": "reconstructed",
            "samples": 300,
            "headline": gain_headline,
            "recall": None,
            "memorized": None,
        }
        decision = decided(config, **fields, cost=None)
        assert decision.verdict == verdict, gain
        assert len(decision.findings) == 1
        assert "dB" in decision.reasons[0]
    # A twentieth less squared error.
    assert gain_headline.required_lead(0.05) == pytest.approx(0.2228, abs=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"delta": 1}, {"confidence": 0.5}, {"cost": 0}, {"memorized": 1.1}, {"recall_loss": -0.1}, {"other": 1}]
)
def test_meaningless_gate_settings_are_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GateConfig(**wrong)
