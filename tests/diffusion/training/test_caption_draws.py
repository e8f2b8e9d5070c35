"""Training with several captions, shuffled tags and weights: a function of the seed, and written down."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.families.ddpm.config import ModelConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.data import open_dataset
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.identity import data_digest, train_key
from diffusion.training.setup import make_setup
from diffusion.training.trainer import Trainer
from tests.builders.captioned import FakeEncoder
from tests.builders.small_datasets import random_images, write_dataset

MODEL = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), text=True, text_tokens=0)
SHORT = {"images": 64, "batch_size": 16, "warmup_images": 0, "cpu_threads": 1, "condition_dropout": 0.0}
TAGS = {"shuffle": True, "keep": 1, "dropout": 0.2, "variants": 4}
WEIGHTS = {"1?.png": 3.0, "*": 1.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    captions = [f"number {number}, a, b, c\nimage {number}, d, e" for number in range(40)]
    write_dataset(tmp_path / "set", random_images(40), 16, captions=captions)
    return tmp_path / "set"


def seen(data: Path, model: ModelConfig = MODEL, **fields: object) -> tuple[list[Tensor], dict[str, object]]:
    """Text conditioning of four batches of a training, and the configuration in its header."""
    config = TrainingConfig.model_validate(SHORT | fields)
    with open_dataset(data, config, None) as dataset, ThreadPoolExecutor(1) as pool:
        setup = make_setup(dataset, model, config, sampling_config(steps=2), SINGLE_PROCESS, pool.map)
        trainer = Trainer(setup, pool)
        with trainer.loader as loader:
            texts = [setup.training_conditioning(loader.batch(position))["text"] for position in range(0, 64, 16)]
        return texts, setup.model_header(0).training


def test_draws_depend_on_the_seed_alone_and_are_written_down(data: Path, fake_encoder: FakeEncoder) -> None:
    first, header = seen(data, workers=1, prefetch=1, tags=TAGS, weights=WEIGHTS)
    again, _ = seen(data, workers=3, prefetch=5, tags=TAGS, weights=WEIGHTS)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert (header["tags"], header["weights"]) == (TAGS, WEIGHTS)
    assert not torch.equal(torch.stack(first), torch.stack(seen(data, seed=1, tags=TAGS, weights=WEIGHTS)[0]))
    # What is shown is a variant of one of the two lines.
    variants = {FakeEncoder()(text).numpy().tobytes(): text for text in fake_encoder.read}
    shown = [variants[embedding.numpy().tobytes()] for batch in first for embedding in batch]
    assert {text.split()[0] for text in shown} == {"number", "image"}
    assert any(text.startswith("number") and not text.endswith("a, b, c") for text in shown)


def test_lines_are_drawn_without_any_setting_and_held_out_losses_see_the_first(
    data: Path, fake_encoder: FakeEncoder
) -> None:
    texts, header = seen(data)
    assert not {"tags", "weights"} & header.keys()
    variants = {FakeEncoder()(text).numpy().tobytes(): text for text in fake_encoder.read}
    shown = [variants[embedding.numpy().tobytes()] for batch in texts for embedding in batch]
    share = sum(text.startswith("number") for text in shown) / len(shown)
    assert 0.25 < share < 0.75
    config = TrainingConfig.model_validate(SHORT)
    with open_dataset(data, config, None) as dataset, ThreadPoolExecutor(1) as pool:
        setup = make_setup(dataset, MODEL, config, sampling_config(steps=2), SINGLE_PROCESS, pool.map)
        trainer = Trainer(setup, pool)
        with trainer.loader as loader:
            embeddings = setup.conditioning(loader.batch(0))["text"]
    assert all(variants[embedding.numpy().tobytes()].startswith("number") for embedding in embeddings)


def test_settings_of_captions_and_weights_are_part_of_the_identity(data: Path) -> None:
    configs = [
        TrainingConfig.model_validate(SHORT | fields)
        for fields in ({}, {"tags": TAGS}, {"weights": WEIGHTS}, {"tags": TAGS | {"keep": 2}})
    ]
    with open_dataset(data, configs[0], None) as dataset:
        keys = {train_key(data_digest(dataset.manifest, config), MODEL, config) for config in configs}
        # Names of images are no part of the content, but weights depend on them.
        assert data_digest(dataset.manifest, configs[2]) != dataset.manifest.content_digest
    assert len(keys) == 4


def test_tags_without_captions_are_a_mistake(data: Path) -> None:
    with pytest.raises(UserError, match=r"set model\.text to true"):
        seen(data, MODEL.model_copy(update={"text": False, "text_tokens": None}), tags=TAGS)
