"""Scores that order rightly: real images made worse in growing doses, by the score that is there to see it."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.copies import (
    PIXELS,
    Memorization,
    detect_memorization,
)
from diffusion.evaluation.metrics.distances import Scores, compute_scores
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from diffusion.evaluation.metrics.per_class import Labelled, PerClass, evaluate_classes, fit_discriminant
from diffusion.evaluation.metrics.registration import find_registered
from tests.builders.degraded import blurred, compressed, with_copies, with_noise, without_classes
from tests.builders.real_images import FASHION, clothes

pytestmark = pytest.mark.skipif(
    not FASHION.is_dir(), reason="Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
)
COUNT = 300
"""Images judged, and images held out."""
TRAINING = 900
CLASSES = [str(number) for number in range(10)]


@cache
def sets() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and classes: of training, held out, and what a perfect model draws, with more to choose from."""
    shown, classes = clothes(4000)
    parts = {"training": slice(TRAINING), "held_out": slice(TRAINING, TRAINING + COUNT), "drawn": slice(1200, 4000)}
    return {name: (shown[part], classes[part]) for name, part in parts.items()}


def drawn() -> Tensor:
    return sets()["drawn"][0][:COUNT]


@cache
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0(32)


@cache
def features(name: str) -> Tensor:
    return extractor()(sets()[name][0])


def scores(judged: Tensor) -> Scores:
    return compute_scores(extractor()(judged), features("held_out"), "efflite0")


@cache
def floor() -> Scores:
    return scores(drawn())


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
    found = [floor(), *(scores(spoil(drawn(), dose)) for dose in doses)]
    assert grows([each.fd for each in found])
    assert grows([each.kid for each in found], by=found[0].kid_se)
    assert found[-1].precision < 0.8 * found[0].precision


def test_missing_classes_raise_distances_and_lower_recall_only() -> None:
    found = [floor(), *(scores(without_classes(*sets()["drawn"], dropped, COUNT)) for dropped in (2, 5, 9))]
    assert grows([each.fd for each in found])
    assert grows([each.kid for each in found], by=found[0].kid_se)
    coverages = [each.coverage or 0 for each in found]
    assert grows([-each for each in coverages], by=0.03)
    # Recall hears of it late: its neighbourhoods reach into classes that are not there.
    assert found[-1].recall < 0.5 * found[0].recall
    assert all(each.precision > 0.9 * found[0].precision for each in found)


def test_label_agreement_falls_with_each_wrong_class() -> None:
    shown, classes = sets()["drawn"]
    reader = fit_discriminant([(features("training"), sets()["training"][1])], len(CLASSES))
    real = Labelled(features("held_out"), sets()["held_out"][1])
    seen = extractor()(shown[: 2 * COUNT])
    last = (classes[: 2 * COUNT] == 9).nonzero()[:, 0]

    def judged(wrong: int) -> PerClass:
        """Asked for one of the first so many classes, the model draws the last."""
        asked = classes[: 2 * COUNT]
        instead = last[torch.arange(len(asked)) % len(last)]
        return evaluate_classes(
            Labelled(seen[torch.where(asked < wrong, instead, torch.arange(len(asked)))], asked),
            real,
            reader,
            CLASSES,
            "efflite0",
        )

    found = [judged(wrong) for wrong in (0, 1, 4, 9)]
    agreements = [each.agreement or 0 for each in found]
    assert grows([-each for each in agreements], by=0.05)
    assert agreements[0] == pytest.approx(found[0].agreement_real, abs=0.08)
    assert found[1].worst == found[1].least_recognized
    assert found[1].worst is not None
    assert (found[1].worst.name, found[1].worst.taken_for) == ("0", "9")


def detect_copies_among(judged: Tensor) -> Memorization:
    def found(shown: Tensor) -> dict[str, NearestNeighbours]:
        training = sets()["training"][0]
        return {
            PIXELS: find_registered([shown], [training], lambda rows: training[rows]),
            "efflite0": find_nearest(extractor()(shown), [features("training")]),
        }

    return detect_memorization(found(judged), found(sets()["held_out"][0]))


@pytest.mark.long
@pytest.mark.slow
def test_copies_of_training_images_are_counted_and_no_distance_sees_them() -> None:
    training = sets()["training"][0]
    several = [with_copies(drawn(), training[:count]) for count in (0, 15, 60, 240)]
    found = [detect_copies_among(each) for each in several]
    assert grows([each.share for each in found], by=0.03)
    assert [each.excess for each in found] == pytest.approx([0, 0.05, 0.2, 0.8], abs=0.04)
    assert found[0].p_value > 0.01 > 1e-4 > found[1].p_value
    # What copies all of its images is as good as real ones to any distance.
    assert abs(scores(training[:COUNT]).kid) < 3 * scores(training[:COUNT]).kid_se
