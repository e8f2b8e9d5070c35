"""Text-image agreement: the cosine of image and prompt between its baselines, and what the gate makes of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.evaluation.comparison import ChampionComparison, compare_with_champion
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.metrics.text_image_agreement import (
    TextImageAgreement,
    compute_cosines,
    mean_over_prompts,
    number_of_each,
)
from diffusion.evaluation.model_metrics import evaluate_in_full
from diffusion.evaluation.reports.comparison_report import ComparisonPage
from diffusion.evaluation.reports.evaluation_report import findings
from diffusion.evaluation.reports.html import format_signed
from diffusion.evaluation.results import Evaluation
from diffusion.generation.generate import conditions_of, sample
from tests.builders import NO_BARS
from tests.builders.captioned import COLOURS, squares
from tests.builders.comparisons import CONFIG, SAMPLING, Watcher, discs, save_images
from tests.builders.html_pages import Page
from tests.builders.small_models import CONFIG as NETWORK
from tests.builders.small_models import write_model
from tests.builders.text_image_encoders import MAX_TOKENS, write_clip, write_onnx, write_processor

pytestmark = pytest.mark.usefixtures("fake_encoder")
OPTION = "evaluation.text_image_encoder"
GATE = GateConfig(recall_loss=None, memorized=None, cost=None, delta=0, looks=1)
COMPARISON_SEED = CONFIG.seed + 1
"""The gate generates with another seed than evaluation if nothing is known of it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "squares"
    squares(folder, 160)
    return folder


def captioned(path: Path, seed: int = 1) -> Path:
    """A model of captions that was never trained."""
    return write_model(path, seed, seed, channels=3, config=NETWORK.model_copy(update={"text": True}))


def of_colours(names: list[str], noise: int, seed: int = 0) -> Tensor:
    """Squares of these colours, with noise."""
    flat = torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
    spread = torch.randint(-noise, noise + 1, (len(names), 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (flat + spread).clamp(0, 255).to(torch.uint8)


def with_encoder(folder: Path, **changes: object) -> EvaluationConfig:
    return CONFIG.model_copy(update={"text_image_encoder": folder, **changes})


def prompts(data: Path, first: int = 0) -> list[str]:
    """Captions of the held-out images, in turn, of images from this number."""
    dataset = Dataset.open(data)
    each = [caption for caption in dataset.captions(dataset.rows("held_out")) if caption is not None]
    return [each[n % len(each)] for n in range(first, first + CONFIG.samples)]


def test_agreement_is_the_cosine_of_transformers_embeddings(data: Path, tmp_path: Path) -> None:
    clip, model = write_clip(tmp_path / "clip"), captioned(tmp_path / "model.safetensors")
    processor = write_processor(tmp_path / "clip")
    first = 16
    evaluator = Evaluator(data, with_encoder(tmp_path / "clip"), SAMPLING, tmp_path, first=first)
    evaluation = evaluate_in_full(evaluator.model(model))
    agreement = evaluation.text_image_agreement
    assert isinstance(agreement, TextImageAgreement)

    dataset = Dataset.open(data)
    rows = dataset.rows("held_out")
    conditions = conditions_of(dataset, rows, [])
    indices = range(first, first + CONFIG.samples)
    images = sample(load_model(model), indices, CONFIG.seed, SAMPLING, conditions=conditions)
    texts = prompts(data, first)

    def embedded(pixels: Tensor) -> Tensor:
        prepared = processor.image_processor(list(pixels), return_tensors="pt")
        return normalize(clip.get_image_features(**prepared).pooler_output)

    tokens = processor.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    meanings = normalize(clip.get_text_features(**tokens).pooler_output)
    cosines = (embedded(images) @ meanings.T).detach().numpy()
    alike = np.array([[one == other for other in texts] for one in texts])
    assert agreement.agreement.value == pytest.approx(np.diag(cosines).mean(), abs=2e-3)
    assert agreement.shuffled == pytest.approx(np.ma.array(cosines, mask=alike).mean(1).mean(), abs=2e-3)
    assert agreement.above_chance.value == pytest.approx(agreement.agreement.value - agreement.shuffled)
    of_real = (embedded(dataset.images(rows)) * meanings[(np.arange(len(rows)) - first) % len(rows)]).sum(1)
    assert agreement.real.value == pytest.approx(of_real.mean().item(), abs=2e-3)
    assert (agreement.images, agreement.captions) == (CONFIG.samples, 3)
    assert agreement.agreement.interval.low < agreement.agreement.value < agreement.agreement.interval.high
    metrics = evaluation.metrics()
    assert metrics[f"text_image_agreement_{agreement.encoder}"] == agreement.agreement.value
    assert {f"text_image_agreement_{each}_{agreement.encoder}" for each in ("shuffled", "real")} <= metrics.keys()


def test_errors_are_those_of_a_bootstrap_over_prompts() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 60, 300)
    values = random.normal(size=300) + 2 * random.normal(size=60)[groups]
    estimate = mean_over_prompts(torch.from_numpy(values), torch.from_numpy(groups))
    of_each = [values[groups == group] for group in range(60)]
    means = [np.concatenate([of_each[group] for group in random.integers(0, 60, 60)]).mean() for _ in range(3000)]
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(np.std(means), rel=0.08)
    assert estimate.freedom == 59
    alone = mean_over_prompts(torch.from_numpy(values), torch.arange(300))
    assert alone.error == pytest.approx(values.std(ddof=1) / 300**0.5)


def test_cosines_with_others_leave_out_equal_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, numbers = number_of_each(["b", "a", "b", "c", "b"])
    assert texts == ["a", "b", "c"]
    x, y = (normalize(torch.randn(count, 7, generator=generator)) for count in (5, 3))
    cosines = compute_cosines(x, y, numbers)
    every = (x @ y[numbers].T).double()
    for image in range(5):
        others = [every[image, other] for other in range(5) if numbers[other] != numbers[image]]
        assert cosines.others[image].item() == pytest.approx(sum(others).item() / len(others), abs=1e-6)
    torch.testing.assert_close(cosines.own, every.diagonal(), atol=1e-6, rtol=0)


def evaluated(data: Path, model: Path, config: EvaluationConfig, output: Path) -> tuple[Evaluation, Page]:
    evaluation = evaluate(data, [model], config.model_copy(update={"guidance": ()}), SAMPLING, output)
    return evaluation, Page((output / "report.html").read_text())


def test_without_an_encoder_a_caption_model_says_so(data: Path, tmp_path: Path) -> None:
    evaluation, page = evaluated(data, captioned(tmp_path / "1.safetensors"), CONFIG, tmp_path / "report")
    assert OPTION in str(evaluation.best.text_image_agreement)
    assert not [name for name in evaluation.metrics() if name.startswith("text_image")]
    [statement] = [words for words in findings(evaluation) if "agreement" in words]
    assert OPTION in statement
    assert statement in page.text
    assert Evaluation.read(tmp_path / "report" / "evaluation.json") == evaluation


def test_a_model_without_captions_has_no_agreement(tmp_path: Path) -> None:
    write_onnx(tmp_path / "encoder")
    model = write_model(tmp_path / "1.safetensors", 1, 1)
    evaluation, page = evaluated(
        discs(tmp_path / "discs"), model, with_encoder(tmp_path / "encoder"), tmp_path / "report"
    )
    assert evaluation.best.text_image_agreement is None
    assert "agreement" not in page.text
    assert not [words for words in findings(evaluation) if "agreement" in words]


def test_a_single_prompt_agrees_with_nothing_and_that_is_said(tmp_path: Path) -> None:
    write_onnx(tmp_path / "encoder")
    squares(tmp_path / "data", every=10**6)
    evaluator = Evaluator(tmp_path / "data", with_encoder(tmp_path / "encoder"), SAMPLING, tmp_path)
    agreement = evaluator.model(captioned(tmp_path / "1.safetensors")).text_image_agreement
    assert "fewer than two different prompts" in str(agreement)


def test_the_report_shows_agreement_with_interval_and_baselines(data: Path, tmp_path: Path) -> None:
    write_onnx(tmp_path / "encoder", knows_colours=True)
    model, config = captioned(tmp_path / "1.safetensors"), with_encoder(tmp_path / "encoder")
    save_images(model, of_colours([text.split()[0] for text in prompts(data)], 60), data, tmp_path / "report", config)
    evaluation, page = evaluated(data, model, config, tmp_path / "report")
    agreement = evaluation.best.text_image_agreement
    assert isinstance(agreement, TextImageAgreement)
    assert agreement.real.value > 0.5 > 0 > agreement.shuffled
    assert agreement.agreement.value > 0.5
    text = " ".join(page.text.split())
    assert f"text_image_agreement_{agreement.encoder} {agreement.agreement.value:.3f}" in text
    assert f"prompts of others it is {agreement.shuffled:.3f}" in text
    assert evaluation.metrics()[f"text_image_agreement_real_{agreement.encoder}"] == agreement.real.value


def test_embeddings_are_cached_by_what_the_encoder_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "moved"):
        write_clip(tmp_path / name)
    write_clip(tmp_path / "other", seed=1)
    model, keys = captioned(tmp_path / "1.safetensors"), {}
    agreements = {}
    for name in ("one", "moved", "other"):
        watcher = Watcher()
        evaluator = Evaluator(data, with_encoder(tmp_path / name), SAMPLING, tmp_path / "cache", watcher)
        agreements[name], keys[name] = evaluator.model(model).text_image_agreement, evaluator.conditions.key
        assert watcher.sampled_models == ({"1"} if name == "one" else set())
        if name == "one":  # from here on a text or image that is embedded again is an error
            whole = type(evaluator.encoder)._embed  # type: ignore[attr-defined]
            monkeypatch.setattr(type(evaluator.encoder), "_embed", None)
        elif name == "moved":
            monkeypatch.setattr(type(evaluator.encoder), "_embed", whole)
    assert agreements["one"] == agreements["moved"] != agreements["other"]
    assert keys["one"] == keys["moved"] != keys["other"]
    assert keys["one"] != Evaluator(data, CONFIG, SAMPLING, tmp_path / "cache").conditions.key


def compared(
    data: Path, folder: Path, first: Tensor, second: Tensor | None, gate: GateConfig = GATE
) -> ChampionComparison:
    """A comparison of two models of captions that generated these images for the held-out captions."""
    encoder = folder / "encoder"
    if not encoder.is_dir():
        write_onnx(encoder, knows_colours=True)
    config, paths = with_encoder(encoder), []
    for number, images in enumerate((first, second)):
        if images is not None:
            paths.append(captioned(folder / f"{number}.safetensors", number))
            save_images(paths[-1], images, data, folder, config.model_copy(update={"seed": COMPARISON_SEED}))
    champion = paths[1] if second is not None else None
    return compare_with_champion(paths[0], champion, data, config, SAMPLING, gate, folder)[0]


def rule(comparison: ChampionComparison, name: str = "text-image agreement") -> tuple[str, str]:
    [finding] = [each for each in comparison.decision.findings if each.rule == name]
    return finding.verdict, finding.reason


@pytest.mark.slow
@pytest.mark.long
def test_good_images_of_something_else_than_their_prompts_are_rejected(data: Path, tmp_path: Path) -> None:
    colours = [text.split()[0] for text in prompts(data)]
    right, wrong = of_colours(colours, 60), of_colours([*colours[1:], colours[0]], 20)
    comparison = compared(data, tmp_path / "worse", wrong, right)
    assert rule(comparison)[0] == "reject"
    assert comparison.decision.verdict == "reject"
    assert rule(comparison, "headline")[0] == "promote"
    better = compared(data, tmp_path / "better", of_colours(colours, 20), of_colours([*colours[1:], colours[0]], 60))
    assert rule(better)[0] == better.decision.verdict == "promote"


@pytest.mark.slow
def test_comparison_report_shows_both_agreements_and_their_baselines(data: Path, tmp_path: Path) -> None:
    colours = [text.split()[0] for text in prompts(data)]
    write_onnx(tmp_path / "encoder", knows_colours=True)
    for config, is_shown in ((with_encoder(tmp_path / "encoder"), True), (CONFIG, False)):
        paths = [captioned(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
        for path, noise in zip(paths, (20, 60), strict=True):
            save_images(
                path, of_colours(colours, noise), data, tmp_path, config.model_copy(update={"seed": COMPARISON_SEED})
            )
        comparison, grids = compare_with_champion(*paths, data, config, SAMPLING, GATE, tmp_path)
        page = tmp_path / "page.html"
        ComparisonPage(comparison, grids, "squares", "squares", "version 2", "version 1").write(page)
        text = " ".join(Page(page.read_text()).text.split())
        assert "Text-image agreement" in text
        assert ("Not measured: " in text) == (not is_shown)
        first, second = (
            comparison.candidate.text_image_agreement,
            comparison.champion and comparison.champion.text_image_agreement,
        )
        if is_shown:
            assert isinstance(first, TextImageAgreement)
            assert isinstance(second, TextImageAgreement)
            assert f"version 2 {format_signed(first.agreement.value)}" in text
            assert f"version 1 {format_signed(second.agreement.value)}" in text


@pytest.mark.slow
def test_agreement_falling_within_the_limit_does_not_hold(data: Path, tmp_path: Path) -> None:
    colours = [text.split()[0] for text in prompts(data)]
    right = of_colours(colours, 20)
    one_wrong = of_colours([*colours[:-1], next(each for each in COLOURS if each != colours[-1])], 20)
    assert rule(compared(data, tmp_path, one_wrong, right))[0] == "promote"


def test_a_first_version_has_its_agreement_among_the_reasons(data: Path, tmp_path: Path) -> None:
    colours = [text.split()[0] for text in prompts(data)]
    comparison = compared(data, tmp_path, of_colours(colours, 20), None, GateConfig(**NO_BARS))
    verdict, reason = rule(comparison)
    assert verdict == "promote"
    assert "text-image agreement by clip_" in reason


def test_an_unmeasured_agreement_is_a_finding_of_the_gate(data: Path, tmp_path: Path) -> None:
    first, second = (captioned(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    comparison, _ = compare_with_champion(first, second, data, CONFIG, SAMPLING, GATE, tmp_path)
    verdict, reason = rule(comparison)
    assert verdict == "promote"
    assert OPTION in reason
