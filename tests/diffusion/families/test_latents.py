"""Diffusion in an autoencoder's latents: whole in one file, repeatable, and editing without touching what is kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion.checkpoints import export, load_model
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.common.random import GaussianNoise
from diffusion.data.dataset import Dataset
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.families.config import ModelConfig
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_float, to_uint8
from diffusion.generation.explain import explain
from diffusion.generation.generate import interpolate, make_conditioning, reconstruct_images, sample
from diffusion.process.denoiser import apply_guidance
from diffusion.process.editing import Edit, downsample_mask
from diffusion.process.samplers import with_sampler
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import models_to_evaluate
from diffusion.training.identity import train_key
from diffusion.training.logging import read_metrics
from diffusion.training.preflight import count_flops
from diffusion.training.train import preflight
from tests.builders.small_autoencoders import (
    CONFIG,
    SAMPLING,
    SIZE,
    STEPPED,
    VAE,
    autoencoder,
    colours,
    denoiser,
    latent,
    mean_square,
)
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import Stop, StopAt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours(tmp_path_factory.mktemp("latents") / "data" / "blobs")


@pytest.fixture(scope="module")
def first(data: Path) -> Path:
    """The file of an autoencoder that has learned."""
    return autoencoder(data, data.parents[1] / "vae", config={"images": 1600, "learning_rate": 1e-2}).final


@pytest.fixture(scope="module")
def run(data: Path, first: Path) -> Path:
    """The folder of a training in its latents."""
    return latent(data, data.parents[1] / "run", denoiser(first)).output


@pytest.fixture(scope="module")
def model(run: Path) -> DiffusionModel:
    loaded = load_model(run / "final.safetensors")
    assert isinstance(loaded, DiffusionModel)
    return loaded


def image(data: Path) -> torch.Tensor:
    return Dataset.open(data).images([0])[0]


def test_latents_of_training_images_have_mean_0_and_deviation_1(data: Path, model: DiffusionModel) -> None:
    dataset = Dataset.open(data)
    z = model.encode(to_float(dataset.images(dataset.rows("train"))))
    assert z.shape[1:] == model.noise_shape == (3, 4, 4)
    spread, mean = torch.std_mean(z.double(), (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(spread, torch.ones(3).double(), atol=1e-4)
    assert model.schedule.sigmas[-1] > 10
    assert model.header.latents is not None
    assert (model.header.latents.shape, model.header.latents.autoencoder) == ((3, 4, 4), VAE)


def test_fine_tuning_keeps_the_moments_of_latents(run: Path, first: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", random_images(40, 3, SIZE), 20)
    config = {"images": 64, "init_from": str(run / "final.safetensors")}
    tuned = load_file(latent(tmp_path / "other", tmp_path / "tuned", denoiser(first), config=config).final)
    weights = load_file(run / "final.safetensors")
    assert all(torch.equal(tuned[f"autoencoder.{name}"], weights[f"autoencoder.{name}"]) for name in ("mean", "std"))


def test_its_autoencoder_is_the_one_it_was_given(data: Path, first: Path, model: DiffusionModel) -> None:
    images = Dataset.open(data).images(range(20))
    actual, expected = (reconstruct_images(each, images, SAMPLING) for each in (model, load_model(first)))
    assert (actual.int() - expected.int()).abs().max() <= 1  # as they are scaled to deviation 1 on the way and back


def test_latent_denoising_loss_matches_the_training_log(data: Path, run: Path, model: DiffusionModel) -> None:
    dataset = Dataset.open(data)
    held_out = dataset.rows("held_out")
    with torch.inference_mode():
        z = model.encode(to_float(dataset.images(held_out)))
        # EDM's noise levels and weights for a deviation of 1, whose loss is 1 for a network that answers 0.
        levels = torch.special.ndtri((torch.arange(len(z)).double() + 0.5) / len(z))
        sigma = (-1.2 + 1.2 * levels).exp()
        noise = GaussianNoise(0, "probe/held_out", range(len(z)), model.noise_shape)()
        estimate = model.denoiser()(z + sigma[:, None, None, None].float() * noise, sigma)
    losses = (sigma**-2 + 1) * (estimate - z).square().mean((1, 2, 3))
    logged_loss = read_metrics(run / "losses.csv")[-1]["held_out_loss_ema"]
    assert losses.mean().item() == pytest.approx(logged_loss, rel=0.05)


@pytest.mark.parametrize("autoencoder", ["vae", "run"])
def test_one_file_is_the_whole_model(data: Path, model: DiffusionModel, tmp_path: Path, autoencoder: str) -> None:
    moved_file = Path(shutil.copy(data.parents[1] / autoencoder / "final.safetensors", tmp_path))
    final = latent(data, tmp_path / "run", denoiser(moved_file)).final
    moved_file.unlink()
    # Where the autoencoder lay is no part of the run.
    assert final.read_bytes() == (data.parents[1] / "run" / "final.safetensors").read_bytes()
    assert torch.equal(sample(load_model(final), range(4), 0, STEPPED), sample(model, range(4), 0, STEPPED))
    with safe_open(final, framework="pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"ema", "guide", "autoencoder"}  # noqa: SIM118


def test_an_exported_checkpoint_is_whole(run: Path, model: DiffusionModel, tmp_path: Path) -> None:
    export(run / "checkpoints" / "0000000320.safetensors", tmp_path / "weights.safetensors")
    exported_model = load_model(tmp_path / "weights.safetensors")
    assert torch.equal(sample(exported_model, range(4), 0, STEPPED), sample(model, range(4), 0, STEPPED))


@pytest.mark.parametrize("stop", [16, 112, 320])
def test_stopped_training_resumes_bit_for_bit(data: Path, first: Path, run: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Stop):
        latent(data, tmp_path / "cut", denoiser(first), track=lambda _: StopAt(stop))
    elsewhere = shutil.copy(first, tmp_path / "elsewhere.safetensors")
    latent(data, tmp_path / "cut", denoiser(elsewhere))
    for name in ("final.safetensors", "losses.csv", "samples/0000000320.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes()


def test_another_autoencoder_is_another_run(data: Path, first: Path, run: Path, tmp_path: Path) -> None:
    other = autoencoder(data, tmp_path / "vae", config={"seed": 1}).final
    with pytest.raises(UserError, match=r"differs in model\.autoencoder: give --restart"):
        latent(data, run, denoiser(other))
    with pytest.raises(UserError, match=r"differs in model\.autoencoder"):
        latent(data, run, denoiser(first).model_copy(update={"autoencoder": None}))


def test_training_key_without_one_is_unchanged() -> None:
    assert {"family", "autoencoder"}.isdisjoint(ModelConfig().model_dump())
    config = TrainingConfig(dataset="blobs", images=320, batch_size=16, precision="fp32", guide=None)
    key = "c514f029d069f3d4606d259b3564ac46e94adff687a181d3a2fcdd681bfe0408"
    model = ModelConfig(width=32, channel_mult=(1, 2), attention=(1,))
    assert train_key("0" * 64, model, config) == key


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "ddpm", "heun"])
def test_image_does_not_depend_on_the_batch(model: DiffusionModel, sampler: str) -> None:
    config = with_sampler(STEPPED, sampler)
    many = sample(model, range(40), 5, config)
    assert many.shape == (40, 3, SIZE, SIZE)
    assert torch.equal(sample(model, [38, 2], 5, config), many[[38, 2]])
    assert not torch.equal(many[0], many[1])


def test_interpolation_between_seeds_starts_and_ends_at_their_images(model: DiffusionModel) -> None:
    images = interpolate(model, 1, 2, 3, STEPPED)
    for place, seed in ((0, 1), (-1, 2)):
        assert (images[place].int() - sample(model, [0], seed, STEPPED)[0].int()).abs().max() <= 2


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]))
def test_a_latent_is_kept_only_if_all_its_pixels_are(seed: int, factor: int) -> None:
    mask = np.random.default_rng(seed).random((16, 16)) < 0.9
    cells = mask.reshape(16 // factor, factor, 16 // factor, factor)
    assert np.array_equal(
        downsample_mask(torch.from_numpy(mask), (16 // factor, 16 // factor))[0].numpy(), cells.all((1, 3))
    )


@pytest.mark.parametrize("times", [1, 2])
def test_latent_inpainting_keeps_known_pixels_bit_for_bit(data: Path, model: DiffusionModel, times: int) -> None:
    real = image(data)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[1:, :7] = True
    images = sample(model, range(3), 0, STEPPED, edit=Edit(real, mask, resample_steps=times, stretch=1))
    assert torch.equal(images[:, :, mask], real[:, mask].expand(3, -1, -1))
    assert not torch.equal(images[0], images[1])


def test_latent_img2img_strength_controls_the_change(data: Path, model: DiffusionModel) -> None:
    real, config = image(data), STEPPED.model_copy(update={"steps": 20})
    back = reconstruct_images(model, real[None], SAMPLING)[0]
    strengths = (0.05, 0.4, 0.95)
    weak, middle, strong = (
        mean_square(sample(model, [0], 0, config, edit=Edit(real, strength=each))[0], back) for each in strengths
    )
    assert weak < 20 < middle < strong


@pytest.mark.slow
def test_latent_evaluation_reports_reconstruction_and_ranks_by_kid(
    data: Path, first: Path, run: Path, tmp_path: Path
) -> None:
    judging = EvaluationConfig(samples=12, extractor_size=32)
    evaluation = evaluate(data, models_to_evaluate(run, tmp_path), judging, STEPPED, tmp_path)
    assert evaluation.best == min(evaluation.checkpoints, key=lambda each: each.scores.kid)
    alone = evaluate(data, [first], judging, SAMPLING, tmp_path / "first").best.reconstruction
    assert alone is not None
    for each in evaluation.checkpoints:
        assert each.reconstruction is not None
        assert each.reconstruction.psnr == pytest.approx(alone.psnr, abs=0.05)
    assert "<h2>Reconstructions</h2>" in (tmp_path / "report.html").read_text()


def test_post_hoc_ema_model_includes_the_autoencoder(data: Path, first: Path, tmp_path: Path) -> None:
    lengths = {"ema_stds": (0.05, 0.1), "ema_decay": None}
    latent(data, tmp_path / "run", denoiser(first), config=lengths)
    models = models_to_evaluate(tmp_path / "run", tmp_path / "report", [0.2])[-1]
    assert models.name == "std-0.2.safetensors"
    assert sample(load_model(models), [0], 0, STEPPED).shape == (1, 3, SIZE, SIZE)


def test_explain_writes_latent_figures_as_images(data: Path, model: DiffusionModel, tmp_path: Path) -> None:
    paths = explain(model, image(data), tmp_path)
    assert [path.name for path in paths] == ["forward.png", "training_step.png", "reverse.png"]
    assert all(Image.open(path).width == 1920 for path in paths)


def test_a_dry_run_counts_the_work_on_latents(data: Path, first: Path) -> None:
    shape = denoiser(first)
    assert preflight(data, shape, CONFIG, STEPPED).flops == count_flops(shape, (3, 4, 4), 0)


def test_estimates_of_latents_are_never_clipped(tmp_path: Path, first: Path) -> None:
    training_images = np.stack([np.full((3, SIZE, SIZE), 40 + 5 * number, np.uint8) for number in range(40)])
    labels = ["dark" if number < 20 else "light" for number in range(40)]
    write_dataset(tmp_path / "shades", training_images, per_shard=20, labels=labels)
    model = load_model(latent(tmp_path / "shades", tmp_path / "run", denoiser(first)).final)
    assert isinstance(model, DiffusionModel)
    far = torch.full((1, *model.noise_shape), 3.0)
    with torch.inference_mode():
        assert (model.denoiser()(far, torch.tensor(0.002)) - 3).abs().max() < 0.1
        images = sample(model, range(36), 0, STEPPED.model_copy(update={"guidance": 3.0}))
        noise = GaussianNoise(0, "sampling", range(36), model.noise_shape)
        conditioning = make_conditioning(model, range(36), 0)
        untold = {"label": torch.full_like(conditioning["label"], 2)}
        mixture = apply_guidance(model.denoiser(conditioning), model.denoiser(untold), 3.0)
        expected = STEPPED.run(mixture, STEPPED.sigma_grid(model.schedule), noise)
        assert torch.equal(images, to_uint8(model.decode(expected)))


def test_invalid_or_mismatched_autoencoder_is_an_error(data: Path, first: Path, tmp_path: Path) -> None:
    pixels = latent(data, tmp_path / "pixels", denoiser(first, autoencoder=None), config={"images": 16}).final
    with pytest.raises(UserError, match=r"is a model of the family ddpm that has no autoencoder"):
        latent(data, tmp_path / "run", denoiser(pixels))
    with pytest.raises(UserError, match=r"no model at .*gone\.safetensors"):
        latent(data, tmp_path / "run", denoiser(tmp_path / "gone.safetensors"))
    with pytest.raises(UserError, match=r"names a registered model, which is not fetched here"):
        latent(data, tmp_path / "run", denoiser("models:/blobs-vae@champion"))
    write_dataset(tmp_path / "grey", random_images(20, 1, SIZE), per_shard=20)
    with pytest.raises(UserError, match=r"trained on images of 3 channels and data set grey has 1"):
        latent(tmp_path / "grey", tmp_path / "run", denoiser(first))
    write_dataset(tmp_path / "odd", random_images(20, 3, 18), per_shard=20)
    with pytest.raises(UserError, match=r"4×4 pixels, and 4 does not divide the images' 18"):
        latent(tmp_path / "odd", tmp_path / "run", denoiser(first))
    with pytest.raises(ValueError, match="likelihood of 8-bit pixels"):
        denoiser(first, variance="learned_range")
    with pytest.raises(ValueError, match=r"model\.low_resolution shows the network small images"):
        denoiser(first, low_resolution=8)


def test_sizes_that_the_factor_does_not_divide_are_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="multiples of 4 pixels"):
        load_model(run / "final.safetensors").with_size((18, 20))


def test_latent_models_are_not_exported_to_diffusers(run: Path, first: Path, tmp_path: Path) -> None:
    mistakes = (
        (run / "final.safetensors", r"a model with model\.autoencoder has no counterpart in diffusers"),
        (first, "diffusers has no counterpart of a model of the family vae"),
    )
    for weights, words in mistakes:
        with pytest.raises(UserError, match=words):
            export_to_diffusers(weights, tmp_path / "exported", STEPPED)


def test_latent_model_header_names_autoencoder_and_image_shape(run: Path) -> None:
    header = read_header(run / "final.safetensors")["model_header"]
    assert header["model"]["autoencoder"] == f"sha256:{header['latents']['digest']}"
    assert (header["channels"], header["size"]) == (3, SIZE)


def test_mask_that_keeps_no_whole_latent_is_an_error(run: Path) -> None:
    model = load_model(run / "final.safetensors")
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    striped = torch.ones(SIZE, SIZE, dtype=torch.bool)
    striped[::2] = False
    with pytest.raises(UserError, match="nothing of the image would be seen"):
        sample(model, [0], 0, STEPPED, edit=Edit(image, striped))
