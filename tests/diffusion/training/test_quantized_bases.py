"""Adapters of pipelines whose frozen weights are rounded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.families.config import DiffusersConfig, ModelConfig, training_conflict
from diffusion.families.header import Origin
from diffusion.families.quantization import QuantizedLinear
from diffusion.generation.config import Conditions
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import TrainResult, train
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import FINE_TUNING, Stop, StopAt

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusion.diffusers_format.adapter import export_adapter
from diffusion.diffusers_format.import_pipeline import import_pipeline
from tests.builders.flow_pipelines import FLOW_MAKERS

SAMPLING = sampling_config(steps=2, compute_batch=2, precision="fp32")
KINDS = (
    ("flux", "int8"),
    pytest.param("stable_diffusion_xl", "int8", marks=pytest.mark.slow),
    pytest.param("flux", "nf4", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def import_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Import a pipeline of a kind, once."""
    paths: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in paths:
            folder = FLOW_MAKERS[kind](tmp_path_factory.mktemp(kind) / "pipeline")
            import_pipeline(folder, path := folder.with_name("model.safetensors"), Origin(source=kind))
            paths[kind] = path
        return paths[kind]

    return make


def configured(base: Path, base_weights: str | None, **options: Any) -> TrainingConfig:
    adapter = {"rank": 2, "alpha": 4} | ({} if base_weights is None else {"base_weights": base_weights})
    fields = FINE_TUNING | {"init_from": str(base), "adapter": adapter, "images": 8, "batch_size": 4, "device": "cpu"}
    return TrainingConfig.model_validate(fields | options)


def run(folder: Path, name: str, config: TrainingConfig, track: Any = lambda _: None) -> TrainResult:
    data = folder / "data"
    if not data.is_dir():
        captions = [f"a {('red', 'blue')[number % 2]} circle" for number in range(8)]
        write_dataset(data, random_images(8, 3, 16), 6, captions=captions)
    return train(data, folder / name, DiffusersConfig(), config, SAMPLING, track)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("kind", "base_weights"), KINDS)
def test_adapter_of_a_rounded_base_trains_and_resumes_bit_for_bit(
    import_kind: Callable[[str], Path], tmp_path: Path, kind: str, base_weights: str
) -> None:
    base = import_kind(kind)
    before, config = sha256_file(base), configured(base, base_weights)
    whole = run(tmp_path, "whole", config)
    header = read_model_header(whole.final)
    assert header.adapter is not None
    assert header.adapter.base_weights == base_weights
    assert header.training["adapter"]["base_weights"] == base_weights
    with pytest.raises(Stop):
        run(tmp_path, "stopped", config, lambda _: StopAt(8))
    resumed = run(tmp_path, "stopped", config)
    weights, again = load_file(whole.final), load_file(resumed.final)
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert sha256_file(base) == before


@pytest.mark.parametrize(("kind", "base_weights"), KINDS)
def test_loaded_model_computes_what_was_trained(
    import_kind: Callable[[str], Path], tmp_path: Path, kind: str, base_weights: str
) -> None:
    base = import_kind(kind)
    final = run(tmp_path, "run", configured(base, base_weights)).final
    header, model = read_model_header(final), load_model(final)
    assert header.adapter is not None
    trained = load_model(base).make_trainable(header.adapter)
    tensors = {name.removeprefix("ema."): value for name, value in load_file(final).items()}
    trained.load_state_dict(tensors)
    trained.eval()
    rounded = [module for module in trained.network.modules() if isinstance(module, QuantizedLinear)]
    assert len(rounded) > 10
    x, t = torch.randn(2, *model.noise_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 700.0])
    conditioning = {name: value.expand(2, *value.shape) for name, value in model.encode_prompt("a red circle").items()}
    with torch.no_grad():
        actual, expected = (network(x, t, **conditioning) for network in (model.network, trained))
        exact = load_model(base).network(x, t, **conditioning)
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(actual, exact)
    images = [
        sample(load_model(final), range(2), 0, SAMPLING, conditions=Conditions(prompts=("a red circle",)))
        for _ in range(2)
    ]
    assert torch.equal(*images)


def test_int8_changes_predictions_little(import_kind: Callable[[str], Path]) -> None:
    base = import_kind("flux")
    model, rounded = (load_model(base) for _ in range(2))
    rounded.round_base(configured(base, "int8").adapter)
    x, t = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    conditioning = {name: value[None] for name, value in model.encode_prompt("a red circle").items()}
    with torch.no_grad():
        expected, actual = (each.network(x, t, **conditioning) for each in (model, rounded))
    error = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 0 < error < 0.03


@pytest.mark.slow
def test_export_says_how_the_base_was_rounded_and_no_second_adapter_is_trained_on_it(
    import_kind: Callable[[str], Path], tmp_path: Path
) -> None:
    final = run(tmp_path, "run", configured(import_kind("flux"), "nf4")).final
    export_adapter(final, tmp_path / "exported")
    with safe_open(next((tmp_path / "exported").glob("*.safetensors")), framework="pt") as file:
        assert "nf4" in file.metadata()["modelspec.description"]
    assert "nf4" in (tmp_path / "exported" / "README.md").read_text()
    # Four bits would keep little of what the first adapter changed.
    with pytest.raises(UserError, match="base_weights"):
        run(tmp_path, "second", configured(final, "nf4"))
    run(tmp_path, "second", configured(final, None))


def test_other_families_have_no_rounded_bases(tmp_path: Path) -> None:
    options = {"timestep_sampling": "uniform", "weighting": "plain"}
    words = training_conflict(ModelConfig(), configured(tmp_path / "model.safetensors", "int8", **options))
    assert words is not None
    assert "base_weights" in words
    assert "\n" not in words
    with pytest.raises(ValidationError):
        configured(tmp_path / "model.safetensors", "int3")
