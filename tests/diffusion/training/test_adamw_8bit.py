"""AdamW of 8 bits: its numbers against the nearest ones, its steps against AdamW's, its memory, resuming, skipping."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffusion.training.adamw_8bit import AdamW8bit, decode, encode, levels
from diffusion.training.config import TrainingConfig
from diffusion.training.train import train
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt, require_skipped

BETAS, DECAY = (0.9, 0.99), 0.1
SHAPES = ((80, 64), (64,))
"""Of a weight whose moments have 8 bits, and of one of which they have 32."""


def gradients_of(steps: int) -> list[list[Tensor]]:
    """Gradients whose sizes differ a thousandfold within a tensor, with a mean and noise."""
    generator = torch.Generator().manual_seed(0)
    sizes = [10 ** torch.empty(shape).uniform_(-3, 0, generator=generator) for shape in SHAPES]
    return [[size * (1 + torch.randn(size.shape, generator=generator)) for size in sizes] for _ in range(steps)]


def trained(kind: type[torch.optim.Optimizer], gradients: list[list[Tensor]]) -> tuple[list[nn.Parameter], Any]:
    parameters = [nn.Parameter(torch.linspace(-1, 1, int(np.prod(shape))).view(shape)) for shape in SHAPES]
    optimizer: Any = kind(parameters, lr=1e-3, betas=BETAS, weight_decay=DECAY)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_become_the_nearest_of_their_block(signed: bool) -> None:
    values = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 6, 7)[:, None]
    values = values if signed else values.square()
    numbers = levels(signed)
    assert len(numbers) == len(numbers.unique()) <= 256
    actual = decode(*encode(values, numbers), numbers, values.shape).flatten().numpy()
    for start in range(0, values.numel(), 256):
        block = values.flatten()[start : start + 256].numpy()
        candidates = np.abs(block).max() * numbers.numpy()
        nearest = np.abs(block[:, None] - candidates[None]).min(1)
        np.testing.assert_allclose(np.abs(actual[start : start + 256] - block), nearest, rtol=1e-5, atol=1e-12)


def test_zeros_stay_zeros_and_roots_never_become_zero() -> None:
    for signed in (True, False):
        numbers = levels(signed)
        assert not decode(*encode(torch.zeros(300), numbers), numbers, torch.Size([300])).any()
    assert levels(signed=False).min() > 0
    assert 0 in levels(signed=True)


def test_weights_go_where_those_of_adamw_go() -> None:
    gradients = gradients_of(100)
    (expected, _), (actual, _) = trained(torch.optim.AdamW, gradients), trained(AdamW8bit, gradients)
    starts, _ = trained(AdamW8bit, [])
    for start, one, other in zip(starts, expected, actual, strict=True):
        way = (one - start).norm()
        assert (one - other).norm() < (0.1 if one.numel() > 4096 else 1e-4) * way


def test_moments_take_a_quarter_of_the_memory() -> None:
    _, optimizer = trained(AdamW8bit, gradients_of(1))
    large, small = (optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"])
    assert sum(value.nbytes for value in large.values()) < 0.26 * 2 * 4 * 80 * 64
    assert {value.dtype for value in small.values()} == {torch.float32}


def test_a_skipped_step_changes_nothing() -> None:
    gradients = gradients_of(6)
    parameters, optimizer = trained(AdamW8bit, gradients[:5])
    require_skipped(optimizer, parameters, gradients[5])


def test_stopped_run_resumes_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"width": 32})
    options = {"images": 96, "checkpoints": 3, "optimizer": "adamw_8bit", "learning_rate": 1e-3}
    config = TrainingConfig.model_validate(CONFIG.model_dump() | options)
    whole = train(dataset, tmp_path / "whole", model, config, SAMPLING, lambda _: None)
    with pytest.raises(Stop):
        train(dataset, tmp_path / "cut", model, config, SAMPLING, lambda _: StopAt(48))
    [checkpoint] = (tmp_path / "cut" / "checkpoints").glob("*32.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        types = {file.get_tensor(name).dtype for name in file.keys() if name.endswith("_codes")}  # noqa: SIM118
    assert types == {torch.uint8}
    resumed = train(dataset, tmp_path / "cut", model, config, SAMPLING, lambda _: None)
    assert resumed.final.read_bytes() == whole.final.read_bytes()
