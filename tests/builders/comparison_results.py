"""A comparison with the champion as its report shows it: of real images, some of them noisy or copied."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.common.fingerprint import fingerprint
from diffusion.evaluation.bootstrap import Replicates, difference
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids, distance_headline
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.gate import GateConfig, decide
from diffusion.evaluation.gate_metrics import ComparisonMetrics
from diffusion.evaluation.metrics.copies import (
    PIXELS,
    Memorization,
    detect_duplicates,
    detect_memorization,
    shifted_thumbnails,
)
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss, LevelLoss
from diffusion.evaluation.metrics.per_group import LabelledFeatures, PerClass, evaluate_classes, fit_discriminant
from diffusion.evaluation.metrics.pixel_metrics import compare_appearance, measure_appearance
from diffusion.evaluation.metrics.registration import describe_images, find_registered
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.evaluation.results import EvaluationConditions, ModelEvaluation, RealBaseline
from diffusion.process.likelihood import noise_levels
from diffusion.process.samplers import sampling_config
from tests.builders import NO_BARS
from tests.builders.degraded import with_copies, with_noise
from tests.builders.one_metric import compute_replicates
from tests.builders.real_images import images

COUNT = 240
"""Images of each set; of training there are three times as many."""
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
TWICE = [20, 31, 42]
"""Images of the candidate that are one."""
GATE = GateConfig(memorized=None, cost=None, **NO_BARS)


@dataclass(frozen=True)
class Shown:
    """A comparison with the images and names that its report shows."""

    comparison: ChampionComparison
    grids: SampleGrids
    model: str = "clothes"
    dataset: str = "fashion"
    candidate: str = "version 3"
    champion: str | None = "version 2"


def example_comparison(with_champion: bool = True) -> Shown:
    """A noisy champion, and a candidate that generates real images and a few of those that it learned from."""
    sets, _ = _sets()
    generated = [sets["candidate"], *([sets["champion"]] if with_champion else [])]
    points = [shifted_thumbnails(each)[0] for each in (*generated, sets["real baseline"])]
    reference = shifted_thumbnails(sets["held out"])[0]
    *replicates, baseline = compute_replicates(points, reference, 20)
    sides = [
        _side(images, point, reference, metrics)
        for images, point, metrics in zip(generated, points, replicates, strict=False)
    ]
    compared = ComparisonMetrics(
        basis="generated",
        samples=COUNT,
        reference=COUNT,
        has_champion=with_champion,
        headline=distance_headline(*replicates, baseline, PIXELS, "kid") if with_champion else None,
        recall=difference(replicates[0]["recall"], replicates[1]["recall"]) if with_champion else None,
    )
    per_class, pairs = sides[0].per_class, sides[0].memorization.pairs
    assert per_class is not None
    conditions = EvaluationConditions(
        content_digest="c" * 64,
        extractor=PIXELS,
        extractor_digest="e" * 64,
        preprocessing="8 pixels",
        evaluation=EvaluationConfig(seed=1),
        sampling=sampling_config(),
    )
    comparison = ChampionComparison(
        conditions=conditions,
        key=conditions.key,
        gate=GATE,
        candidate=sides[0],
        champion=sides[1] if with_champion else None,
        real_baseline=RealBaseline(
            scores=compute_scores(points[-1], reference, PIXELS), estimates=_estimates(baseline)
        ),
        compared=compared,
        look=1,
        confidence=GATE.confidence,
        decision=decide(compared, GATE),
    )
    grids = SampleGrids(
        real=sets["held out"][:64],
        candidate=sets["candidate"][:64],
        champion=sets["champion"][:64] if with_champion else None,
        nearest_generated=sets["candidate"][[p.generated for p in pairs]],
        nearest_training=sets["training"][[p.training for p in pairs]],
        duplicates=[sets["candidate"][group.members] for group in sides[0].duplicates.groups],
        captions=([], []),
        classes=_class_samples(per_class),
    )
    if with_champion:
        return Shown(comparison, grids)
    return Shown(comparison, grids, candidate="version 1", champion=None)


def _estimates(metrics: dict[str, Replicates]) -> dict[str, MetricEstimate]:
    return {f"{name}_{PIXELS}": MetricEstimate.from_estimate(each.estimate) for name, each in metrics.items()}


def _side(images: Tensor, points: Tensor, reference: Tensor, metrics: dict[str, Replicates]) -> ModelEvaluation:
    sets, _ = _sets()
    is_champion = images is sets["champion"]
    return ModelEvaluation(
        sampling=sampling_config(),
        sha256="a" * 64,
        family="ddpm" if is_champion else "autoregressive",
        images=1000,
        fingerprint=fingerprint(8, "fp32", "cpu"),
        scores=compute_scores(points, reference, PIXELS),
        memorization=_copies(images),
        duplicates=detect_duplicates(shifted_thumbnails(images), shifted_thumbnails(sets["held out"])),
        drift=compare_appearance(measure_appearance(images), measure_appearance(sets["held out"])),
        per_class=_by_class(images),
        held_out_loss=_losses(0.9 if is_champion else 0.8),
        gflop=1.0,
        estimates=_estimates(metrics),
    )


@cache
def _sets() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images, and their classes."""
    source_images, classes = images(6 * COUNT)
    names = ("training", "held out", "champion", "candidate")
    parts = dict(zip(names, (slice(3 * COUNT), *(slice(n * COUNT, (n + 1) * COUNT) for n in (3, 4, 5))), strict=True))
    sets = {name: source_images[part] for name, part in parts.items()}
    sets["real baseline"] = sets["training"][:COUNT]
    sets["champion"] = with_noise(sets["champion"], 0.3)
    sets["candidate"] = with_copies(sets["candidate"], sets["training"][-12:])
    sets["candidate"][TWICE] = sets["candidate"][TWICE[0]].clone()
    labels = {name: classes[part] for name, part in parts.items()}
    labels["candidate"] = torch.cat([labels["training"][-12:], labels["candidate"][12:]])
    labels["candidate"][TWICE] = labels["candidate"][TWICE[0]].clone()
    return sets, labels


def _copies(images: Tensor) -> Memorization:
    sets, _ = _sets()
    training = sets["training"]
    near, of_real = (
        find_registered([each], [describe_images(training)], lambda rows: training[rows])
        for each in (images, sets["held out"])
    )
    return detect_memorization({PIXELS: near}, {PIXELS: of_real})


def _by_class(images: Tensor) -> PerClass:
    sets, labels = _sets()
    reader = fit_discriminant([(shifted_thumbnails(sets["training"])[0], labels["training"])], len(CLASSES))
    whose = "candidate" if images is sets["candidate"] else "champion"
    real = LabelledFeatures(shifted_thumbnails(sets["held out"])[0], labels["held out"])
    return evaluate_classes(
        LabelledFeatures(shifted_thumbnails(images)[0], labels[whose]), real, reader, CLASSES, PIXELS
    )


def _class_samples(per_class: PerClass) -> dict[str, tuple[Tensor, Tensor]]:
    """The first four real and generated images of the two worst classes."""
    sets, labels = _sets()
    numbers = {each.name: CLASSES.index(each.name) for each in per_class.worst_first[:2]}

    def of(whose: str, number: int) -> Tensor:
        return sets[whose][labels[whose] == number][:4]

    return {name: (of("held out", number), of("candidate", number)) for name, number in numbers.items()}


def _losses(worst: float) -> HeldOutLoss:
    edges = noise_levels().tolist()
    levels = [
        LevelLoss(sigma_low=low, sigma_high=high, loss=worst * (0.1 + 0.05 * n), loss_se=0.01)
        for n, (low, high) in enumerate(pairwise(edges))
    ]
    return HeldOutLoss(
        images=COUNT, levels=levels, loss=0.5, loss_se=0.01, bits_per_dim=3 + worst, bits_per_dim_se=0.02
    )
