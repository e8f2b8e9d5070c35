"""Scores by class: against scikit-learn's discriminant analysis, closed forms, and classes spoiled one by one."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from diffusion.evaluation.metrics.per_group import (
    SHRINKAGE,
    LabelledFeatures,
    PerClass,
    evaluate_classes,
    fit_discriminant,
)

NAMES = ("boots", "coats", "hats")
WIDTH = 12


def features(count: int, seed: int, wrong: int | None = None) -> LabelledFeatures:
    """``count`` points of each class about a centre of its own; those of class ``wrong`` about that of the first."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(NAMES)).repeat_interleave(count)
    centres = 3 * torch.eye(len(NAMES), WIDTH)
    if wrong is not None:
        centres[wrong] = centres[0]
    return LabelledFeatures(centres[labels] + torch.randn(len(labels), WIDTH, generator=random), labels)


READER = fit_discriminant([(features(200, 99).features, features(200, 99).labels)], len(NAMES))


def per_class_of(generated: LabelledFeatures, real: LabelledFeatures | None = None) -> PerClass:
    return evaluate_classes(generated, real or features(60, 1), READER, NAMES, "some")


@pytest.mark.parametrize("piece", [7, 300])
def test_discriminant_matches_scikit_learn(piece: int) -> None:
    training, queries = features(50, 0), features(80, 1)
    reader = fit_discriminant(
        zip(torch.split(training.features, piece), torch.split(training.labels, piece), strict=True), len(NAMES)
    )
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[1 / 3] * 3)
    discriminant.fit(training.features.double().numpy(), training.labels.numpy())
    assert np.array_equal(reader(queries.features), discriminant.predict(queries.features.double().numpy()))
    scores = queries.features.double() @ reader.weights + reader.offsets
    expected = discriminant.decision_function(queries.features.double().numpy())
    np.testing.assert_allclose(scores - scores[:, :1], expected - expected[:, :1], atol=1e-8)


def test_unlabelled_images_and_empty_classes_are_ignored() -> None:
    training = features(50, 0)
    strangers = torch.randn(40, WIDTH) * 100
    labels = torch.cat([training.labels, torch.full((40,), 4)])
    reader = fit_discriminant([(torch.cat([training.features, strangers]), labels)], 4)
    plain = fit_discriminant([(training.features, training.labels)], 3)
    torch.testing.assert_close(reader.weights[:, :3], plain.weights)
    assert not (reader(strangers) == 3).any()


def test_with_one_image_per_class_the_nearest_class_wins() -> None:
    training = features(1, 0)
    reader = fit_discriminant([(training.features, training.labels)], len(NAMES))
    assert torch.equal(reader(training.features + 0.01), training.labels)


def test_rare_class_is_predicted_too() -> None:
    training = features(300, 0)
    rows = (training.labels != 2) | (torch.arange(900) % 30 == 0)
    reader = fit_discriminant([(training.features[rows], training.labels[rows])], 3)
    queries = features(200, 1)
    assert (reader(queries.select_class(2)) == 2).double().mean() > 0.85


def test_each_class_has_its_kid_over_all_pairs() -> None:
    generated, real = features(60, 0, wrong=1), features(60, 1)
    for label, result in enumerate(per_class_of(generated, real).classes):
        expected = kernel_mmd(
            generated.select_class(label).double().numpy(), real.select_class(label).double().numpy(), kid_kernel="poly"
        )
        assert result.kid == pytest.approx(expected, rel=1e-4)
        assert (result.name, result.samples, result.reference) == (NAMES[label], 60, 60)


def test_spoiled_class_is_the_worst_and_its_confusion_is_named() -> None:
    for wrong in (1, 2):
        per_class = per_class_of(features(60, 0, wrong=wrong))
        assert per_class.worst is not None
        assert per_class.least_recognized is not None
        assert per_class.worst.name == per_class.least_recognized.name == NAMES[wrong]
        assert per_class.worst.taken_for == NAMES[0]
        assert per_class.worst.agreement < 0.1
        assert per_class.worst.agreement_real > 0.9
        others = [each for each in per_class.classes if each.name != NAMES[wrong]]
        assert all(each.kid < per_class.worst.kid - 5 * per_class.worst.kid_se for each in others)
        assert per_class.agreement == pytest.approx(2 / 3, abs=0.1)


def test_real_images_are_recognised_as_often_as_real_ones() -> None:
    per_class = per_class_of(features(60, 0))
    assert per_class.agreement == pytest.approx(per_class.agreement_real, abs=0.06)
    for each in per_class.classes:
        assert abs(each.kid) < 3 * each.kid_se
        assert each.agreement_low <= each.agreement_real <= each.agreement_high


def test_classes_with_too_few_images_are_named_as_not_evaluated() -> None:
    generated, real = features(60, 0), features(60, 1)
    rows = (generated.labels != 1) | (torch.arange(180) < 60 + 19)
    per_class = per_class_of(LabelledFeatures(generated.features[rows], generated.labels[rows]), real)
    assert [each.name for each in per_class.classes] == ["boots", "hats"]
    assert [(each.name, each.samples, each.reference) for each in per_class.skipped] == [("coats", 19, 60)]


def test_images_of_any_class_belong_to_none() -> None:
    generated = features(60, 0)
    nothing: Tensor = torch.full_like(generated.labels, 3)
    per_class = per_class_of(LabelledFeatures(generated.features, nothing))
    assert (per_class.classes, per_class.worst, per_class.agreement) == ([], None, None)
    assert per_class.metrics().keys() == {"class_agreement_real"}
    assert PerClass.model_validate_json(per_class.model_dump_json()) == per_class


def test_figures_carry_the_name_of_their_features() -> None:
    per_class = per_class_of(features(60, 0, wrong=1))
    assert per_class.worst is not None
    assert per_class.metrics() == {
        "class_agreement": per_class.agreement,
        "class_agreement_real": per_class.agreement_real,
        "kid_worst_class_some": per_class.worst.kid,
        "kid_worst_class_se_some": per_class.worst.kid_se,
    }
