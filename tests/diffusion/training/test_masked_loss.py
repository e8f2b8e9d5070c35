"""The loss by masks: what plain arithmetic says, in pixels and latents, and what a model learns and does not learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.data.loader import Loader, make_order
from diffusion.families.config import GANConfig, ModelConfig, training_conflict
from diffusion.generation.generate import sample
from diffusion.process.config import MaskConfig
from diffusion.process.objective import make_objective
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import train
from tests.builders.masked import read_masked, write_masked, write_watermarked
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_trainers import make_trainer
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Away, Stop, StopAt, run


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A data set whose images have a mark that masks leave out."""
    read_masked(tmp_path / "data" / "marked", write_watermarked(tmp_path / "images"), size=8)
    return tmp_path / "data" / "marked"


def masked(**fields: Any) -> TrainingConfig:
    return CONFIG.model_copy(update={"mask": MaskConfig(**fields)})


@pytest.mark.parametrize("sides", [(8, 8), (16, 8)], ids=["pixels", "latents"])
def test_loss_is_the_mean_of_weighted_squares(sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    grid, side = sides
    x0, noise = (torch.randn(5, 4, side, side, generator=generator) for _ in range(2))
    weights = torch.rand(5, 1, grid, grid, generator=generator)
    config = TrainingConfig(images=1, weighting="plain")
    objective = make_objective(ModelConfig(prediction="epsilon"), config, 0.5, (4, side, side))

    def loss(pixel_weights: torch.Tensor | None) -> torch.Tensor:
        t = torch.full((5,), 300)
        return objective.loss(lambda x, _: torch.full_like(x, 0.25), x0, t, noise, pixel_weights=pixel_weights)

    means = weights.numpy().reshape(5, 1, side, grid // side, side, grid // side).mean((3, 5))
    expected = (means * (0.25 - noise.numpy()) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(loss(weights).numpy(), expected, rtol=1e-5)
    assert torch.equal(loss(torch.ones_like(weights)), loss(None))


@pytest.mark.parametrize("fields", [{}, {"min_weight": 0.25}, {"normalize_area": True, "min_weight": 0.1}])
def test_masks_become_weights_of_their_images(tmp_path: Path, fields: dict[str, Any]) -> None:
    read_masked(tmp_path / "data", write_masked(tmp_path / "images", 16), size=24)
    config = masked(**fields).model_copy(update={"batch_size": 8})
    with worker_threads(1) as pool:
        trainer = make_trainer(tmp_path / "data", MODEL, config, pool, 64)
        with trainer.loader:
            batch = trainer.loader.batch(0)
        inputs = trainer.objective.make_batch(trainer.setup.x0(batch), batch.indices, {})
        weights = trainer.setup.with_masks(inputs, batch).pixel_weights
    assert weights is not None
    for row, image, weight in zip(batch.rows, batch.images.numpy(), weights.numpy(), strict=True):
        number = int(trainer.setup.dataset.sources([row])[0][:2])
        expected = np.maximum(image / 255, fields.get("min_weight", 0)) if number % 3 else np.ones_like(image, float)
        expected = expected / expected.mean() if fields.get("normalize_area") else expected
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.slow
def test_models_do_not_learn_what_masks_leave_out(marked: Path, tmp_path: Path) -> None:
    config = TrainingConfig(
        dataset="marked", images=4800, batch_size=32, warmup_images=320, checkpoints=1, precision="fp32"
    )
    corners, rest = {}, {}
    for name, mask in (("plain", None), ("masked", MaskConfig())):
        result = train(marked, tmp_path / name, MODEL, config.model_copy(update={"mask": mask}), SAMPLING)
        model = load_model(result.final)
        images = sample(model, range(16), 0, sampling_config(steps=8, compute_batch=16)).float()
        corners[name] = images[:, :, :4, :4].mean().item()
        rest[name] = images[:, :, 4:].mean().item()
        assert read_header(result.final)["model_header"]["training"].get("mask") == (mask and mask.model_dump())
    assert corners["plain"] > 200
    assert corners["masked"] < 150
    assert max(rest.values()) < 80


@pytest.mark.slow
def test_masked_training_resumes_and_streams_to_equal_bits(marked: Path, tmp_path: Path) -> None:
    plain = run(marked, tmp_path / "plain")
    config = masked(min_weight=0.1)
    whole = run(marked, tmp_path / "whole", config)
    assert whole.train_key != plain.train_key
    assert whole.final.read_bytes() != plain.final.read_bytes()
    streaming = config.model_copy(update={"stream_bytes": 10**9, "cache_bytes": 0})
    store = Away(marked, tmp_path / "remote")
    with pytest.raises(Stop):
        run(marked, tmp_path / "cut", streaming, store=store, track=lambda _: StopAt(112))
    assert run(marked, tmp_path / "cut", streaming, store=store).final.read_bytes() == whole.final.read_bytes()


def test_ranks_share_the_masks_of_a_batch(tmp_path: Path) -> None:
    read_masked(tmp_path / "data", write_masked(tmp_path / "images", 16))
    dataset = Dataset.open(tmp_path / "data")
    order, rows = make_order(dataset, 0, 8), dataset.rows("train")

    def masks(rank: int, ranks: int) -> torch.Tensor:
        with Loader(dataset, rows, order, 8, rank=rank, ranks=ranks, flip_seed=1, masks=True) as loader:
            found = loader.batch(8).masks
        assert found is not None
        return found

    assert torch.equal(masks(0, 1), torch.cat([masks(0, 2), masks(1, 2)]))


def test_masks_without_an_effect_are_mistakes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", random_images(16), per_shard=8)
    with pytest.raises(UserError, match=r"ingest\.masks"):
        run(tmp_path / "data", tmp_path / "run", masked())
    assert "training.mask" in (training_conflict(GANConfig(), masked()) or "")
    learned = ModelConfig(variance="learned_range")
    assert "training.mask" in (
        training_conflict(learned, TrainingConfig(mask=MaskConfig(), timestep_sampling="uniform")) or ""
    )
    with pytest.raises(ValidationError, match=r"training\.mask"):
        TrainingConfig.model_validate(
            {"mask": {}, "student": {"steps": 1}, "images": 1, "init_from": "model.safetensors"}
        )
