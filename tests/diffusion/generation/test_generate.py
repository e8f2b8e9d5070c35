"""Sampling: image i of seed s is the same everywhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.checkpoints import export, load_model, save_tensors
from diffusion.common.errors import UserError
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_float, to_uint8
from diffusion.generation.generate import sample
from diffusion.process.samplers import SAMPLING_ADAPTER, sampling_config
from tests.builders.training_runs import run

CONFIG = sampling_config(steps=3, compute_batch=8)


@pytest.fixture
def model(dataset: Path, tmp_path: Path) -> DiffusionModel:
    return load_model(run(dataset, tmp_path / "run").final)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "dpmpp_2m"},
        {"sampler": "ddpm"},
        {"sampler": "unipc", "order": 3},
        {"sampler": "heun", "churn": {"amount": 2}},
    ],
    ids=lambda settings: settings["sampler"],
)
def test_image_does_not_depend_on_the_batch(model: DiffusionModel, settings: dict[str, object]) -> None:
    config = SAMPLING_ADAPTER.validate_python({"steps": 3, "compute_batch": 8} | settings)
    many = sample(model, range(20), 7, config)
    assert many.shape == (20, 1, 8, 8)
    assert many.dtype == torch.uint8
    torch.testing.assert_close(sample(model, [13], 7, config)[0], many[13], rtol=0, atol=0)
    shuffled = sample(model, [19, 0, 13], 7, config)
    torch.testing.assert_close(shuffled, many[[19, 0, 13]], rtol=0, atol=0)


def test_seeds_and_indices_give_different_images(model: DiffusionModel) -> None:
    images = torch.cat([sample(model, range(8), seed, CONFIG) for seed in (0, 1)])
    assert len({image.numpy().tobytes() for image in images}) == 16


def test_exported_checkpoint_generates_the_same_images(model: DiffusionModel, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "0000000320.safetensors"
    first = export(checkpoint, tmp_path / "weights.safetensors")
    assert export(checkpoint, tmp_path / "again.safetensors") == first
    exported_model = load_model(tmp_path / "weights.safetensors")
    torch.testing.assert_close(sample(exported_model, [0], 0, CONFIG), sample(model, [0], 0, CONFIG), rtol=0, atol=0)


def test_uint8_round_trip_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_files_that_are_no_models_are_rejected_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_model(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"is not a model|something else than a model"):
        load_model(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "list.safetensors", {"darkroom": "[1]"})
    with pytest.raises(UserError, match=r"is not a model|something else than a model"):
        load_model(tmp_path / "list.safetensors")
    with pytest.raises(UserError, match="is a folder: give a model file"):
        load_model(tmp_path)
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"something": "else"})
    with pytest.raises(UserError, match="header this version cannot read"):
        load_model(tmp_path / "other.safetensors")
