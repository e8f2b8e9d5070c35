"""Prior preservation: what is added to the loss, against peft's own switch, what it keeps, and that it resumes."""

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.families.config import DiffusersConfig
from diffusion.families.fine_tuning import TrainableSubset, adapted_layers
from diffusion.families.header import Origin
from diffusion.families.model import TrainingBatch
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.setup import make_setup
from diffusion.training.train import TrainResult, train
from diffusion.training.trainer import Trainer
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import FINE_TUNING, SAMPLING, Stop, StopAt

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusion.diffusers_format.import_pipeline import import_pipeline  # noqa: E402
from tests.builders import pipelines  # noqa: E402

PROMPT = "a circle"
SHORT: dict[str, Any] = FINE_TUNING | {"images": 64, "adapter": {"rank": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.MAKERS["stable_diffusion"](tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    import_pipeline(folder, path := folder.with_name("model.safetensors"), Origin(source="tiny"))
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    captions: list[str | None] = [f"a {('red', 'blue')[number % 2]} circle" for number in range(24)]
    write_dataset(tmp_path / "circles", random_images(24, 3, 16), 10, captions=captions)
    return tmp_path / "circles"


@pytest.fixture
def pool() -> Iterator[Executor]:
    with worker_threads(1) as pool:
        yield pool


def configured(base: Path, **options: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(SHORT | {"init_from": str(base)} | options)


def trainer_of(dataset: Path, base: Path, pool: Executor, **options: Any) -> Trainer:
    config = configured(base, **options)
    return Trainer(
        make_setup(Dataset.open(dataset), DiffusersConfig(), config, SAMPLING, SINGLE_PROCESS, pool.map), pool
    )


def run(dataset: Path, output: Path, base: Path, track: Any = lambda _: None, **options: Any) -> TrainResult:
    return train(dataset, output, DiffusersConfig(), configured(base, **options), SAMPLING, track)


def batch_of(trainer: Trainer) -> TrainingBatch:
    batch, setup = trainer.loader.batch(0), trainer.setup
    inputs = trainer.objective.make_batch(setup.x0(batch), batch.indices, setup.training_conditioning(batch))
    return setup.with_prior(inputs)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "oft"])
def test_error_of_the_prior_is_that_of_the_adapter_switched_off(
    dataset: Path, folder: Path, base: Path, pool: Executor, kind: str
) -> None:
    trainer = trainer_of(dataset, base, pool, adapter={"kind": kind}, prior={"weight": 3, "prompt": PROMPT})
    network, batch = trainer.state.network, batch_of(trainer)
    assert isinstance(network, TrainableSubset)
    without = TrainingBatch(batch.x0, batch.conditioning, batch.random)
    fresh = trainer.objective.losses(network, batch)
    torch.testing.assert_close(fresh, trainer.objective.losses(network, without))
    for name, parameter in network.named_parameters():
        if "magnitude" not in name:
            nn.init.normal_(parameter, std=0.3)
    added = trainer.objective.losses(network, batch) - trainer.objective.losses(network, without)
    # By diffusers' noise and text encoder, and peft's switch.
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids)[0].expand(len(batch.x0), -1, -1)
    t = batch.random["t"]
    noisy = scheduler.add_noise(batch.x0, batch.random["noise"], t)
    unet: Any = network.network.get_submodule("unet")

    def predict(is_adapted: bool) -> Tensor:
        for module in adapted_layers(network.network).values():
            module.enable_adapters(is_adapted)  # type: ignore[operator]
        output: Tensor = unet(noisy, t, encoder_hidden_states=hidden).sample
        return output

    expected = functional.mse_loss(predict(True), predict(False), reduction="none").mean((1, 2, 3))
    predict(True)
    assert expected.min() > 1e-4
    torch.testing.assert_close(added, 3 * expected, rtol=1e-3, atol=1e-5)


def test_prior_without_a_prompt_is_that_of_the_empty_one(dataset: Path, base: Path, pool: Executor) -> None:
    prior = batch_of(trainer_of(dataset, base, pool, prior={})).prior
    assert prior is not None
    model = load_model(base)
    assert isinstance(model, PretrainedModel)
    assert torch.equal(prior["states"][3], model.encode_prompt("")["states"])


def test_switched_off_network_shares_the_frozen_weights(dataset: Path, base: Path, pool: Executor) -> None:
    network = trainer_of(dataset, base, pool).state.network
    assert isinstance(network, TrainableSubset)
    memory = {value.data_ptr() for value in network.network.parameters()}
    assert {value.data_ptr() for value in network.base.parameters()} <= memory
    model = load_model(base)
    assert isinstance(model, PretrainedModel)
    denoiser = f"{model.pipeline.denoiser_name}."
    names = {name for name in model.network.state_dict() if name.startswith(denoiser)}
    assert network.base.state_dict().keys() == names


@pytest.mark.long
@pytest.mark.slow
def test_predictions_for_the_class_stay_nearer_to_the_base(dataset: Path, base: Path, tmp_path: Path) -> None:
    generator, distances = torch.Generator().manual_seed(0), []
    original = load_model(base)
    assert isinstance(original, PretrainedModel)
    x, t = torch.randn(8, *original.noise_shape, generator=generator), torch.linspace(0, 900, 8)
    states = original.encode_prompt(PROMPT)["states"].expand(8, -1, -1)
    for number, prior in enumerate((None, {"weight": 20, "prompt": PROMPT})):
        tuned = load_model(run(dataset, tmp_path / str(number), base, images=400, prior=prior).final)
        with torch.no_grad():
            difference = tuned.network(x, t, states=states) - original.network(x, t, states=states)
        distances.append(float(difference.square().mean()))
    assert distances[1] < distances[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2])
def test_prior_resumes_bit_for_bit(dataset: Path, base: Path, tmp_path: Path, threads: int) -> None:
    options: dict[str, Any] = {"cpu_threads": threads, "prior": {"prompt": PROMPT}}
    whole = run(dataset, tmp_path / "whole", base, **options)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", base, lambda _: StopAt(32), **options)
    assert run(dataset, tmp_path / "cut", base, **options).final.read_bytes() == whole.final.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"), [({"adapter": None}, "training.adapter"), ({"prior": {"prompt": ""}}, "prompt")]
)
def test_priors_without_effect_are_errors(
    dataset: Path, base: Path, pool: Executor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((UserError, ValueError), match=words):
        trainer_of(dataset, base, pool, **{"prior": {}} | options)
