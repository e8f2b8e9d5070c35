"""Guidance is chosen by evaluation: none, unless some brings images significantly nearer to training images."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import export, load_model
from diffusion.data.dataset import Dataset
from diffusion.evaluation.cache import load_or_compute
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.kid import compute_kid
from diffusion.evaluation.reports.evaluation_report import EvaluationPage, findings
from diffusion.evaluation.results import Evaluation, GuidanceChoice, GuidanceScore, GuidanceVerdict
from diffusion.generation.config import make_request
from diffusion.generation.generate import sample
from diffusion.generation.requests import answer
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders.captioned import squares
from tests.builders.comparisons import CONFIG, SAMPLING, Watcher, discs, training_images
from tests.builders.evaluations import an_evaluation
from tests.builders.evaluations import images as shown_images
from tests.builders.html_pages import Page
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as NETWORK
from tests.builders.small_models import write_model

CLASSES = {"left": 60, "right": 60}
CANDIDATES = {
    "none": SAMPLING,
    "1.5 at σ from 0.2 to 5": SAMPLING.with_changes({"guidance": 1.5, "guidance_interval": (0.2, 5)}),
    "2 at σ from 0.2 to 5": SAMPLING.with_changes({"guidance": 2, "guidance_interval": (0.2, 5)}),
    "3 at σ from 0.2 to 5": SAMPLING.with_changes({"guidance": 3, "guidance_interval": (0.2, 5)}),
    "2 at all σ": SAMPLING.with_changes({"guidance": 2}),
}
LOOKS = {"first": slice(0, 16), "last": slice(16, 16 + CONFIG.samples)}
"""Numbers of the images that select finalists, a third of ``samples`` in whole batches, and of those that decide."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return discs(tmp_path / "data" / "discs")


def write_checkpoint(
    folder: Path, classes: dict[str, int] | None = CLASSES, guide: int | None = None, **training: Any
) -> Path:
    return write_model(
        folder / "checkpoints" / "100.safetensors",
        seed=1,
        images=100,
        classes=classes,
        training={"condition_dropout": 0.1} | training,
        guide=guide,
    )


def evaluated(data: Path, checkpoint: Path, output: Path, images: dict[str, Tensor]) -> Evaluation:
    """An evaluation of a model that generates these ``images``, by guidance."""
    evaluator = Evaluator(data, CONFIG, SAMPLING, output / "evaluations")
    rows = evaluator.real.training_rows(CONFIG.seed, 5 * CONFIG.samples)
    for (text, generated), numbers in product(images.items(), LOOKS.values()):
        model = evaluator.model(checkpoint, numbers.stop, CANDIDATES[text], seed=CONFIG.seed + 2, captioned=rows)
        load_or_compute(evaluator.folder, model.generated_key, partial(dict, images=generated[: numbers.stop]))
    return evaluate(data, [checkpoint], CONFIG, SAMPLING, output)


def scores_of(evaluation: Evaluation) -> list[GuidanceScore]:
    assert evaluation.guidance is not None
    return evaluation.guidance.scores


def spoiled(data: Path, deviation: float) -> Tensor:
    clean = training_images(data, LOOKS["last"].stop)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return (clean + deviation * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.slow
def test_guidance_is_scored_on_images_the_gate_does_not_use(data: Path, tmp_path: Path) -> None:
    checkpoint, watcher = write_checkpoint(tmp_path), Watcher()
    evaluation = evaluate(data, [checkpoint], CONFIG, SAMPLING, tmp_path / "report", progress=watcher)
    scores = scores_of(evaluation)
    assert {each.sampling.guidance_text: each.sampling for each in scores} == CANDIDATES
    assert watcher.sampled_models == {"100", *(f"guidance {text}" for text in CANDIDATES)}
    dataset, extractor, model = Dataset.open(data), EfficientNetLite0(32), load_model(checkpoint)
    train = dataset.rows("train")
    rows = Evaluator(data, CONFIG, SAMPLING, tmp_path / "other").real.training_rows(CONFIG.seed, 5 * CONFIG.samples)
    assert sorted(rows) == sorted(train)  # fewer than 5 for each generated image
    references = {"first": rows[: len(rows) // 5], "last": rows[len(rows) // 5 :]}

    def kid(sampling: SamplingConfig, look: str) -> float:
        images = sample(model, range(LOOKS[look].stop), CONFIG.seed + 2, sampling)[LOOKS[look]]
        return compute_kid(extractor(images), extractor(dataset.images(references[look])))[0]

    first_kids = {each.sampling.guidance_text: kid(each.sampling, "first") for each in scores}
    finalists = {each.sampling.guidance_text for each in scores if each.p_value is not None}
    assert all(first_kids[text] < first_kids["none"] for text in finalists)
    unguided = kid(SAMPLING, "last" if finalists else "first")
    for each in scores:
        text = each.sampling.guidance_text
        is_last = text in finalists or (finalists and text == "none")
        assert each.kid == pytest.approx(kid(each.sampling, "last") if is_last else first_kids[text], rel=1e-3)
        if each.gain is not None:
            before = unguided if is_last else first_kids["none"]
            assert each.gain.value == pytest.approx(before - each.kid, abs=1e-3)

    again = Watcher()
    assert evaluate(data, [checkpoint], CONFIG, SAMPLING, tmp_path / "report", progress=again) == evaluation
    assert again.seen == []


@pytest.mark.slow
def test_chosen_guidance_is_stored_in_the_registered_file(data: Path, tmp_path: Path) -> None:
    checkpoint, report = write_checkpoint(tmp_path), tmp_path / "report"
    noises = dict(zip(CANDIDATES, (90, 40, 2, 20, 60), strict=True))
    evaluation = evaluated(data, checkpoint, report, {text: spoiled(data, noise) for text, noise in noises.items()})
    name = "2 at σ from 0.2 to 5"
    assert evaluation.sampling == CANDIDATES[name]
    assert min(scores_of(evaluation), key=lambda each: each.kid).sampling == CANDIDATES[name]
    assert Evaluation.read(report / "evaluation.json") == evaluation
    headline, *_ = statements = findings(evaluation)
    assert "without guidance" in headline
    [statement] = [each for each in statements if each.startswith("Guidance")]
    assert statement.startswith(f"Guidance {name} lowers its KID")
    assert statement.endswith("--set sampling.guidance=2 --set sampling.guidance_interval=[0.2,5].")
    page = Page((report / "report.html").read_text())
    assert all(text in page.text for text in CANDIDATES)
    assert f"{name} chosen" in " ".join(page.text.split())

    weights = tmp_path / "weights.safetensors"
    digest = export(checkpoint, weights, evaluation.sampling)
    assert export(checkpoint, tmp_path / "again.safetensors", evaluation.sampling) == digest
    model = load_model(weights)
    [images] = answer(model, [make_request({"task": "sample", "seed": 7, "count": 3})], SAMPLING)
    assert torch.equal(images, sample(load_model(checkpoint), range(3), 7, CANDIDATES[name]))
    unguided = SAMPLING.with_changes({"guidance": 1})
    [images] = answer(model, [make_request({"task": "sample", "seed": 7, "count": 3})], unguided)
    assert torch.equal(images, sample(model, range(3), 7, SAMPLING))
    # The gate and monitoring see it as it samples.
    assert Evaluator(data, CONFIG, SAMPLING, report / "evaluations").model(weights).guided == CANDIDATES[name]


@pytest.mark.slow
def test_of_guidance_with_equal_kid_the_least_is_chosen(data: Path, tmp_path: Path) -> None:
    checkpoint, clean, bad = write_checkpoint(tmp_path), spoiled(data, 2), spoiled(data, 90)
    images = dict(zip(CANDIDATES, (bad, clean, clean, bad, clean), strict=True))
    some = evaluated(data, checkpoint, tmp_path / "some", images)
    assert some.sampling == CANDIDATES["1.5 at σ from 0.2 to 5"]
    assert [each.verdict for each in scores_of(some)] == [None, "chosen", "better", "not a finalist", "better"]
    none = evaluated(data, checkpoint, tmp_path / "none", dict.fromkeys(CANDIDATES, clean))
    assert none.sampling == SAMPLING
    assert {each.verdict for each in scores_of(none)} == {"chosen", "not a finalist"}
    assert "It samples without guidance" in " ".join(findings(none))
    plain = export(checkpoint, tmp_path / "plain.safetensors")
    assert export(checkpoint, tmp_path / "weights.safetensors", none.sampling) == plain


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1, 2])
def test_guidance_of_a_user_wins(data: Path, tmp_path: Path, guidance: float) -> None:
    sampling = SAMPLING.with_changes({"guidance": guidance})
    evaluation = evaluate(data, [write_checkpoint(tmp_path)], CONFIG, sampling, tmp_path / "report")
    assert (evaluation.guidance, evaluation.sampling) == (None, sampling)


@pytest.mark.parametrize(
    ("classes", "training", "candidates"),
    [
        pytest.param({}, {}, (2,), id="no classes"),
        pytest.param(CLASSES, {"condition_dropout": 0}, (2,), id="no dropout", marks=pytest.mark.slow),
        pytest.param(CLASSES, {"student": {"steps": 2}}, (2,), id="student", marks=pytest.mark.slow),
        pytest.param(CLASSES, {}, (), id="empty"),
        pytest.param(CLASSES, {}, None, id="null", marks=pytest.mark.slow),
    ],
)
def test_no_guidance_is_chosen_where_there_are_no_candidates(
    data: Path, tmp_path: Path, classes: dict[str, int], training: dict[str, Any], candidates: tuple[float, ...] | None
) -> None:
    checkpoint = write_checkpoint(tmp_path, classes, **training)
    config = CONFIG.model_copy(update={"guidance": candidates})
    assert evaluate(data, [checkpoint], config, SAMPLING, tmp_path / "report").guidance is None


@pytest.mark.long
@pytest.mark.slow
def test_autoguidance_is_a_candidate_with_and_without_classes(data: Path, tmp_path: Path) -> None:
    by_guide = ["1.5 by autoguidance", "2 by autoguidance", "3 by autoguidance"]
    for classes, others in ((CLASSES, list(CANDIDATES)), ({}, ["none"])):
        folder = tmp_path / f"{len(classes)}"
        checkpoint = write_checkpoint(folder, classes, guide=2)
        choice = scores_of(evaluate(data, [checkpoint], CONFIG, SAMPLING, folder / "report"))
        assert [each.sampling.guidance_text for each in choice] == [*others, *by_guide]
        weights = folder / "weights.safetensors"
        export(checkpoint, weights, choice[-1].sampling)
        model = load_model(weights)
        [images] = answer(model, [make_request({"task": "sample", "seed": 7, "count": 3})], SAMPLING)
        assert torch.equal(images, sample(load_model(checkpoint), range(3), 7, choice[-1].sampling))


def test_guidance_candidates_keep_the_key_and_exceed_1() -> None:
    conditions = an_evaluation([0.1]).conditions
    other = conditions.model_copy(update={"evaluation": EvaluationConfig(guidance=(4,))})
    assert (other != conditions, other.key) == (True, conditions.key)
    with pytest.raises(ValueError, match="greater than 1"):
        EvaluationConfig(guidance=(1,))


def test_interval_grows_with_the_noise_levels_of_large_images(tmp_path: Path) -> None:
    labels = ["left" if number % 3 else "right" for number in range(48)]
    write_dataset(tmp_path / "large", random_images(48, 3, 64), 48, labels=labels)
    checkpoint = write_model(
        tmp_path / "100.safetensors", 1, 100, 3, 64, NETWORK, CLASSES, training={"condition_dropout": 0.1}
    )
    config = CONFIG.model_copy(update={"samples": 10, "guidance": (4, 2)})
    sampling = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=10, precision="fp32")
    choice = scores_of(evaluate(tmp_path / "large", [checkpoint], config, sampling, tmp_path / "report"))
    texts = [each.sampling.guidance_text for each in choice]
    assert texts == ["none", "2 at σ from 0.4 to 10", "4 at σ from 0.4 to 10", "4 at all σ"]


def test_captions_of_the_choice_are_those_of_training_images(tmp_path: Path) -> None:
    squares(tmp_path / "squares")
    checkpoint = write_model(tmp_path / "100.safetensors", 1, 100, 3, config=NETWORK.model_copy(update={"text": True}))
    evaluator = Evaluator(tmp_path / "squares", CONFIG, SAMPLING, tmp_path / "cache")
    dataset, rows = evaluator.real.dataset, evaluator.real.training_rows(0, evaluator.real.samples)
    evaluation = evaluator.model(checkpoint, 12, seed=2, captioned=rows)
    usual = evaluator.model(checkpoint, 12, seed=2)
    assert list(evaluation.conditions.prompts) == dataset.captions(rows)
    assert list(usual.conditions.prompts) == dataset.captions(dataset.rows("held_out"))
    assert evaluation.generated_key != usual.generated_key


def chosen_evaluation(recall_loss: float, verdict: GuidanceVerdict = "chosen") -> Evaluation:
    """An evaluation in which one kind of guidance reached the last look, and another did not."""
    names = list(CANDIDATES)
    unguided = GuidanceScore(
        sampling=SAMPLING, images=300, kid=0.392, verdict=None if verdict == "chosen" else "chosen"
    )
    finalist = GuidanceScore(
        sampling=CANDIDATES[names[1]],
        images=300,
        kid=0.2,
        gain=Estimate(value=0.192, error=0.02, freedom=99),
        p_value=1.2e-9,
        recall_loss=Estimate(value=recall_loss, error=0.02, freedom=99),
        verdict=verdict,
    )
    other = GuidanceScore(
        sampling=CANDIDATES[names[2]],
        images=100,
        kid=0.390,
        gain=Estimate(value=0.144, error=0.03, freedom=99),
        verdict="not a finalist",
    )
    choice = GuidanceChoice(scores=[unguided, finalist, other], confidence=0.95, max_recall_loss=0.1)
    return an_evaluation([0.5, 0.2]).model_copy(update={"guidance": choice})


@pytest.mark.parametrize(
    ("recall_loss", "verdict", "words"),
    [
        (0.09, "chosen", "and lowers its recall by 0.090 ± 0.020: a registered model samples with it"),
        (-0.09, "chosen", "and raises its recall by 0.090 ± 0.020: a registered model samples with it"),
        (0.2, "may lose too much recall", ", but lowers its recall by 0.200 ± 0.020, and gate.recall_loss = 0.1"),
    ],
)
def test_findings_say_whether_guidance_raises_or_lowers(
    recall_loss: float, verdict: GuidanceVerdict, words: str
) -> None:
    [statement] = [each for each in findings(chosen_evaluation(recall_loss, verdict)) if "Holm" in each]
    assert words in statement
    assert "lowers its KID against training images, 0.392, by 0.192 ± 0.020" in statement
    assert "(p by Holm's correction: under 0.001)" in statement


def test_report_compares_guidance_on_the_images_of_its_look(tmp_path: Path) -> None:
    evaluation = chosen_evaluation(-0.09)
    generated = {each.sha256: shown_images(number) for number, each in enumerate(evaluation.checkpoints)}
    EvaluationPage(evaluation, real=shown_images(99), generated=generated).write(tmp_path / "report.html")
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "300 0.200 0.192 ± 0.020 from 0.392 under 0.001 −0.090 ± 0.020" in text
    assert "100 first look 0.390 0.144 ± 0.030 from 0.534" in text
