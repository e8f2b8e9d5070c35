"""Which first versions become champion: digits made worse in ways that single metrics do not see."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion.evaluation.cache import load_or_compute
from diffusion.evaluation.comparison import own_metrics
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig, GateDecision, GateVerdict, decide
from diffusion.evaluation.gate_metrics import ComparisonMetrics, CopyShare
from diffusion.evaluation.model_metrics import ClassMetrics
from tests.builders.comparisons import SAMPLING
from tests.builders.degraded import blurred
from tests.builders.real_images import digits
from tests.builders.small_datasets import write_dataset
from tests.builders.small_models import write_model

SET = 1000
"""Images of the data set, of which every other one is held out; the rest is what models may have generated."""
COUNT = EvaluationConfig().samples
Spoil = Callable[[Tensor, Tensor], Tensor]
"""Images from good ones, (N, 1, 28, 28), and from their class numbers, (N,)."""


def mean_of(*images: Tensor) -> Tensor:
    return torch.stack(images).float().mean(0).round().to(torch.uint8)


def swapped(images: Tensor, labels: Tensor) -> Tensor:
    """Fours for nines, and the other way round: together they are as real as before."""
    mixed = images.clone()
    fours, nines = ((labels == label).nonzero()[:, 0] for label in (4, 9))
    count = min(len(fours), len(nines))
    mixed[fours[:count]], mixed[nines[:count]] = images[nines[:count]], images[fours[:count]]
    return mixed


def noise(images: Tensor) -> Tensor:
    return torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def half_noise(images: Tensor, labels: Tensor) -> Tensor:
    mixed = images.clone()
    mixed[::2] = noise(images)[::2]
    return mixed


def one_of_each(images: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([images[labels == label][0] for label in range(10)])


MODELS: dict[str, tuple[Spoil, set[str]]] = {
    "other real images": (lambda images, labels: images, set()),
    "half noise": (half_noise, {"precision"}),
    "one class": (lambda images, labels: images[labels == 7].repeat(20, 1, 1, 1)[:COUNT], {"coverage"}),
    "averages of two": (lambda images, labels: mean_of(images, images.roll(1, 0)), {"precision", "coverage"}),
    "blur of 1 pixel": (lambda images, labels: blurred(images, 1.0), {"precision", "coverage"}),
    "blur of 3 pixels": (lambda images, labels: blurred(images, 3.0), {"precision", "coverage"}),
    "noise": (lambda images, labels: noise(images), {"precision", "coverage", "class agreement"}),
    "the mean image": (
        lambda images, labels: mean_of(*images).expand_as(images),
        {"precision", "coverage", "class agreement"},
    ),
    "ten images": (lambda images, labels: one_of_each(images, labels)[labels], {"recall", "coverage"}),
    "classes in any order": (lambda images, labels: images.roll(3, 0), {"class agreement"}),
    "two classes swapped": (swapped, {"class agreement"}),
}
"""Images of each model, and rules that hold it among others; none: it becomes champion."""


@pytest.fixture(scope="module")
def decisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GateDecision]:
    """The gate's decision on each model, by its default features and number of images."""
    folder, config, features = tmp_path_factory.mktemp("first"), EvaluationConfig(), dict[bytes, Tensor]()
    source_images, classes = digits(5000)
    names = [str(number) for number in range(10)]
    labels = [names[number] for number in classes[:SET]]
    write_dataset(folder / "data", source_images[:SET].numpy(), per_shard=SET, labels=labels, held_out_every=2)
    spare = [iter(source_images[SET:][classes[SET:] == number]) for number in range(10)]
    evaluator, models = Evaluator(folder / "data", config, SAMPLING, folder / "evaluations"), []
    paths = [
        write_model(folder / f"{seed}.safetensors", seed, seed, size=28, classes=dict.fromkeys(names, 50))
        for seed in range(len(MODELS))
    ]
    wanted = evaluator.model(paths[0]).labels
    assert wanted is not None
    good = torch.stack([next(spare[label]) for label in wanted.tolist()])
    for path, (spoil, _) in zip(paths, MODELS.values(), strict=True):
        model, images = evaluator.model(path), list(spoil(good, wanted))
        keys = [image.numpy().tobytes() for image in images]
        # Many models generate the same images.
        if new := {key: image for key, image in zip(keys, images, strict=True) if key not in features}:
            features |= zip(new, evaluator.real.extractor(torch.stack([*new.values()])), strict=True)
        found = torch.stack([features[key] for key in keys])
        load_or_compute(folder / "evaluations", model.features_key, lambda found=found: {"features": found})
        models.append(model)
    with pytest.MonkeyPatch.context() as patch:
        # Errors from 20 cuts, right to a sixth, in a fifth of the time.
        patch.setattr("diffusion.evaluation.evaluator.SPLITS", 20)
        *replicates, baseline = evaluator.replicates(models)
    decisions = {}
    for name, model, halves in zip(MODELS, models, replicates, strict=True):
        metrics = ComparisonMetrics(
            basis="generated",
            samples=COUNT,
            reference=len(evaluator.real.compared),
            has_champion=False,
            memorized=CopyShare(share=0.0, expected=0, p_value=1.0),
            **own_metrics(evaluator, model.scores, ClassMetrics().compute(model), halves, baseline),
        )
        decisions[name] = decide(metrics, GateConfig())
    return decisions


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bad_first_versions_are_held_by_the_rules_they_break(name: str, decisions: dict[str, GateDecision]) -> None:
    decision, (_, rules) = decisions[name], MODELS[name]
    assert decision.verdict == (GateVerdict.hold if rules else GateVerdict.promote), decision.reasons
    assert rules <= {finding.rule for finding in decision.findings if finding.verdict == GateVerdict.hold}


def test_reasons_name_the_classes_that_are_not_recognised(decisions: dict[str, GateDecision]) -> None:
    [reason] = decisions["two classes swapped"].reasons
    assert "'9' 0." in reason
    assert "'1'" not in reason
