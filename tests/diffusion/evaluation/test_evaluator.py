"""The evaluation of one model: each metric that of its definition, computed once, and the same end after a kill."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.random import GaussianNoise
from diffusion.data.dataset import Dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0, make_extractor
from diffusion.evaluation.metrics.copies import detect_duplicates, shifted_thumbnails
from diffusion.evaluation.metrics.held_out_loss import measure_losses, summarize_losses
from diffusion.evaluation.metrics.pixel_metrics import compare_appearance, measure_appearance, psnr
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.evaluation.model_evaluator import ModelEvaluator
from diffusion.evaluation.model_metrics import evaluate_in_full
from diffusion.evaluation.results import ModelEvaluation
from diffusion.families.model import Model
from diffusion.generation.generate import sample
from diffusion.generation.super_resolution import GenerationTask, shrink_images, upscale
from diffusion.process.samplers import sampling_config
from tests.builders.bucketed import bucketed_set
from tests.builders.comparisons import CONFIG, SAMPLING, Watcher, discs, save_images, training_images, write_autoencoder
from tests.builders.small_models import CONFIG as MODEL
from tests.builders.small_models import write_model

CLASSES = {"left": 60, "right": 60}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors", seed=1, images=700)


def evaluated(
    path: Path, data: Path, folder: Path, progress: Watcher | None = None, **changes: object
) -> tuple[ModelEvaluator, ModelEvaluation]:
    config = CONFIG.model_copy(update=changes)
    model = Evaluator(data, config, SAMPLING, folder / "evaluations", progress or Watcher()).model(path)
    return model, evaluate_in_full(model)


@pytest.fixture(scope="module")
def whole(
    data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ModelEvaluator, ModelEvaluation]:
    """The evaluation of ``model`` and the folder of its cache, which tests copy."""
    folder = tmp_path_factory.mktemp("whole") / "evaluation"
    return folder, *evaluated(model, data, folder)


def test_an_evaluation_has_each_metric_of_the_generated_images(
    data: Path, model: Path, whole: tuple[Path, ModelEvaluator, ModelEvaluation]
) -> None:
    _, metrics, evaluation = whole
    images = sample(load_model(model), range(CONFIG.samples), CONFIG.seed, SAMPLING)
    assert torch.equal(metrics.images, images)
    dataset, extractor = Dataset.open(data), EfficientNetLite0(32)
    held_out = dataset.images(dataset.rows("held_out"))
    expected = compute_scores(extractor(images), extractor(held_out), "efflite0")
    assert evaluation.scores.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-4)
    assert evaluation.drift == compare_appearance(measure_appearance(images), measure_appearance(held_out))
    assert evaluation.duplicates == detect_duplicates(shifted_thumbnails(images), shifted_thumbnails(held_out))
    terms = measure_losses(load_model(model), [(held_out, {})], SAMPLING)
    assert evaluation.held_out_loss == summarize_losses(terms)
    assert (evaluation.images, evaluation.family, evaluation.per_class, metrics.psnr) == (700, "ddpm", None, None)
    assert evaluation.memorization.generated == CONFIG.samples
    assert evaluation.gflop > 0
    assert ModelEvaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    names = evaluation.metrics().keys()
    assert {"kid_efflite0", "copies_share", "duplicates_share", "drift_brightness", "bits_per_dim"} <= names


def test_class_conditional_model_is_evaluated_per_class(data: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "conditional.safetensors", 0, 1, classes=CLASSES)
    per_class = evaluated(path, data, tmp_path, samples=64)[1].per_class
    assert per_class is not None
    assert [each.name for each in per_class.classes] == ["left", "right"]
    assert sum(each.samples for each in per_class.classes) == 64
    assert [each.reference for each in per_class.classes] == [20, 20]


def test_copies_of_training_images_are_found_and_named(data: Path, model: Path, tmp_path: Path) -> None:
    save_images(model, training_images(data, CONFIG.samples), data, tmp_path)
    memorization = evaluated(model, data, tmp_path)[1].memorization
    assert memorization.share == 1
    assert memorization.p_value < 1e-3
    assert {(pair.generated, pair.training) for pair in memorization.pairs} <= {(n, n) for n in range(CONFIG.samples)}


@pytest.mark.parametrize("flip", [False, True])
def test_mirrored_copies_count_whether_or_not_training_mirrored(flip: bool, data: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "flipped.safetensors", 0, 1, training={"flip": flip})
    save_images(path, training_images(data, CONFIG.samples).flip(3), data, tmp_path)
    assert evaluated(path, data, tmp_path)[1].memorization.share == 1


def test_a_model_is_evaluated_once_and_again_if_anything_changes(
    data: Path,
    model: Path,
    whole: tuple[Path, ModelEvaluator, ModelEvaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, first = Path(shutil.copytree(whole[0], tmp_path / "copy")), whole[2]
    for change in ({"seed": 1}, {"samples": 32}):
        watcher = Watcher()
        assert evaluated(model, data, folder, watcher, **change)[1] != first
        assert watcher.sampled_models == {"model"}
    watcher = Watcher()
    monkeypatch.setattr("diffusion.evaluation.real_images.compute_scores", None)
    assert evaluated(model, data, folder, watcher)[1] == first
    assert watcher.seen == []
    with pytest.raises(TypeError):
        evaluated(model, data, folder, samples=40)


def test_unconditional_samples_are_reused_when_the_data_set_grows(model: Path, tmp_path: Path) -> None:
    first, first_evaluation = evaluated(model, discs(tmp_path / "few", 80), tmp_path)
    watcher = Watcher()
    grown, grown_evaluation = evaluated(model, discs(tmp_path / "more", 96), tmp_path, watcher)
    assert watcher.sampled_models == set()
    assert torch.equal(grown.images, first.images)
    assert grown_evaluation.scores != first_evaluation.scores
    files = list((tmp_path / "evaluations" / "training").iterdir())
    assert [folder.name for folder in files] == [Dataset.open(tmp_path / "more").manifest.content_digest[:16]]


@pytest.mark.parametrize(
    "stop_at",
    [
        "model: images sampled",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in ("images compared with", "model: held-out images looked at")
        ),
    ],
)
def test_interrupted_model_evaluation_resumes_to_the_same_result(
    stop_at: str, data: Path, model: Path, whole: tuple[Path, ModelEvaluator, ModelEvaluation], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, data, tmp_path / "cut", Watcher(stop_at))
    watcher = Watcher()
    assert evaluated(model, data, tmp_path / "cut", watcher)[1] == whole[2]
    assert watcher.sampled_models == ({"model"} if stop_at.endswith("sampled") else set())


def test_autoencoder_is_evaluated_by_reconstructions(data: Path, tmp_path: Path) -> None:
    path = write_autoencoder(tmp_path / "vae.safetensors", 0)
    sampling = sampling_config(compute_batch=16, precision="fp32")
    result = Evaluator(data, CONFIG, sampling, tmp_path / "evaluations").model(path)
    evaluation = evaluate_in_full(result)
    assert result.psnr is not None
    assert len(result.psnr) == 40
    assert evaluation.metrics()["reconstruction_psnr"] == pytest.approx(result.psnr.mean().item())
    assert evaluation.held_out_loss.levels == []
    assert evaluation.held_out_loss.bits_per_dim is not None


def test_super_resolution_is_evaluated_on_split_held_out_images(data: Path, tmp_path: Path) -> None:
    config = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    path = write_model(tmp_path / "sr.safetensors", 0, 1, config=config)
    dataset, extractor = Dataset.open(data), make_extractor(CONFIG)
    evaluation = Evaluator(data, CONFIG, SAMPLING, tmp_path / "evaluations", task=GenerationTask(4, 2, 0.1)).model(path)
    held_out = dataset.rows("held_out")
    real_images = dataset.images(held_out[:20])
    assert torch.equal(
        evaluation.images, upscale(load_model(path), shrink_images(real_images, 2), CONFIG.seed, SAMPLING)
    )
    similarity = evaluation.compute_model_scores().similarity
    assert similarity is not None
    assert similarity.psnr == pytest.approx(psnr(evaluation.images, real_images).mean().item())
    expected = compute_scores(extractor(evaluation.images), extractor(dataset.images(held_out[20:])), "x")
    assert evaluation.scores.kid == pytest.approx(expected.kid, rel=1e-4)


def test_images_of_several_shapes_have_different_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noises: list[Tensor] = []

    def noted(model: Model, _: object, indices: range, seed: int, *__: object) -> Tensor:
        noises.extend(GaussianNoise(seed, "sampling", indices, model.noise_shape)().flatten(1)[:, :64])
        return torch.zeros(len(indices), *model.shape, dtype=torch.uint8)

    monkeypatch.setattr("diffusion.evaluation.model_evaluator.generate", noted)
    weights = write_model(tmp_path / "model.safetensors", 0, 0, channels=3, size=16)
    evaluator = Evaluator(bucketed_set(tmp_path), CONFIG, SAMPLING, tmp_path / "evaluations")
    assert len({image.shape for image in evaluator.model(weights).images}) == 3
    assert len({tuple(noise.tolist()) for noise in noises}) == len(noises) >= CONFIG.samples
