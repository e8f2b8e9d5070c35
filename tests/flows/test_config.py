"""params.yaml: one configuration, checked, with overrides; mistakes name their mend."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from diffusion.common.config import dataset_folder
from diffusion.common.errors import UserError
from diffusion.families.config import ModelConfig, VAEConfig
from diffusion.presets import PresetName
from diffusion.process.samplers import sampling_config
from diffusion.process.schedules import linear_schedule, make_schedule
from diffusion.training.config import DistillationConfig, TrainingConfig
from flows.config import (
    Params,
    combinations,
    family_variants,
    flatten_sections,
    load_params,
    load_with_origins,
    registered_autoencoder,
)
from tests.builders import ROOT

LEARNED = "model.variance=learned_range training.timestep_sampling=uniform"
MINIMAL = "training:\n  images: 100\n"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_any_field_with_its_type(params: Path) -> None:
    config = load_params(params, ["model.channel_mult=[1, 2, 2]", "training.flip=true", "ingest.size=64"])
    assert config.model.channel_mult == (1, 2, 2)
    assert config.training.flip is True
    assert config.ingest.size == 64


def test_folders_and_model_follow_the_data_set_unless_named(params: Path) -> None:
    config = load_params(params, ["training.dataset=faces"])
    assert str(config.dataset_folder) == "data/faces"
    assert str(config.run_folder) == "runs/faces"
    assert config.model_name == "faces"
    explicit = load_params(params, ["training.dataset=faces", "training.output=elsewhere", "registry.model=mine"])
    assert (str(explicit.run_folder), explicit.model_name) == ("elsewhere", "mine")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("training.batchsize=64", r"unknown key training\.batchsize: did you mean batch_size\?"),
        ("trainning.images=1", "unknown key trainning: did you mean training"),
        ("training.zzz=1", "known here: .*batch_size"),
        ("ingest.size=huge", r"^--set ingest\.size=huge: ingest\.size: .*got 'huge'"),
        ("ingest.size=4", r"ingest\.size: .*greater than or equal to 8"),
        ("ingest.licence=''", r"ingest\.licence: .*at least 1 character"),
        ("training.images", "write it as key=value"),
        ("training.images.more=1", "is a value, not a section"),
        ("model.attention=[5]", r"^--set model\.attention=\[5\]: model: model\.attention"),
        ("ingest.background=red", "ingest.background"),
        ("sampling_batch.chunk=100", r"cuts compute batches of 64 images .* use 128"),
        ("training.minutes=.inf", r"training\.minutes: .*finite"),
        ("sampling_batch.runner=slurm", r"sampling_batch\.runner: .*got 'slurm'"),
        ("gate.delta=1", r"gate\.delta: .*less than 1"),
        ("gate.memorised=0.1", r"unknown key gate\.memorised: did you mean memorized\?"),
        ("preset=quick", "preset: Input should be 'fast', 'ddpm' or 'large'"),
        ("evaluation.ema_stds=[0.08]", r"the snapshots that training\.ema_stds saves"),
        ("training.ema_stds=[0.05,0.1] evaluation.ema_stds=[0.5]", r"less than 0\.28"),
        (f"{LEARNED} sampling.sampler=deis", r"sampling\.sampler = deis ignores it: use ddpm"),
        (
            "preset=large model.variance=learned_range",
            r"training\.timestep_sampling samples levels between them: use uniform",
        ),
        (
            "sampling.guidance=3 training.condition_dropout=0",
            r"never learns with training\.condition_dropout = 0: set that to 0\.1",
        ),
        ("sampling.autoguidance=2 training.guide=null", r"training\.guide = null"),
        ("sampling.sampler=heun sampling.variance=larger", r"sampling\.variance means nothing to sampler = heun"),
        ("model.family=vae model.schedule=edm", r"schedule is a field of model\.family = ddpm, and this is vae"),
        ("model.family=vae model.kl_wait=1", r"unknown key model\.kl_wait: did you mean kl_weight\?"),
        ("model.family=vae model.kl_weight=-1", r"model\.kl_weight: Input should be greater than or equal to 0"),
        ("model.family=vae sampling.steps=50", r"sampling\.steps means nothing to model\.family = vae"),
        ("model.family=vae preset=large", r"preset large is of diffusion models"),
        ("model.kl_weight=1", r"model\.kl_weight is a field of model\.family = vae, and this is ddpm"),
        ("model.family=flow", r"model: family is ddpm \(default\), vae, gan, autoregressive or diffusers"),
        (
            "model.family=autoregressive model.gamma=1",
            r"model\.gamma is a field of model\.family = gan, and this is autoregressive",
        ),
        ("model.family=gan training.keep_best=1", r"training\.keep_best means nothing to model\.family = gan"),
        ("model.widht=16", r"unknown key model\.widht: did you mean width\?"),
    ],
)
def test_configuration_errors_name_the_key_and_the_remedy(params: Path, overrides: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_params(params, overrides.split())
    assert "\n" not in str(error.value)


def test_duration_of_an_option_replaces_the_file(params: Path) -> None:
    config = load_params(params, ["training.minutes=3"])
    assert (config.training.images, config.training.minutes) == (None, 3)
    params.write_text("training:\n  minutes: 3\n")
    config = load_params(params, ["training.images=8000"])
    assert (config.training.images, config.training.minutes) == (8000, None)
    with pytest.raises(UserError, match=r"^--set training\.images --set training\.minutes: give one"):
        load_params(params, ["training.images=8000", "training.minutes=2"])
    params.write_text("training:\n  images: 5\n  minutes: 3\n")
    with pytest.raises(UserError, match=r"^.*params\.yaml: training: give either"):
        load_params(params, [])


def test_errors_blame_the_file_or_the_option(params: Path) -> None:
    params.write_text("training:\n  batchsize: 3\n")
    with pytest.raises(UserError, match=r"^.*params\.yaml: unknown key training\.batchsize"):
        load_params(params, ["ingest.size=32"])
    params.write_text(MINIMAL)
    with pytest.raises(UserError, match=r"^--dataset \.\./x: training\.dataset"):
        load_params(params, ["ingest.size=32"], {"training.dataset": ("--dataset", "../x")})
    # Of several fields that contradict each other, those of the command line are to blame if the file alone is valid.
    with pytest.raises(UserError, match=r"^--set sampling_batch\.chunk=100: "):
        load_params(params, ["sampling_batch.chunk=100"])
    # And the file as well, if the message names a field that stands there.
    params.write_text("model:\n  conditional: true\n")
    for override in ("model.low_resolution=8", "model.family=vae"):
        with pytest.raises(UserError, match=rf"^\S*params\.yaml .*--set {override}: .*model\.conditional"):
            load_params(params, [override])


def test_each_field_has_the_origin_that_set_it_last(params: Path) -> None:
    params.write_text("preset: ddpm\ningest:\n  size: 32\ntraining:\n  images: 5\n  dataset: faces\n")
    values, origins = load_with_origins(params, ["ingest.size=64", "training.minutes=1"])
    assert origins.keys() == flatten_sections(values.model_dump(mode="json")).keys()
    expected = {
        "ingest.size": "--set",
        "training.minutes": "--set",
        "training.images": "default",
        "training.dataset": str(params),
        "sampling.sampler": "preset ddpm",
        "ingest.fit": "default",
    }
    assert {key: origins[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "not found"),
        ("training: [", "not plain YAML"),
        ("training:\n  images: 5\n  images: 6\n", "images is given twice"),
        ("- a\n- b\n", "sections"),
    ],
)
def test_missing_or_broken_configuration_file_is_an_error(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_params(tmp_path / "params.yaml", [])
    with pytest.raises(UserError, match=r"cannot be read .*: give a configuration file to --params"):
        load_params(tmp_path, [])


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\\b", "a:b", "bob's", 'say "a"', "a\nb"])
def test_data_set_names_cannot_escape_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="plain name"):
        dataset_folder(name)


def test_the_shipped_configuration_is_valid() -> None:
    config = load_params(ROOT / "params.yaml", [])
    assert config.model.steps == 1000


def test_flattened_keys_are_dotted() -> None:
    assert flatten_sections({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_default_preset_equals_the_field_defaults(params: Path) -> None:
    config = load_params(params, [])
    assert config.preset == "fast"
    assert (config.model, config.sampling) == (ModelConfig(), sampling_config())
    assert config.training == TrainingConfig(images=100)


def test_the_preset_ddpm_is_the_book(params: Path) -> None:
    config = load_params(params, ["preset=ddpm"])
    model, training, sampling = config.model, config.training, config.sampling
    assert (model.steps, model.schedule, model.prediction) == (1000, "linear", "epsilon")
    assert (training.weighting, training.timestep_sampling, training.learning_rate) == ("plain", "uniform", 2e-4)
    assert (sampling.sampler, sampling.steps) == ("ddpm", 1000)
    torch.testing.assert_close(
        sampling.sigma_grid(make_schedule(model, (1, 28, 28)))[:-1], linear_schedule(1000).sigmas.flip(0)
    )


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_explicit_settings_override_the_preset(params: Path, preset: str) -> None:
    plain = load_params(params, [f"preset={preset}"])
    config = load_params(params, [f"preset={preset}", "model.width=16", "sampling.steps=7"])
    assert (config.model.width, config.sampling.steps) == (16, 7)
    assert config.model.model_copy(update={"width": plain.model.width}) == plain.model
    assert Params.model_validate(config.model_dump()) == config


def test_super_resolution_has_its_own_default_noise_levels(params: Path) -> None:
    config = load_params(params, ["model.low_resolution=16"])
    plain = load_params(params, [])
    levels = ("log_sigma_mean", "sigma_min", "sigma_max")
    for section in ("training", "sampling"):
        changed, default = getattr(config, section).model_dump(), getattr(plain, section).model_dump()
        assert {name for name in changed if changed[name] != default[name]} <= set(levels)
    assert config.training.log_sigma_mean == -2.5
    assert (config.sampling.sigma_min, config.sampling.sigma_max) == (0.02, 4)
    options = ["training.log_sigma_mean=-2", "sampling.sigma_max=9"]
    config = load_params(params, ["model.low_resolution=16", *options])
    assert (config.training.log_sigma_mean, config.sampling.sigma_max) == (-2, 9)
    # Times that are not drawn from a distribution of σ have no use for its mean.
    config = load_params(params, ["model.low_resolution=16", "training.timestep_sampling=uniform"])
    assert config.training.log_sigma_mean is None


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_params(Path("params.yaml"), ["ingest.size=64"])
    assert (config.ingest.size, config.training.minutes, config.training.images) == (64, 10, None)
    assert load_params(Path("params.yaml"), ["training.images=5"]).training.minutes is None
    (tmp_path / "params.yaml").write_text("")
    assert load_params(Path("params.yaml"), ["ingest.size=64"]) == config
    with pytest.raises(UserError, match=r"other.yaml not found"):
        load_params(Path("other.yaml"), [])


def test_rules_of_the_gate_can_be_changed_one_by_one(params: Path) -> None:
    gate = load_params(params, ["gate.delta=0.1", "gate.cost=null"]).gate
    assert (gate.delta, gate.cost, gate.recall_loss) == (0.1, None, 0.1)


def test_ema_stds_override_the_preset(params: Path) -> None:
    config = load_params(params, ["preset=large", "training.ema_stds=[0.05, 0.1]", "evaluation.ema_stds=[0.08]"])
    assert (config.training.ema_decay, config.training.ema_stds) == (None, (0.05, 0.1))


def test_settings_that_fit_together_are_taken(params: Path) -> None:
    assert load_params(params, [*LEARNED.split(), "sampling.sampler=ddpm"]).model.variance == "learned_range"
    load_params(params, ["sampling.autoguidance=2", "training.guide=null", "training.init_from=models:/faces/1"])


def test_each_family_has_its_own_fields(params: Path) -> None:
    vae = load_params(params, ["model.family=vae", "model.kl_weight=0.5"])
    assert isinstance(vae.model, VAEConfig)
    assert (vae.model.kl_weight, vae.sampling) == (0.5, sampling_config())
    assert load_params(params, ["model.family=ddpm"]) == load_params(params, [])


def test_each_family_has_its_own_runs_reports_and_champion(params: Path) -> None:
    vae = load_params(params, ["training.dataset=faces", "model.family=vae"])
    assert (str(vae.run_folder), str(vae.report_folder)) == ("runs/faces-vae", "reports/faces-vae")
    assert vae.model_name == "faces-vae"
    others = {f"reports/faces-{family}" for family in ("vae", "gan", "autoregressive", "diffusers")}
    assert {"reports/faces"} | others <= {str(folder) for folder in vae.report_folders}
    explicit = load_params(params, ["model.family=vae", "training.output=elsewhere", "registry.model=mine"])
    assert (str(explicit.run_folder), explicit.model_name) == ("elsewhere", "mine")


def test_each_run_folder_has_a_report_of_its_own(params: Path) -> None:
    usual = load_params(params, ["training.dataset=faces", "registry.model=faces-tuned"])
    tuned = load_params(params, ["training.dataset=faces", "training.output=runs/faces-tuned"])
    elsewhere = load_params(params, ["training.dataset=faces", "training.output=/shared/runs/faces"])
    assert str(usual.report_folder) == str(elsewhere.report_folder) == "reports/faces"
    assert str(tuned.report_folder) == "reports/faces/runs/faces-tuned"
    assert tuned.dataset_report_folder == usual.dataset_report_folder
    student = tuned.model_copy(
        update={"training": tuned.training.model_copy(update={"student": DistillationConfig(steps=2)})}
    )
    assert student.report_folder not in (tuned.report_folder, usual.report_folder)


def test_takedown_searches_folders_of_models_sweeps_and_students(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_params(params, ["training.dataset=faces"])
    [combination] = combinations(config, {"model.width": [32]})
    student = config.model_copy(
        update={"training": config.training.model_copy(update={"student": DistillationConfig(steps=2)})}
    )
    other = config.model_copy(
        update={"training": config.training.model_copy(update={"output": Path("runs", "faces-tuned")})}
    )
    [other_combination] = combinations(other, {"model.width": [32]})
    folders = [config.model_report_folder("0123456789" * 6), combination.folder, student.report_folder]
    folders += [other.report_folder, other.model_report_folder("0123456789" * 6), other_combination.folder]
    runs = [combination.params.run_folder, student.run_folder]
    for folder in (*folders, *runs):
        folder.mkdir(parents=True)
    assert {config.report_folder, *folders} <= set(config.report_folders)
    assert {config.run_folder, *runs} <= set(config.run_folders)


def test_a_configuration_of_any_family_survives_being_written_down(params: Path) -> None:
    families = [[f"model.family={family}"] for family in ("vae", "gan", "autoregressive")]
    for overrides in (*families, ["model.autoencoder=models:/faces-vae@champion"], []):
        config = load_params(params, overrides)
        assert Params.model_validate(config.model_dump(mode="json")) == config
        assert Params.model_validate_json(config.model_dump_json()) == config
    assert "family" not in config.model.model_dump()


def test_the_form_shows_what_each_family_takes() -> None:
    schema = Params.model_json_schema()
    schemas = [schema["$defs"][option["$ref"].rpartition("/")[2]] for option in schema["properties"]["model"]["oneOf"]]
    families = ["ddpm", "vae", "gan", "autoregressive", "diffusers"]
    assert [each["properties"]["family"]["const"] for each in schemas] == families
    assert "kl_weight" in schemas[1]["properties"]
    assert "schedule" not in schemas[1]["properties"]


def test_family_defaults_are_overridden_by_explicit_settings(params: Path) -> None:
    gan = load_params(params, ["model.family=gan", "training.batch_size=16"])
    assert (gan.training.batch_size, gan.training.weight_decay) == (16, 0)
    assert load_params(params, ["model.family=vae"]).training.weight_decay == 0.01


def test_compared_families_share_data_length_and_evaluation_only(params: Path) -> None:
    options = ["training.dataset=faces", "training.images=500", "training.seed=3", "training.learning_rate=0.5"]
    own = load_params(params, [*options, "model.width=16", "sampling.compute_batch=8", "evaluation.samples=50"])
    variants = family_variants(own, ["gan", "ddpm", "autoregressive"])
    assert list(variants) == ["gan", "ddpm", "autoregressive"]
    assert variants["ddpm"] == own
    default = load_params(params, ["model.family=gan"])
    gan = variants["gan"]
    assert (gan.run_folder, gan.model_name) == (Path("runs/faces-gan"), "faces-gan")
    assert (gan.training.images, gan.training.seed, gan.sampling.compute_batch) == (500, 3, 8)
    assert gan.evaluation == own.evaluation
    assert gan.ingest == own.ingest
    assert gan.model == default.model
    assert gan.training.learning_rate == default.training.learning_rate


@pytest.mark.parametrize(
    ("overrides", "families", "words"),
    [
        ([], ["gan", "flow"], "there is no family 'flow'"),
        ([], ["gan"], "name two families or more, each once"),
        ([], ["gan", "gan"], "name two families or more, each once"),
        (["training.output=elsewhere"], ["gan", "vae"], r"training\.output = elsewhere is one place"),
        (["registry.model=mine"], ["gan", "vae"], r"registry\.model = mine is one place"),
        (["model.low_resolution=4"], ["gan", "vae"], "super-resolution model, and"),
    ],
)
def test_settings_not_shared_by_all_families_are_an_error(
    params: Path, overrides: list[str], families: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        family_variants(load_params(params, overrides), families)


def test_optional_settings_are_stored_only_when_set(params: Path) -> None:
    plain = load_params(params, []).model_dump(mode="json")
    assert plain["registry"] == {"model": None}
    assert "licence" not in plain["ingest"]
    params_with_options = load_params(params, ["registry.approval=true", "ingest.licence=CC-BY-4.0"])
    assert (params_with_options.registry.approval, params_with_options.ingest.licence) == (True, "CC-BY-4.0")
    assert Params.model_validate(params_with_options.model_dump(mode="json")) == params_with_options


def test_only_a_model_uri_is_looked_up(params: Path) -> None:
    uri = "models:/faces-vae@champion"
    assert registered_autoencoder(load_params(params, [f"model.autoencoder={uri}"])) == uri
    assert registered_autoencoder(load_params(params, ["model.autoencoder=runs/faces-vae/final.safetensors"])) is None
    assert registered_autoencoder(load_params(params, ["model.family=vae"])) is None


@pytest.mark.parametrize(
    ("settings", "size", "images"),
    [
        ([], 8, 64),
        ([], 32, 64),
        ([], 48, 32),
        ([], 64, 32),
        ([], 256, 16),
        (["training.cpu_threads=48"], 64, 64),
        (["training.batch_size=128"], 64, 128),
        (["preset=ddpm"], 64, 128),
        (["model.family=vae"], 64, 64),
        (["model.family=gan"], 128, 32),
        (["model.autoencoder=vae.safetensors"], 256, 64),
    ],
)
def test_the_default_batch_has_fewer_images_where_they_are_larger(
    params: Path, settings: list[str], size: int, images: int
) -> None:
    config = load_params(params, settings)
    assert config.training.with_batch_size(config.model, size).images_per_step == images


def test_micro_batches_split_the_default_batch_or_are_an_error(params: Path) -> None:
    config = load_params(params, ["training.micro_batch=32"])
    assert config.training.with_batch_size(config.model, 32).micro_batch == 32
    with pytest.raises(UserError, match=r"training\.micro_batch = 32 splits no batch of 32 images"):
        config.training.with_batch_size(config.model, 64)
