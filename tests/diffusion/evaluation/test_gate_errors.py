"""How often the gate errs, by simulation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, multivariate_normal, norm

from diffusion.evaluation.bootstrap import Replicates, difference
from diffusion.evaluation.comparison import distance_headline
from diffusion.evaluation.estimate import Estimate, sequential_confidences
from diffusion.evaluation.gate import GateConfig, GateVerdict, decide, images_needed
from diffusion.evaluation.gate_metrics import ComparisonMetrics, Cost, Headline
from tests.builders import HEADLINE_ALONE
from tests.builders.gaussian_distances import sample_gaussian, true_frechet, true_kid
from tests.builders.one_metric import frechet_replicates, kid_replicates, share_replicates
from tests.builders.one_thread import one_thread

SPLITS = 25
TRIALS = 200
MAX_ERRORS = int(binom.ppf(0.99, TRIALS, 0.05))
"""Promotions of 200 that a gate which errs in 5 % of all cases exceeds in 1 % of all tests."""
WIDTH = 12
"""Features of an image."""
MEASURES: dict[str, Callable[..., list[Replicates]]] = {"kid": kid_replicates, "fd": frechet_replicates}
TRUE: dict[str, Callable[[int, float, float], float]] = {"kid": true_kid, "fd": true_frechet}
CHAMPION = 0.4
"""How far the champion's points lie from real ones, in each dimension."""


def comparison(figure: str, seed: int, count: int, shift: float, common: float = 0.0) -> ComparisonMetrics:
    """A candidate ``shift`` off against the champion, with a share ``common`` of the same noise, measured once."""
    noise, own, baseline, reference = (sample_gaussian(count, WIDTH, 4 * seed + each) for each in range(4))
    candidate = common * noise + (1 - common**2) ** 0.5 * own + shift
    with one_thread():
        replicates = MEASURES[figure]([candidate, noise + CHAMPION, baseline], reference, splits=SPLITS)
    headline = distance_headline(*({figure: each} for each in replicates), "points", figure)
    return ComparisonMetrics(basis="generated", samples=count, reference=count, has_champion=True, headline=headline)


def better_by(figure: str, share: float) -> float:
    """The shift whose true distance is smaller than the champion's by this share, larger if that is negative."""
    goal = (1 - share) * TRUE[figure](WIDTH, CHAMPION, 1.0)
    return float(brentq(lambda shift: TRUE[figure](WIDTH, shift, 1.0) - goal, 0, 2 * CHAMPION))


def promotions(comparisons: list[ComparisonMetrics], delta: float) -> int:
    config = GateConfig(delta=delta, **HEADLINE_ALONE)
    return sum(decide(each, config).verdict == GateVerdict.promote for each in comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["kid", "fd"])
def test_the_same_model_with_other_seeds_is_rarely_promoted(figure: str) -> None:
    comparisons = [comparison(figure, seed, 120, CHAMPION) for seed in range(TRIALS)]
    assert promotions(comparisons, delta=0) <= MAX_ERRORS
    # Who goes by the figure alone promotes half of them, and who goes by one standard error a sixth.
    leads = [each.headline.lead for each in comparisons if each.headline]
    assert sum(lead.value > 0 for lead in leads) > 2 * MAX_ERRORS
    assert sum(lead.value > lead.error for lead in leads) > MAX_ERRORS


def test_model_that_samples_real_images_is_not_promoted_over_itself() -> None:
    chances = []
    for seed in range(TRIALS):
        candidate, champion, baseline, reference = (sample_gaussian(60, WIDTH, 4 * seed + each) for each in range(4))
        with one_thread():
            figures = [
                {each.figure: each}
                for each in kid_replicates([candidate, champion, baseline], reference, splits=SPLITS)
            ]
        headline = distance_headline(*figures, "points", "kid")
        chances.append(
            ComparisonMetrics(basis="generated", samples=60, reference=60, has_champion=True, headline=headline)
        )
    assert promotions(chances, delta=0) <= MAX_ERRORS


def test_a_model_better_by_exactly_delta_is_rarely_promoted() -> None:
    comparisons = [comparison("kid", seed, 120, better_by("kid", 0.3)) for seed in range(TRIALS)]
    assert promotions(comparisons, delta=0.3) <= MAX_ERRORS
    # It is better, and a gate without δ would say so much more often.
    assert promotions(comparisons, delta=0) > 2 * MAX_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "count"), [("kid", 350), ("fd", 320)])
def test_twice_delta_is_promoted_in_four_of_five_cases(figure: str, count: int) -> None:
    shift = better_by(figure, 0.6)
    comparisons = [comparison(figure, seed, count, shift) for seed in range(100)]
    assert promotions(comparisons, delta=0.3) >= 80
    # Who waits until the intervals of both no longer overlap promotes fewer: errors that both share count twice.
    config = GateConfig()
    apart = 0
    for each in comparisons:
        assert each.headline is not None
        candidate, champion = each.headline.candidate.interval(0.9), each.headline.champion.interval(0.9)
        apart += candidate.high + each.headline.required_lead(0.3) < champion.low
    assert apart < 80
    assert all(decide(each, config).verdict != GateVerdict.reject for each in comparisons)


def recall_verdicts(scale: float, trials: int, count: int) -> list[GateVerdict]:
    """What the rule on recall says of a champion against a candidate of ``scale`` times its variety, measured once."""
    verdicts = []
    for seed in range(trials):
        candidate, champion, reference = (sample_gaussian(count, WIDTH, 3 * seed + each) for each in range(3))
        with one_thread():
            own, other = share_replicates([candidate * scale, champion], reference, splits=SPLITS)
        metrics = ComparisonMetrics(
            basis="generated",
            samples=count,
            reference=count,
            has_champion=True,
            recall=difference(own["recall"], other["recall"]),
        )
        findings = decide(metrics, GateConfig(memorized=None, cost=None)).findings
        verdicts.append(next(each.verdict for each in findings if each.rule == "recall"))
    return verdicts


@pytest.mark.slow
def test_the_recall_rule_rarely_holds_equal_models() -> None:
    objections = [verdict for verdict in recall_verdicts(1.0, TRIALS, 60) if verdict != GateVerdict.promote]
    assert len(objections) <= MAX_ERRORS


def test_rule_on_recall_stops_models_of_less_variety() -> None:
    verdicts = recall_verdicts(0.5, 20, 150)
    assert verdicts.count(GateVerdict.promote) <= 1


HALF_THE_COST = Cost(candidate=2, champion=4, unit="network evaluations")


def as_good(figure: str, worse: float, count: int, trials: int = TRIALS, **config: Any) -> int:
    """How often a candidate whose distance is larger by the share ``worse`` is promoted at half the cost."""
    shift, settings = better_by(figure, -worse), GateConfig(**HEADLINE_ALONE | config)
    comparisons = [comparison(figure, seed, count, shift) for seed in range(trials)]
    cheaper = [each.model_copy(update={"cost": HALF_THE_COST}) for each in comparisons]
    return sum(decide(each, settings).verdict == GateVerdict.promote for each in cheaper)


def test_a_cheaper_model_worse_by_delta_is_rarely_promoted() -> None:
    assert as_good("kid", 0.3, 120, delta=0.3) <= MAX_ERRORS


def test_an_equal_cheaper_model_is_promoted_in_four_of_five() -> None:
    assert as_good("kid", 0.0, 800, trials=40, delta=0.3) >= 32


def test_shared_noise_detects_smaller_improvements() -> None:
    shift = better_by("kid", 0.3)
    alone, paired = ([comparison("kid", seed, 120, shift, common) for seed in range(40)] for common in (0.0, 0.98))
    assert promotions(alone, delta=0.05) < 20
    assert promotions(paired, delta=0.05) > 35


def test_a_model_that_is_surely_worse_is_rejected() -> None:
    comparisons = [comparison("kid", seed, 200, 2 * CHAMPION) for seed in range(10)]
    assert all(decide(each, GateConfig(**HEADLINE_ALONE)).verdict == GateVerdict.reject for each in comparisons)


def test_images_needed_suffice_in_four_of_five_cases() -> None:
    shift, config = better_by("kid", 0.5), GateConfig(delta=0.2, **HEADLINE_ALONE)
    truth = TRUE["kid"](WIDTH, CHAMPION, 1.0)
    few = [comparison("kid", seed, 120, shift) for seed in range(20)]
    squares = [each.headline.lead.error**2 for each in few if each.headline]
    lead = Estimate(value=0.5 * truth, error=(sum(squares) / len(squares)) ** 0.5, freedom=SPLITS)
    needed = images_needed(120, lead, 0.3 * truth, config.confidence)
    assert needed is not None
    comparisons = [comparison("kid", seed, needed, shift) for seed in range(50)]
    assert 0.6 * 50 < promotions(comparisons, delta=0.2) < 50


# Several looks, by Gaussian increments.

TRIALS_OF_LOOKS = 2500


def verdicts_after(
    lead: float, looks: int, held_out: float = 0.0, delta: float = 0.0, gives_up: bool = True
) -> list[str]:
    """Verdicts on a candidate with a true ``lead``, in errors of the first look, where each look has twice the images.

    The champion's distance is 20. ``held_out``: variance due to the held-out images, which stay the same, beside that
    of the first look's images, 1. ``gives_up``: no look follows where it would hardly decide, as in use.
    """
    rng, counts, verdicts, trials = np.random.default_rng(0), 2 ** np.arange(looks), [], TRIALS_OF_LOOKS
    config = GateConfig(delta=delta, **HEADLINE_ALONE)
    sums = (rng.standard_normal((trials, looks)) * np.sqrt(np.diff(counts, prepend=0))).cumsum(1)
    means = sums / counts + np.sqrt(held_out) * rng.standard_normal((trials, 1))
    errors = np.sqrt(1 / counts + held_out)
    for measured in lead * errors[0] + means:
        for look, (value, error) in enumerate(zip(measured, errors, strict=True), 1):
            each = Headline(
                name="kid",
                candidate=Estimate(value=20 - value, error=1.0, freedom=10**6),
                champion=Estimate(value=20, error=1.0, freedom=10**6),
                difference=Estimate(value=-value, error=error, freedom=10**6),
                real_baseline=0.0,
            )
            fields = {"basis": "generated", "reference": 500, "has_champion": True, "headline": each}
            decision = decide(ComparisonMetrics(samples=250 * 2**look, **fields), config, look, looks)
            if decision.verdict != GateVerdict.hold or (gives_up and not decision.worth_another_look(250 * 2**looks)):
                break
        verdicts.append(decision.verdict)
    return verdicts


@pytest.mark.parametrize(("looks", "held_out"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 1.0), (8, 0.0)])
def test_looks_together_promote_at_delta_as_rarely_as_one(looks: int, held_out: float) -> None:
    # At δ of the champion's distance, the most favourable candidate that must not be promoted.
    lead = 0.1 * 20 / np.sqrt(1 + held_out)
    promotions = verdicts_after(lead, looks, held_out, delta=0.1, gives_up=False).count(GateVerdict.promote)
    assert promotions <= binom.ppf(0.999, TRIALS_OF_LOOKS, 0.05)
    if held_out == 0:
        # All of the error is spent, but for what is rejected before a later look.
        assert promotions >= 0.8 * TRIALS_OF_LOOKS * 0.05


def test_further_looks_reject_worse_candidates_as_often_as_one() -> None:
    # Worse by four times δ, and rejected by one look in 74 % of all cases. Where δ is small beside the error, what is
    # not ahead is hardly looked at again, so that the first look must reject as often.
    lead = -float(norm.ppf(0.95) + norm.ppf(0.74))
    one, three, shared = (
        verdicts_after(lead, looks, held_out, delta=-lead / 4 / 20).count(GateVerdict.reject) / TRIALS_OF_LOOKS
        for looks, held_out in ((1, 0.0), (3, 0.0), (3, 1.0))
    )
    assert one == pytest.approx(0.74, abs=0.03)
    assert three >= 0.99 * one
    assert shared >= 0.97 * one


def test_further_looks_find_leads_more_often_than_bonferroni() -> None:
    lead, bonferroni = 1.5, norm.ppf(1 - 0.05 / 3)
    rng, counts = np.random.default_rng(1), np.array([1, 2, 4])
    sums = (rng.standard_normal((TRIALS_OF_LOOKS, 3)) * np.sqrt(np.diff(counts, prepend=0))).cumsum(1) + lead * counts
    power = (sums / np.sqrt(counts) > bonferroni).any(1).mean()
    assert verdicts_after(lead, 3, gives_up=False).count(GateVerdict.promote) / TRIALS_OF_LOOKS > power + 0.04


def test_a_good_candidate_is_hardly_ever_rejected_early() -> None:
    assert verdicts_after(2.0, 3).count(GateVerdict.reject) <= 4


@pytest.mark.parametrize("looks", [1, 2, 3, 5])
def test_confidences_of_looks_agree_with_the_multivariate_normal_distribution(looks: int) -> None:
    bounds = norm.ppf(sequential_confidences(looks, 0.95))
    information = 2.0 ** np.arange(looks)
    correlations = np.sqrt(np.minimum.outer(information, information) / np.maximum.outer(information, information))
    assert multivariate_normal(np.zeros(looks), correlations, seed=0).cdf(bounds) == pytest.approx(0.95, abs=2e-4)
    assert bounds * np.sqrt(information) == pytest.approx(bounds[-1] * np.sqrt(information[-1]))
