"""Choices among several: simulated, equal ones are called better as rarely as is promised, and better ones are found.

Images are drawn as their contributions to KID, from which value, jackknife and halves follow without a network.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from diffusion.evaluation.bootstrap import Replicates, difference
from diffusion.evaluation.estimate import Estimate, holm
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.guidance import KidDeviations, Look, choose, describe_guidance
from diffusion.evaluation.ranking import measure_leads, rank_evaluations
from diffusion.evaluation.results import GuidanceChoice
from diffusion.process.samplers import sampling_config
from tests.builders.evaluations import an_evaluation

KID, ERROR = 0.14, 0.2
"""KID, and the standard deviation of an image's contribution to the difference of two: over √500 that is 6.4 % of KID,
as measured with a model of digits."""
SAMPLES = {"first": 192, "last": 500}
KINDS = 7
SAMPLINGS = [sampling_config(), *(sampling_config(guidance=2 + n) for n in range(KINDS))]
Values = NDArray[np.float64]


def subsets(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return (subset for size in range(1, len(numbers) + 1) for subset in combinations(numbers, size))


def test_holm_is_the_closure_of_bonferroni_tests() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        p_values = rng.random(count) ** 3
        closed = [
            max(min(1, len(s) * min(p_values[list(s)])) for s in subsets(range(count)) if number in s)
            for number in range(count)
        ]
        assert holm(p_values.tolist()) == pytest.approx(closed)


class Kinds:
    """Contributions of each image to the KID of none and of ``KINDS`` kinds of guidance that lower it by ``gains``."""

    def __init__(self, gains: Sequence[float], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.images: dict[Look, Values] = {}
        self.reals: dict[Look, Values] = {}
        for look, count in SAMPLES.items():
            # What all kinds have in common is ten times as large, and cancels.
            common, real = rng.normal(0, 10 * ERROR, count), rng.normal(0, ERROR, 4 * count)
            kinds = rng.standard_t(5, (KINDS + 1, count)) * ERROR * np.sqrt(0.5 * 3 / 5)
            self.images[look] = KID * (1 - np.array([0, *gains]))[:, None] + common + kinds  # type: ignore[index]
            self.reals[look] = real + rng.normal(0, 0.1 * ERROR, (KINDS + 1, 4 * count))  # type: ignore[index]

    def measure_kid(self, kind: int, look: Look) -> KidDeviations:
        images, reals = self.images[look][kind], self.reals[look][kind]
        left_out = (-(x - x.mean()) / (len(x) - 1) for x in (images, reals))
        of_images, of_reals = map(torch.from_numpy, left_out)
        return float(images.mean() + reals.mean()), of_images, of_reals

    def expected(self, finalists: int = 3) -> int:
        """The choice, by another implementation."""

        def t_test(kind: int, look: Look) -> tuple[float, float]:
            x, y = (values[look][0] - values[look][kind] for values in (self.images, self.reals))
            gain = x.mean() + y.mean()
            return gain, float(student.sf(gain / np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y)), len(x) - 1))

        first = {kind: t_test(kind, "first")[0] for kind in range(1, KINDS + 1)}
        final = [kind for kind in sorted(first, key=first.__getitem__)[-finalists:] if first[kind] > 0]
        p_values = {kind: t_test(kind, "last")[1] for kind in final}
        found = [
            k for k in final if all(min(p_values[i] for i in s) * len(s) <= 0.05 for s in subsets(final) if k in s)
        ]
        if not found:
            return 0
        means = {kind: self.images["last"][kind].mean() + self.reals["last"][kind].mean() for kind in found}
        best = min(means, key=means.__getitem__)
        x, y = (
            {kind: values["last"][kind] - values["last"][best] for kind in found}
            for values in (self.images, self.reals)
        )
        return min(
            k for k in found if means[k] - means[best] <= np.hypot(x[k].std() / 500**0.5, y[k].std() / 2000**0.5)
        )


def measure_recall(loss: float, error: float = 0.02) -> Replicates:
    """Recall that is ``loss`` lower than that of none, with about this ``error``."""
    halves = np.random.default_rng(0).normal(0.7 - loss, np.sqrt(2) * error if loss else 0, (100, 2))
    return Replicates("recall", 0.7 - loss, torch.from_numpy(halves), 500, 2000, 1280)


def choose_kind(kinds: Kinds) -> GuidanceChoice:
    return choose(SAMPLINGS, kinds.measure_kid, lambda *_: measure_recall(0), GateConfig())


def chosen(choice: GuidanceChoice) -> int:
    return choice.scores.index(choice.chosen)


@pytest.mark.parametrize(
    ("gains", "least", "most"),
    [
        pytest.param([0] * KINDS, 0, 0.08, id="equals"),  # 5 %, and two standard errors of 200 trials
        pytest.param([0] * 6 + [0.2], 0.8, 1, id="one better by a fifth"),
        pytest.param([0.2, 0, 0.2, 0.1, 0, 0.15, -0.3], 0.9, 1, id="several better"),
        pytest.param([-0.2] * KINDS, 0, 0.01, id="worse"),
    ],
)
def test_guidance_replaces_none_for_a_real_gain_alone(gains: list[float], least: float, most: float) -> None:
    trials = [Kinds(gains, seed) for seed in range(200)]
    choices = [chosen(choose_kind(trial)) for trial in trials]
    assert choices == [trial.expected() for trial in trials]
    assert least <= np.mean([choice > 0 for choice in choices]) <= most


@pytest.mark.parametrize(
    ("loss", "error", "limit", "is_chosen"),
    [
        pytest.param(0.02, 0.02, 0.1, True, id="within the limit"),
        pytest.param(0.15, 0.02, 0.1, False, id="surely beyond"),
        pytest.param(0.08, 0.03, 0.1, False, id="perhaps beyond"),
        pytest.param(0.15, 0.02, None, True, id="no limit"),
        pytest.param(None, 0, 0.1, False, id="not measured"),
    ],
)
def test_guidance_that_may_cost_too_much_recall_is_not_chosen(
    loss: float | None, error: float, limit: float | None, is_chosen: bool
) -> None:
    kinds, gate = Kinds([0.5, 0.5, *[0] * 5], 0), GateConfig(recall_loss=limit)
    recall = None
    if loss is not None:
        # On the first images it seems to be within the limit.
        recall = lambda kind, look: measure_recall(loss if kind and look == "last" else 0, error)  # noqa: E731
    choice = choose(SAMPLINGS, kinds.measure_kid, recall, gate)
    lost = {"not a finalist" if loss is None else "may lose too much recall"}
    assert {score.verdict for score in choice.scores[1:3]} == ({"better", "chosen"} if is_chosen else lost)
    assert (choice.chosen.gain is not None) == is_chosen
    assert ("without guidance" in describe_guidance(choice)) == (not is_chosen)


def draw_models(rng: np.random.Generator, kids: Sequence[float], images: int = 100) -> list[Replicates]:
    """Models of these KIDs, of the same image numbers and reference, cut into the same halves."""
    common = rng.normal(0, 1, images)
    models = [kid + common + rng.normal(0, 1, images) for kid in kids]
    orders = rng.permuted(np.tile(np.arange(images), (50, 1)), axis=1).reshape(50, 2, images // 2)
    return sorted(
        (Replicates("kid", x.mean(), torch.from_numpy(x[orders].mean(2)), images, images, 1) for x in models),
        key=lambda model: model.value,
    )


@pytest.mark.parametrize("count", [2, 4, 8])
def test_of_equal_models_hardly_any_is_called_better(count: int) -> None:
    rng = np.random.default_rng(count)

    def has_winner(kids: Sequence[float]) -> bool:
        models = draw_models(rng, kids)
        leads = measure_leads([""] * count, lambda i, j: difference(models[j], models[i]))
        return any(lead.is_sure for lead in leads)

    assert np.mean([has_winner([0] * count) for _ in range(200)]) <= 0.08
    assert np.mean([has_winner([0] * (count - 1) + [1]) for _ in range(20)]) >= 0.95


def test_hardly_a_sweep_of_equal_runs_calls_one_better() -> None:
    rng, template, claims = np.random.default_rng(0), an_evaluation([0.2]), []

    def rank(kids: Sequence[float]) -> list[bool]:
        evaluations = [
            template.model_copy(
                update={
                    "best": template.best.model_copy(
                        update={"scores": template.best.scores.model_copy(update={"kid": kid})}
                    )
                }
            )
            for kid in kids
        ]
        ranking = rank_evaluations(evaluations, [{"x": n} for n in range(len(kids))], [""] * len(kids))
        return [lead.is_sure for lead in ranking.leads]

    claims = [any(rank(rng.normal(0.2, template.best.scores.kid_se, 8).tolist())) for _ in range(200)]
    assert np.mean(claims) <= 0.08
    assert rank([0.2, 0.21, 0.5]) == [False, True]


def test_p_values_are_those_of_students_test() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 20)
    estimate = Estimate(value=x.mean(), error=x.std(ddof=1) / np.sqrt(20), freedom=19)
    assert estimate.p_value == pytest.approx(student.sf(estimate.value / estimate.error, 19))
    assert [Estimate(value=value).p_value for value in (-1, 0, 1)] == [1, 1, 0]
