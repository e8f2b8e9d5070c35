"""Scores by class: against scikit-learn's discriminant analysis, closed forms, and classes spoiled one by one."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from diffusion.evaluation.metrics.per_class import SHRINKAGE, Labelled, PerClass, evaluate_classes, fit_discriminant

NAMES = ("boots", "coats", "hats")
WIDTH = 12


def features(count: int, seed: int, wrong: int | None = None) -> Labelled:
    """``count`` points of each class about a centre of its own; those of class ``wrong`` about that of the first."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(NAMES)).repeat_interleave(count)
    centres = 3 * torch.eye(len(NAMES), WIDTH)
    if wrong is not None:
        centres[wrong] = centres[0]
    return Labelled(centres[labels] + torch.randn(len(labels), WIDTH, generator=random), labels)


READER = fit_discriminant([(features(200, 99).features, features(200, 99).labels)], len(NAMES))


def judged(drawn: Labelled, real: Labelled | None = None) -> PerClass:
    return evaluate_classes(drawn, real or features(60, 1), READER, NAMES, "some")


@pytest.mark.parametrize("piece", [7, 300])
def test_discriminant_matches_scikit_learn(piece: int) -> None:
    given, asked = features(50, 0), features(80, 1)
    reader = fit_discriminant(
        zip(torch.split(given.features, piece), torch.split(given.labels, piece), strict=True), len(NAMES)
    )
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[1 / 3] * 3)
    theirs.fit(given.features.double().numpy(), given.labels.numpy())
    assert np.array_equal(reader(asked.features), theirs.predict(asked.features.double().numpy()))
    scores = asked.features.double() @ reader.weights + reader.offsets
    expected = theirs.decision_function(asked.features.double().numpy())
    np.testing.assert_allclose(scores - scores[:, :1], expected - expected[:, :1], atol=1e-8)


def test_unlabelled_images_and_empty_classes_are_ignored() -> None:
    given = features(50, 0)
    strangers = torch.randn(40, WIDTH) * 100
    labels = torch.cat([given.labels, torch.full((40,), 4)])
    reader = fit_discriminant([(torch.cat([given.features, strangers]), labels)], 4)
    plain = fit_discriminant([(given.features, given.labels)], 3)
    torch.testing.assert_close(reader.weights[:, :3], plain.weights)
    assert not (reader(strangers) == 3).any()


def test_of_one_image_of_each_class_the_nearest_is_the_answer() -> None:
    known = features(1, 0)
    reader = fit_discriminant([(known.features, known.labels)], len(NAMES))
    assert torch.equal(reader(known.features + 0.01), known.labels)


def test_rare_class_is_predicted_too() -> None:
    given = features(300, 0)
    kept = (given.labels != 2) | (torch.arange(900) % 30 == 0)
    reader = fit_discriminant([(given.features[kept], given.labels[kept])], 3)
    asked = features(200, 1)
    assert (reader(asked.of(2)) == 2).double().mean() > 0.85


def test_each_class_has_its_kid_over_all_pairs() -> None:
    drawn, real = features(60, 0, wrong=1), features(60, 1)
    for label, found in enumerate(judged(drawn, real).classes):
        expected = kernel_mmd(drawn.of(label).double().numpy(), real.of(label).double().numpy(), kid_kernel="poly")
        assert found.kid == pytest.approx(expected, rel=1e-4)
        assert (found.name, found.samples, found.reference) == (NAMES[label], 60, 60)


def test_spoiled_class_is_the_worst_and_its_confusion_is_named() -> None:
    for wrong in (1, 2):
        found = judged(features(60, 0, wrong=wrong))
        assert found.worst is not None
        assert found.least_recognized is not None
        assert found.worst.name == found.least_recognized.name == NAMES[wrong]
        assert found.worst.taken_for == NAMES[0]
        assert found.worst.agreement < 0.1
        assert found.worst.agreement_real > 0.9
        others = [each for each in found.classes if each.name != NAMES[wrong]]
        assert all(each.kid < found.worst.kid - 5 * found.worst.kid_se for each in others)
        assert found.agreement == pytest.approx(2 / 3, abs=0.1)


def test_real_images_are_recognised_as_often_as_real_ones() -> None:
    found = judged(features(60, 0))
    assert found.agreement == pytest.approx(found.agreement_real, abs=0.06)
    for each in found.classes:
        assert abs(each.kid) < 3 * each.kid_se
        assert each.agreement_low <= each.agreement_real <= each.agreement_high


def test_classes_with_too_few_images_are_named_as_not_evaluated() -> None:
    drawn, real = features(60, 0), features(60, 1)
    kept = (drawn.labels != 1) | (torch.arange(180) < 60 + 19)
    found = judged(Labelled(drawn.features[kept], drawn.labels[kept]), real)
    assert [each.name for each in found.classes] == ["boots", "hats"]
    assert [(each.name, each.samples, each.reference) for each in found.skipped] == [("coats", 19, 60)]


def test_images_of_any_class_belong_to_none() -> None:
    drawn = features(60, 0)
    nothing: Tensor = torch.full_like(drawn.labels, 3)
    found = judged(Labelled(drawn.features, nothing))
    assert (found.classes, found.worst, found.agreement) == ([], None, None)
    assert found.metrics().keys() == {"class_agreement_real"}
    assert PerClass.model_validate_json(found.model_dump_json()) == found


def test_figures_carry_the_name_of_their_features() -> None:
    found = judged(features(60, 0, wrong=1))
    assert found.worst is not None
    assert found.metrics() == {
        "class_agreement": found.agreement,
        "class_agreement_real": found.agreement_real,
        "kid_worst_class_some": found.worst.kid,
        "kid_worst_class_se_some": found.worst.kid_se,
    }
