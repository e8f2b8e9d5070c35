"""params.yaml: one configuration, checked, with overrides; mistakes name their mend."""

from pathlib import Path
from typing import get_args

import pytest

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.models.config import ModelConfig
from diffusion.presets import PresetName
from diffusion.training.config import TrainingConfig
from flows.params import Params, dataset_folder, flattened, load_params

MINIMAL = "training:\n  images: 100\n"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_any_field_with_its_type(params: Path) -> None:
    config = load_params(params, ["model.multipliers=[1, 2, 2]", "training.flip=true", "ingest.size=64"])
    assert config.model.multipliers == (1, 2, 2)
    assert config.training.flip is True
    assert config.ingest.size == 64


def test_folders_and_model_follow_the_data_set_unless_named(params: Path) -> None:
    config = load_params(params, ["training.dataset=faces"])
    assert str(config.dataset_folder) == "data/faces"
    assert str(config.run_folder) == "runs/faces"
    assert config.model_name == "faces"
    named = load_params(params, ["training.dataset=faces", "training.output=elsewhere", "registry.model=mine"])
    assert (str(named.run_folder), named.model_name) == ("elsewhere", "mine")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.batchsize=64", r"unknown key training\.batchsize: did you mean batch_size\?"),
        ("trainning.images=1", "unknown key trainning: did you mean training"),
        ("training.zzz=1", "known here: .*batch_size"),
        ("ingest.size=huge", r"ingest\.size: .*got 'huge'"),
        ("ingest.size=4", r"ingest\.size: .*greater than or equal to 8"),
        ("training.images", "write it as key=value"),
        ("training.images.more=1", "is a value, not a section"),
        ("training.minutes=1", r"either training\.images or training\.minutes"),
        ("model.attention=[5]", r"model\.attention"),
        ("ingest.background=red", "ingest.background"),
    ],
)
def test_mistakes_name_the_key_and_the_mend(params: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_params(params, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load_params(tmp_path / "params.yaml", [])
    (tmp_path / "params.yaml").write_text("training: [")
    with pytest.raises(UserError, match="not YAML"):
        load_params(tmp_path / "params.yaml", [])
    (tmp_path / "params.yaml").write_text("- a\n- b\n")
    with pytest.raises(UserError, match="sections"):
        load_params(tmp_path / "params.yaml", [])


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\\b"])
def test_data_set_names_cannot_lead_elsewhere(name: str) -> None:
    with pytest.raises(UserError, match="plain name"):
        dataset_folder(name)


def test_the_shipped_configuration_is_valid() -> None:
    config = load_params(Path(__file__).parents[2] / "params.yaml", [])
    assert config.model.steps == 1000


def test_flattened_keys_are_dotted() -> None:
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_the_default_preset_says_what_the_fields_have_by_default(params: Path) -> None:
    config = load_params(params, [])
    assert config.preset == "fast"
    assert (config.model, config.sampling) == (ModelConfig(), SamplingConfig())
    assert config.training == TrainingConfig(images=100)


def test_the_preset_ddpm_is_the_book(params: Path) -> None:
    config = load_params(params, ["preset=ddpm"])
    model, training, sampling = config.model, config.training, config.sampling
    assert (model.steps, model.schedule, model.prediction) == (1000, "linear", "noise")
    assert (training.weighting, training.times, training.learning_rate) == ("plain", "uniform", 2e-4)
    assert (sampling.sampler, sampling.steps) == ("ddpm", 1000)


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_what_is_set_wins_over_the_preset_and_the_rest_is_taken_from_it(params: Path, preset: str) -> None:
    plain = load_params(params, [f"preset={preset}"])
    config = load_params(params, [f"preset={preset}", "model.width=16", "sampling.steps=7"])
    assert (config.model.width, config.sampling.steps) == (16, 7)
    assert config.model.model_copy(update={"width": plain.model.width}) == plain.model
    assert Params.model_validate(config.model_dump()) == config


def test_a_preset_that_does_not_exist_is_refused(params: Path) -> None:
    with pytest.raises(UserError, match="preset: Input should be 'fast', 'ddpm' or 'large'"):
        load_params(params, ["preset=quick"])


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_params(Path("params.yaml"), ["ingest.size=64"])
    assert (config.ingest.size, config.training.minutes, config.training.images) == (64, 10, None)
    assert load_params(Path("params.yaml"), ["training.images=5"]).training.minutes is None
    (tmp_path / "params.yaml").write_text("")
    assert load_params(Path("params.yaml"), ["ingest.size=64"]) == config
    with pytest.raises(UserError, match=r"other.yaml not found"):
        load_params(Path("other.yaml"), [])


def test_averages_of_a_length_replace_a_presets_own_and_must_be_kept_to_be_judged(params: Path) -> None:
    config = load_params(params, ["preset=large", "training.ema_lengths=[0.05, 0.1]", "evaluation.ema_lengths=[0.08]"])
    assert (config.training.ema_decay, config.training.ema_lengths) == (None, (0.05, 0.1))
    with pytest.raises(UserError, match=r"what training\.ema_lengths keeps"):
        load_params(params, ["evaluation.ema_lengths=[0.08]"])
    with pytest.raises(UserError, match=r"less than 0\.28"):
        load_params(params, ["training.ema_lengths=[0.05, 0.1]", "evaluation.ema_lengths=[0.5]"])


def test_a_model_and_a_training_that_do_not_fit_are_refused_before_anything_is_read(params: Path) -> None:
    learned = ["model.learned_variance=true", "training.times=uniform"]
    assert load_params(params, [*learned, "sampling.sampler=ddpm"]).model.learned_variance
    with pytest.raises(UserError, match=r"sampling\.sampler = deis passes it over: use ddpm"):
        load_params(params, [*learned, "sampling.sampler=deis"])
    with pytest.raises(UserError, match=r"training\.times = lognormal draws from between them: use uniform"):
        load_params(params, ["preset=large", "model.learned_variance=true"])
    with pytest.raises(UserError, match=r"never learns with training\.condition_dropout = 0: set that to 0\.1"):
        load_params(params, ["sampling.guidance=3", "training.condition_dropout=0"])
    with pytest.raises(UserError, match=r"sampling\.variance means nothing to sampler = heun"):
        load_params(params, ["sampling.sampler=heun", "sampling.variance=larger"])
