"""One optimizer step is what the textbook says, however it is computed."""

from pathlib import Path

import pytest
import torch

from diffusion.data.dataset import Dataset
from diffusion.families.base import BETAS
from diffusion.lanes import lanes
from diffusion.model import to_float
from diffusion.models.config import ModelConfig
from diffusion.training.config import TrainingConfig
from diffusion.training.run import Run, learning_rate

MODEL = ModelConfig(width=16, multipliers=(1, 2), blocks=1, attention=(1,), patch=2)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_steps_in_lanes_equal_plain_adamw_on_the_whole_batch(dataset: Path, parts: int) -> None:
    config = TrainingConfig(images=640, batch_size=16, lanes=parts, precision="fp32", warmup_images=0, clip_norm=1e9)
    with lanes(parts) as pool:
        run = Run.new(Dataset.open(dataset), MODEL, config, pool)
        plain = Run.new(Dataset.open(dataset), MODEL, config, pool)
        run.total = 640
        network = plain.state.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        reference = torch.optim.AdamW(
            network.parameters(), betas=BETAS, weight_decay=config.weight_decay, foreach=False
        )
        for images in range(0, 96, 16):
            batch = plain.loader.batch(images)
            indices = range(images, images + 16)
            drawn = plain.learner.drawn(to_float(batch.pictures), indices, plain._told(batch))
            loss = plain.learner.losses(network, drawn).mean()
            reference.param_groups[0]["lr"] = learning_rate(config, images, 640)
            reference.zero_grad()
            loss.backward()
            reference.step()
            step_loss, _ = run.step()
            torch.testing.assert_close(step_loss, loss.detach(), rtol=1e-4, atol=1e-6)
    # Adam's first steps are signs: where a gradient is all but zero, its sign is rounding's.
    differences = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(run.state.network.parameters(), network.parameters(), strict=True)]
    )
    assert differences.quantile(0.99) < 1e-4
