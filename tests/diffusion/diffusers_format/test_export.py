"""Export to diffusers: its pipelines and schedulers draw, of the same noise, the images that we do."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from torch import Tensor

import diffusion.diffusers_format.export
from diffusion.checkpoints import AVERAGED, export, load_model, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.diffusers_format import DarkroomPipeline
from diffusion.diffusers_format.export import ExportResult, export_to_diffusers
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.families.diffusion_model import DiffusionModel, denoiser_of
from diffusion.families.text_encoder import ENCODER
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.generation.generate import encode_prompts, make_conditioning, sample
from diffusion.process.samplers import SAMPLING_ADAPTER, SamplingConfig, sampling_config
from tests.builders import ROOT, small_models
from tests.builders.captioned import FakeEncoder

CLASSES = {"cat": 30, "dog": 10}
SEED, COUNT = 7, 3
SCHEDULES: dict[str, dict[str, Any]] = {
    "noise": {"prediction": "epsilon", "schedule": "linear"},
    "v": {"prediction": "v_prediction", "schedule": "cosine"},
    "x0": {"prediction": "sample", "schedule": "sigmoid"},
    "no signal left": {"prediction": "v_prediction", "schedule": "linear", "zero_terminal_snr": True},
    "edm": {"prediction": "edm", "schedule": "edm"},
}
predictions = pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)


def write_model(
    folder: Path,
    channels: int = 1,
    classes: dict[str, int] | None = None,
    data_mean: tuple[float, ...] | None = None,
    **settings: Any,
) -> Path:
    """A model that was never trained, every weight of which is random: fresh ones answer with zeros."""
    config = small_models.CONFIG.model_copy(update=settings)
    config = ModelConfig.model_validate(config.model_dump())
    network = UNet(config, channels, 8, len(classes or {}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=2.0 if name == "classes.weight" else 0.07, generator=generator)
    about = small_models.header(config, channels=channels).model_copy(
        update={
            "class_histogram": classes or {},
            "encoder": ENCODER if config.text else None,
            "sigma_data": 0.6,
            "data_mean": data_mean,
        }
    )
    path = folder / "final.safetensors"
    tensors = {AVERAGED + name: value for name, value in network.state_dict().items()}
    save_tensors(path, tensors, {"model_header": about.model_dump(mode="json")})
    return path


def exported(weights: Path, **sampling: Any) -> tuple[DiffusionModel, ExportResult]:
    config = SAMPLING_ADAPTER.validate_python({"steps": 8} | sampling)
    return load_model(weights), export_to_diffusers(weights, weights.parent / "folder", config)


def load(exported_pipeline: ExportResult, kind: Any = DarkroomPipeline) -> Any:
    pipe = kind.from_pretrained(exported_pipeline.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_seed(model: DiffusionModel) -> Callable[[], Tensor]:
    return GaussianNoise(SEED, "sampling", range(COUNT), model.shape)


def from_generator(model: DiffusionModel) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return lambda: torch.randn((COUNT, *model.shape), generator=generator)


@torch.no_grad()
def ours(
    model: DiffusionModel,
    config: SamplingConfig,
    levels: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
    conditions: Conditions = UNCONDITIONAL,
) -> Tensor:
    """In [0, 1], as diffusers gives images."""
    levels = config.sigma_grid(model.schedule) if levels is None else levels
    meanings = encode_prompts(model, conditions)
    conditioning = make_conditioning(model, range(COUNT), SEED, conditions, meanings)
    denoise = denoiser_of(model, conditioning, config, meanings[conditions.negative_prompt])
    return (config.run(denoise, levels, noise or from_seed(model), model.start(conditioning)) / 2 + 0.5).clamp(0, 1)


def whole(model: DiffusionModel, scheduler: Any, steps: int) -> Tensor:
    """The noise levels that a scheduler of whole times visits."""
    scheduler.set_timesteps(steps)
    return torch.cat([model.schedule.sigmas[scheduler.timesteps], torch.zeros(1).double()])


def assert_equal(theirs: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    """To ``tolerance`` in [−1, 1]; and there is something to see."""
    assert expected.std() > 0.02
    torch.testing.assert_close(theirs, expected, atol=tolerance / 2, rtol=0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc"])
@predictions
def test_exported_pipeline_reproduces_images_with_diffusers_scheduler(
    tmp_path: Path, settings: dict[str, Any], sampler: Any
) -> None:
    mean = (0.4, -0.6, 0.1)
    model, exported_pipeline = exported(write_model(tmp_path, channels=3, data_mean=mean, **settings), sampler=sampler)
    theirs = load(exported_pipeline)(batch_size=COUNT, seed=SEED, output_type="pt").images
    # DEIS as diffusers has it computes σ = 4,096 in float32.
    tolerance = 4e-3 if sampler == "deis" and settings.get("zero_terminal_snr") else 1e-3
    assert_equal(theirs, ours(model, sampling_config(sampler=sampler, steps=8)), tolerance)


@pytest.mark.parametrize(
    "bounds", [{}, {"sigma_max": None, "sigma_min": None}, {"sigma_max": 5, "sigma_min": 0.1}], ids=str
)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc"])
def test_in_a_stock_pipeline_their_scheduler_visits_our_noise_levels(
    tmp_path: Path, sampler: Any, bounds: dict[str, Any]
) -> None:
    model, exported_pipeline = exported(write_model(tmp_path), sampler=sampler, **bounds)
    scheduler = load(exported_pipeline, diffusers.DDPMPipeline).scheduler
    scheduler.set_timesteps(8)
    levels = sampling_config(sampler=sampler, steps=8, **bounds).sigma_grid(model.schedule)[:-1]
    theirs = scheduler.sigmas.double().unique().flip(0)[:8]
    torch.testing.assert_close(theirs[theirs > 0][: len(levels)], levels, rtol=1e-3, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@predictions
def test_stock_ddim_pipeline_matches_our_sampler_at_its_noise_levels(
    tmp_path: Path, settings: dict[str, Any], eta: float
) -> None:
    model, exported_pipeline = exported(write_model(tmp_path, **settings))
    pipe = load(exported_pipeline, DDIMPipeline)
    generator = torch.Generator().manual_seed(SEED)
    theirs = pipe(COUNT, generator, eta, num_inference_steps=20, output_type="pt").images
    config = sampling_config(sampler="ddim", steps=20, eta=eta)
    assert_equal(theirs, ours(model, config, whole(model, pipe.scheduler, 20), from_generator(model)))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", None])
def test_stock_ddpm_pipeline_matches_our_sampler_at_every_noise_level(tmp_path: Path, variance: Any) -> None:
    weights = write_model(
        tmp_path, channels=3, steps=40, variance="fixed" if variance else "learned_range", **SCHEDULES["noise"]
    )
    every_level = {"sampler": "ddpm", "steps": 40, "sigma_max": None, "sigma_min": None, "variance": variance}
    model, exported_pipeline = exported(weights, **every_level)
    assert exported_pipeline.pipeline == "DDPMPipeline"
    pipe = load(exported_pipeline, DiffusionPipeline)
    assert isinstance(pipe, DDPMPipeline)
    generator = torch.Generator().manual_seed(SEED)
    theirs = pipe(COUNT, generator, num_inference_steps=40, output_type="pt").images
    expected = ours(model, SAMPLING_ADAPTER.validate_python(every_level), noise=from_generator(model))
    assert_equal(theirs, expected)
    again = torch.Generator().manual_seed(SEED)
    assert_equal(load(exported_pipeline)(batch_size=COUNT, generator=again, output_type="pt").images, expected)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_diffusers_finds_the_pipeline_of_an_unconditional_model(tmp_path: Path, sampler: Any) -> None:
    _, exported_pipeline = exported(write_model(tmp_path), sampler=sampler)
    pipe = load(exported_pipeline, DiffusionPipeline)
    assert type(pipe).__name__ == exported_pipeline.pipeline
    assert pipe(batch_size=2, num_inference_steps=5, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_the_lines_of_the_readme_run_in_a_new_process(tmp_path: Path) -> None:
    _, exported_pipeline = exported(write_model(tmp_path))
    own, stock = re.findall(r"```python\n(.*?)```", (exported_pipeline.folder / "README.md").read_text(), re.DOTALL)
    assert "DiffusionPipeline.from_pretrained" in stock
    script = "".join(f"{lines}print(type(pipe).__name__)\n" for lines in (stock, own))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == [exported_pipeline.pipeline, "DarkroomPipeline"], process.stderr[-2000:]


@pytest.mark.parametrize("settings", [{"classes": CLASSES}, {"sampler": "unipc"}], ids=str)
def test_where_diffusers_has_no_pipeline_its_error_says_what_to_load(tmp_path: Path, settings: dict[str, Any]) -> None:
    sampling = {name: settings.pop(name) for name in ("sampler",) if name in settings}
    _, exported_pipeline = exported(write_model(tmp_path, **settings), **sampling)
    line = "from diffusion.diffusers_format import DarkroomPipeline"
    with pytest.raises(AttributeError, match=line):
        DiffusionPipeline.from_pretrained(exported_pipeline.folder)
    assert type(load(exported_pipeline)) is DarkroomPipeline
    assert line in (exported_pipeline.folder / "README.md").read_text()


def test_learned_variance_is_dropped_on_export_for_other_samplers(tmp_path: Path) -> None:
    model, exported_pipeline = exported(write_model(tmp_path, variance="learned_range"), sampler="dpmpp_2m")
    theirs = load(exported_pipeline)(batch_size=COUNT, seed=SEED, output_type="pt").images
    assert_equal(theirs, ours(model, sampling_config(sampler="dpmpp_2m", steps=8)))
    assert load(exported_pipeline, DDIMPipeline)(num_inference_steps=5, output_type="pt").images.shape == (1, 1, 8, 8)


def test_scheduler_from_config_samples_from_the_same_model(tmp_path: Path) -> None:
    model, exported_pipeline = exported(write_model(tmp_path))
    pipe = load(exported_pipeline)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(batch_size=COUNT, seed=SEED, num_inference_steps=20, eta=1.0, output_type="pt").images
    config = sampling_config(sampler="ddim", steps=20, eta=1.0)
    assert_equal(theirs, ours(model, config, whole(model, pipe.scheduler, 20)))


@pytest.mark.parametrize("labels", [(), ("dog",), ("cat", None, "dog")])
@pytest.mark.parametrize("guidance", [{}, {"guidance": 3.0, "guidance_interval": (0.2, 5.0), "guidance_rescale": 0.7}])
def test_exported_pipeline_takes_class_names_and_guidance(
    tmp_path: Path, labels: tuple[str | None, ...], guidance: dict[str, Any]
) -> None:
    model, exported_pipeline = exported(write_model(tmp_path, classes=CLASSES))
    arguments = {"guidance_scale" if name == "guidance" else name: value for name, value in guidance.items()}
    theirs = load(exported_pipeline)(batch_size=COUNT, seed=SEED, labels=labels, output_type="pt", **arguments).images
    config = SAMPLING_ADAPTER.validate_python({"steps": 8} | guidance)
    assert_equal(theirs, ours(model, config, conditions=Conditions(labels=labels)))
    none = ours(model, sampling_config(steps=8), conditions=Conditions(labels=(None,)))
    assert not torch.allclose(theirs, none, atol=1e-2)


def test_exported_pipeline_takes_prompts(tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    model, exported_pipeline = exported(write_model(tmp_path, channels=3, text=True), guidance=2.0)
    theirs = load(exported_pipeline)(COUNT, SEED, prompts="red square", negative_prompt="blue", output_type="pt").images
    conditions = Conditions(prompts=("red square",), negative_prompt="blue")
    assert_equal(theirs, ours(model, sampling_config(steps=8, guidance=2.0), conditions=conditions))
    assert set(fake_encoder.read) == {"red square", "blue"}


def test_exported_network_takes_text_and_tokens_together(tmp_path: Path) -> None:
    """With the vector alone it would attend to no caption."""
    _, exported_pipeline = exported(write_model(tmp_path, channels=3, text=True))
    network = load(exported_pipeline).unet
    prompt = {"text": torch.ones(1, 384), "tokens": torch.ones(1, 32, 384)}
    assert network(torch.zeros(1, 3, 8, 8), 5, **prompt).sample.shape == (1, 3, 8, 8)
    for name, value in prompt.items():
        with pytest.raises(ValueError, match="is missing"):
            network(torch.zeros(1, 3, 8, 8), 5, **{name: value})


def test_images_are_those_of_sample_to_one_level_of_grey(tmp_path: Path) -> None:
    model, exported_pipeline = exported(write_model(tmp_path))
    images = load(exported_pipeline)(batch_size=COUNT, seed=SEED).images
    config = sampling_config(steps=8, compute_batch=COUNT, precision="fp32")
    expected = sample(model, range(COUNT), SEED, config)[:, 0].int()
    theirs = torch.stack([torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in images]).int()
    assert {each.mode for each in images} == {"L"}
    assert (theirs.view_as(expected) - expected).abs().max() <= 1


def test_half_precision_weights_give_nearly_the_same_images(tmp_path: Path) -> None:
    model, exported_pipeline = exported(write_model(tmp_path), sampler="dpmpp_2m")
    half = load(exported_pipeline).to(torch.bfloat16)
    theirs = half(batch_size=COUNT, seed=SEED, output_type="pt").images
    torch.testing.assert_close(theirs, ours(model, sampling_config(sampler="dpmpp_2m", steps=8)), atol=0.1, rtol=0)
    stock = load(exported_pipeline, DDIMPipeline).to(torch.bfloat16)
    assert stock(num_inference_steps=5, output_type="pt").images.dtype == torch.bfloat16


def test_a_pipeline_saved_again_is_the_same(tmp_path: Path) -> None:
    _, exported_pipeline = exported(write_model(tmp_path))
    pipe = load(exported_pipeline)
    pipe.save_pretrained(tmp_path / "again")
    again = DarkroomPipeline.from_pretrained(tmp_path / "again")
    one, other = (each(seed=SEED, output_type="pt").images for each in (pipe, again))
    assert torch.equal(one, other)


def test_exported_folder_contains_no_pickle_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, exported_pipeline = exported(write_model(tmp_path))
    assert {Path(name).suffix for name in exported_pipeline.files} == {".json", ".safetensors", ".md"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert load(exported_pipeline, DDPMPipeline)(num_inference_steps=4, output_type="pt").images.isfinite().all()


def test_exported_readme_runs_and_names_the_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_model(tmp_path)
    exported_pipeline = export_to_diffusers(
        weights, tmp_path / "folder", sampling_config(steps=4), "models:/blobs/3", "run-0815"
    )
    text = (exported_pipeline.folder / "README.md").read_text()
    for name in (
        "models:/blobs/3",
        "run-0815",
        load_model(weights).header.content_digest,
        exported_pipeline.weights_sha256,
    ):
        assert name in text
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        names: dict[str, Any] = {}
        exec(example, names)
        assert names["pipe"].unet.dtype == torch.float32


def test_repeated_export_changes_nothing_and_a_different_one_fails(tmp_path: Path) -> None:
    weights = write_model(tmp_path)
    _, exported_pipeline = exported(weights)
    before = {path: path.stat().st_mtime_ns for path in exported_pipeline.folder.rglob("*")}
    assert exported(weights)[1] == exported_pipeline
    with pytest.raises(UserError, match="is there and differs"):
        exported(weights, steps=9)
    assert {path: path.stat().st_mtime_ns for path in exported_pipeline.folder.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"final.safetensors", "folder"}


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_model(tmp_path)

    def full(_: Path) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(diffusion.diffusers_format.export, "sync_folder", full)
        with pytest.raises(OSError, match="no space"):
            exported(weights)
    assert not (tmp_path / "folder").exists()
    assert load(exported(weights)[1])(seed=SEED).images


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"sampler": "euler", "churn": {"amount": 5.0}}, "keep no sampling.churn"),
        ({"eta": 0.5}, "not with sampling.eta = 0.5"),
        ({"sampler": "ddim", "steps": 1001}, "of which there are 1000"),
        ({"guidance": 3.0}, "trained without classes and captions"),
        ({"low_resolution_noise": 0.1}, "the model is given none"),
    ],
)
def test_sampling_settings_unknown_to_diffusers_are_not_exported(
    tmp_path: Path, sampling: dict[str, Any], words: str
) -> None:
    weights = write_model(tmp_path)
    with pytest.raises(UserError, match=words):
        exported(weights, **sampling)
    assert [path.name for path in tmp_path.iterdir()] == ["final.safetensors"]


def test_super_resolution_models_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a model with model\.low_resolution has no counterpart"):
        exported(write_model(tmp_path, low_resolution=4, conditional=False))


def test_missing_diffusers_gives_a_one_line_install_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_model(tmp_path)
    for name in [name for name in sys.modules if name.startswith("diffusion.diffusers_format")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(diffusion, "diffusers_format")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[diffusers\]'"):
        exported(weights)


def test_exported_pipeline_rejects_options_without_effect(tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    _, exported_pipeline = exported(write_model(tmp_path, classes=CLASSES))
    pipe = load(exported_pipeline)
    with pytest.raises(UserError, match="no class 'bird'"):
        pipe(labels="bird")
    with pytest.raises(UserError, match="without captions"):
        pipe(prompts="a bird")
    with pytest.raises(UserError, match="eta means nothing to DPMSolver"):
        pipe(eta=0.5)
    with pytest.raises(UserError, match=r"guidance_rescale means nothing to sampling.guidance = null"):
        pipe(guidance_rescale=0.7)
    with pytest.raises(UserError, match=r"sampling\.steps: Input should be greater than or equal to 2"):
        pipe(num_inference_steps=1)
    with pytest.raises(UserError, match="batch_size = 0: ask for one image or more"):
        pipe(batch_size=0)
    config = pipe.scheduler.config
    for scheduler, words in (
        (diffusers.DDPMScheduler.from_config(config), "from a generator"),
        (diffusers.DDPMScheduler.from_config(config, variance_type="learned_range"), "learned by one network"),
        (diffusers.DDIMScheduler.from_config(config, prediction_type="epsilon"), "another prediction"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "another prediction or noise schedule"),
        (diffusers.PNDMScheduler.from_config(config), "takes other steps"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(UserError, match=words):
            pipe()


def test_exported_pipeline_guides_as_evaluation_chose_unless_overridden(tmp_path: Path) -> None:
    checkpoint, weights = write_model(tmp_path, classes=CLASSES), tmp_path / "weights.safetensors"
    guided = sampling_config(steps=8, sampler="dpmpp_2m", guidance=3, guidance_interval=(0.2, 5))
    export(checkpoint, weights, guided)
    model, exported_pipeline = exported(weights, sampler="dpmpp_2m")
    pipe = load(exported_pipeline)
    assert_equal(pipe(batch_size=COUNT, seed=SEED, output_type="pt").images, ours(model, guided))
    unguided = pipe(batch_size=COUNT, seed=SEED, output_type="pt", guidance_scale=1).images
    assert_equal(unguided, ours(model, guided.without_guidance()))
    assert "guidance 3 at σ from 0.2 to 5" in (exported_pipeline.folder / "README.md").read_text()


def test_exported_pipeline_has_the_guide_that_autoguidance_leads_away_from(tmp_path: Path) -> None:
    weights, guided = tmp_path / "weights.safetensors", sampling_config(steps=8, sampler="dpmpp_2m", autoguidance=2)
    export(small_models.write_model(tmp_path / "trained.safetensors", 0, 100, guide=1), weights, guided)
    model, exported_pipeline = exported(weights, sampler="dpmpp_2m")
    assert exported_pipeline.pipeline == "DarkroomPipeline"
    pipe = load(exported_pipeline)
    assert_equal(pipe(batch_size=COUNT, seed=SEED, output_type="pt").images, ours(model, guided))
    unguided = pipe(batch_size=COUNT, seed=SEED, output_type="pt", guidance_scale=1).images
    assert_equal(unguided, ours(model, guided.with_changes({"autoguidance": None})))
    (tmp_path / "folder").rename(tmp_path / "guided")
    _, without = exported(weights, sampler="dpmpp_2m", autoguidance=1)
    assert load(without).unet.guide is None
