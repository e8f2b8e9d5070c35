"""Training from another model: from its weights, bit for bit, and with its training state as a warm start."""

import shlex
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoints import export, read_model_header, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.dataset import Dataset
from diffusion.families.model import StartConflict
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.starting_models import advise, load_initial
from diffusion.training.train import TrainResult, preflight, train
from diffusion.training.warm_start import export_state, join_state
from tests.builders.small_autoencoders import VAE
from tests.builders.small_models import write_model
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt

CLASSES = {"even": 24, "odd": 24}
SHORT = {"images": 96, "checkpoints": 3, "warmup_images": 16}


def start(folder: Path, seed: int = 0, **options: object) -> Path:
    """A model of the kind that is trained here, with random weights, which training would not make."""
    path = folder / f"start-{seed}.safetensors"
    return write_model(path, seed, images=9, **({"config": MODEL, "classes": CLASSES} | options))  # type: ignore[arg-type]


def run(dataset: Path, output: Path, begun: Path | str | None, **options: object) -> TrainResult:
    config = TrainingConfig.model_validate(CONFIG.model_dump() | SHORT | {"init_from": begun and str(begun)})
    return train(dataset, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


def test_training_begins_with_the_weights_it_is_given(dataset: Path, tmp_path: Path) -> None:
    initial_tensors = load_file(start(tmp_path))
    with pytest.raises(Stop):
        run(dataset, tmp_path / "warm", start(tmp_path), track=lambda _: StopAt(0))
    begun = load_file(tmp_path / "warm" / "checkpoints" / "0000000000.safetensors")
    for name, value in initial_tensors.items():
        bare = name.removeprefix("ema.")
        assert torch.equal(begun[f"network.{bare}"], value)
        assert torch.equal(begun[name], value)
    assert not [name for name in begun if name.startswith(("adamw.", "muon."))]


def test_stopped_warm_started_run_resumes_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    whole = run(dataset, tmp_path / "whole", start(tmp_path))
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", start(tmp_path), track=lambda _: StopAt(48))
    moved_file = shutil.copy(start(tmp_path), tmp_path / "moved.safetensors")
    resumed_run = run(dataset, tmp_path / "cut", moved_file)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    assert resumed_run.train_key == whole.train_key


def test_init_from_changes_the_run_key(dataset: Path, tmp_path: Path) -> None:
    cold = train(dataset, tmp_path / "cold", MODEL, CONFIG.model_copy(update=SHORT), SAMPLING)
    assert run(dataset, tmp_path / "null", None).train_key == cold.train_key
    warm = run(dataset, tmp_path / "warm", start(tmp_path, 1))
    other = run(dataset, tmp_path / "other", start(tmp_path, 2))
    assert len({cold.train_key, warm.train_key, other.train_key}) == 3
    assert len({each.final.read_bytes() for each in (cold, warm, other)}) == 3
    with pytest.raises(UserError, match=r"differs in training\.init_from"):
        run(dataset, tmp_path / "warm", start(tmp_path, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": MODEL.model_copy(update={"width": 32})}, r".* --set model\.width=32,"),
        ({"config": MODEL.model_copy(update={"prediction": "epsilon"})}, r".* --set model\.prediction=epsilon,"),
        ({"classes": {"even": 1, "odd": 1, "round": 1}}, "knows the classes even, odd, round, and .* has even, odd"),
        ({"size": 16}, "generates images of 1×16×16 .*, and data set blobs has 1×8×8"),
    ],
)
def test_init_from_of_another_architecture_is_a_one_line_error(
    dataset: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    start_file = start(tmp_path, **options)
    with pytest.raises(
        UserError, match=rf"training\.init_from .*start-0\.safetensors {words}.*training\.init_from=null"
    ):
        run(dataset, tmp_path / "warm", start_file)


def test_advised_settings_of_another_network_are_valid(dataset: Path, tmp_path: Path) -> None:
    captioned = MODEL.model_copy(update={"text": True})
    with pytest.raises(UserError, match=r"--set model\.text=false"), closing(Dataset.open(dataset)) as data:
        load_initial(captioned, CONFIG.model_copy(update={"init_from": str(start(tmp_path))}), data)


def test_families_do_not_mix(dataset: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"init_from": str(start(tmp_path))})
    with pytest.raises(UserError, match="is a model of the family ddpm, and this is vae"):
        preflight(dataset, VAE, config, sampling_config(compute_batch=36))


@pytest.mark.parametrize("name", ["champion", "models:/blobs@champion"])
def test_registered_model_as_init_from_needs_a_registry(dataset: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="names a registered model, which is not fetched here"):
        run(dataset, tmp_path / "warm", name)


def test_missing_init_from_model_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        run(dataset, tmp_path / "warm", tmp_path / "nowhere.safetensors")


@pytest.mark.slow
def test_default_resolutions_are_recorded_and_equal_explicit_ones(dataset: Path, tmp_path: Path) -> None:
    unset = MODEL.model_copy(update={"channel_mult": None, "attention": ("middle",)})
    config = TrainingConfig.model_validate(CONFIG.model_dump() | SHORT)
    first = train(dataset, tmp_path / "first", unset, config, SAMPLING).final
    assert read_model_header(first).model == unset.model_copy(update={"channel_mult": (1, 1)})
    for model in (unset, unset.model_copy(update={"channel_mult": (1, 1)})):
        warm = config.model_copy(update={"init_from": str(first)})
        train(dataset, tmp_path / f"second-{model.channel_mult}", model, warm, SAMPLING)


def go_on(data: Path, output: Path, begun: Path, **options: object) -> TrainResult:
    fields = {"init_from": str(begun), "warm_start": True, "guide": None}
    config = TrainingConfig.model_validate(CONFIG.model_dump() | SHORT | fields)
    return train(data, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(dataset: Path, tmp_path: Path) -> Path:
    """The last but one checkpoint of a training, whose rate is not zero yet."""
    train(dataset, tmp_path / "night", MODEL, CONFIG.model_copy(update=SHORT | {"guide": None}), SAMPLING)
    return tmp_path / "night" / "checkpoints" / "0000000064.safetensors"


def test_warm_start_takes_over_weights_moments_and_statistics(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    header, mean = read_header(checkpoint), (0.25,)
    header["model_header"] |= {"sigma_data": 2.0, "data_mean": mean}
    save_tensors(checkpoint, load_file(checkpoint), header)
    with pytest.raises(Stop):
        go_on(dataset, tmp_path / "next", checkpoint, track=lambda _: StopAt(0))
    begun = tmp_path / "next" / "checkpoints" / "0000000000.safetensors"
    before, after = load_file(checkpoint), load_file(begun)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name in after if name.startswith("muon.")]
    assert not torch.equal(after["ema.stem.weight"], after["network.stem.weight"])
    assert (read_model_header(begun).sigma_data, read_model_header(begun).data_mean) == (2.0, mean)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "tuned", checkpoint, track=lambda _: StopAt(0))
    tuned = read_model_header(tmp_path / "tuned" / "checkpoints" / "0000000000.safetensors")
    assert tuned.data_mean != mean


def test_stopped_warm_start_with_state_resumes_bit_for_bit(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole = go_on(dataset, tmp_path / "whole", checkpoint)
    with pytest.raises(Stop):
        go_on(dataset, tmp_path / "cut", checkpoint, track=lambda _: StopAt(48))
    resumed = go_on(dataset, tmp_path / "cut", checkpoint)
    assert resumed.final.read_bytes() == whole.final.read_bytes()


def test_state_beside_the_model_is_a_checkpoint_again(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    weights, state, joined = (tmp_path / f"{name}.safetensors" for name in ("weights", "state", "joined"))
    export(checkpoint, weights)
    assert export_state(checkpoint, state)
    assert not set(load_file(weights)) & set(load_file(state))
    join_state(weights, state, joined)
    assert go_on(dataset, tmp_path / "a", joined).train_key == go_on(dataset, tmp_path / "b", checkpoint).train_key
    alone = go_on(dataset, tmp_path / "c", weights)
    assert alone.train_key != go_on(dataset, tmp_path / "a", joined).train_key
    assert not export_state(weights, state)
    assert not state.exists()
    export_state(tmp_path / "a" / "checkpoints" / "0000000064.safetensors", state)
    with pytest.raises(UserError):
        join_state(weights, state, joined)


def test_moments_of_another_optimizer_are_left_aside(
    dataset: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = SHORT | {"init_from": str(checkpoint), "warm_start": True, "optimizer": "adamw"}
    config = TrainingConfig.model_validate(CONFIG.model_dump() | fields)
    with pytest.raises(Stop):
        train(dataset, tmp_path / "next", MODEL, config, SAMPLING, track=lambda _: StopAt(0))
    begun = load_file(tmp_path / "next" / "checkpoints" / "0000000000.safetensors")
    assert not [name for name in begun if name.startswith(("adamw.", "muon."))]
    assert torch.equal(begun["network.stem.weight"], load_file(checkpoint)["ema.stem.weight"])
    assert "averaged weights" in caplog.text


def test_options_to_begin_with_a_model_can_be_pasted() -> None:
    settings = {"channel_mult": (1, 2), "attention": (), "autoencoder": "sha256:ab", "parametrization": "edm"}
    common = ["give", "--set", "model.channel_mult=[1,2]", "--set", "model.attention=[]", "--set"]
    conflict = StartConflict("is another network", settings)
    known, unknown = (advise(conflict, autoencoder) or "" for autoencoder in ("models:/vae/3", None))
    assert shlex.split(known) == [*common, "model.autoencoder=models:/vae/3", "--set", "model.parametrization=edm"]
    assert "model.autoencoder=FILE " in unknown
    assert "'model.channel_mult=[1,2]'" in known
    assert unknown.endswith("(FILE: the autoencoder whose weights have the digest sha256:ab)")
    assert advise(StartConflict("knows other classes")) is None
