"""Memory of a step on fake tensors, against what torch's profiler sees allocated on real ones, and arithmetic."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.ingest import ingest
from diffusion.families.config import (
    AutoregressiveConfig,
    DiffusersConfig,
    FamilyConfig,
    GANConfig,
    ModelConfig,
    VAEConfig,
)
from diffusion.families.gan.network import Discriminator, Generator
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.muon import Muon
from diffusion.training.setup import TrainingSetup, make_setup
from diffusion.training.step_memory import LiveMemory, measure_step, muon_size
from diffusion.training.trainer import Trainer
from tests.builders.bucketed import config as ingest_config
from tests.builders.bucketed import write_rectangles
from tests.builders.one_thread import Alone
from tests.builders.small_datasets import random_images, write_dataset

UNET = ModelConfig(width=32, channel_mult=(1, 2), blocks=1, attention=(1,), patch=1)
VAE = VAEConfig(width=16)
PIXELS = AutoregressiveConfig(width=16)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("square") / "data"
    write_dataset(folder, random_images(12, 3, 24), 10, labels=["a", "b"] * 6)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    ingest(root / "data", ingest_config(write_rectangles(root / "images"), size=32, buckets=("40x24", "24x40")))
    return root / "data"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.builders import pipelines

    return import_pipeline_of(pipelines.stable_diffusion, tmp_path_factory.mktemp("pipeline"))


def import_pipeline_of(make: Callable[[Path], Path], folder: Path) -> Path:
    for name in ("diffusers", "transformers", "peft"):
        pytest.importorskip(name)
    from diffusion.diffusers_format.import_pipeline import import_pipeline

    import_pipeline(make(folder / "pipeline"), path := folder / "model.safetensors", Origin(source="x"))
    return path


def make(data: Path, model: FamilyConfig, **options: object) -> TrainingSetup:
    fields: dict[str, Any] = {"images": 96, "batch_size": 5, "precision": "fp32", "cpu_threads": 1}
    config = TrainingConfig.model_validate(fields | options)
    return make_setup(Dataset.open(data), model, config, sampling_config(), SINGLE_PROCESS)


def allocated(work: Callable[[], object], trace: Path) -> int:
    """Bytes that torch's profiler sees allocated at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(trace))
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each.get("name") == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda each: each["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


def really_allocated(setup: TrainingSetup, trace: Path) -> int:
    """Bytes that the second step takes beyond the state; the first one makes the moments."""
    trainer = Trainer(setup, Alone())
    trainer.total = 1000
    with closing(setup.dataset), trainer.loader:
        trainer.train_step(1e-3)
        batch = trainer.loader.batch(trainer.state.images, trainer.total)
        inputs = trainer.objective.make_batch(setup.x0(batch), batch.indices, setup.training_conditioning(batch))
        inputs = setup.with_prior(inputs)
        sources = (inputs.random, inputs.conditioning, inputs.prior or {})
        tensors: list[Tensor] = [inputs.x0, *(value for values in sources for value in values.values())]
        return sum(value.nbytes for value in tensors) + allocated(lambda: trainer.update(inputs, 1e-3), trace)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "model", "options"),
    [
        ("wide", UNET, {}),
        ("wide", UNET, {"precision": "bf16", "batch_size": 3}),
        ("wide", UNET, {"optimizer": "adamw", "gradient_checkpointing": True}),
        ("square", UNET, {"learned_uncertainty": True, "ema_stds": [0.05, 0.1]}),
        ("square", UNET, {"optimizer": "prodigy", "learning_rate": 1}),
        ("square", VAE, {}),
        ("wide", PIXELS, {}),
    ],
)
def test_step_takes_what_torch_allocates(
    shape: str, model: FamilyConfig, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    setup = make(request.getfixturevalue(shape), model, **options)
    expected = really_allocated(setup, tmp_path / "trace.json")
    assert measure_step(setup).step(setup.config.images_per_step) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"adapter": {"rank": 2}, "prior": {}, "optimizer": "prodigy", "learning_rate": 1},
        pytest.param({"adapter": {"kind": "lora", "rank": 2, "dropout": 0.1}}, marks=pytest.mark.slow),
        pytest.param({"adapter": {"kind": "dora", "rank": 2}}, marks=pytest.mark.slow),
        pytest.param({"adapter": {"kind": "lokr", "rank": 2}}, marks=pytest.mark.slow),
        pytest.param({"adapter": {"kind": "oft", "block_size": 4}}, marks=pytest.mark.slow),
        pytest.param(
            {"adapter": {"rank": 2, "text_encoder": True}, "prior": {}, "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["prior", "lora", "dora", "lokr", "oft", "text_encoder"],
)
def test_step_of_an_adapter_takes_what_torch_allocates(pipeline: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    write_dataset(tmp_path / "data", random_images(8, 3, 32), 10, captions=["a red circle"] * 8)
    more: dict[str, Any] = {"init_from": str(pipeline), "weighting": "plain", "timestep_sampling": "scheduler"}
    setup = make(tmp_path / "data", DiffusersConfig(), **more, **options)
    expected = really_allocated(setup, tmp_path / "trace.json")
    # Text encoders have temporary tensors that are not of torch's operations.
    assert measure_step(setup).step(setup.config.images_per_step) == pytest.approx(expected, rel=0.03)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_step_of_a_prompt_of_any_length_is_planned(tmp_path: Path, name: str) -> None:
    """Transformers that leave padding out, take one image after another, or keep tensors that are not buffers."""
    pytest.importorskip("diffusers")
    from tests.builders.flow_pipelines import FLOW_MAKERS

    data, model = tmp_path / "data", import_pipeline_of(FLOW_MAKERS[name], tmp_path)
    header = load_model(model).header
    write_dataset(data, random_images(8, header.channels, header.size), 10, captions=["a red circle"] * 8)
    more: dict[str, Any] = {"init_from": str(model), "weighting": "plain", "timestep_sampling": "scheduler"}
    setup = make(data, DiffusersConfig(), adapter={"rank": 2}, **more)
    expected = really_allocated(setup, tmp_path / "trace.json")
    assert 0.98 * expected < measure_step(setup).step(setup.config.images_per_step) < 3 * expected


@pytest.mark.slow
@pytest.mark.long
def test_step_of_two_networks_takes_about_what_torch_allocates(square: Path, tmp_path: Path) -> None:
    setup = make(square, GANConfig(width=16))
    memory = measure_step(setup)
    # The second derivative of a convolution allocates without asking.
    assert memory.step(5) == pytest.approx(really_allocated(setup, tmp_path / "trace.json"), rel=0.25)
    networks = (Generator(GANConfig(width=16), 3, 24, 2), Discriminator(GANConfig(width=16), 3, 24, 2))
    generator, both = 4 * count(networks[0]), 4 * sum(map(count, networks))
    assert (memory.trained, memory.averages) == (both, generator)


def count(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def test_state_is_weights_moments_and_averages(square: Path) -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "guide": None, "learned_uncertainty": False}
    memory = measure_step(setup := make(square, UNET, **options))
    weights = 4 * count(setup.make_network())
    steps = 4 * len(list(setup.make_network().parameters()))
    assert (memory.trained, memory.averages, memory.frozen, memory.encoders) == (weights, weights, 0, 0)
    assert memory.optimizer == 2 * weights + steps
    assert memory.state == 4 * weights + steps
    guided = measure_step(make(square, UNET, ema_stds=[0.05, 0.1]))
    assert guided.averages == 3 * weights


def test_measuring_leaves_the_setup_as_it_is(square: Path) -> None:
    def weights() -> list[Tensor]:
        trainer = Trainer(setup, Alone())
        trainer.total = 1000
        with trainer.loader:
            trainer.train_step(1e-3)
        return list(trainer.state.network.parameters())

    setup = make(square, UNET)
    expected, state = weights(), torch.get_rng_state()
    measure_step(setup)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights(), expected))


def test_attention_is_fused() -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    memory = LiveMemory()
    with memory:
        block = attention.BasicTransformerBlock(640, 10, 64, cross_attention_dim=2048).to(torch.bfloat16)

    def step() -> None:
        x, text = (torch.empty(1, *shape, dtype=torch.bfloat16) for shape in ((4096, 640), (77, 2048)))
        block(x, encoder_hidden_states=text).sum().backward()

    # A matrix of attention alone would take 320 MiB.
    assert memory.record(step).max() < 220 * 2**20


SHAPES = [(48, 160)] * 3 + [(96, 96)] * 2 + [(200, 40)] + [(32, 24, 3, 3)] * 4


def parameters(shapes: list[tuple[int, ...]], memory_format: torch.memory_format) -> list[nn.Parameter]:
    parameter_list = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for each in parameter_list:
        if each.ndim == 4:
            each.data = each.data.to(memory_format=memory_format)
        each.grad = torch.randn_like(each)
    return parameter_list


def by_hand(matrices: list[nn.Parameter]) -> list[int]:
    """Bytes for each length of the shorter side, the most first: of updates, their matrices, and square products.

    Matrices of convolutions in channels-last format are copies. At most there are five products, Gram matrices among
    them, in an iteration; or three and the results at the end.
    """
    sizes = []
    for side in {min(each.flatten(1).shape) for each in matrices}:
        group = [each for each in matrices if min(each.flatten(1).shape) == side]
        updates = 4 * sum(each.numel() for each in group)
        copies = 4 * sum(each.numel() for each in group if each.flatten(1).data_ptr() != each.data_ptr())
        products = 4 * len(group) * side**2
        sizes.append(updates + copies + max(5 * products, 3 * products + updates))
    return sorted(sizes, reverse=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_what_torch_allocates(memory_format: torch.memory_format, tmp_path: Path) -> None:
    matrices = parameters(SHAPES, memory_format)
    estimate = muon_size(matrices, 1)
    assert estimate == pytest.approx(by_hand(matrices)[0], rel=0.02)
    optimizer = Muon(matrices, 0.1, 0.1)
    optimizer.step()  # makes the momentum
    assert estimate == pytest.approx(allocated(optimizer.step, tmp_path / "trace.json"), rel=0.05)
    assert all(each.grad is not None and not each.is_meta for each in matrices)


def test_threads_update_the_matrices_of_as_many_sides_at_once() -> None:
    matrices = parameters(SHAPES, torch.contiguous_format)
    sizes = by_hand(matrices)
    for threads in (1, 2, 3):
        assert muon_size(matrices, threads) == pytest.approx(sum(sizes[:threads]), rel=0.02)
    assert muon_size(matrices, 9) == pytest.approx(sum(sizes), rel=0.02)
    assert muon_size([], 2) == 0
