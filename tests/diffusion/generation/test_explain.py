"""Explain: the numbers behind the images, and the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_uint8
from diffusion.generation.explain import explain, forward, reverse, training_step
from diffusion.process.schedules import NoiseSchedule, make_schedule
from tests.builders.ideal_denoiser import IdealNetwork
from tests.builders.small_models import header, write_model

SCHEDULES = [make_schedule(ModelConfig(schedule=name), (1, 28, 28)) for name in ("linear", "cosine")]


def noise(seed: int, channels: int = 1, size: int = 16) -> Tensor:
    return torch.randn(channels, size, size, generator=torch.Generator().manual_seed(seed))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def perfect_model(points: Tensor, prediction: str) -> DiffusionModel:
    """A model that knows its data set, ``points``, by heart."""
    config = ModelConfig.model_validate({"prediction": prediction})
    schedule = make_schedule(config, (1, 28, 28))
    ideal = IdealNetwork(points, schedule.sigmas.numpy(), prediction)

    def network(x_t: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return ideal(x_t, time)

    _, channels, size, _ = points.shape
    return DDPMModel(header(config, channels, size), network, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
def test_the_forward_strip_goes_from_the_image_to_the_noise(schedule: NoiseSchedule) -> None:
    x0, epsilon = noise(0).clamp(-1, 1), noise(1)
    steps, images = forward(schedule, x0, epsilon)
    assert (steps[0], steps[-1]) == (0, 999)
    assert images.shape == (8, 1, 16, 16)
    to_image = [correlation(frame, x0) for frame in images]
    to_noise = [correlation(frame, epsilon) for frame in images]
    assert to_image == sorted(to_image, reverse=True)
    assert to_noise == sorted(to_noise)
    assert min(to_image[0], to_noise[-1]) > 0.999
    for frame, alpha_bar in zip(images, schedule.alphas_cumprod[steps].tolist(), strict=True):
        torch.testing.assert_close(frame, alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * epsilon)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_predicts_the_noise_of_the_training_step(prediction: str) -> None:
    x0, epsilon = noise(0).clamp(-1, 1), noise(1)
    model = perfect_model(x0[None], prediction)
    t, mixture, predicted = training_step(model, x0, epsilon)
    assert model.schedule.alphas_cumprod[t] == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(mixture, 0.5**0.5 * (x0 + epsilon), atol=0.02, rtol=0)
    torch.testing.assert_close(predicted, epsilon, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [0.0, 1.5], ids=["grey", "brighter than white"])
def test_prediction_error_equals_the_wrong_image_estimate(level: float) -> None:
    x0, epsilon = noise(0).clamp(-1, 1), noise(1)
    _, _, predicted = training_step(perfect_model(torch.full((1, 1, 16, 16), level), "sample"), x0, epsilon)
    # x_0 + σ ε less its estimate is taken for noise, and σ is 1 there; nothing is clipped in training.
    torch.testing.assert_close(predicted - epsilon, x0 - level, atol=0.02, rtol=0)


def test_reverse_process_of_a_perfect_model_ends_at_the_data() -> None:
    points = torch.stack([noise(seed).clamp(-1, 1) for seed in range(4)])
    frames = reverse(perfect_model(points, "v_prediction"), seed=3)
    distances = (points - frames.result).abs().amax((1, 2, 3))
    assert distances.min() < 0.01
    nearest_point = points[distances.argmin()]
    assert frames.steps == sorted(frames.steps, reverse=True)
    assert frames.steps[0] > 950
    assert frames.steps[-1] < 1
    assert len(frames.steps) == len(frames.images) == len(frames.estimates) == 8
    assert abs(correlation(frames.images[0], nearest_point)) < 0.3
    assert frames.images[0].std() == pytest.approx(1, abs=0.1)
    assert correlation(frames.images[-1], nearest_point) > 0.999
    assert correlation(frames.estimates[-1], nearest_point) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_explain_writes_three_deterministic_figures(channels: int, tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model.safetensors", seed=0, images=0, channels=channels))
    image = to_uint8(noise(0, channels, 8))
    paths = explain(model, image, tmp_path / "first", seed=5)
    assert [path.name for path in paths] == ["forward.png", "training_step.png", "reverse.png"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        with Image.open(path) as figure:
            assert figure.format == "PNG"
            assert figure.width == 1920
            assert np.asarray(figure.convert("L")).std() > 20
    again = explain(model, image, tmp_path / "again", seed=5)
    other = explain(model, image, tmp_path / "other", seed=6)
    for path, same, different in zip(paths, again, other, strict=True):
        assert path.read_bytes() == same.read_bytes()
        assert path.read_bytes() != different.read_bytes()


def test_image_of_another_size_is_an_error(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model.safetensors", seed=0, images=0))
    with pytest.raises(UserError, match="the image is 3×8×8 and the model generates 1×8×8"):
        explain(model, to_uint8(noise(0, 3, 8)), tmp_path)
