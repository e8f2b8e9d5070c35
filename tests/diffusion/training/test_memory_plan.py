"""Plans of memory: from configurations alone, for this machine and for GPUs of several sizes."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.families.adapters import LoRAConfig, OFTConfig
from diffusion.families.config import DiffusersConfig, FamilyConfig, ModelConfig
from diffusion.families.header import Origin
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import Ranks
from diffusion.training.memory_plan import (
    GIB,
    GPU_SIZES,
    GPUPlan,
    MemoryPlan,
    MemoryPlans,
    estimate_memory,
    outline_setup,
    plan_here,
    plan_memory,
)
from diffusion.training.preflight import warn_of_memory
from diffusion.training.step_memory import measure_step
from diffusion.training.train import preflight, train
from tests.builders.comparisons import discs, write_autoencoder
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import write_model
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING

LORA: dict[str, Any] = {"adapter": {"rank": 2}}
WIDE = ModelConfig(width=512, channel_mult=(1, 2, 4), blocks=2, attention=(2,), patch=1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.safetensors", 0, images=9, config=MODEL, classes={"even": 24, "odd": 24})


def plans(dataset: Path, model: FamilyConfig = MODEL, **options: object) -> MemoryPlans:
    return estimate_memory(dataset, model, TrainingConfig.model_validate(CONFIG.model_dump() | options))


@pytest.mark.slow
@pytest.mark.long
def test_a_network_of_gigabytes_is_planned_without_its_memory(dataset: Path) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = plans(dataset, WIDE, batch_size=64, optimizer="adamw")
    assert process.memory_info().rss - before < 2**30
    whole, recomputed = memory.gpus
    # Weights, two moments, average and guide.
    assert memory.here.weights + memory.here.optimizer + memory.here.averages > 4 * GIB
    assert whole.image.optimizer == pytest.approx(2 * whole.image.weights, rel=1e-3)
    assert whole.image.averages == 2 * whole.image.weights
    assert recomputed.image.activations < whole.image.activations
    for gpu in memory.gpus:
        counts = [gpu.images[size] for size in GPU_SIZES]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1]
    assert all(recomputed.images[size] >= whole.images[size] for size in GPU_SIZES)


def test_no_weights_are_read(dataset: Path, base: Path) -> None:
    config = TrainingConfig.model_validate(CONFIG.model_dump() | LORA | {"init_from": str(base)})
    whole = plan_here(outline_setup(Dataset.open(dataset), MODEL, config))
    content = bytearray(base.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    content[head:] = b"\xff" * (len(content) - head)
    base.write_bytes(content)
    with pytest.raises(UserError):
        load_model(base)
    assert plan_here(outline_setup(Dataset.open(dataset), MODEL, config)) == whole


@pytest.mark.long
@pytest.mark.slow
def test_low_rank_matrices_and_all_weights_are_planned(dataset: Path, base: Path) -> None:
    adapted, _, whole, _ = plans(dataset, init_from=str(base), **LORA).gpus
    assert [adapted.name, whole.name] == ["LoRA 2", "all weights"]
    assert adapted.image.optimizer < whole.image.optimizer / 5
    assert adapted.image.weights > whole.image.weights


def test_student_has_its_teacher_beside_it(dataset: Path, base: Path) -> None:
    fields = CONFIG.model_dump() | {"init_from": str(base), "guide": None, "precision": "fp32"}
    configs = (
        TrainingConfig.model_validate(fields | more) for more in ({}, {"student": {"steps": 2, "guidance": 2.0}})
    )
    started, student = (plan_here(outline_setup(Dataset.open(dataset), MODEL, config)) for config in configs)
    assert student.weights == started.weights  # the initial model of either
    assert student.activations >= started.activations


def test_half_precision_halves_most_activations(dataset: Path) -> None:
    full, half = (
        plan_here(outline_setup(Dataset.open(dataset), MODEL, CONFIG.model_copy(update={"precision": precision})))
        for precision in ("fp32", "bf16")
    )
    assert half.activations < 0.85 * full.activations
    assert (half.weights, half.optimizer) == (full.weights, full.optimizer)


@pytest.mark.long
@pytest.mark.slow
def test_gpu_holds_no_copy_of_a_checkpoint(dataset: Path) -> None:
    memory = plans(dataset)
    assert memory.here.written == memory.here.weights + memory.here.optimizer + memory.here.averages
    for gpu in memory.gpus:
        assert gpu.image.written == 0
        assert "copy of a checkpoint" not in gpu.image.summary


@pytest.mark.parametrize("start", ["missing.safetensors", "models:/faces/1"])
def test_a_start_that_is_not_there_is_an_error(dataset: Path, tmp_path: Path, start: str) -> None:
    with pytest.raises(UserError):
        plans(dataset, init_from=start if ":" in start else str(tmp_path / start))


def test_network_that_the_file_does_not_have_is_an_error(dataset: Path, base: Path) -> None:
    with pytest.raises(UserError):
        plans(dataset, MODEL.model_copy(update={"width": 32}), init_from=str(base))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param({"rank": 2}, marks=pytest.mark.slow),
        {"rank": 2, "text_encoder": True},
        pytest.param({"rank": 2, "base_weights": "int8"}, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_pipeline_is_planned_with_its_encoders(tmp_path: Path, adapter: dict[str, Any] | None) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusion.diffusers_format.import_pipeline import import_pipeline
    from tests.builders import pipelines

    folder, path = pipelines.stable_diffusion(tmp_path / "pipeline"), tmp_path / "model.safetensors"
    import_pipeline(folder, path, Origin(source="x"))
    write_dataset(tmp_path / "data", random_images(8, 3, 16), 10, captions=["a red circle"] * 8)
    fields = {"init_from": str(path), "adapter": adapter, "images": 8, "batch_size": 4, "weighting": "plain"}
    config = TrainingConfig.model_validate(fields | {"timestep_sampling": "scheduler", "precision": "fp32"})
    setup = outline_setup(Dataset.open(tmp_path / "data"), DiffusersConfig(), config)
    memory, measured = plan_here(setup), measure_step(setup)
    gpu = plan_memory(setup, measured, 1, is_gpu=True)
    network = load_model(path).network

    def size(*names: str) -> int:
        return sum(4 * each.numel() for name, each in network.named_parameters() if name.startswith(names))

    encoders = size("vae.", "text_encoder.")
    assert memory.encoding > size("") + 4 * 16 * 3 * 16 * 16
    # A single process maps captions, and of several each holds what the main one has sent.
    assert memory.captions == 0 < plan_here(replace(setup, ranks=Ranks(0, 2))).captions
    # A GPU has the text encoder in steps if it is trained, and else before, by itself.
    assert gpu.encoders == (size("text_encoder.") if adapter and "text_encoder" in adapter else 0)
    assert gpu.encoding < memory.encoding - size("unet.")
    if adapter is None:
        assert (memory.encoders, memory.averages) == (encoders, size("unet."))
        # Beside the pipeline as it was.
        assert memory.weights == 2 * size("unet.")
    else:
        assert memory.encoders == encoders
        rounded = adapter.get("base_weights")
        assert size("unet.") < memory.weights < (1.6 if rounded else 1.1) * size("unet.")
        assert (gpu.weights < 0.9 * size("unet.")) == bool(rounded)
        assert size("vae.") < gpu.validation - measured.validation(4) < size("unet.", "vae.") / 2


@pytest.mark.slow
def test_run_of_little_work_plans_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert preflight(dataset, MODEL, CONFIG, SAMPLING).memory is None
    monkeypatch.setattr("diffusion.training.preflight.PLANNED_FLOPS", 0)
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.0)
    about = preflight(dataset, MODEL, CONFIG, SAMPLING)
    assert about.memory is not None
    assert "at most" in dict(about.lines())["memory"]
    with caplog.at_level(logging.WARNING):
        warn_of_memory(about.memory, torch.device("cpu"))
        assert not caplog.messages
        warn_of_memory(about.memory.model_copy(update={"peak": 2**60}), torch.device("cpu"))
    (message,) = caplog.messages
    assert "training.gradient_checkpointing" in message
    muon = about.memory.model_copy(update={"peak": 2**60, "muon": about.memory.activations + 1})
    warn_of_memory(muon, torch.device("cpu"))
    assert "training.optimizer=adamw" in caplog.messages[-1]


def test_table_has_a_row_for_each_gpu() -> None:
    image = MemoryPlan.model_validate(dict.fromkeys(MemoryPlan.model_fields, 3 * GIB) | {"encoders": 0})
    gpus = [
        GPUPlan(
            adapter=adapter,
            gradient_checkpointing=adapter is None,
            image=image,
            images={size: size for size in GPU_SIZES},
        )
        for adapter in (LoRAConfig(rank=4), OFTConfig(), None)
    ]
    plans = MemoryPlans(here=image, free=0, precision="bf16", batch_size=16, gpus=gpus)
    title, kinds, *rows = plans.lines()
    assert "GiB" in title
    assert kinds.split() == ["LoRA", "4", "OFT", "all", "weights,", "checkpointing"]
    assert [row.split()[2:] for row in rows if row.startswith("images on")] == [
        [str(size), "GB", str(size), str(size), str(size)] for size in GPU_SIZES
    ]
    assert not any("encoders" in row for row in rows)
    assert len({len(row) for row in (kinds, *rows)}) == 1


@pytest.mark.slow
def test_a_training_that_begins_with_a_model_of_latents_is_planned(tmp_path: Path) -> None:
    data, autoencoder = discs(tmp_path / "data", 48), write_autoencoder(tmp_path / "vae.safetensors", 1)
    model = ModelConfig(width=16, channel_mult=(1,), attention=(), autoencoder=str(autoencoder))
    config = TrainingConfig(dataset="data", images=8, batch_size=4, checkpoints=1)
    first = train(data, tmp_path / "run", model, config, SAMPLING).final
    assert plans(data, model, init_from=str(first)).here.optimizer == plans(data, model).here.optimizer
    write_autoencoder(autoencoder, 2)
    with pytest.raises(UserError, match=r"model\.autoencoder"):
        plans(data, model, init_from=str(first))
