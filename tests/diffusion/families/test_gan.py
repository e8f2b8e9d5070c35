"""Two networks against each other: penalties in closed form, exact resume of both, and no collapse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.evaluation.metrics.held_out_loss import measure_losses, summarize_losses
from diffusion.families.config import GANConfig
from diffusion.families.gan.model import GANModel, RelativisticObjective, gradient_penalties
from diffusion.families.gan.network import AUGMENTING, Discriminator, Generator, augment
from diffusion.families.model import TrainingBatch, to_uint8
from diffusion.generation.config import Conditions
from diffusion.generation.explain import explain
from diffusion.generation.generate import interpolate, sample
from diffusion.generation.requests import tasks_of
from diffusion.process.editing import Edit
from diffusion.training.checkpointing import Checkpoints
from diffusion.training.config import TrainingConfig
from diffusion.training.preflight import count_flops
from diffusion.training.train import TrainResult, train
from tests.builders.small_autoencoders import CONFIG, SAMPLING
from tests.builders.small_datasets import write_dataset
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import Stop, StopAt

SIZE = 8
MODEL = GANConfig(width=16, channel_mult=(1, 2), patch=2, latent=8, gamma=0.5)
TRAINING = CONFIG.model_copy(update={"learning_rate": 2e-3, "weight_decay": 0.0, "flip": False, "precision": "fp32"})


def quarters(folder: Path, count: int = 96) -> Path:
    """Dark images of which one quarter is bright: the upper ones are of one class, the lower ones of another."""
    random = np.random.default_rng(0)
    images = random.integers(20, 40, (count, 1, SIZE, SIZE)).astype(np.uint8)
    half, labels = SIZE // 2, []
    for number, image in enumerate(images):
        row, column = number % 4 // 2, number % 2
        image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 180
        labels.append(["upper", "lower"][row])
    write_dataset(folder, images, per_shard=32, labels=labels, held_out_every=5)
    return folder


def trained(data: Path, output: Path, config: TrainingConfig = TRAINING, **options: object) -> TrainResult:
    return train(data, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quarters(tmp_path_factory.mktemp("gan") / "data" / "quarters")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return trained(data, data.parents[1] / "run").output


@pytest.fixture(scope="module")
def model(run: Path) -> GANModel:
    loaded = load_model(run / "final.safetensors")
    assert isinstance(loaded, GANModel)
    return loaded


class Linear(nn.Module):
    """An discriminator whose every answer is known: w · x."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return x.flatten(1) @ self.weights


class Constant(nn.Module):
    """A generator that returns the noise itself, times a factor, at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.factor * z.reshape(len(z), 1, 2, 2)


def test_penalty_of_a_linear_discriminator_is_its_squared_weights() -> None:
    discriminator = Linear(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x = torch.randn(5, 1, 2, 2)
    penalty, steepness = gradient_penalties(discriminator, x)
    assert torch.equal(penalty, discriminator(x))
    assert torch.allclose(steepness, discriminator.weights.square().sum().expand(5))
    (gradient,) = torch.autograd.grad(steepness.mean(), discriminator.weights)
    assert torch.allclose(gradient, 2 * discriminator.weights)


def test_the_penalty_of_a_square_is_that_of_its_slope() -> None:
    x = torch.randn(6, 3, 4, 4)
    _, steepness = gradient_penalties(lambda each: each.square().flatten(1).sum(1), x)
    assert torch.allclose(steepness, 4 * x.square().flatten(1).sum(1))


def test_gan_losses_and_gradients_match_the_closed_form() -> None:
    weights, gamma = torch.tensor([0.3, -0.2, 0.5, 0.1]), 0.8
    discriminator, generator = Linear(weights), Constant()
    config = MODEL.model_copy(update={"latent": 4, "gamma": gamma, "augment": 0.0})
    objective = RelativisticObjective(config, 0, discriminator)  # type: ignore[arg-type]
    x, noise = torch.randn(5, 1, 2, 2), torch.randn(5, 8, 1, 1)
    batch = TrainingBatch(x, {}, {"noise": noise, "augment": torch.rand(5, AUGMENTING)})
    own_noise, other_noise = noise[:, 4:].flatten(1), noise[:, :4].flatten(1)

    losses = objective.losses(generator, batch)
    ahead = (x.flatten(1) - 0.7 * own_noise) @ weights
    assert torch.allclose(losses, functional.softplus(ahead))
    (gradient,) = torch.autograd.grad(losses.sum(), generator.factor)
    # With a tolerance for terms that cancel.
    assert torch.allclose(gradient, -(ahead.sigmoid() * (own_noise @ weights)).sum(), atol=1e-5)

    opposing = objective.discriminator_losses(generator, batch)
    behind = 0.7 * other_noise - x.flatten(1)
    assert torch.allclose(opposing, functional.softplus(behind @ weights) + gamma * weights.square().sum())
    (gradient,) = torch.autograd.grad(opposing.sum(), discriminator.weights)
    expected = (behind * (behind @ weights).sigmoid()[:, None]).sum(0) + 5 * 2 * gamma * weights
    assert torch.allclose(gradient, expected, atol=1e-5)


def numbers(count: int, **values: float) -> Tensor:
    """Numbers that leave ``count`` images as they are at a rate of 0.5, but for ``values``, by name."""
    names = ["recolour", "translate", "cut", "brightness", "saturation", "contrast", "down", "right", "row", "column"]
    neutral = dict.fromkeys(names, 0.5) | values
    return torch.tensor([[neutral[name] for name in names]]).expand(count, -1)


def test_augmentations_do_what_their_numbers_say() -> None:
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(augment(x, torch.rand(3, AUGMENTING), 0.0), x, atol=1e-6)
    assert torch.allclose(augment(x, numbers(3), 0.5), x, atol=1e-6)
    assert torch.allclose(augment(x, numbers(3, recolour=0, brightness=0.75), 0.5), x + 0.25, atol=1e-6)
    grey = x.mean(1, keepdim=True).expand_as(x)
    assert torch.allclose(augment(x, numbers(3, recolour=0, saturation=0), 0.5), grey, atol=1e-6)
    twice = x.mean((1, 2, 3), keepdim=True) + 1.25 * (x - x.mean((1, 2, 3), keepdim=True))
    assert torch.allclose(augment(x, numbers(3, recolour=0, contrast=0.75), 0.5), twice, atol=1e-6)
    # A quarter of the range of 8/4 pixels to either side is one pixel.
    shifted_images = augment(x, numbers(3, translate=0, down=1.0, right=0.0), 0.5)
    rows, columns = torch.tensor([1, 2, 3, 4, 5, 6, 7, 7]), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    assert torch.allclose(shifted_images, x[:, :, rows][..., columns], atol=1e-6)
    cut = augment(x, numbers(3, cut=0, row=0.0, column=0.5), 0.5)
    assert (cut[:, :, :2, 3:6] == 0).all()
    assert torch.allclose(cut[:, :, 2:], x[:, :, 2:], atol=1e-6)


def test_augmentation_changes_its_rate_of_images_independently() -> None:
    random = torch.Generator().manual_seed(0)
    x, uniform = torch.rand(400, 1, 8, 8, generator=random), torch.rand(400, AUGMENTING, generator=random)
    augmented_images = augment(x, uniform, 0.3)
    assert torch.equal(augmented_images[17:18], augment(x[17:18], uniform[17:18], 0.3))
    changed_pixels = (augmented_images - x).abs().amax((1, 2, 3)) > 1e-4
    # A translation by nothing is one of 9, and a hole is always seen.
    assert changed_pixels.float().mean().item() == pytest.approx(1 - 0.7**3, abs=0.07)


def test_real_and_generated_images_have_the_same_augmentation() -> None:
    inputs: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
            inputs.append(x)
            return x.flatten(1).sum(1)

    objective = RelativisticObjective(MODEL.model_copy(update={"latent": 64, "augment": 1.0}), 3, Recorder())  # type: ignore[arg-type]
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = objective.make_batch(x, range(5), {})

    def same(noise: Tensor, label: Tensor | None) -> Tensor:
        return x.clone().requires_grad_()

    objective.losses(same, batch).sum().backward()  # type: ignore[arg-type]
    objective.discriminator_losses(same, batch)  # type: ignore[arg-type]
    expected = augment(x, batch.random["augment"], 1.0)
    assert (expected - x).abs().max() > 0.1
    for images in (inputs[0], inputs[1], *inputs[2].chunk(2)):
        assert torch.allclose(images, expected)
    assert torch.equal(objective.make_batch(x[3:], range(3, 5), {}).random["augment"], batch.random["augment"][3:])


@pytest.mark.parametrize("stop", [112, 320])
def test_stopped_gan_training_resumes_bit_for_bit(data: Path, run: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Stop):
        trained(data, tmp_path / "cut", track=lambda _: StopAt(stop))
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    trained(data, tmp_path / "cut")
    for name in ("final.safetensors", "samples/0000000320.png", "checkpoints/0000000320.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes()


def test_checkpoints_have_the_discriminator_and_final_models_do_not(run: Path) -> None:
    checkpoint = Checkpoints(run / "checkpoints").newest()
    assert checkpoint is not None
    names = set(checkpoint[0])
    assert {"discriminator.begin.weight", "adamw.discriminator.0.exp_avg_sq", "adamw.network.0.exp_avg_sq"} <= names
    with safe_open(run / "final.safetensors", framework="pt") as file:
        assert all(name.startswith("ema.") for name in file.keys())  # noqa: SIM118
        assert set(file.keys()) == {name for name in names if name.startswith("ema.")}


@pytest.mark.parametrize("step", [0, 1])
def test_worker_threads_add_up_to_the_gradients_of_the_batch(data: Path, step: int) -> None:
    gradients = []
    for count in (1, 4):
        config = TRAINING.model_copy(update={"cpu_threads": count})
        with worker_threads(count) as pool:
            trainer = make_trainer(data, MODEL, config, pool)
            x0 = torch.linspace(-1, 1, 16 * SIZE**2).view(16, 1, SIZE, SIZE)
            batch = trainer.objective.make_batch(x0, range(16), {"label": torch.arange(16) % 3})
            part = trainer.state.steps[step]
            loss = trainer.backward(part, batch, None)
            gradients.append([loss, *(parameter.grad for parameter in part.parameters)])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_discriminator_steps_first_and_nonfinite_steps_are_skipped(data: Path) -> None:
    with worker_threads(1) as pool:
        trainer = make_trainer(data, MODEL, TRAINING.model_copy(update={"cpu_threads": 1}), pool, 3200)
        state = trainer.state
        with trainer.loader:
            take_step(trainer)
            before = [each.clone() for each in state.network.parameters()]
            with torch.no_grad():
                state.steps[0].parameters[0].fill_(math.nan)
            take_step(trainer)
            trainer.check_finite()
        assert state.skipped == 1
        assert all(torch.equal(*pair) for pair in zip(before, state.network.parameters(), strict=True))


@pytest.mark.long
@pytest.mark.slow
def test_trained_gan_covers_all_modes_and_classes(data: Path, tmp_path: Path) -> None:
    config = TRAINING.model_copy(update={"images": 5600, "learning_rate": 4e-3, "checkpoints": 1})
    drawer = load_model(trained(data, tmp_path / "run", config).final)
    images = sample(drawer, range(72), 0, SAMPLING).float()
    half = SIZE // 2
    bright = functional.avg_pool2d(images, half).flatten(1)
    which = bright.argmax(1)
    # Each quarter about as often as there is one, bright, and beside dark ones.
    assert torch.bincount(which, minlength=4).min() >= 6
    assert (bright.sort(1).values[:, -1] > 150).float().mean() > 0.8
    assert (bright.sort(1).values[:, -2] < 90).float().mean() > 0.8
    upper = sample(drawer, range(36), 1, SAMPLING, conditions=Conditions(labels=("upper",))).float()
    assert (functional.avg_pool2d(upper, half).flatten(1).argmax(1) < 2).float().mean() > 0.9


def test_gan_image_depends_on_seed_and_index_only(model: GANModel) -> None:
    conditions = Conditions(labels=("lower",))
    many, one = (
        sample(model, range(40), 3, SAMPLING, conditions=conditions),
        sample(model, [37], 3, SAMPLING, conditions=conditions),
    )
    assert torch.equal(many[37], one[0])
    z = GaussianNoise(3, "sampling", range(36), (8, 1, 1))()
    with torch.inference_mode():
        assert torch.equal(many[:36], to_uint8(model.network(z, torch.full((36,), model.classes.index("lower")))))
    path = interpolate(model, 3, 4, 36, SAMPLING, conditions=conditions)
    assert (path[0].int() - many[0].int()).abs().max() <= 1


@pytest.mark.parametrize("size", [8, 7])
def test_a_size_that_resolutions_do_not_divide_is_cut(size: int) -> None:
    torch.manual_seed(0)
    images = Generator(MODEL, 3, size)(torch.randn(2, 8, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert Discriminator(MODEL, 3, size)(images).shape == (2,)
    with pytest.raises(UserError, match="fold 16 pixels into one, and the images have 8"):
        Generator(MODEL.model_copy(update={"channel_mult": (1, 1, 1, 1)}), 1, 8)


def test_discriminator_output_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(MODEL, 1, SIZE, 2)
    x, label = torch.randn(4, 1, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    alone = torch.cat([discriminator(x[[number]], label[[number]]) for number in range(4)])
    assert torch.allclose(discriminator(x, label), alone, atol=1e-6)


def test_edits_are_an_error(model: GANModel) -> None:
    assert tasks_of(model) == ("sample", "interpolate")
    with pytest.raises(UserError, match="no steps in which to edit an image"):
        sample(model, [0], 0, SAMPLING, edit=Edit(torch.zeros(1, SIZE, SIZE, dtype=torch.uint8), strength=0.5))


def test_gan_reports_no_likelihood(data: Path, model: GANModel) -> None:
    dataset = Dataset.open(data)
    rows = dataset.rows("held_out")
    conditioning = {"label": dataset.classes(rows, model.classes)}
    losses = summarize_losses(measure_losses(model, [(dataset.images(rows), conditioning)], SAMPLING))
    assert losses.images == len(rows)
    assert losses.metrics() == {}


def test_gan_explain_writes_an_interpolation(data: Path, model: GANModel, tmp_path: Path) -> None:
    paths = explain(model, Dataset.open(data).images([0])[0], tmp_path, 0)
    assert [path.name for path in paths] == ["way.png"]


def test_work_is_counted_for_both_networks() -> None:
    # Nearly all of it is convolutions, whose work grows with the positions.
    small, large = (count_flops(MODEL, (3, size, size), 0) for size in (16, 32))
    assert large / small == pytest.approx(4, rel=0.1)
