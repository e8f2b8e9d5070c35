"""Images pixel by pixel: later pixels leak nothing, likelihoods add up, and what is sampled in columns is right."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.data.dataset import Dataset
from diffusion.evaluation.metrics.held_out_loss import measure_losses
from diffusion.evaluation.model_evaluator import count_gflop
from diffusion.families.autoregressive.model import AutoregressiveModel, bits_of_pixels
from diffusion.families.autoregressive.network import (
    PixelCNN,
    PixelSampler,
    log_probability,
    mixtures_of,
    sample_images,
    sample_pixels,
)
from diffusion.families.config import AutoregressiveConfig
from diffusion.families.model import to_float, to_uint8
from diffusion.generation.config import Conditions
from diffusion.generation.explain import explain
from diffusion.generation.generate import interpolate, sample
from diffusion.generation.requests import tasks_of
from diffusion.process.editing import Edit
from diffusion.process.samplers import sampling_config
from diffusion.training.logging import read_metrics
from diffusion.training.train import TrainResult, train
from tests.builders.small_autoencoders import CONFIG, SAMPLING
from tests.builders.small_datasets import write_dataset
from tests.builders.training_runs import Stop, StopAt

SIZE = 8
MODEL = AutoregressiveConfig(width=16, layers=3, mixtures=2)
TRAINING = CONFIG.model_copy(update={"learning_rate": 1e-2, "flip": False, "precision": "fp32"})


def network(channels: int, classes: int = 0, layers: int = 5, seed: int = 0) -> PixelCNN:
    """One of which no weight is zero, in float64."""
    torch.manual_seed(seed)
    pixel_cnn = PixelCNN(AutoregressiveConfig(width=8, layers=layers, mixtures=2), channels, classes).double()
    for parameter in pixel_cnn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return pixel_cnn


def images(count: int, channels: int, size: int, levels: int = 256, seed: int = 1) -> Tensor:
    places = torch.randint(0, levels, (count, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return places.double() / ((levels - 1) / 2) - 1


def stripes(folder: Path, count: int = 96) -> Path:
    """Images of two classes, in which each row, or each column, is of one of two shades."""
    random = np.random.default_rng(0)
    lines = random.choice([40, 200], (count, 1, SIZE, 1)).astype(np.uint8).repeat(SIZE, 3)
    lines[1::2] = lines[1::2].transpose(0, 1, 3, 2)
    write_dataset(folder, lines, per_shard=32, labels=["rows", "columns"] * (count // 2))
    return folder


def trained(data: Path, output: Path, **options: object) -> TrainResult:
    return train(data, output, MODEL, TRAINING, SAMPLING, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stripes(tmp_path_factory.mktemp("autoregressive") / "data" / "stripes")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return trained(data, data.parents[1] / "run").output


@pytest.fixture(scope="module")
def model(run: Path) -> AutoregressiveModel:
    loaded = load_model(run / "final.safetensors")
    assert isinstance(loaded, AutoregressiveModel)
    return loaded


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_parameters_depend_only_on_earlier_pixels_in_reach(channels: int) -> None:
    size = 6
    # Reaches of 1, 2, 4, 8 and 1: all of so small an image.
    model = network(channels)
    x = images(1, channels, size).requires_grad_()
    parameters = model(x)
    for place in range(size * size):
        (gradient,) = torch.autograd.grad(parameters[..., place // size, place % size].sum(), x, retain_graph=True)
        sizes = gradient[0].abs().amax(0).flatten()
        assert (sizes[place:] == 0).all()
        assert (sizes[:place] > 0).all()


def test_probability_of_a_value_ignores_later_values_of_its_pixel() -> None:
    x = images(1, 3, 4).float().requires_grad_()
    mixtures = mixtures_of(network(3).float()(x).movedim(1, -1), 3)
    pixel = x.movedim(1, -1)
    means = mixtures.means + (mixtures.slopes * pixel[..., None, :, None]).sum(-2)
    for value in range(3):
        (gradient,) = torch.autograd.grad(means[0, 2, 2, value].sum(), x, retain_graph=True)
        assert (gradient[0, value:, 2, 2] == 0).all()
        assert (gradient[0, :value, 2, 2] != 0).all()


@pytest.mark.parametrize(("channels", "size", "levels"), [(1, 2, 4), (1, 3, 2), (3, 2, 2)])
def test_the_likelihoods_of_all_images_add_up_to_one(channels: int, size: int, levels: int) -> None:
    steps = (np.arange(levels) / ((levels - 1) / 2) - 1).tolist()
    every = torch.tensor(list(itertools.product(steps, repeat=channels * size**2)), dtype=torch.float64)
    x = every.view(-1, channels, size, size)
    bits = bits_of_pixels(network(channels), x, {}, levels).double().flatten(1).sum(1)
    assert (2.0**-bits).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("channels", "classes"), [(1, 0), (3, 2)])
def test_incremental_parameters_equal_those_of_one_full_pass(channels: int, classes: int) -> None:
    size, model = 9, network(channels, classes)
    x = images(3, channels, size)
    label = torch.tensor([0, 1, 2]) if classes else None
    whole = model(x, label)
    sampler = PixelSampler(model, 3, size, size, label)
    with torch.inference_mode():
        for y in range(size):
            sampler.begin_row(y)
            for place in range(size):
                parameters = sampler.parameters(y, place)
                assert torch.allclose(parameters, whole[:, :, y, place], atol=1e-5)
                sampler.images[:, :, y, place] = x[:, :, y, place]


@pytest.mark.parametrize("channels", [1, 3])
def test_incremental_sampling_equals_sampling_by_full_passes(channels: int) -> None:
    size, model = 6, network(channels).float()
    noise = torch.randn(2, channels + 1, size, size, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, channels, size, size)
    with torch.inference_mode():
        for y, place in itertools.product(range(size), repeat=2):
            mixtures = mixtures_of(model(x)[:, :, y, place], channels)
            x[:, :, y, place] = sample_pixels(mixtures, noise[:, :, y, place])
        assert torch.equal(to_uint8(sample_images(model, noise)), to_uint8(x))


def test_sampling_costs_one_pass_for_any_number_of_pixels(model: AutoregressiveModel) -> None:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        sample_images(model.network, torch.zeros(1, 2, SIZE, SIZE), torch.tensor([0]))
    # But for the first layer above, which a whole pass computes for one row more and leaves out.
    assert counter.get_total_flops() / 1e9 == pytest.approx(count_gflop(model, sampling_config()), rel=0.1)


@pytest.mark.parametrize("stop", [16, 240])
def test_stopped_training_resumes_bit_for_bit(data: Path, run: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Stop):
        trained(data, tmp_path / "cut", track=lambda _: StopAt(stop))
    trained(data, tmp_path / "cut")
    for name in ("final.safetensors", "losses.csv", "samples/0000000320.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes()


def test_its_loss_is_exactly_the_bits_of_held_out_images(data: Path, run: Path, model: AutoregressiveModel) -> None:
    dataset = Dataset.open(data)
    rows = dataset.rows("held_out")
    x, label = to_float(dataset.images(rows)), dataset.classes(rows, model.classes)
    mixtures = mixtures_of(model.network(x, label).movedim(1, -1), 1)
    expected = -log_probability(mixtures, x.movedim(1, -1)).flatten(1).sum(1) / math.log(2) / SIZE**2
    last = read_metrics(run / "losses.csv")[-1]["held_out_loss_ema"]
    assert last == pytest.approx(expected.mean().item(), rel=1e-4)
    terms = measure_losses(model, [(dataset.images(rows), {"label": label})], SAMPLING)
    assert torch.allclose(terms.bits.float(), expected, rtol=1e-4)
    # Eight bits are what knows nothing takes.
    assert last < 7


def test_class_conditional_images_do_not_depend_on_the_count(model: AutoregressiveModel) -> None:
    many = sample(model, range(40), 3, SAMPLING, conditions=Conditions(labels=("rows",)))
    one = sample(model, [37], 3, SAMPLING, conditions=Conditions(labels=("rows",)))
    assert torch.equal(many[37], one[0])
    noise = GaussianNoise(3, "sampling", range(36), (2, SIZE, SIZE))()
    with torch.inference_mode():
        expected = sample_images(model.network, noise, torch.full((36,), model.classes.index("rows")))
    assert torch.equal(many[:36], to_uint8(expected))


def test_edits_are_an_error(model: AutoregressiveModel) -> None:
    assert tasks_of(model) == ("sample", "interpolate")
    images = interpolate(model, 1, 2, 3, SAMPLING, conditions=Conditions(labels=("rows",)))
    assert images.shape == (3, 1, SIZE, SIZE)
    image = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(UserError, match="no steps in which to edit an image"):
        sample(model, [0], 0, SAMPLING, edit=Edit(image, strength=0.5))


def test_explain_writes_figures_with_a_real_image(data: Path, model: AutoregressiveModel, tmp_path: Path) -> None:
    paths = explain(model, Dataset.open(data).images([0])[0], tmp_path, 0)
    assert [path.name for path in paths] == ["surprise.png"]
