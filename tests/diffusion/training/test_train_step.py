"""One optimizer step is what the textbook says, however it is computed."""

from pathlib import Path

import pytest
import torch

from diffusion.common.threads import worker_threads
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.model import TrainingObjective, to_float
from diffusion.training.config import TrainingConfig
from diffusion.training.trainer import scheduled_learning_rate
from tests.builders.small_trainers import make_trainer, take_step

MODEL = ModelConfig(width=16, channel_mult=(1, 2), blocks=1, attention=(1,), patch=2)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_worker_threads_step_equals_plain_adamw_on_the_batch(dataset: Path, parts: int) -> None:
    config = TrainingConfig(
        images=640,
        batch_size=16,
        cpu_threads=parts,
        precision="fp32",
        warmup_images=0,
        max_grad_norm=1e9,
        optimizer="adamw",
    )
    with worker_threads(parts) as pool:
        trainer = make_trainer(dataset, MODEL, config, pool, 640)
        plain = make_trainer(dataset, MODEL, config, pool, 640)
        network = plain.state.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        reference = torch.optim.AdamW(
            network.parameters(), betas=TrainingObjective.betas, weight_decay=config.weight_decay, foreach=False
        )
        for images in range(0, 96, 16):
            batch = plain.loader.batch(images)
            indices = range(images, images + 16)
            conditioning = plain.setup.training_conditioning(batch)
            noised = plain.objective.make_batch(to_float(batch.images), indices, conditioning)
            loss = plain.objective.losses(network, noised).mean()
            reference.param_groups[0]["lr"] = scheduled_learning_rate(config, images, 640)
            reference.zero_grad()
            loss.backward()
            reference.step()
            step_loss, _ = take_step(trainer)
            torch.testing.assert_close(step_loss, loss.detach(), rtol=1e-4, atol=1e-6)
    # Adam's first steps are signs: where a gradient is all but zero, its sign is rounding's.
    differences = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(trainer.state.network.parameters(), network.parameters(), strict=True)]
    )
    assert differences.quantile(0.99) < 1e-4


@pytest.mark.parametrize("share", [0.02, 0.98], ids=["little noise", "much noise"])
def test_network_inputs_have_variance_1_at_every_noise_level(dataset: Path, share: float) -> None:
    network_inputs: list[torch.Tensor] = []
    with worker_threads(1) as pool:
        trainer = make_trainer(dataset, MODEL, TrainingConfig(images=64), pool, 64)
        setup = trainer.setup
        x0 = to_float(setup.dataset.images(setup.dataset.rows("train")))
        x0 = x0 / 4 + 0.7  # far from a mean of 0 and a variance of 1
        moments = {"data_mean": x0.mean((0, 2, 3)).tolist(), "sigma_data": x0.var((0, 2, 3)).mean().sqrt().item()}
        header = setup.model_header(0).model_copy(update=moments)
        assert header.data_mean is not None
        objective = DDPMModel.make_objective(header, trainer.config)
        batch = objective.make_batch(x0, range(len(x0)), {}, probe="moments")
        batch.random["t"] = torch.full_like(batch.random["t"], share * 999)
        trainer.state.network.register_forward_pre_hook(lambda _, inputs: network_inputs.append(inputs[0]))
        with torch.inference_mode():
            objective.losses(trainer.state.network, batch)
    assert network_inputs[0].mean((0, 2, 3)).abs().max().item() < 0.03
    assert network_inputs[0].var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=0.03)
