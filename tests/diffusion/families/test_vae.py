"""Autoencoders: trained, resumed, evaluated and sampled as diffusion models are, by their own measure."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal

from diffusion.checkpoints import export, load_model
from diffusion.common.errors import UserError
from diffusion.common.image_grids import make_paired_grid, png_bytes
from diffusion.common.random import GaussianNoise
from diffusion.data.dataset import Dataset
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.pixel_metrics import ssim
from diffusion.families.config import ModelConfig, VAEConfig
from diffusion.families.model import to_float, to_uint8
from diffusion.families.vae import network as vae
from diffusion.families.vae.model import VAEModel
from diffusion.generation.config import Conditions, make_request
from diffusion.generation.explain import explain
from diffusion.generation.generate import interpolate, reconstruct_images, sample
from diffusion.generation.requests import answer, tasks_of
from diffusion.process.editing import Edit
from diffusion.training.ema import models_to_evaluate
from diffusion.training.logging import read_metrics
from diffusion.training.preflight import count_flops
from diffusion.training.train import train
from tests.builders.comparisons import evaluate_one
from tests.builders.small_autoencoders import CONFIG, SAMPLING, SIZE, VAE, autoencoder, colours, mean_square
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import Stop, StopAt

EVALUATION = EvaluationConfig(samples=12, extractor_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours(tmp_path_factory.mktemp("vae") / "data" / "blobs")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """The folder of a training."""
    return autoencoder(data, data.parents[1] / "run").output


@pytest.fixture(scope="module")
def model(run: Path) -> VAEModel:
    loaded = load_model(run / "final.safetensors")
    assert isinstance(loaded, VAEModel)
    return loaded


@pytest.mark.parametrize("stop", [16, 112, 320])
def test_stopped_training_resumes_bit_for_bit(data: Path, run: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Stop):
        autoencoder(data, tmp_path / "cut", track=lambda _: StopAt(stop))
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    autoencoder(data, tmp_path / "cut")
    for name in ("final.safetensors", "losses.csv", "samples/0000000320.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_images_come_back_closer_than_the_mean_image(data: Path, tmp_path: Path) -> None:
    final = autoencoder(data, tmp_path / "run", config={"images": 1600, "learning_rate": 1e-2}).final
    dataset = Dataset.open(data)
    held_out, train_set = (dataset.images(dataset.rows(split)) for split in ("held_out", "train"))
    back = reconstruct_images(load_model(final), held_out, SAMPLING)
    mean = to_uint8(to_float(train_set).mean(0))
    assert mean_square(back, held_out) < 0.5 * mean_square(mean.expand_as(held_out), held_out)


@pytest.mark.slow
def test_bound_of_a_trained_network_is_below_the_likelihood(tmp_path: Path) -> None:
    # Images of two correlated Gaussian factors a quarter, whose density is known. Quantised to 8 bits, of which there
    # are 30 to a deviation.
    random = np.random.default_rng(0)
    size, count, spread = 8, 400, 0.12
    loadings = 0.25 * random.standard_normal((size * size, 2))
    x = random.standard_normal((count, 2)) @ loadings.T + spread * random.standard_normal((count, size * size))
    pixels = np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8).reshape(count, 1, size, size)
    write_dataset(tmp_path / "factors", pixels, per_shard=100)
    settings = {"images": 3200, "batch_size": 32, "learning_rate": 1e-2, "flip": False, "precision": "fp32"}
    options = CONFIG.model_copy(update=settings)
    shape = VAEConfig(width=16, channel_mult=(1,), patch=4, latent_channels=2, kl_weight=1)
    run = train(tmp_path / "factors", tmp_path / "run", shape, options, SAMPLING)
    dataset = Dataset.open(tmp_path / "factors")
    held_out = to_float(dataset.images(dataset.rows("held_out"))).flatten(1).double()
    covariance = torch.from_numpy(loadings @ loadings.T + spread**2 * np.eye(size * size))
    exact = MultivariateNormal(torch.zeros(size * size).double(), covariance).log_prob(held_out).mean().item()
    independent = MultivariateNormal(torch.zeros(size * size).double(), covariance.diagonal().diag())
    # From bits of whole levels to the density of values in [−1, 1].
    bits = [row["held_out_loss_ema"] for row in read_metrics(run.output / "losses.csv")]
    bounds = [-size * size * math.log(2) * (each - math.log2(127.5)) for each in bits]
    assert max(bounds) < exact
    # And it found the factors, or it would do no better than any that takes pixels to be independent.
    assert bounds[-1] > independent.log_prob(held_out).mean().item()


def test_vae_image_comes_from_the_noise_of_seed_and_index(model: VAEModel) -> None:
    many, one = sample(model, range(40), 3, SAMPLING), sample(model, [37], 3, SAMPLING)
    assert torch.equal(many[37], one[0])
    noise = GaussianNoise(3, "sampling", range(36), (64 + 3 * 4 * 4, 1, 1))()
    with torch.inference_mode():
        assert torch.equal(many[:36], to_uint8(model.network.generate(noise)))
    assert not torch.equal(many[:4], sample(model, range(4), 4, SAMPLING))


def test_interpolation_between_seeds_starts_and_ends_at_their_images(model: VAEModel) -> None:
    path = interpolate(model, 1, 2, 36, SAMPLING)
    for place, seed in ((0, 1), (-1, 2)):
        assert (path[place].int() - sample(model, [0], seed, SAMPLING)[0].int()).abs().max() <= 1


def test_an_exported_checkpoint_is_the_same_model(run: Path, model: VAEModel, tmp_path: Path) -> None:
    export(run / "checkpoints" / "0000000320.safetensors", tmp_path / "weights.safetensors")
    exported_model = load_model(tmp_path / "weights.safetensors")
    assert torch.equal(sample(exported_model, range(4), 0, SAMPLING), sample(model, range(4), 0, SAMPLING))


@pytest.mark.slow
def test_vae_training_logs_the_reconstruction_psnr(data: Path, tmp_path: Path) -> None:
    figures: dict[str, float] = {}

    class Listener(StopAt):
        def log_metrics(self, metrics: object, images: int) -> None:
            figures.update(metrics)  # type: ignore[call-overload]

    autoencoder(data, tmp_path / "run", track=lambda _: Listener(0))
    assert 5 < figures["held_out_psnr_ema"] < 40
    assert figures["held_out_kl_ema"] > 0
    assert not any("level" in name for name in figures)
    # Nearly all of it is convolutions, whose work grows with the positions.
    small, large = (count_flops(VAE, (3, size, size), 0) for size in (16, 32))
    assert large / small == pytest.approx(4, rel=0.02)


@pytest.mark.slow
def test_vae_is_evaluated_by_held_out_reconstruction(data: Path, run: Path, tmp_path: Path) -> None:
    evaluation = evaluate(data, models_to_evaluate(run, tmp_path), EVALUATION, SAMPLING, tmp_path, run / "losses.csv")
    dataset, extractor = Dataset.open(data), EfficientNetLite0(32)
    held_out = dataset.images(dataset.rows("held_out"))
    for checkpoint in evaluation.checkpoints:
        back = reconstruct_images(load_model(Path(checkpoint.file)), held_out, SAMPLING)
        ratios = [10 * math.log10(255**2 / mean_square(*pair)) for pair in zip(back, held_out, strict=True)]
        assert checkpoint.reconstruction is not None
        assert checkpoint.reconstruction.psnr == pytest.approx(np.mean(ratios))
        assert checkpoint.reconstruction.psnr_se == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(len(ratios)))
        assert checkpoint.reconstruction.ssim == pytest.approx(ssim(back, held_out).mean().item())
        expected = frechet_distance(compute_moments(extractor(back)), compute_moments(extractor(held_out)))
        assert checkpoint.reconstruction.fd == pytest.approx(expected, rel=1e-3)
    best = max(evaluation.checkpoints, key=lambda each: each.reconstruction.psnr)
    assert evaluation.best == best
    assert json.loads((tmp_path / "metrics.json").read_text())["reconstruction_psnr"] == best.reconstruction.psnr
    assert "reconstruction_psnr" in (tmp_path / "scores.csv").read_text().splitlines()[0]
    grid_pixels = np.asarray(Image.open(tmp_path / "grids" / "held_out_reconstructed.png"))
    expected = make_paired_grid(held_out, reconstruct_images(load_model(Path(best.file)), held_out, SAMPLING))
    assert np.array_equal(grid_pixels, np.asarray(expected))
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Reconstructions</h2>" in page
    assert f"{best.reconstruction.psnr:.2f} ±" in page
    again = evaluate_one(Path(best.file), data, EVALUATION, SAMPLING, tmp_path)
    assert again == best


def test_originals_are_shown_above_reconstructions() -> None:
    images = torch.from_numpy(random_images(5, size=4))
    sheet = np.asarray(make_paired_grid(images, 255 - images, columns=2, scale=1))
    assert sheet.shape == (2 + 4 * 6, 2 + 2 * 6)
    assert np.array_equal(sheet[2:6, 2:6], images[0, 0])
    assert np.array_equal(sheet[8:12, 2:6], 255 - images[0, 0])
    assert np.array_equal(sheet[20:24, 8:12], 255 - images[3, 0])


def test_explain_writes_figures_with_a_real_image(data: Path, model: VAEModel, tmp_path: Path) -> None:
    image = Dataset.open(data).images([0])[0]
    paths = explain(model, image, tmp_path, 0)
    assert [path.name for path in paths] == ["reconstruction.png"]
    assert Image.open(paths[0]).height > 2 * SIZE


def test_a_size_that_its_factor_does_not_divide_is_rejected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latent position of 32×32 pixels, and 32 does not divide the images' 16"):
        autoencoder(data, tmp_path / "run", VAE.model_copy(update={"channel_mult": (1, 1, 1, 1, 1)}))
    with pytest.raises(ValueError, match="latents as large as images"):
        VAEConfig(patch=1, channel_mult=(1,))


def test_vae_rejects_unknown_conditions_and_edits(model: VAEModel) -> None:
    with pytest.raises(UserError, match="trained without classes"):
        sample(model, [0], 0, SAMPLING, conditions=Conditions(labels=("cat",)))
    with pytest.raises(UserError, match="trained without captions"):
        sample(model, [0], 0, SAMPLING, conditions=Conditions(prompts=("a cat",)))
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(UserError, match="no steps in which to edit an image"):
        sample(model, [0], 0, SAMPLING, edit=Edit(image, strength=0.5))


def test_vae_supports_sampling_and_interpolation_requests_only(model: VAEModel) -> None:
    assert tasks_of(model) == ("sample", "interpolate")
    images = answer(model, [make_request({"count": 2, "seed": 3, "index": 5})], SAMPLING)
    assert torch.equal(images[0], sample(model, [5, 6], 3, SAMPLING))
    image = png_bytes(Image.new("RGB", (SIZE, SIZE)))
    with pytest.raises(UserError, match="not trained to img2img: it can sample, interpolate"):
        answer(model, [make_request({"task": "img2img", "image": image})], SAMPLING)
    with pytest.raises(UserError, match=r"sampling\.steps means nothing to model\.family = vae"):
        answer(model, [make_request({"steps": 50})], SAMPLING)


def test_training_settings_of_diffusion_are_rejected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.weighting means nothing to model\.family = vae"):
        autoencoder(data, tmp_path / "run", config={"weighting": "plain"})


def test_run_folder_of_another_family_is_an_error(data: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"differs in .*model\.kl_weight"):
        train(data, run, ModelConfig(width=16, channel_mult=(1,), attention=()), CONFIG, SAMPLING)


def test_initial_deviation_of_images_does_not_depend_on_depth() -> None:
    torch.manual_seed(0)
    network = vae.VAE(VAE, 3, SIZE)
    mean, log_variance = network.autoencoder.posterior(torch.randn(8, 3, SIZE, SIZE))
    assert 0.1 < mean.std().item() < 2
    assert log_variance.abs().mean().item() < 2
    assert network.generate(torch.randn(8, 64 + 3 * 4 * 4, 1, 1)).std().item() < 2
