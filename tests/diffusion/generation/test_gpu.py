"""On a GPU, where there is one: the same training and the same images as on a processor, to float tolerance."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoints import load_model
from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import fingerprint
from diffusion.families.config import ModelConfig
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.logging import read_metrics
from diffusion.training.train import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
MODEL = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(0,), heads=1, patch=1, dropout=0.1)
CONFIG = TrainingConfig(images=640, batch_size=16, warmup_images=32, checkpoints=2, precision="fp32")
SAMPLING = sampling_config(steps=4, compute_batch=36, precision="fp32")


def losses(dataset: Path, output: Path, **changes: object) -> np.ndarray:
    """The curve of a training with these settings."""
    config = CONFIG.model_copy(update=changes)
    sampling = SAMPLING.model_copy(update={"device": config.device})
    train(dataset, output, MODEL, config, sampling)
    return np.array([row["loss"] for row in read_metrics(output / "history.csv")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_missing_gpu_is_an_error_unless_auto() -> None:
    with pytest.raises(UserError, match="torch sees no GPU: use auto"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    assert torch.backends.cpu.get_cpu_capability() in fingerprint(64, "fp32", "auto").device


def test_concurrent_determinism_settings_are_restored_by_the_last_user() -> None:
    def switches() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), cudnn.deterministic

    before, gpu = switches(), torch.device("cuda")
    one, other = ExitStack(), ExitStack()
    one.enter_context(compute_deterministically(gpu))
    other.enter_context(compute_deterministically(gpu))
    one.close()
    assert switches() == ("high", True, True)
    other.close()
    assert switches() == before


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_has_the_losses_of_a_processor(dataset: Path, tmp_path: Path, compiled: bool) -> None:
    there = losses(dataset, tmp_path / "gpu", device="cuda", compile=compiled)
    np.testing.assert_allclose(there[:10], losses(dataset, tmp_path / "cpu", device="cpu")[:10], rtol=2e-2)


@needs_gpu
def test_gpu_training_is_repeatable_and_resumes_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        losses(dataset, tmp_path / name, device="cuda")
    (tmp_path / "two" / "final.safetensors").unlink()
    for path in sorted((tmp_path / "two" / "checkpoints").glob("*640*")):
        path.unlink()
    losses(dataset, tmp_path / "two", device="cuda")
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@needs_gpu
def test_gpu_generates_the_same_images_as_the_cpu(dataset: Path, tmp_path: Path) -> None:
    losses(dataset, tmp_path / "run", device="cpu")
    model = load_model(tmp_path / "run" / "final.safetensors")
    for guidance in (None, 2.0):
        there, here = (
            sample(model, range(8), 0, SAMPLING.model_copy(update={"device": each, "guidance": guidance}))
            for each in ("cuda", "cpu")
        )
        assert (there.int() - here.int()).abs().max() <= 2
    assert torch.cuda.get_device_name() in fingerprint(36, "fp32", "cuda").device
