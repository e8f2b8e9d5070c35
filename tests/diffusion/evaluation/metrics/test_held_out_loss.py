"""Losses and bits of held-out images, against data of which all is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.evaluation.metrics.held_out_loss import (
    HeldOutLoss,
    conditioning_of_rows,
    measure_losses,
    summarize_losses,
)
from diffusion.families.config import ModelConfig, VAEConfig
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.ddpm.network import UNet
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_float
from diffusion.families.text_encoder import ENCODER
from diffusion.families.vae.config import LatentSpace
from diffusion.families.vae.model import VAEModel
from diffusion.families.vae.network import VAE, Latents
from diffusion.generation.super_resolution import task_of
from diffusion.process.denoiser import Denoiser
from diffusion.process.likelihood import HALF_A_LEVEL, LEVELS, Terms, compute_bound, denoising_terms, noise_levels
from diffusion.process.objective import Objective, make_edm_weight
from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import sampling_config
from diffusion.process.schedules import edm_schedule
from tests.builders.captioned import FakeEncoder
from tests.builders.ideal_denoiser import IdealDenoiser, two_tone_points
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import header, write_model

SPREAD = 0.2
SHAPE = (1, 4, 4)
EDGES = noise_levels()
SAMPLING = sampling_config(compute_batch=8, precision="fp32")


def gaussian(count: int, seed: int = 0, spread: float = SPREAD) -> Tensor:
    """Values of independent pixels, (count, *SHAPE), rounded as stored ones are."""
    values = spread * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return ((values + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def wiener(variances: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x] of Gaussian values of these ``variances``, (D,)."""
    level = sigma[:, None] ** 2
    return (x.flatten(1) * (variances / (variances + level))).view_as(x).float()


def rounding() -> float:
    """Bits by which the last step of Gaussian values costs more than if levels were infinitely fine, by quadrature."""
    z = np.linspace(-7, 7, 20_001)
    half = HALF_A_LEVEL / EDGES[0].item()
    nats = np.average(-np.log(norm.cdf(z + half) - norm.cdf(z - half)), weights=norm.pdf(z))
    return float(nats - 0.5 - 0.5 * math.log(2 * math.pi) + math.log(2 * half)) / math.log(2)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(random_images(count, seed=seed))


def test_gaussian_values_have_loss_one_and_their_entropy_in_bits() -> None:
    x0 = gaussian(600)
    variances = torch.full((16,), SPREAD**2, dtype=torch.float64)
    losses = summarize_losses(denoising_terms(lambda x, s: wiener(variances, x, s), x0, SPREAD, range(600)))
    assert [level.loss for level in losses.levels] == pytest.approx([1] * LEVELS, abs=0.06)
    assert all(abs(level.loss - 1) < 4 * level.loss_se for level in losses.levels)
    # The differential entropy, in bits, of a value in units of the 256 levels.
    expected = 0.5 * math.log2(2 * math.pi * math.e * SPREAD**2) + math.log2(127.5) + rounding()
    assert losses.bits_per_dim is not None
    assert losses.bits_per_dim_se is not None
    assert losses.bits_per_dim == pytest.approx(expected, abs=4 * losses.bits_per_dim_se)
    assert losses.bits_per_dim_se < 0.04


def test_values_of_different_spread_cost_their_entropy() -> None:
    spreads = torch.linspace(0.05, 0.3, 16, dtype=torch.float64)
    values = spreads * torch.randn(600, 16, generator=torch.Generator().manual_seed(1)).double()
    x0 = ((values.view(600, *SHAPE) + 1) * 127.5).round().clamp(0, 255).float() / 127.5 - 1
    overall = spreads.square().mean().sqrt().item()
    losses = summarize_losses(denoising_terms(lambda x, s: wiener(spreads**2, x, s), x0, overall, range(600)))
    expected = (0.5 * torch.log2(2 * math.pi * math.e * spreads**2)).mean().item() + math.log2(127.5) + rounding()
    assert losses.bits_per_dim is not None
    assert losses.bits_per_dim_se is not None
    # The deviation of the last step is that of all values, and the widest reach 1.
    assert -4 * losses.bits_per_dim_se < losses.bits_per_dim - expected < 4 * losses.bits_per_dim_se + 0.01


def test_ideal_denoiser_pays_only_the_bits_of_the_image_index() -> None:
    points = two_tone_points(4)
    x0 = points.repeat(50, 1, 1, 1)
    losses = summarize_losses(denoising_terms(IdealDenoiser(points), x0, 1.0, range(200)))
    # Besides, black and white are told from their neighbours at the least noise, as often as a Gaussian is.
    bits = -torch.special.log_ndtr(torch.tensor(HALF_A_LEVEL) / EDGES[0]).item() / math.log(2)
    assert losses.bits_per_dim is not None
    assert losses.bits_per_dim_se is not None
    assert losses.bits_per_dim == pytest.approx(math.log2(4) / 16 + bits, abs=4 * losses.bits_per_dim_se)
    assert losses.bits_per_dim_se < 0.01


def test_wrong_denoiser_has_more_bits_per_dim() -> None:
    x0 = gaussian(200)
    variances = torch.full((16,), SPREAD**2, dtype=torch.float64)
    bits = []
    for wrong in (1.0, 1.5, 3.0):
        terms = denoising_terms(lambda x, s, w=wrong: wiener(w * variances, x, s), x0, SPREAD, range(200))  # type: ignore[misc]
        bits.append(summarize_losses(terms).bits_per_dim)
    assert bits == sorted(bits)  # type: ignore[type-var]


def test_it_is_the_limit_over_ever_more_steps_from_below() -> None:
    x0 = gaussian(64)
    variances = torch.full((16,), SPREAD**2, dtype=torch.float64)
    terms = denoising_terms(lambda x, s: wiener(variances, x, s), x0, SPREAD, range(64))
    limit = summarize_losses(terms).bits_per_dim
    random = torch.Generator().manual_seed(0)
    sums = []
    for steps in (60, 400):
        schedule, total = edm_schedule(steps, sigma_min=EDGES[0].item()), 0.0
        for t in range(steps):
            times = torch.full((64,), t)
            sigma = schedule.sigmas[times]
            x = x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=random)
            errors = wiener(variances, x, sigma) - x0
            # The lesser variance, but for the last step, where it is next to none.
            v = torch.full_like(x0, -1 if t else 1)
            total += compute_bound(schedule, times, x0, errors, v).mean().item()
        sums.append(total)
    assert limit is not None
    assert limit < sums[1] + 0.03
    assert sums[1] < sums[0]
    assert sums[1] - limit < 0.5


def test_the_loss_is_that_of_training_with_edms_weight(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model", 0, 0))
    assert isinstance(model, DiffusionModel)
    x0 = to_float(images(6))
    parametrization = Parametrization(model.config.prediction, 0.5)
    denoiser = Denoiser(model.network, model.schedule, parametrization, clip=False)
    inputs: list[tuple[Tensor, Tensor]] = []

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        inputs.append((x, sigma))
        return denoiser(x, sigma)

    terms = denoising_terms(estimate, x0, 0.5, range(6))
    objective = Objective(model.schedule, parametrization, make_edm_weight(0.5))
    for (x, sigma), losses in zip(inputs, terms.losses.unbind(1), strict=False):
        noise = ((x - x0) / sigma[:, None, None, None]).float()
        expected = objective.loss(model.network, x0, model.schedule.time(sigma), noise)
        torch.testing.assert_close(losses.float(), expected, rtol=2e-3, atol=1e-4)
    assert all(((EDGES[n] <= s) & (s <= EDGES[n + 1])).all() for n, (_, s) in enumerate(inputs[:-1]))


def test_each_image_has_its_noise_however_images_come(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model", 0, 0))
    x = images(21)
    whole = measure_losses(model, [(x, {})], SAMPLING)
    parts = measure_losses(model, [(x[:8], {}), (x[8:16], {}), (x[16:], {})], SAMPLING)
    assert whole.bits is not None
    assert parts.bits is not None
    assert torch.equal(whole.losses, parts.losses)
    assert torch.equal(whole.bits, parts.bits)
    assert whole.losses.shape == (21, LEVELS)


@pytest.mark.parametrize(
    "changes", [{"prediction": "v_prediction"}, {"prediction": "epsilon"}, {"variance": "learned_range"}]
)
def test_any_network_can_be_measured(changes: dict[str, object], tmp_path: Path) -> None:
    config = ModelConfig.model_validate(header().model.model_dump() | changes)
    model = load_model(write_model(tmp_path / "model", 0, 0, config=config))
    losses = summarize_losses(measure_losses(model, [(images(10), {})], SAMPLING))
    assert losses.bits_per_dim is not None
    assert losses.bits_per_dim > 0
    assert losses.images == 10
    assert HeldOutLoss.model_validate_json(losses.model_dump_json()) == losses
    assert losses.metrics().keys() == {"held_out_loss", "held_out_loss_se", "bits_per_dim", "bits_per_dim_se"}


def test_held_out_loss_conditions_on_labels(tmp_path: Path) -> None:
    labels = [("cat", "dog", None)[number % 3] for number in range(24)]
    write_dataset(tmp_path / "set", random_images(24), 8, labels)
    dataset = Dataset.open(tmp_path / "set")
    rows = dataset.rows("held_out")
    model = load_model(write_model(tmp_path / "model", 0, 0, classes={"cat": 8, "dog": 8}))
    conditioning = conditioning_of_rows(model, dataset, rows)
    names = ["cat", "dog", None]
    assert [names[number] for number in conditioning["label"].tolist()] == dataset.labels(rows)
    x = dataset.images(rows)
    as_told = measure_losses(model, [(x, conditioning)], SAMPLING).losses
    otherwise = measure_losses(model, [(x, {"label": torch.full_like(conditioning["label"], 2)})], SAMPLING).losses
    unlabelled = conditioning["label"] == 2
    assert torch.equal(as_told[unlabelled], otherwise[unlabelled])
    assert not torch.equal(as_told[~unlabelled], otherwise[~unlabelled])
    plain = load_model(write_model(tmp_path / "plain", 0, 0))
    assert conditioning_of_rows(plain, dataset, rows) == {}


def test_held_out_loss_conditions_on_captions_and_small_images(fake_encoder: FakeEncoder, tmp_path: Path) -> None:
    captions = ["a red square" if number % 8 == 0 else None for number in range(24)]
    write_dataset(tmp_path / "set", random_images(24), 8, captions=captions)
    dataset = Dataset.open(tmp_path / "set")
    rows = dataset.rows("held_out")
    real_images = dataset.images(rows)
    for changes, name in (({"text": True}, "text"), ({"low_resolution": 4, "conditional": False}, "low")):
        config = ModelConfig.model_validate(header().model.model_dump() | changes)
        about = header(config).model_copy(update={"encoder": ENCODER if name == "text" else None})
        model = DDPMModel(about, UNet(config, 1, 8).eval(), edm_schedule(1000))
        conditioning = conditioning_of_rows(model, dataset, rows)
        if name == "text":
            embeddings = [fake_encoder(text) if text else torch.zeros(384) for text in dataset.captions(rows)]
            assert torch.equal(conditioning["text"], torch.stack(embeddings))
        else:
            assert torch.equal(conditioning["low"], task_of(config, 8).conditioning(real_images)["low"])
            assert not conditioning["level"].any()
        assert measure_losses(model, [(real_images, conditioning)], SAMPLING).losses.isfinite().all()


def test_latent_models_report_a_loss_and_no_bits_per_dim() -> None:
    torch.manual_seed(0)
    vae = VAEConfig(width=16, channel_mult=(1, 1), latent_channels=3)
    about = header(size=16)
    assert isinstance(about.model, ModelConfig)
    network = UNet(about.model.model_copy(update={"patch": 1}), 3, 4).eval()
    latents = Latents(LatentSpace(autoencoder=vae, digest="", channels=3, size=4), 1).eval()
    model = DDPMModel(about, network, edm_schedule(1000), latents)
    losses = summarize_losses(measure_losses(model, [(torch.from_numpy(random_images(9, size=16)), {})], SAMPLING))
    assert losses.bits_per_dim is None
    assert len(losses.levels) == LEVELS
    assert losses.loss is not None
    assert losses.metrics().keys() == {"held_out_loss", "held_out_loss_se"}


def test_autoencoders_report_bits_per_dim_and_no_denoising_loss() -> None:
    x = torch.from_numpy(random_images(9, size=16))
    results = []
    for weight in (1.0, 0.01):
        config = VAEConfig(width=16, channel_mult=(1, 1), latent_channels=3, kl_weight=weight)
        torch.manual_seed(0)
        network = VAE(config, 1, 16).eval()
        model = VAEModel(header(size=16).model_copy(update={"model": config}), network)
        results.append(measure_losses(model, [(x, {})], SAMPLING))
    assert results[0].bits is not None
    assert results[1].bits is not None
    assert torch.equal(results[0].bits, results[1].bits)
    summary = summarize_losses(results[0])
    assert (summary.levels, summary.loss) == ([], None)
    # One sample of the posteriors is taken, of an expectation.
    random = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        samples = [network(to_float(x), torch.randn(9, 64 + 3 * 4 * 4, 1, 1, generator=random)) for _ in range(100)]
    nats = torch.stack([misfit + divergence for misfit, divergence, _ in samples]).mean()
    assert summary.bits_per_dim == pytest.approx(nats.item() / 256 / math.log(2), rel=0.02)


def test_errors_are_those_of_means_over_images() -> None:
    losses = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).double()
    loss_summary = summarize_losses(Terms(torch.tensor([0.1, 1, 10, 80], dtype=torch.float64), losses, losses[:, 0]))
    assert [(level.sigma_low, level.sigma_high) for level in loss_summary.levels] == [(0.1, 1), (1, 10), (10, 80)]
    assert loss_summary.levels[1].loss == pytest.approx(losses[:, 1].mean().item())
    assert loss_summary.levels[1].loss_se == pytest.approx(losses[:, 1].std().item() / 50**0.5)
    assert loss_summary.loss_se == pytest.approx(losses.mean(1).std().item() / 50**0.5)
    assert (loss_summary.bits_per_dim, loss_summary.bits_per_dim_se) == (
        loss_summary.levels[0].loss,
        loss_summary.levels[0].loss_se,
    )
