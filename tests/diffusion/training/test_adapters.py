"""Training of adapters: what is trained and stored, and that it resumes to the same bits."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusion.checkpoints import (
    export,
    find_base,
    load_model,
    model_digest,
    read_model_header,
    read_tensors,
    save_tensors,
    weights_digest,
)
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.evaluation.comparison import compare_with_champion
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.gate import GateConfig
from diffusion.families.adapters import LoRAConfig
from diffusion.families.ddpm.network import UNet
from diffusion.families.fine_tuning import merge_adapters
from diffusion.generation.generate import sample
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import reconstruct_average
from diffusion.training.logging import Validation
from diffusion.training.preflight import make_preflight
from diffusion.training.train import TrainResult, preflight, train
from tests.builders.small_models import write_model
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt

CLASSES = {"even": 24, "odd": 24}
SHORT = {"images": 96, "checkpoints": 3, "warmup_images": 16, "learning_rate": 1e-2, "adapter": {"rank": 2, "alpha": 4}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base" / "start.safetensors", 0, images=9, config=MODEL, classes=CLASSES)


def configured(base: Path, **options: object) -> TrainingConfig:
    return TrainingConfig.model_validate(CONFIG.model_dump() | SHORT | {"init_from": str(base)} | options)


def run(dataset: Path, output: Path, base: Path, track: object = lambda _: None, **options: object) -> TrainResult:
    return train(dataset, output, MODEL, configured(base, **options), SAMPLING, track)  # type: ignore[arg-type]


def test_adapter_is_all_that_is_trained_and_stored(dataset: Path, tmp_path: Path, base: Path) -> None:
    result = run(dataset, tmp_path / "run", base)
    header, tensors = read_model_header(result.final), load_file(result.final)
    assert header.base is not None
    assert header.base.sha256 == sha256_file(base)
    assert header.adapter == LoRAConfig(rank=2, alpha=4)
    assert {name.split(".lora_")[1] for name in tensors} == {"A.weight", "B.weight"}
    assert sum(value.numel() for value in tensors.values()) < sum(v.numel() for v in load_file(base).values()) / 3
    begun, model = load_model(base), load_model(result.final)
    assert model.header.sigma_data == begun.header.sigma_data
    expected = copy.deepcopy(begun.network)
    expected.load_state_dict(merge_adapters(expected, header.adapter, read_tensors(result.final, "ema.")), strict=False)
    for (name, mine), reference in zip(model.network.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, reference), name
    changed_names = {
        name
        for name, value in model.network.state_dict().items()
        if not torch.equal(value, begun.network.state_dict()[name])
    }
    assert changed_names
    assert {name.split(".")[0] for name in changed_names} <= {"down", "middle", "up"}
    assert model_digest(result.final) == model_digest(max((tmp_path / "run" / "checkpoints").glob("*.safetensors")))
    # The losses of the checkpoint are those of the merged network.
    assert (tmp_path / "run" / "samples" / "0000000096.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "threads"),
    [
        ({"rank": 2, "alpha": 4}, 1),
        ({"rank": 2, "alpha": 4}, 2),
        ({"dropout": 0.25}, 2),
        ({"kind": "dora"}, 2),
        ({"kind": "lokr"}, 2),
        ({"kind": "oft"}, 2),
    ],
)
def test_stopped_run_resumes_bit_for_bit(
    dataset: Path, tmp_path: Path, base: Path, adapter: dict[str, Any], threads: int
) -> None:
    options: dict[str, Any] = {"cpu_threads": threads, "adapter": adapter}
    whole = run(dataset, tmp_path / "whole", base, **options)
    before, after = (load_model(path).network.state_dict() for path in (base, whole.final))
    assert not all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", base, lambda _: StopAt(48), **options)
    moved_base = shutil.move(base, tmp_path / "moved.safetensors")
    resumed_run = run(dataset, tmp_path / "cut", moved_base, **options)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    assert resumed_run.train_key == whole.train_key
    if "kind" not in adapter:
        again = run(dataset, tmp_path / "again", moved_base, **options, gradient_checkpointing=True)
        assert again.final.read_bytes() == whole.final.read_bytes()


def test_run_of_another_base_or_rank_is_another_run(dataset: Path, tmp_path: Path, base: Path) -> None:
    key = run(dataset, tmp_path / "run", base).train_key
    other = write_model(tmp_path / "other.safetensors", 1, images=9, config=MODEL, classes=CLASSES)
    for base_file, options in ((other, {}), (base, {"adapter": {"rank": 3}}), (base, {"adapter": None})):
        with pytest.raises(UserError, match=r"differs in training\.(init_from|adapter)"):
            run(dataset, tmp_path / "run", base_file, **options)  # type: ignore[arg-type]
    assert run(dataset, tmp_path / "run", base).train_key == key


def test_file_is_loaded_with_its_base_beside_it_or_above(dataset: Path, tmp_path: Path, base: Path) -> None:
    final = run(dataset, tmp_path / "run", base).final
    images = sample(load_model(final), range(2), 0, SAMPLING)
    alone = Path(shutil.copy(final, tmp_path))
    with pytest.raises(UserError, match=sha256_file(base)):
        load_model(alone)
    shutil.copy(base, tmp_path / f"{sha256_file(base)}.safetensors")
    assert torch.equal(sample(load_model(alone), range(2), 0, SAMPLING), images)
    path = tmp_path / "far" / "away" / "weights.safetensors"
    export(final, path)
    assert find_base(path, load_model(final).header.base).parent == path.parent  # type: ignore[arg-type]
    assert torch.equal(sample(load_model(path), range(2), 0, SAMPLING), images)


@pytest.mark.slow
def test_gate_compares_adapter_and_base_either_way(dataset: Path, tmp_path: Path, base: Path) -> None:
    adapted = run(dataset, tmp_path / "run", base, images=32, checkpoints=1).final
    config, gate = EvaluationConfig(samples=16, extractor_size=32), GateConfig(looks=1)
    for candidate, champion in ((adapted, base), (base, adapted)):
        comparison, grids = compare_with_champion(
            candidate, champion, dataset, config, SAMPLING, gate, tmp_path / "reports"
        )
        assert comparison.compared.headline is not None
        assert comparison.compared.cost is not None
        assert comparison.compared.cost.candidate == comparison.compared.cost.champion  # merged, it is no larger
        assert grids.champion is not None
        assert not torch.equal(grids.candidate, grids.champion)


def test_damaged_base_is_an_error(dataset: Path, tmp_path: Path, base: Path) -> None:
    final = run(dataset, tmp_path / "run", base).final
    link = tmp_path / "run" / f"{sha256_file(base)}.safetensors"
    data = bytearray(link.read_bytes())
    data[-1] ^= 1
    link.unlink()
    link.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_model(final)


@pytest.mark.parametrize("change", ["another shape", "one factor", "no such layer", "another rank"])
def test_file_that_does_not_fit_its_base_is_an_error(dataset: Path, tmp_path: Path, base: Path, change: str) -> None:
    final = run(dataset, tmp_path / "run", base).final
    tensors, about = load_file(final), read_header(final)
    name = next(iter(tensors))
    match change:
        case "another shape":
            tensors[name] = torch.cat([tensors[name]] * 2, dim=1)
        case "one factor":
            del tensors[name]
        case "no such layer":
            tensors |= {f"ema.down.99.conv1.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
        case _:
            about["model_header"]["adapter"]["rank"] = 3
    save_tensors(final, tensors, about)
    with pytest.raises(UserError, match="does not fit"):
        load_model(final)


def test_adaptation_of_an_adapted_model_needs_both_bases(dataset: Path, tmp_path: Path, base: Path) -> None:
    first = run(dataset, tmp_path / "first", base).final
    second = run(dataset, tmp_path / "second", first).final
    links = {path.stem for path in (tmp_path / "second").glob("*.safetensors")} - {"final"}
    assert links == {sha256_file(base), sha256_file(first)}
    assert len({weights_digest(path) for path in (base, first, second)}) == 3
    assert sample(load_model(second), range(2), 0, SAMPLING).shape == (2, 1, 8, 8)
    # All weights, from a merged model.
    whole = run(dataset, tmp_path / "all", second, adapter=None, images=32, checkpoints=1).final
    assert read_model_header(whole).base is None


def test_post_hoc_averages_are_adapters_with_their_base(dataset: Path, tmp_path: Path, base: Path) -> None:
    run(dataset, tmp_path / "run", base, ema_stds=(0.05, 0.1), ema_decay=None)
    path = reconstruct_average(tmp_path / "run" / "averages", 0.1, tmp_path / "report" / "averages")
    assert load_model(path).header.base is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_from": None}, "training.init_from"),
        ({"optimizer": "adamw"}, "training.optimizer"),
        ({"weighting": "plain", "shard": True, "optimizer": "prodigy", "learning_rate": 1.0}, "training.shard"),
        ({"shard": True}, "training.shard"),
        ({"adapter": {"text_encoder": True}}, "text_encoder"),
        ({"adapter": {"ranks": {"to_q": 4}}}, "ranks has the pattern to_q"),
        ({"adapter": {"kind": "oft", "target_modules": ["conv1"]}}, "target_modules names conv1"),
        ({"adapter": {"target_modules": ["to_q"]}}, "conv1, conv2, modulation"),
    ],
)
def test_options_that_contradict_it_are_named(
    dataset: Path, tmp_path: Path, base: Path, options: dict[str, object], words: str
) -> None:
    config = configured(base, **options)
    with pytest.raises(UserError, match=words):
        preflight(dataset, MODEL, config, SAMPLING)


def test_chosen_layers_alone_are_adapted(dataset: Path, tmp_path: Path, base: Path) -> None:
    final = run(dataset, tmp_path / "run", base, adapter={"target_modules": ["conv1", "middle.0.modulation"]}).final
    layers = {name.removeprefix("ema.").rpartition(".lora_")[0] for name in load_file(final)}
    assert layers >= {"middle.0.modulation", "middle.0.conv1", "down.0.conv1"}
    assert {name.rpartition(".")[2] for name in layers} == {"conv1", "modulation"}
    assert "down.0.modulation" not in layers


def test_micro_batches_add_up_to_the_batch(dataset: Path) -> None:
    gradients = {}
    for size in (None, 5, 3):
        config = TrainingConfig(images=64, batch_size=16, cpu_threads=1, precision="fp32", micro_batch=size)
        runs = []
        for _ in range(2):
            with worker_threads(1) as pool:
                trainer = make_trainer(dataset, MODEL, config, pool, 64)
                take_step(trainer)
                take_step(trainer)
                runs.append([value.clone() for value in trainer.state.network.parameters()])
        assert all(map(torch.equal, *runs))
        gradients[size] = runs[0]
    for size in (5, 3):
        assert not all(map(torch.equal, gradients[size], gradients[None]))
        for mine, whole in zip(gradients[size], gradients[None], strict=True):
            assert (mine - whole).abs().quantile(0.9) < 1e-4


def test_held_out_images_pass_no_more_at_once_than_in_training(dataset: Path) -> None:
    losses, sizes = {}, set[int]()
    for size in (None, 3):
        config = TrainingConfig(images=64, batch_size=16, cpu_threads=1, precision="fp32", micro_batch=size)
        with worker_threads(1) as pool:
            trainer = make_trainer(dataset, MODEL, config, pool, 64)
            validation = Validation(trainer.setup, trainer.objective, pool, trainer.state.network)
            tensors = trainer.checkpoint_tensors(trainer.checkpoint_header())
            hook = register_module_forward_pre_hook(
                lambda module, inputs: sizes.add(len(inputs[0])) if isinstance(module, UNet) else None
            )
            sizes.clear()
            try:
                losses[size] = validation.evaluate(tensors, 0)[1]
            finally:
                hook.remove()
        assert (size or 4) <= max(sizes) <= (size or 16)
    assert losses[3] == pytest.approx(losses[None], rel=1e-4)
    assert losses[3].keys() == losses[None].keys()


def test_low_rank_matrices_cost_less_work(dataset: Path, base: Path) -> None:
    with worker_threads(1) as pool:
        work = [
            make_preflight(make_trainer(dataset, MODEL, configured(base, **options), pool, 96), None).flops
            for options in ({}, {"adapter": None, "learning_rate": 1e-3})
        ]
    assert work[0] < work[1]


def test_micro_batch_that_splits_nothing_is_an_error() -> None:
    with pytest.raises(ValidationError, match="micro_batch"):
        TrainingConfig(batch_size=16, micro_batch=16)
