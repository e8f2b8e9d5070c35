"""Scores that order rightly: real images made worse in growing doses, by the score that is there to see it."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.copies import PIXELS, Memorization, detect_memorization
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from diffusion.evaluation.metrics.per_group import LabelledFeatures, PerClass, evaluate_classes, fit_discriminant
from diffusion.evaluation.metrics.registration import describe_images, find_registered
from diffusion.evaluation.metrics.scores import Scores, compute_scores
from tests.builders.degraded import blurred, compressed, with_copies, with_noise, without_classes
from tests.builders.real_images import FASHION, clothes

pytestmark = pytest.mark.skipif(
    not FASHION.is_dir(), reason="Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
)
COUNT = 300
"""Images evaluated, and images held out."""
TRAINING = 900
CLASSES = [str(number) for number in range(10)]


@cache
def sets() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and classes: of training, held out, and what a perfect model generates, with more to choose from."""
    source_images, classes = clothes(4000)
    parts = {"training": slice(TRAINING), "held_out": slice(TRAINING, TRAINING + COUNT), "generated": slice(1200, 4000)}
    return {name: (source_images[part], classes[part]) for name, part in parts.items()}


def generated_images() -> Tensor:
    return sets()["generated"][0][:COUNT]


@cache
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0(32)


@cache
def features(name: str) -> Tensor:
    return extractor()(sets()[name][0])


def scores(images: Tensor) -> Scores:
    return compute_scores(extractor()(images), features("held_out"), "efflite0")


@cache
def real_baseline() -> Scores:
    return scores(generated_images())


def grows(values: Sequence[float], by: float = 0.0) -> bool:
    return all(following > value + by for value, following in pairwise(values))


@pytest.mark.parametrize(
    ("spoil", "doses"),
    [
        pytest.param(blurred, [0.5, 1.0, 3.0], id="blur"),
        pytest.param(with_noise, [0.03, 0.1, 0.4], id="noise"),
        pytest.param(compressed, [80, 20, 3], id="JPEG artefacts"),
    ],
)
def test_distances_grow_with_image_degradation(spoil: Callable[[Tensor, float], Tensor], doses: list[float]) -> None:
    results = [real_baseline(), *(scores(spoil(generated_images(), dose)) for dose in doses)]
    assert grows([each.fd for each in results])
    assert grows([each.kid for each in results], by=results[0].kid_se)
    assert results[-1].precision < 0.8 * results[0].precision


def test_missing_classes_raise_distances_and_lower_recall_only() -> None:
    results = [
        real_baseline(),
        *(scores(without_classes(*sets()["generated"], dropped, COUNT)) for dropped in (2, 5, 9)),
    ]
    assert grows([each.fd for each in results])
    assert grows([each.kid for each in results], by=results[0].kid_se)
    coverages = [each.coverage or 0 for each in results]
    assert grows([-each for each in coverages], by=0.03)
    # Recall hears of it late: its neighbourhoods reach into classes that are not there.
    assert results[-1].recall < 0.5 * results[0].recall
    assert all(each.precision > 0.9 * results[0].precision for each in results)


def test_label_agreement_falls_with_each_wrong_class() -> None:
    images, classes = sets()["generated"]
    reader = fit_discriminant([(features("training"), sets()["training"][1])], len(CLASSES))
    real = LabelledFeatures(features("held_out"), sets()["held_out"][1])
    features_of_images = extractor()(images[: 2 * COUNT])
    last = (classes[: 2 * COUNT] == 9).nonzero()[:, 0]

    def per_class_of(wrong: int) -> PerClass:
        """Asked for one of the first so many classes, the model generates the last."""
        labels = classes[: 2 * COUNT]
        instead = last[torch.arange(len(labels)) % len(last)]
        return evaluate_classes(
            LabelledFeatures(
                features_of_images[torch.where(labels < wrong, instead, torch.arange(len(labels)))], labels
            ),
            real,
            reader,
            CLASSES,
            "efflite0",
        )

    results = [per_class_of(wrong) for wrong in (0, 1, 4, 9)]
    agreements = [each.agreement or 0 for each in results]
    assert grows([-each for each in agreements], by=0.05)
    assert agreements[0] == pytest.approx(results[0].agreement_real, abs=0.08)
    assert results[1].worst == results[1].least_recognized
    assert results[1].worst is not None
    assert (results[1].worst.name, results[1].worst.taken_for) == ("0", "9")


def detect_copies_among(images: Tensor) -> Memorization:
    def nearest(images: Tensor) -> dict[str, NearestNeighbours]:
        training = sets()["training"][0]
        return {
            PIXELS: find_registered([images], [describe_images(training)], lambda rows: training[rows]),
            "efflite0": find_nearest(extractor()(images), [features("training")]),
        }

    return detect_memorization(nearest(images), nearest(sets()["held_out"][0]))


@pytest.mark.long
@pytest.mark.slow
def test_copies_are_counted_though_no_distance_sees_them() -> None:
    training = sets()["training"][0]
    several = [with_copies(generated_images(), training[:count]) for count in (0, 15, 60, 240)]
    detections = [detect_copies_among(each) for each in several]
    assert grows([each.share for each in detections], by=0.03)
    assert [each.copy_share.excess for each in detections] == pytest.approx([0, 0.05, 0.2, 0.8], abs=0.04)
    assert detections[0].p_value > 0.01 > 1e-4 > detections[1].p_value
    # What copies all of its images is as good as real ones to any distance.
    assert abs(scores(training[:COUNT]).kid) < 3 * scores(training[:COUNT]).kid_se
