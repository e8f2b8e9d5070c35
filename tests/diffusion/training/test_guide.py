"""The guide: averaged weights from early in a training, in the model's file, away from which autoguidance leads."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import AVERAGED, GUIDE, load_model, read_model_header, read_tensors
from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.common.shapes import Images
from diffusion.families.config import DiffusersConfig, effective_sampling, sampling_conflict
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.generation.config import make_request
from diffusion.generation.generate import sample
from diffusion.generation.requests import answer, sampling_of
from diffusion.process.samplers import SamplingConfig, sampling_config
from diffusion.training.config import DistillationConfig, TrainingConfig, student_training
from diffusion.training.ema import reconstruct_average
from diffusion.training.train import TrainResult, train
from tests.builders.small_models import write_lora, write_model
from tests.builders.training_runs import CONFIG, MODEL, Stop, StopAt, run

SAMPLING = sampling_config(steps=4, compute_batch=8, precision="fp32")


def changed(**options: object) -> TrainingConfig:
    return TrainingConfig.model_validate(CONFIG.model_dump() | options)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def trained(dataset: Path, tmp_path: Path) -> TrainResult:
    """Of four checkpoints after 80 images each, all of which are kept."""
    return run(dataset, tmp_path / "run", changed(keep=9))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_guide_has_the_averaged_weights_of_its_share_of_training(dataset: Path, tmp_path: Path, share: float) -> None:
    result = run(dataset, tmp_path / "run", changed(guide=share, keep=9))
    then = tmp_path / "run" / "checkpoints" / f"{int(320 * share):010d}.safetensors"
    assert equal(read_tensors(result.final, GUIDE), read_tensors(then, AVERAGED))
    assert not equal(read_tensors(result.final, GUIDE), read_tensors(result.final, AVERAGED))
    assert read_model_header(result.final).guide_images == 320 * share
    # Until then it is the model itself.
    assert equal(read_tensors(then, GUIDE), read_tensors(then, AVERAGED))
    first = read_model_header(tmp_path / "run" / "checkpoints" / "0000000000.safetensors")
    assert first.guide_images == 0


@pytest.mark.slow
@pytest.mark.parametrize("stop", [48, 80, 240])
def test_run_stopped_before_or_after_keeps_the_same_guide(
    dataset: Path, tmp_path: Path, trained: TrainResult, stop: int
) -> None:
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", changed(keep=9), track=lambda _: StopAt(stop))
    assert run(dataset, tmp_path / "cut", changed(keep=9)).final.read_bytes() == trained.final.read_bytes()


def test_a_training_that_begins_with_a_model_keeps_its_guide(
    dataset: Path, tmp_path: Path, trained: TrainResult
) -> None:
    warm = run(dataset, tmp_path / "warm", changed(init_from=str(trained.final), images=96))
    assert equal(read_tensors(warm.final, GUIDE), read_tensors(trained.final, GUIDE))
    assert read_model_header(warm.final).guide_images == 80
    # A model with another guide is another start.
    plain = run(dataset, tmp_path / "plain", changed(guide=None))
    assert equal(read_tensors(plain.final, AVERAGED), read_tensors(trained.final, AVERAGED))
    other = run(dataset, tmp_path / "other", changed(init_from=str(plain.final), images=96))
    assert other.train_key != warm.train_key
    assert read_model_header(other.final).guide_images == 32  # of 96, in batches of 16


def test_without_a_guide_there_is_none_in_the_file(dataset: Path, tmp_path: Path) -> None:
    result = run(dataset, tmp_path / "run", changed(guide=None))
    assert not read_tensors(result.final, GUIDE)
    assert read_model_header(result.final).guide_images is None
    assert load_model(result.final).guide is None


def test_post_hoc_averages_have_the_guide_of_the_run(dataset: Path, tmp_path: Path) -> None:
    result = run(dataset, tmp_path / "run", changed(ema_stds=(0.05, 0.1)))
    average = reconstruct_average(tmp_path / "run" / "averages", 0.07, tmp_path / "averages")
    assert equal(read_tensors(average, GUIDE), read_tensors(result.final, GUIDE))
    assert load_model(average).guide is not None


def model_of(folder: Path, guide: int | None = 1, classes: dict[str, int] | None = None) -> DiffusionModel:
    model = load_model(write_model(folder / f"{guide}.safetensors", 0, 100, classes=classes, guide=guide))
    assert isinstance(model, DiffusionModel)
    return model


def generated(model: DiffusionModel, sampling: SamplingConfig) -> Images:
    return sample(model, range(5), 3, sampling)


def test_autoguidance_leads_from_the_guides_estimate_through_the_models(tmp_path: Path) -> None:
    """DDIM of D_1 + w (D_0 − D_1) (arXiv 2406.02507, equation 3), by the denoisers of two plain models."""
    model, guide = model_of(tmp_path), load_model(write_model(tmp_path / "other.safetensors", 1, 25))
    assert isinstance(guide, DiffusionModel)
    strong, weak = (replace(each.denoiser(), clip=False) for each in (model, guide))
    config = sampling_config(sampler="ddim", steps=6, autoguidance=2.5, compute_batch=5, precision="fp32")
    sigmas = config.sigma_grid(model.schedule)
    x = float(sigmas[0]) * GaussianNoise(3, "sampling", range(5), model.noise_shape)()
    with torch.inference_mode():
        for sigma, following in pairwise(sigmas):
            x0 = (weak(x, sigma) + 2.5 * (strong(x, sigma) - weak(x, sigma))).clamp(-1, 1)
            x = x0 + float(following / sigma) * (x - x0)
    images = generated(model, config)
    assert isinstance(images, Tensor)
    assert (images - ((x.clamp(-1, 1) + 1) * 127.5).round()).abs().max() <= 1


def test_a_guide_with_the_models_own_weights_changes_nothing(tmp_path: Path) -> None:
    same, plain = model_of(tmp_path, guide=0), generated(model_of(tmp_path, guide=None), SAMPLING)
    assert torch.equal(generated(same, SAMPLING.with_changes({"autoguidance": 3})), plain)
    other = model_of(tmp_path)
    assert torch.equal(generated(other, SAMPLING.with_changes({"autoguidance": 1})), plain)
    assert not torch.equal(generated(other, SAMPLING.with_changes({"autoguidance": 3})), plain)


def test_autoguidance_that_was_chosen_applies_unless_a_user_guides(tmp_path: Path) -> None:
    about = model_of(tmp_path, classes={"a": 1, "b": 1}).header.model_copy(update={"autoguidance": 2.0})
    assert about.sampling(SAMPLING) == SAMPLING.with_changes({"autoguidance": 2})
    # It needs neither class nor prompt.
    assert about.sampling(SAMPLING, conditional=False) == SAMPLING.with_changes({"autoguidance": 2})
    for own in ({"guidance": 3}, {"guidance": 1}, {"autoguidance": 1}, {"autoguidance": 1.5}):
        assert about.sampling(SAMPLING.with_changes(own)) == SAMPLING.with_changes(own)


def test_a_request_with_guidance_has_no_autoguidance_besides(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", 0, 100, classes={"a": 1, "b": 1}, guide=1)
    model = load_model(path)
    sampling = SAMPLING.with_changes({"autoguidance": 2})
    [images] = answer(model, [make_request({"task": "sample", "seed": 3, "count": 5})], sampling)
    assert torch.equal(images, sample(model, range(5), 3, sampling))
    request = make_request({"task": "sample", "guidance": 3})
    assert sampling_of(model, request, sampling) == SAMPLING.with_changes({"guidance": 3})


def test_autoguidance_of_a_model_without_a_guide_is_rejected(tmp_path: Path) -> None:
    request, guided = make_request({"task": "sample"}), SAMPLING.with_changes({"autoguidance": 2})
    with pytest.raises(UserError, match=r"training\.guide"):
        sampling_of(model_of(tmp_path, guide=None), request, guided)
    # That of its base knows nothing of what an adapter learned.
    base = write_model(tmp_path / "base.safetensors", 0, 100, guide=1)
    with pytest.raises(UserError, match=r"training\.guide.*none: leave it out"):
        sampling_of(load_model(write_lora(tmp_path / "lora.safetensors", base, 2)), request, guided)
    with pytest.raises(UserError, match="leave one out"):
        guided.with_changes({"guidance": 2})


def test_training_and_distillation_with_autoguidance_and_no_guide_are_rejected(dataset: Path, tmp_path: Path) -> None:
    guided = SAMPLING.with_changes({"autoguidance": 2})
    with pytest.raises(UserError, match=r"training\.guide"):
        train(dataset, tmp_path / "run", MODEL, changed(guide=None), guided)
    teacher = run(dataset, tmp_path / "teacher", changed(guide=None, images=32)).final
    student = student_training(CONFIG, DistillationConfig(images=32), guided, str(teacher), read_model_header(teacher))
    with pytest.raises(UserError, match=r"training\.guide"):
        train(dataset, tmp_path / "student", MODEL, student, guided)


def test_models_for_super_resolution_have_no_guide(dataset: Path, tmp_path: Path) -> None:
    enlarging = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    result = train(dataset, tmp_path / "run", enlarging, changed(images=32), SAMPLING)
    assert not read_tensors(result.final, GUIDE)
    with pytest.raises(UserError, match=r"training\.guide.*none: leave"):
        train(dataset, tmp_path / "guided", enlarging, changed(images=32), SAMPLING.with_changes({"autoguidance": 2}))


def test_sample_grids_of_a_training_are_guided(dataset: Path, tmp_path: Path) -> None:
    for name, sampling in (("plain", SAMPLING), ("guided", SAMPLING.with_changes({"autoguidance": 3}))):
        train(dataset, tmp_path / name, MODEL, changed(), sampling)
    last = "samples/0000000320.png"
    assert (tmp_path / "plain" / last).read_bytes() != (tmp_path / "guided" / last).read_bytes()
    ends = [(tmp_path / name / "final.safetensors").read_bytes() for name in ("plain", "guided")]
    assert ends[0] == ends[1]


def test_pipelines_of_diffusers_are_sampled_without_autoguidance() -> None:
    guided = SAMPLING.with_changes({"autoguidance": 2})
    assert effective_sampling(DiffusersConfig(), guided) == SAMPLING
    assert effective_sampling(MODEL, guided) == guided
    assert "sampling.autoguidance" in (sampling_conflict(DiffusersConfig(), guided) or "")
