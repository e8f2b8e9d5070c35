"""Prodigy: against its algorithm, step by step, in NumPy; that it finds a rate; and that it resumes and skips."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffusion.checkpoints import read_model_header
from diffusion.common.threads import worker_threads
from diffusion.training.config import DistillationConfig, TrainingConfig, student_training
from diffusion.training.prodigy import Prodigy
from diffusion.training.train import train
from diffusion.training.trainer import scheduled_learning_rate
from tests.builders.small_models import write_model
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt, require_skipped

BETAS, DECAY = (0.9, 0.99), 0.1


def gradients_of(steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) + 1 for shape in ((3, 4), (5,))]
        for _ in range(steps)
    ]


def stepped(gradients: list[list[Tensor]], rates: list[float]) -> tuple[list[nn.Parameter], Prodigy]:
    # In float64: the first steps are below the resolution of weights in float32, which shifts the estimate.
    starts = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), torch.ones(5, dtype=torch.float64)
    parameters = [nn.Parameter(start) for start in starts]
    optimizer = Prodigy(parameters, 1.0, BETAS, DECAY)
    for step, rate in zip(gradients, rates, strict=True):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return parameters, optimizer


def reference(gradients: list[list[Tensor]], rates: list[float]) -> tuple[np.ndarray, float]:
    """Algorithm 4 of arXiv 2306.06101, in float64, on all weights as one vector; its η_k is rate × bias correction."""
    beta1, beta2 = BETAS
    beta3 = beta2**0.5
    start = np.concatenate([np.linspace(-1, 1, 12), np.ones(5)])
    x, m, v, s = start.copy(), np.zeros(17), np.zeros(17), np.zeros(17)
    d0 = d = 1e-6
    r = 0.0
    for k, (step, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = np.concatenate([gradient.double().numpy().ravel() for gradient in step])
        eta = rate * (1 - beta2**k) ** 0.5 / (1 - beta1**k)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = beta3 * r + (d / d0) * d * eta * g @ (start - x)
        s = beta3 * s + (d / d0) * d * g
        following = max(d, r / np.abs(s).sum())
        x = x - eta * d * (DECAY * x + m / (np.sqrt(v) + 1e-8 * d))
        d = following
    return x, d


def test_steps_are_those_of_the_algorithm() -> None:
    gradients, rates = gradients_of(40), [1 - number / 50 for number in range(40)]
    parameters, optimizer = stepped(gradients, rates)
    expected, distance = reference(gradients, rates)
    assert distance > 5e-6
    assert float(optimizer.state[parameters[0]]["distance"]) == pytest.approx(distance, rel=1e-4)
    actual = torch.cat([parameter.detach().flatten() for parameter in parameters]).double().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_minimum_is_found_at_any_scale(scale: float) -> None:
    target = scale * torch.tensor([3.0, -4.0])
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Prodigy([weight], 1.0, (0.9, 0.99), 0.0)
    for number in range(600):
        weight.grad = 2 * (weight.detach() - target)
        optimizer.param_groups[0]["lr"] = 1 - number / 600
        optimizer.step()
    assert (weight - target).norm() < 0.05 * target.norm()


def test_a_skipped_step_changes_nothing() -> None:
    gradients = gradients_of(6)
    parameters, optimizer = stepped(gradients[:5], [1.0] * 5)
    require_skipped(optimizer, parameters, gradients[5])


def test_stopped_run_resumes_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "prodigy", "learning_rate": 1.0, "learning_rate_decay": "constant"}
    config = TrainingConfig.model_validate(CONFIG.model_dump() | {"images": 96, "checkpoints": 3} | options)
    whole = train(dataset, tmp_path / "whole", MODEL, config, SAMPLING, lambda _: None)
    with pytest.raises(Stop):
        train(dataset, tmp_path / "cut", MODEL, config, SAMPLING, lambda _: StopAt(48))
    resumed = train(dataset, tmp_path / "cut", MODEL, config, SAMPLING, lambda _: None)
    assert resumed.final.read_bytes() == whole.final.read_bytes()


def test_rate_is_found_in_training(dataset: Path) -> None:
    config = TrainingConfig(
        images=640,
        batch_size=16,
        cpu_threads=1,
        precision="fp32",
        optimizer="prodigy",
        learning_rate=1.0,
        warmup_images=0,
    )
    with worker_threads(1) as pool:
        trainer = make_trainer(dataset, MODEL, config, pool, 640)
        for _ in range(20):
            take_step(trainer)
        [optimizers] = trainer.state.optimizers
        [optimizer] = optimizers.values()
    assert isinstance(optimizer, Prodigy)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["distance"] > 2e-6


@pytest.mark.parametrize(("decay", "expected"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_rate_decays_as_configured(decay: Any, expected: float) -> None:
    config = TrainingConfig(images=1000, batch_size=10, warmup_images=100, learning_rate_decay=decay, learning_rate=2.0)
    assert scheduled_learning_rate(config, 40, 1000) < scheduled_learning_rate(config, 100, 1000)
    assert scheduled_learning_rate(config, 500, 1000) == pytest.approx(2 * expected)
    assert scheduled_learning_rate(config, 1000, 1000) == pytest.approx(2.0 if decay == "constant" else 0.0)


def test_rate_of_other_optimizers_is_an_error() -> None:
    with pytest.raises(ValidationError, match="set that to 1"):
        TrainingConfig(optimizer="prodigy", learning_rate=4e-3)


def test_students_of_such_a_configuration_are_trained_at_their_own_rate(tmp_path: Path) -> None:
    header = read_model_header(write_model(tmp_path / "teacher.safetensors", 0, images=9, config=MODEL))
    config = TrainingConfig(optimizer="prodigy", learning_rate=1.0)
    student = student_training(config, DistillationConfig(learning_rate=2e-3), SAMPLING, "teacher.safetensors", header)
    assert (student.optimizer, student.learning_rate) == ("muon", 2e-3)
