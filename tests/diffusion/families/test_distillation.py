"""Students of few evaluations: consistency sampling in closed form, and distillation as a training of its own."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes, to_pil_image
from diffusion.data.dataset import Dataset
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.families.config import ModelConfig, training_conflict
from diffusion.families.ddpm.distillation import ConsistencyObjective
from diffusion.families.diffusion_model import DiffusionModel, count_evaluations
from diffusion.families.model import to_float
from diffusion.generation.config import make_request
from diffusion.generation.generate import sample
from diffusion.generation.requests import answer, sampling_of
from diffusion.process.config import StudentConfig
from diffusion.process.samplers import sampling_config, with_sampler
from diffusion.process.samplers.consistency import last_level
from diffusion.process.schedules import edm_schedule, make_schedule
from diffusion.training.config import DistillationConfig, TrainingConfig, student_training
from diffusion.training.train import TrainResult, train
from flows.config import Params
from tests.builders.sampler_options import noises
from tests.builders.small_autoencoders import autoencoder, colours, denoiser
from tests.builders.small_datasets import write_dataset
from tests.builders.small_models import write_model
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt

STEPS = 2


@pytest.fixture
def teacher(dataset: Path, tmp_path: Path) -> Path:
    return train(dataset, tmp_path / "teacher", MODEL, CONFIG.model_copy(update={"images": 160}), SAMPLING).final


def distilled(dataset: Path, output: Path, teacher: Path, images: int = 320, **options: object) -> TrainResult:
    config = DistillationConfig(steps=STEPS, images=images)
    training = student_training(CONFIG, config, SAMPLING, str(teacher), read_model_header(teacher))
    return train(dataset, output, MODEL, training, SAMPLING, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_of_gaussian_data_is_exact_in_any_steps(steps: int) -> None:
    """From N(0, s²) data the ODE leads from x at σ to x s/√(σ² + s²)."""
    spread, config = 0.5, sampling_config(sampler="consistency", steps=steps)
    sigmas, noise = config.sigma_grid(edm_schedule(1000)), noises(0, 4000)
    observations = []

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        observations.append(float(sigma))
        return x * spread / float((sigma**2 + spread**2).sqrt())

    images = config.run(exact, sigmas, noise)
    assert len(observations) == steps
    assert observations == sorted(observations, reverse=True)
    # The start, σ ε, lacks the data's own variance.
    assert images.std().item() == pytest.approx(spread, rel=0.02)
    assert images.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_evaluations_that_land_on_the_last_level_need_no_new_noise(steps: int) -> None:
    """Of N(0, s²) data the function that leads from σ to the last level, and from there to the image, is known."""
    spread, config = 0.5, sampling_config(sampler="consistency", steps=steps, eta=0)
    sigmas, samples = config.sigma_grid(edm_schedule(1000)), [noises(0, 4000)()]
    start, landing = samples[0] * float(sigmas[0]), sigmas[-2]
    assert landing == pytest.approx(last_level(28 * 28))

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        end = landing if sigma > landing else torch.zeros(())
        landed = x * float(((end**2 + spread**2) / (sigma**2 + spread**2)).sqrt())
        return (landed - float(end / sigma) * x) / (1 - float(end / sigma))

    images = config.run(exact, sigmas, samples.pop)
    assert not samples
    if steps == 2:  # more evaluations go on to levels above the last one, along straight lines
        expected = start * spread / math.sqrt(float(sigmas[0]) ** 2 + spread**2)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("steps", "last"), [(2, 1.6), (3, 4 / 3), (4, 1), (8, 0.5)])
def test_levels_of_a_student_fall_by_equal_factors(steps: int, last: float) -> None:
    levels = sampling_config(sampler="consistency", steps=steps).sigma_grid(edm_schedule(1000)).tolist()
    assert len(levels) == steps + 1
    assert levels[-2:] == [pytest.approx(last), 0]
    assert [above / below for above, below in pairwise(levels[:-1])] == pytest.approx(
        [(levels[0] / last) ** (1 / (steps - 1))] * (steps - 1)
    )


@pytest.mark.long
@pytest.mark.slow
def test_student_separates_two_tones_where_its_teacher_does_not(tmp_path: Path) -> None:
    """From noise the best estimate is their mean, and a step to the lowest level leaves the teacher there."""
    random = np.random.default_rng(0)
    tones = random.permutation(np.repeat([40, 215], 100))[:, None, None, None]
    write_dataset(tmp_path / "tones", (tones + random.integers(-9, 10, (200, 1, 8, 8))).astype(np.uint8), 100)
    config = CONFIG.model_copy(update={"images": 9600, "flip": False, "learning_rate": 1e-2})
    teacher = train(tmp_path / "tones", tmp_path / "teacher", MODEL, config, SAMPLING).final
    student = distilled(tmp_path / "tones", tmp_path / "student", teacher, 6400).final

    def apart(path: Path, **options: object) -> float:
        """Share of images whose mean is within 25 of a tone."""
        model = load_model(path)
        config = model.header.sampling(sampling_config(compute_batch=36, **options))
        assert isinstance(model, DiffusionModel)
        assert count_evaluations(config, model.schedule) == STEPS
        means = sample(model, range(144), 0, config).float().mean((1, 2, 3))
        return ((means - torch.tensor([[40], [215]])).abs().amin(0) < 25).float().mean().item()

    assert apart(student) > 0.8
    assert apart(teacher, sampler="ddim", steps=STEPS) < 0.65


@pytest.mark.slow
def test_stopped_distillation_resumes_bit_for_bit(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    whole = distilled(dataset, tmp_path / "whole", teacher)
    with pytest.raises(Stop):
        distilled(dataset, tmp_path / "cut", teacher, track=lambda _: StopAt(160))
    assert distilled(dataset, tmp_path / "cut", teacher).final.read_bytes() == whole.final.read_bytes()


def test_student_samples_as_distilled_unless_a_request_says_otherwise(
    dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    model = load_model(distilled(dataset, tmp_path / "student", teacher, 32).final)
    configured = sampling_config(steps=16, guidance=3, compute_batch=8)
    sampling = sampling_of(model, make_request({"task": "sample"}), configured)
    assert (sampling.sampler, sampling.steps, sampling.guidance, sampling.compute_batch) == (
        "consistency",
        STEPS,
        None,
        8,
    )
    more = sampling_of(model, make_request({"task": "sample", "steps": 4}), configured)
    assert (more.steps, more.model_dump()["eta"], sampling.model_dump()["eta"]) == (4, 0, 0)
    of_new_noise = sampling_config(sampler="consistency", eta=1)
    assert sampling_of(model, make_request({"task": "sample"}), of_new_noise).model_dump()["eta"] == 1
    with pytest.raises(UserError):
        sampling_of(load_model(teacher), make_request({"task": "sample"}), sampling_config(sampler="consistency"))


def test_students_edit_an_image_the_more_the_greater_the_strength(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    model = load_model(distilled(dataset, tmp_path / "student", teacher, 32).final)
    source_images = Dataset.open(dataset).images(np.arange(1))
    image = png_bytes(to_pil_image(source_images[0]))
    changes = []
    for strength in (0.2, 0.5, 0.9):
        request = make_request({"task": "img2img", "image": image, "strength": strength, "count": 8})
        [images] = answer(model, [request], SAMPLING)
        changes.append((images.float() - source_images.float()).square().mean().item())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_a_student_is_not_taken_beyond_black_and_white(dataset: Path, teacher: Path) -> None:
    """Targets are its own estimates, so that each would take the next one further."""
    cases = [
        (-1.2, -1.5, 0), (-1.5, -1.2, 0), (-0.8, -1.5, 0.2), (-1.2, -0.8, 0.4),
        (0.3, 0.4, 0.1), (0.8, 1.5, 0.2), (1.2, 1.5, 0),
    ]  # fmt: skip
    estimates, targets, apart = torch.tensor(cases, dtype=torch.float64).T
    model = load_model(teacher)
    assert isinstance(model, DiffusionModel)
    header = model.header.model_copy(update={"model": MODEL.model_copy(update={"prediction": "sample"})})
    config = CONFIG.model_copy(update={"student": StudentConfig(steps=STEPS)})
    objective = ConsistencyObjective(config, replace(model, header=header), header, 320)
    batch = objective.make_batch(to_float(Dataset.open(dataset).images(np.arange(len(cases)))), range(len(cases)), {})
    sigma = batch.random["sigma"]

    class Given(nn.Module):
        """Predicts the estimates at the higher noise levels, and the targets at the lower ones."""

        def forward(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
            values = estimates if torch.equal(t, model.schedule.time(sigma)) else targets
            return values.float()[:, None, None, None].expand_as(x)

    losses = objective.losses(Given(), batch).double()
    expected = ((apart**2 + 1e-6).sqrt() - 1e-3) * (1 / sigma + 1 / header.sigma_data)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)
    assert losses[apart == 0].max().item() == 0


def test_the_target_of_a_student_that_lands_is_a_mixture_with_the_image(teacher: Path) -> None:
    """An error of 0.1 at the lower level counts the less the nearer that is to where the student lands."""
    model = load_model(teacher)
    assert isinstance(model, DiffusionModel)
    header = model.header.model_copy(update={"model": MODEL.model_copy(update={"prediction": "sample"})})
    config = CONFIG.model_copy(update={"student": StudentConfig(steps=STEPS, landing=1.6)})
    objective = ConsistencyObjective(config, replace(model, header=header), header, 320)
    x0 = torch.full((64, *model.noise_shape), 0.3)
    batch = objective.make_batch(x0, range(64), {})
    sigma, lower = batch.random["sigma"], batch.random["lower"]
    assert (lower[sigma > 1.6] >= 1.6).all()
    assert (lower < sigma).all()
    off = torch.where(sigma > 1.6, (1 - 1.6 / lower) / (1 - 1.6 / sigma), torch.ones(()))

    class Given(nn.Module):
        """Is right at the higher levels, and wrong by 0.1 at the lower ones."""

        def forward(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
            return torch.full_like(x, 0.3 if torch.equal(t, model.schedule.time(sigma)) else 0.4)

    losses = objective.losses(Given(), batch).double()
    expected = (((0.1 * off) ** 2 + 1e-6).sqrt() - 1e-3) * (1 / sigma + 1 / header.sigma_data)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)


def test_each_weight_of_a_student_has_a_gradient_in_bfloat16(dataset: Path, teacher: Path) -> None:
    model = load_model(teacher)
    assert isinstance(model, DiffusionModel)
    config = CONFIG.model_copy(update={"student": StudentConfig(steps=STEPS)})
    objective = ConsistencyObjective(config, model, model.header, 320)
    batch = objective.make_batch(to_float(Dataset.open(dataset).images(np.arange(4))), range(4), {})
    student = copy.deepcopy(model.network).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        objective.losses(student, batch).sum().backward()
    assert [name for name, weight in student.named_parameters() if weight.grad is None] == []


def test_guidance_of_the_teacher_is_part_of_the_distillation(dataset: Path, teacher: Path) -> None:
    config, header = DistillationConfig(), read_model_header(teacher)
    guided_header = header.model_copy(update={"guidance": 2.0, "guidance_interval": (0.2, 5.0)})
    student = student_training(CONFIG, config, sampling_config(), str(teacher), guided_header).student
    assert student is not None
    assert (student.guidance, student.guidance_interval) == (2, (0.2, 5))
    set_by_user = student_training(CONFIG, config, sampling_config(guidance=1), str(teacher), guided_header).student
    assert set_by_user is not None
    assert set_by_user.guidance is None
    by_guide = header.model_copy(update={"autoguidance": 2.0})
    student = student_training(CONFIG, config, sampling_config(), str(teacher), by_guide).student
    assert student is not None
    assert (student.guidance, student.autoguidance) == (None, 2)
    guided = sampling_config(guidance=3, autoguidance=1)
    student = student_training(CONFIG, config, guided, str(teacher), by_guide).student
    assert student is not None
    assert (student.guidance, student.autoguidance) == (3, None)


def test_requested_guidance_drops_the_interval_chosen_for_another_scale(teacher: Path) -> None:
    model = load_model(teacher)
    model = replace(model, header=model.header.model_copy(update={"guidance": 2.0, "guidance_interval": (0.2, 5.0)}))
    sampling = sampling_of(model, make_request({"label": model.classes[0]}), SAMPLING)
    assert (sampling.guidance, sampling.guidance_interval) == (2, (0.2, 5))
    requested = sampling_of(model, make_request({"label": model.classes[0], "guidance": 3}), SAMPLING)
    assert (requested.guidance, requested.guidance_interval) == (3, None)


def test_student_has_a_folder_beside_that_of_its_teacher() -> None:
    params = Params.model_validate({"training": {"output": "runs/mine", "images": 100}})
    student = TrainingConfig(images=100, init_from="x", output=Path("runs/mine"), student=StudentConfig(steps=2))
    assert params.run_folder == Path("runs/mine")
    assert params.model_copy(update={"training": student}).run_folder == Path("runs/mine-student")


@pytest.mark.parametrize("guidance", [{"guidance": 2}, {"autoguidance": 2}], ids=str)
def test_guided_distillation_has_other_weights(
    dataset: Path, teacher: Path, tmp_path: Path, guidance: dict[str, float]
) -> None:
    plain = distilled(dataset, tmp_path / "plain", teacher, 32)
    config = sampling_config(**guidance)
    training = student_training(CONFIG, DistillationConfig(images=32), config, str(teacher), read_model_header(teacher))
    guided = train(dataset, tmp_path / "guided", MODEL, training, config)
    assert guided.train_key != plain.train_key
    assert guided.final.read_bytes() != plain.final.read_bytes()


@pytest.mark.slow
def test_latent_models_are_distilled(tmp_path: Path) -> None:
    data = colours(tmp_path / "colours")
    vae = autoencoder(data, tmp_path / "vae").final
    teacher = train(data, tmp_path / "teacher", denoiser(vae), CONFIG, SAMPLING).final
    config, header = DistillationConfig(images=32), read_model_header(teacher)
    training = student_training(CONFIG, config, SAMPLING, str(teacher), header)
    student = train(data, tmp_path / "student", denoiser(vae), training, SAMPLING).final
    model = load_model(student)
    assert isinstance(model, DiffusionModel)
    assert model.latents is not None
    images = sample(model, range(3), 0, model.header.sampling(SAMPLING))
    assert images.shape == (3, 3, 16, 16)


def test_what_cannot_be_distilled_or_exported_is_rejected(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    student = distilled(dataset, tmp_path / "student", teacher, 32).final
    with pytest.raises(UserError, match="student"):
        distilled(dataset, tmp_path / "another", student)
    with pytest.raises(UserError, match="teacher"):
        export_to_diffusers(student, tmp_path / "export", SAMPLING)
    with pytest.raises(ValidationError):
        TrainingConfig(images=100, student={"steps": 2})  # type: ignore[arg-type]
    training = CONFIG.model_copy(update={"student": {"steps": 2}})
    assert training_conflict(MODEL.model_copy(update={"prediction": "sample"}), training) is not None


def test_teacher_of_another_network_is_an_error_naming_it(dataset: Path, tmp_path: Path) -> None:
    config = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    teacher = write_model(tmp_path / "teacher.safetensors", 0, 0, config=config)
    with pytest.raises(UserError, match=r"^distillation\.teacher .*--set model\.low_resolution=4") as raised:
        distilled(dataset, tmp_path / "student", teacher)
    assert "init_from" not in str(raised.value)


def test_one_step_students_begin_at_a_level_of_their_schedule() -> None:
    for model in (ModelConfig(), ModelConfig(schedule="linear", zero_terminal_snr=True, prediction="v_prediction")):
        schedule = make_schedule(model, (3, 64, 64))
        for sigma_max in ("auto", None, 4.0):
            config = sampling_config(sampler="consistency", steps=1, sigma_max=sigma_max)
            first, last = config.sigma_grid(schedule).tolist()
            assert last == 0
            assert first == pytest.approx(sigma_max if isinstance(sigma_max, float) else math.sqrt(3 * 64 * 64))


def test_consistency_sampling_has_defaults_of_its_own() -> None:
    params = Params.model_validate({"sampling": {"sampler": "consistency", "steps": 4}})
    assert params.sampling == sampling_config(sampler="consistency", steps=4)
    assert with_sampler(sampling_config(steps=16), "consistency") == sampling_config(sampler="consistency")
