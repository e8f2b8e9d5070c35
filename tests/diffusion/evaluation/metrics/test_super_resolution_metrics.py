"""ResamplingBaseline images evaluated: likeness by the book, beside interpolation, and said in plain words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import AVERAGED, load_model, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.image_grids import interleave_images, make_grid, repeat_pixels
from diffusion.data.dataset import Dataset
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.pixel_metrics import (
    ImageSimilarity,
    ResamplingBaseline,
    compare_images,
    describe_baselines,
    psnr,
    resample,
    ssim,
)
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.evaluation.results import Evaluation
from diffusion.families.ddpm.network import UNet
from diffusion.generation.super_resolution import GenerationTask, shrink_images, upscale
from diffusion.process.samplers import sampling_config
from tests.builders.comparisons import Watcher, evaluate_one
from tests.builders.evaluations import scores
from tests.builders.html_pages import Page
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as SHAPE
from tests.builders.small_models import header, write_model

CONFIG = EvaluationConfig(samples=20, extractor_size=32, finalists=3)
SAMPLING = sampling_config(steps=3, compute_batch=10, precision="fp32")
ENLARGING = SHAPE.model_copy(update={"low_resolution": 4, "conditional": False})


def enlarging(path: Path, seed: int, images: int) -> Path:
    network = UNet(ENLARGING, 1, 8)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    tensors = {AVERAGED + name: value for name, value in network.state_dict().items()}
    save_tensors(path, tensors, {"model_header": header(ENLARGING, images=images).model_dump(mode="json")})
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data" / "small", random_images(128), 128)
    return tmp_path / "data" / "small"


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    return [enlarging(tmp_path / "run" / f"{images}.safetensors", images, images) for images in (100, 200)]


def pair() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    one = random.integers(0, 256, (2, 3, 24, 20), np.uint8)
    other = np.clip(one + random.integers(-40, 41, one.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(one), torch.from_numpy(other)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    one, other = pair()
    # scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False).
    assert ssim(one, other).tolist() == pytest.approx([0.958206271706135, 0.9501173584172532], abs=1e-12)
    assert psnr(one, other).tolist() == pytest.approx([21.28342813548128, 20.87628731952565], abs=1e-9)
    alike = compare_images(one, other)
    assert alike.ssim == pytest.approx((0.958206271706135 + 0.9501173584172532) / 2)
    assert alike.psnr == pytest.approx((21.28342813548128 + 20.87628731952565) / 2)


def test_psnr_and_ssim_of_flat_images_match_the_closed_form() -> None:
    black, grey = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 51, dtype=torch.uint8)
    assert psnr(black, grey).item() == pytest.approx(20 * np.log10(5))
    constant = 2.55**2
    assert ssim(black, grey).item() == pytest.approx(constant / (51**2 + constant))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_image_is_most_similar_to_itself(height: int, width: int, seed: int) -> None:
    one, other = np.random.default_rng(seed).integers(0, 256, (2, 2, 3, height, width), np.uint8)
    first, second = torch.from_numpy(one), torch.from_numpy(other)
    assert ssim(first, first).tolist() == pytest.approx([1, 1])
    assert psnr(first, first).tolist() == pytest.approx([58.92, 58.92], abs=0.01)
    assert (ssim(first, second) <= 1).all()
    torch.testing.assert_close(ssim(first, second), ssim(second, first))


@pytest.mark.parametrize(("name", "method"), [("bicubic", Image.BICUBIC), ("lanczos", Image.LANCZOS)])
def test_images_in_colour_are_enlarged_as_pillow_does_it(name: str, method: Image.Resampling) -> None:
    small = torch.from_numpy(random_images(2, channels=3, size=6))[..., :5]
    for image, large in zip(small, resample(small, 3, name), strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((15, 18), method)
        assert np.array_equal(large.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_scores_compare_enlarged_held_out_images_with_interpolation(
    data: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(data, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    dataset, extractor = Dataset.open(data), EfficientNetLite0(32)
    held_out = dataset.rows("held_out")
    half = len(held_out) // 2
    assert half < CONFIG.samples
    real, others = dataset.images(held_out[:half]), dataset.images(held_out[half:])
    small = shrink_images(real, 2)
    sets = {
        path.stem: (upscale(load_model(path), small, CONFIG.seed, SAMPLING), model)
        for path, model in zip(checkpoints, evaluation.checkpoints, strict=True)
    }
    assert evaluation.baselines is not None
    assert list(evaluation.baselines) == ["bicubic", "lanczos"]
    sets |= {name: (resample(small, 2, name), each) for name, each in evaluation.baselines.items()}
    for images, result in sets.values():
        expected = compute_scores(extractor(images), extractor(others), "efflite0")
        assert result.scores.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-4)
        assert result.similarity == compare_images(images, real)


def test_reevaluation_reads_the_stored_result_and_samples_nothing(
    data: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    output, again = tmp_path / "report", Watcher()
    evaluation = evaluate(data, checkpoints, CONFIG, SAMPLING, output)
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert evaluate(data, checkpoints, CONFIG, SAMPLING, output, progress=again) == evaluation
    assert again.seen == []
    assert {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert Evaluation.model_validate_json((output / "evaluation.json").read_bytes()) == evaluation
    metrics = json.loads((output / "metrics.json").read_bytes())
    assert evaluation.best.similarity is not None
    assert evaluation.baselines is not None
    assert metrics["psnr"] == evaluation.best.similarity.psnr
    assert metrics["lanczos_ssim"] == evaluation.baselines["lanczos"].similarity.ssim
    assert metrics["bicubic_fd_efflite0"] == evaluation.baselines["bicubic"].scores.fd
    assert (output / "scores.csv").read_text().splitlines()[0].endswith(",psnr,psnr_se,ssim")


def test_report_compares_super_resolution_with_interpolation(
    data: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(data, checkpoints, CONFIG, SAMPLING, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert evaluation.baselines is not None
    assert describe_baselines(evaluation.best.scores, evaluation.baselines) in page.text
    assert "Enlargement from 4×4 pixels" in page.text
    bicubic = evaluation.baselines["bicubic"]
    assert f"{bicubic.similarity.psnr:.2f} dB {bicubic.similarity.ssim:.3f}" in page.text
    dataset = Dataset.open(data)
    held_out = dataset.rows("held_out")
    real = dataset.images(held_out[: len(held_out) // 2])[:16]
    small = shrink_images(real, 2)
    enlarged_images = upscale(load_model(Path(evaluation.best.file)), small, CONFIG.seed, SAMPLING)
    expected_grid = make_grid(
        interleave_images(repeat_pixels(small, 2), resample(small, 2, "bicubic"), enlarged_images, real), columns=8
    )
    assert np.array_equal(page.image("Enlargements side by side"), np.asarray(expected_grid))


def test_report_of_other_models_has_no_super_resolution_section(data: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "plain.safetensors", 0, 100)
    evaluation = evaluate(data, [path], CONFIG, SAMPLING, tmp_path / "report")
    assert "nlarge" not in Page((tmp_path / "report" / "report.html").read_text()).text
    assert "baselines" not in json.loads((tmp_path / "report" / "evaluation.json").read_bytes())
    assert "low_resolution" not in evaluation.conditions.model_dump()


@pytest.mark.parametrize(
    ("bicubic", "lanczos", "words"),
    [
        (200, 150, "it beats bicubic and Lanczos enlargement."),
        (200, 50, "it beats bicubic enlargement, and does not beat Lanczos enlargement."),
        (100, 50, "it does not beat bicubic or Lanczos enlargement."),
    ],
)
def test_the_verdict_is_by_the_distance(bicubic: float, lanczos: float, words: str) -> None:
    alike = ImageSimilarity(psnr=20, psnr_se=1, ssim=0.5)
    interpolations = {"bicubic": bicubic, "lanczos": lanczos}
    baselines = {
        name: ResamplingBaseline(scores=scores(0.1, fd=fd), similarity=alike) for name, fd in interpolations.items()
    }
    assert describe_baselines(scores(0.1, fd=100), baselines) == f"On the Fréchet distance to real images {words}"


def test_models_of_two_tasks_are_not_compared(data: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain.safetensors", 0, 100)
    with pytest.raises(UserError, match=r"plain\.safetensors generates from noise, and what .* enlarges from 4 pixels"):
        evaluate_one(plain, data, CONFIG, SAMPLING, tmp_path / "report", task=GenerationTask(4, 2, 0.1))
    with pytest.raises(UserError, match=r"100\.safetensors enlarges from 4 pixels, and what .* generates from noise"):
        evaluate_one(checkpoints[0], data, CONFIG, SAMPLING, tmp_path / "report")
    with pytest.raises(UserError, match="scores say nothing of two tasks"):
        evaluate(data, [checkpoints[0], plain], CONFIG, SAMPLING, tmp_path / "report")
