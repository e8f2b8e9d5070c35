"""Configurations of sd-scripts, ai-toolkit and OneTrainer: what is taken over, and what may come instead of one."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion.common.errors import UserError
from diffusion.data.sources.trainer_configs import read_trainer_config
from diffusion.data.sources.trainer_settings import TrainerConfig

KOHYA = """
[general]
shuffle_caption = true
caption_extension = '.caption'
keep_tokens = 1
enable_bucket = true

[[datasets]]
resolution = [768, 512]
batch_size = 4
min_bucket_reso = 256

  [[datasets.subsets]]
  image_dir = 'sets/hoge'
  class_tokens = 'hoge girl'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'sets/fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'sets/reg'
  class_tokens = 'human'
"""
ARGUMENTS = """
[model_arguments]
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
[dataset_arguments]
train_data_dir = "img"
resolution = "512,512"
[training_arguments]
max_train_steps = 1600
train_batch_size = 2
gradient_accumulation_steps = 3
lr_warmup_steps = 10
learning_rate = 1e-4
network_dim = 32
network_alpha = 16
optimizer_type = "AdamW8bit"
seed = 42
"""
AI_TOOLKIT = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {save_every: 250}
      datasets:
        - folder_path: images/person
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: true
          keep_tokens: 2
          token_dropout_rate: 0.1
          resolution: [512, 768, 1024]
          flip_x: true
          cache_latents_to_disk: true
      train: {batch_size: 1, steps: 2000, gradient_accumulation_steps: 1, lr: 1e-4, noise_scheduler: flowmatch}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample: {prompts: [a cat]}
"""
CONCEPTS = [
    {
        "path": "cats",
        "balancing": 2.5,
        "balancing_strategy": "REPEATS",
        "text": {"enable_tag_shuffling": True, "keep_tags_count": 2, "tag_dropout_probability": 0.3},
        "image": {"enable_random_flip": True, "enable_crop_jitter": True, "random_hue_max_strength": 0.0},
    },
    {"path": "dogs", "enabled": False},
    {"path": "regular", "type": "PRIOR_PREDICTION"},
]
ONE_TRAINER = {
    "training_method": "LORA",
    "base_model_name": "stabilityai/sdxl",
    "concept_file_name": "concepts.json",
    "resolution": "512",
    "batch_size": 4,
    "epochs": 10,
    "learning_rate": 0.0003,
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "aspect_ratio_bucketing": True,
    "masked_training": True,
}


def read(folder: Path, name: str, text: str) -> TrainerConfig:
    (folder / name).write_text(text)
    return read_trainer_config(folder / name)


def test_data_sets_of_sd_scripts(tmp_path: Path) -> None:
    taken = read(tmp_path, "dataset_config.toml", KOHYA)
    taken.finish(100)
    assert (taken.source, taken.weights) == ("sets", {"hoge/*": 10, "fuga/*": 1})
    assert taken.settings == {
        "training.tags.shuffle": True,
        "training.tags.keep": 1,
        "ingest.captions": "caption",
        "ingest.fit": "bucket",
        "ingest.size": 627,
        "training.batch_size": 4,
    }
    assert taken.left.keys() == {
        *("subsets[0].class_tokens", "subsets[1].class_tokens", "subsets[1].keep_tokens", "subsets[2].is_reg"),
        "min_bucket_reso",
    }


@pytest.mark.parametrize(
    ("lines", "images"),
    [
        ("max_train_epochs = 3", 3 * (20 * 10 + 5 * 2 + 4)),
        ("max_train_epochs = 3\nmax_train_steps = 1600", 3 * 214),  # as there, epochs count
        ("max_train_epochs = 0\nmax_train_steps = 16", 16),
        ("epoch = 5\nmax_train_epochs = 3", 3 * 214),
        ("epoch = 5\nmax_train_steps = 16", 16),
        ("epoch = 5", 5 * 214),
    ],
)
def test_epochs_of_sd_scripts_count_the_repeats_in_names(tmp_path: Path, lines: str, images: int) -> None:
    taken = read(tmp_path, "config.toml", f"train_data_dir = 'img'\n{lines}")
    taken.finish(29, {"10_cat": 20, "2_dog": 5, "other": 4})
    assert taken.settings["training.images"] == images


def test_folders_of_several_data_sets_count_as_often_as_listed(tmp_path: Path) -> None:
    subset = "[[datasets.subsets]]\nimage_dir = '{}'\nnum_repeats = {}\n".format
    first = "[[datasets]]\n" + subset("sets/10_cat", 3) + subset("sets/10_cat", 7) + subset("sets/dog", 1)
    second = "[[datasets]]\n" + subset("sets/10_cat", 2)
    taken = read(tmp_path, "c.toml", f"max_train_epochs = 2\n{first}{second}")
    # sd-scripts passes over the second one of a data set, and trains on the folders of all data sets.
    assert taken.folders == {"sets/10_cat": 5, "sets/dog": 1}
    assert "subsets[1].image_dir" in taken.left
    assert taken.weights == {"10_cat/*": 5, "dog/*": 1}
    taken.finish(12, {"10_cat": 8, "dog": 3, "dog/deep": 1})
    assert taken.settings["training.images"] == 2 * (8 * 5 + 4)
    taken = read(tmp_path, "c.toml", f"max_train_epochs = 2\n{first}")
    taken.finish(12, {"elsewhere": 12})
    assert "epochs" in taken.left


def test_arguments_of_sd_scripts(tmp_path: Path) -> None:
    taken = read(tmp_path, "config_file.toml", ARGUMENTS)
    taken.finish(100)
    assert (taken.source, taken.base) == ("img", "runwayml/stable-diffusion-v1-5")
    assert taken.settings == {
        "ingest.size": 512,
        "training.images": 1600 * 6,
        "training.batch_size": 6,
        "training.micro_batch": 2,
        "training.warmup_images": 60,
        "training.learning_rate": 1e-4,
        "training.optimizer": "adamw_8bit",
        "training.seed": 42,
    }
    assert taken.adapter == {"rank": 32, "alpha": 16}
    assert not taken.left


def test_job_of_ai_toolkit(tmp_path: Path) -> None:
    taken = read(tmp_path, "job.yaml", AI_TOOLKIT)
    taken.finish(100)
    assert (taken.source, taken.base, taken.weights) == ("images/person", "black-forest-labs/FLUX.1-dev", {})
    assert taken.settings == {
        "ingest.trigger": "p3r5on",
        "ingest.captions": "txt",
        "ingest.size": 512,
        "training.condition_dropout": 0.05,
        "training.tags.shuffle": True,
        "training.tags.keep": 2,
        "training.tags.dropout": 0.1,
        "training.flip": True,
        "training.batch_size": 1,
        "training.images": 2000,
        "training.learning_rate": 1e-4,
    }
    assert taken.adapter == {"rank": 16, "alpha": 8}
    assert taken.left.keys() == {
        *("datasets[0].resolution", "datasets[0].cache_latents_to_disk", "save", "sample"),
        *("train.noise_scheduler", "model.is_flux", "model.quantize"),
    }


@pytest.mark.parametrize(
    ("name", "text", "adapter", "left"),
    [
        (
            "c.toml",
            'network_module = "lycoris.kohya"\nnetwork_dim = 4\nnetwork_args = ["algo=lokr", "factor=8", "conv_dim=4"]',
            {"kind": "lokr", "rank": 4, "factor": 8},
            {"network_args.conv_dim"},
        ),
        (
            "c.toml",
            'network_module = "lycoris.kohya"\nnetwork_args = "algo=locon dora_wd=True"',
            {"kind": "dora"},
            set(),
        ),
        (
            "c.toml",
            'network_module = "lycoris.kohya"\nnetwork_args = ["algo=diag-oft", "factor=-1"]',
            {},
            {"network_args.algo"},
        ),
        ("c.toml", 'network_module = "networks.dylora"\nnetwork_dim = 4', {"rank": 4}, {"network_module"}),
        (
            "j.yaml",
            "config: {process: [{network: {type: lokr, linear: 8, lokr_full_rank: true, lokr_factor: 16}}]}",
            {"kind": "lokr", "rank": 8, "factor": 16},
            {"network.lokr_full_rank"},
        ),
        ("j.yaml", "config: {process: [{network: {type: lorm, linear: 8}}]}", {"rank": 8}, {"network.type"}),
        (
            "o.json",
            '{"training_method": "LORA", "peft_type": "LORA", "lora_decompose": true, "lora_rank": 8}',
            {"kind": "dora", "rank": 8},
            set(),
        ),
        ("o.json", '{"training_method": "LORA", "peft_type": "LOHA"}', {}, {"peft_type"}),
    ],
)
def test_kinds_of_adapters_are_taken_over(
    tmp_path: Path, name: str, text: str, adapter: dict[str, object], left: set[str]
) -> None:
    taken = read(tmp_path, name, text)
    assert taken.adapter == adapter
    assert taken.left.keys() == left


@pytest.mark.parametrize(
    ("name", "text", "settings", "left"),
    [
        (
            "c.toml",
            'optimizer_type = "Prodigy"\nlr_scheduler = "constant_with_warmup"\nlearning_rate = 1',
            {"optimizer": "prodigy", "learning_rate_decay": "constant", "learning_rate": 1.0},
            set(),
        ),
        ("c.toml", 'optimizer_type = "AdamW"\nlr_scheduler = "cosine"', {}, set()),
        (
            "c.toml",
            'optimizer_type = "Lion"\nlr_scheduler = "cosine_with_restarts"',
            {},
            {"optimizer_type", "lr_scheduler"},
        ),
        (
            "j.yaml",
            "config: {process: [{train: {optimizer: prodigy, lr_scheduler: linear}}]}",
            {"optimizer": "prodigy", "learning_rate_decay": "linear"},
            set(),
        ),
        (
            "o.json",
            '{"training_method": "LORA", "learning_rate_scheduler": "CONSTANT"}',
            {"learning_rate_decay": "constant"},
            set(),
        ),
    ],
)
def test_optimizers_and_schedules_are_taken_over(
    tmp_path: Path, name: str, text: str, settings: dict[str, object], left: set[str]
) -> None:
    taken = read(tmp_path, name, text)
    assert taken.settings == {f"training.{key}": value for key, value in settings.items()}
    assert taken.left.keys() == left


def test_configuration_and_concepts_of_one_trainer(tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps(CONCEPTS))
    taken = read(tmp_path, "config.json", json.dumps(ONE_TRAINER))
    taken.finish(40)
    assert (taken.source, taken.base, taken.epochs) == ("cats", "stabilityai/sdxl", 10)
    assert taken.settings == {
        "ingest.size": 512,
        "ingest.fit": "bucket",
        "training.batch_size": 4,
        # Of 40 images, 2.5 times in each epoch.
        "training.images": 1000,
        "training.learning_rate": 0.0003,
        "training.tags.shuffle": True,
        "training.tags.keep": 2,
        "training.flip": True,
    }
    assert taken.adapter == {"rank": 16, "alpha": 1.0}
    assert taken.left.keys() == {"masked_training", "concepts[0].image.enable_crop_jitter", "concepts[2]"}
    alone = read_trainer_config(tmp_path / "concepts.json")
    assert alone.folders == {"cats": 2.5}
    (tmp_path / "concepts.json").unlink()
    assert "concept_file_name" in read_trainer_config(tmp_path / "config.json").left


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.toml", b"not = = toml"),
        ("a.toml", b"\xff\xfe"),
        ("a.toml", b"a = " + b"[" * 100_000),
        ("a.toml", b"#" + b"x" * 2**20),
        ("a.yaml", b"!!python/object/apply:os.system ['echo']"),
        ("a.yaml", b"a: &a [*a]"),
        ("a.yaml", b"just: a map"),
        ("a.json", b"[" * 100_000),
        ("a.json", b"{"),
        ("a.json", b'{"other": 1}'),
        ("a.json", b"[]"),
        ("a.json", b"[1, 2]"),
        ("gone.toml", None),
    ],
)
def test_what_is_not_a_configuration_is_an_error_of_one_line(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as error:
        read_trainer_config(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**400,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "-1",
        "1e999",
        "٣",
        [],
        [1, "x"],
        {},
        {"a": []},
    ]
)
NAMES = st.sampled_from(
    [
        *("path", "text", "image", "resolution", "batch_size", "epochs", "learning_rate", "lora_rank", "balancing"),
        *("process", "datasets", "subsets", "image_dir", "folder_path", "train", "network", "num_repeats", "enabled"),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.sampled_from(["concepts", "datasets", "config"]))
def test_any_values_are_taken_over_or_left(tmp_path: Path, tree: object, key: str) -> None:
    text = json.dumps({key: {"process": [tree]} if key == "config" else [tree], "batch_size": tree})
    taken = read(tmp_path, "a.json", text)
    taken.finish(10)
    json.dumps(taken.settings, allow_nan=False)
    assert all(0.01 <= repeats <= 10_000 for repeats in taken.folders.values())
