"""Small images enlarged: what the network is shown, tiles that agree, and a model that beats interpolation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.data.dataset import Dataset
from diffusion.evaluation.metrics.pixel_metrics import psnr
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.ddpm.network import UNet
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_float, to_uint8
from diffusion.generation.explain import explain
from diffusion.generation.generate import interpolate, sample
from diffusion.generation.super_resolution import (
    GenerationTask,
    add_conditioning_noise,
    enlarge_images,
    make_tiles,
    place_tiles,
    shrink_images,
    upscale,
)
from diffusion.process.samplers import SAMPLING_ADAPTER, sampling_config, with_sampler
from diffusion.process.schedules import make_schedule
from diffusion.training.config import TrainingConfig
from diffusion.training.logging import read_metrics
from diffusion.training.train import preflight, train
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import header
from tests.builders.training_runs import Stop, StopAt

MODEL = ModelConfig.model_validate(
    {"width": 16, "channel_mult": (1,), "attention": (), "patch": 2, "prediction": "sample", "schedule": "cosine"}
    | {"low_resolution": 4}
)
CONFIG = TrainingConfig(
    dataset="blocks",
    images=320,
    batch_size=16,
    warmup_images=160,
    checkpoints=2,
    keep=1,
    learning_rate=1e-2,
    weighting="plain",
    timestep_sampling="uniform",
)
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=4, compute_batch=8, precision="fp32")
SMALL = torch.from_numpy(random_images(5, size=4, seed=1))
WIDE = torch.from_numpy(random_images(3, size=12, seed=2))[:, :, :7]


def flat_blocks(count: int, across: int = 4, seed: int = 0) -> np.ndarray:
    """Images (count, 1, 2 across, 2 across) of flat blocks of 2×2 pixels: made small, nothing of them is lost."""
    return random_images(count, size=across, seed=seed).repeat(2, axis=2).repeat(2, axis=3)


def untrained(config: ModelConfig = MODEL, channels: int = 1, size: int = 8) -> DiffusionModel:
    """A model whose every weight is random."""
    network = UNet(config, channels, size)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DDPMModel(header(config, channels, size), network, make_schedule(config, (channels, size, size)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data" / "blocks", flat_blocks(256), 128)
    return tmp_path / "data" / "blocks"


def pillow(images: Tensor, height: int, width: int) -> Tensor:
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], height, width)


def test_resizing_matches_pillow() -> None:
    images = torch.from_numpy(random_images(4, channels=3, size=24))
    small = shrink_images(images, 3)
    assert small.dtype == torch.uint8
    assert (small.int() - pillow(images, 8, 8).int()).abs().max() <= 1
    large = to_uint8(enlarge_images(small[..., :5, :], 3))
    assert (large.int() - pillow(small[..., :5, :], 15, 24).int()).abs().max() <= 1


def test_network_that_adds_nothing_leaves_the_interpolated_image() -> None:
    model = untrained()
    nn.init.zeros_(model.network.head.weight)
    assert model.network.head.bias is not None
    nn.init.zeros_(model.network.head.bias)
    assert torch.equal(upscale(model, SMALL, 0, SAMPLING), to_uint8(enlarge_images(SMALL, 2)))
    assert torch.equal(upscale(model, WIDE, 0, SAMPLING), to_uint8(enlarge_images(WIDE, 2)))


def test_super_resolution_sigma_data_is_the_residual_deviation() -> None:
    images = torch.from_numpy(random_images(40, channels=3, size=24))
    apart = (images.double() - pillow(pillow(images, 8, 8), 24, 24).double()).square().mean().sqrt()
    # Between the two lies the clipping of Pillow's whole numbers.
    assert GenerationTask(8, 3, 0.1).sigma_data(images) == pytest.approx(apart.item() / 127.5, rel=0.02)
    # Nothing of flat blocks is lost but what bicubic interpolation smooths.
    task = GenerationTask(4, 2, 0.1)
    assert task.sigma_data(torch.from_numpy(flat_blocks(40))) < task.sigma_data(
        torch.from_numpy(random_images(40, size=8))
    )


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 12])
def test_small_image_and_noise_level_reach_every_answer(patch: int, size: int) -> None:
    model = untrained(MODEL.model_copy(update={"patch": patch}), 3, size)
    x, low = torch.randn(2, 2, 3, size, size, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.02, 0.1])
    low.requires_grad_()
    level.requires_grad_()
    answer = model.network(x, torch.tensor([3.0, 400.0]), low=low, level=level)
    assert answer.shape == x.shape
    one, *rest = torch.autograd.grad(answer[0].sum(), [low, level])
    assert one[0].abs().min() > 0
    assert not one[1].any()
    assert rest[0][0] != 0
    assert rest[0][1] == 0


def test_noise_on_small_images_depends_on_seed_and_index() -> None:
    low = torch.zeros(200, 3, 4, 4)
    conditioning = {"low": low, "level": torch.zeros(200)}
    whole = add_conditioning_noise(conditioning, 0.4, 3, range(100, 300))
    part = add_conditioning_noise(
        {name: values[50:60] for name, values in conditioning.items()}, 0.4, 3, range(150, 160)
    )
    assert all(torch.equal(part[name], whole[name][50:60]) for name in conditioning)
    assert 0 <= whole["level"].min() < 0.02 < 0.38 < whole["level"].max() <= 0.4
    assert abs(whole["level"].mean() - 0.2) < 0.03
    spread = (whole["low"] / whole["level"][:, None, None, None]).std()
    assert abs(spread - 1) < 0.03
    assert not torch.equal(add_conditioning_noise(conditioning, 0.4, 4, range(100, 300))["level"], whole["level"])


def test_configurations_without_it_keep_their_digests() -> None:
    assert not [name for name in ModelConfig().model_dump() if name.startswith("low_resolution")]
    assert not [name for name in sampling_config().model_dump() if name.startswith("low_resolution")]
    assert digest_of(sampling_config(low_resolution_noise=0).model_dump()) != digest_of(sampling_config().model_dump())
    assert ModelConfig().conditional
    assert not ModelConfig(low_resolution=4).conditional
    again = ModelConfig.model_validate(ModelConfig(low_resolution=4).model_dump(mode="json"))
    assert again == ModelConfig(low_resolution=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low_resolution": 4, "conditional": True}, "on nothing besides: leave out model.conditional"),
        ({"low_resolution": 4, "text": True}, "on nothing besides: leave out model.text"),
        ({"low_resolution_noise": 0.1}, "there is none: set model.low_resolution"),
        ({"low_resolution": 1}, "greater than or equal to 2"),
        ({"low_resolution": 4, "low_resolution_noise": -1}, "greater than or equal to 0"),
    ],
)
def test_contradicting_settings_are_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("low_resolution", "size", "words"),
    [(3, 8, "no multiple of it: use 2 or 4"), (8, 8, "use 2 or 4"), (16, 8, "use 2 or 4"), (3, 7, "at another size")],
)
def test_low_resolution_must_divide_the_image_size(low_resolution: int, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        UNet(MODEL.model_copy(update={"low_resolution": low_resolution}), 1, size)


@pytest.mark.slow
def test_stopped_super_resolution_run_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole = train(data, tmp_path / "whole", MODEL, CONFIG, SAMPLING)
    with pytest.raises(Stop):
        train(data, tmp_path / "cut", MODEL, CONFIG, SAMPLING, track=lambda _: StopAt(112))
    resumed_run = train(data, tmp_path / "cut", MODEL, CONFIG, SAMPLING)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    for name in ("losses.csv", "samples/0000000320.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    model = load_model(whole.final)
    assert model.config == MODEL
    last = load_model(tmp_path / "whole" / "checkpoints" / "0000000320.safetensors")
    assert torch.equal(upscale(model, SMALL, 0, SAMPLING), upscale(last, SMALL, 0, SAMPLING))
    with pytest.raises(UserError, match=r"differs in model\.low_resolution_noise"):
        train(data, tmp_path / "cut", MODEL.model_copy(update={"low_resolution_noise": 0.2}), CONFIG, SAMPLING)
    paths = explain(model, torch.from_numpy(flat_blocks(1))[0], tmp_path / "explained")
    assert all(path.is_file() for path in paths)


def test_a_grid_shows_held_out_images_small_enlarged_and_real(data: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"images": 32, "checkpoints": 1})
    result = train(data, tmp_path / "run", MODEL, config, SAMPLING)
    dataset = Dataset.open(data)
    real = dataset.images(dataset.rows("held_out")[:36])
    large = upscale(load_model(result.final), shrink_images(real, 2), 0, SAMPLING)
    sheet = np.asarray(Image.open(tmp_path / "run" / "samples" / "0000000032.png"))
    scale, pad = 8, 2

    def cell(number: int) -> Tensor:
        top, left = (index * (8 * scale + pad) + pad for index in divmod(number, 12))
        return torch.from_numpy(sheet[top : top + 8 * scale : scale, left : left + 8 * scale : scale].copy())

    for number in (0, 7, 35):
        assert torch.equal(cell(3 * number)[::2, ::2], shrink_images(real, 2)[number, 0])
        assert torch.equal(cell(3 * number + 1), large[number, 0])
        assert torch.equal(cell(3 * number + 2), real[number, 0])


def test_dry_run_reports_the_network_input(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.0)
    about = preflight(data, MODEL, CONFIG, SAMPLING)
    assert "8×8×1, upscaled from 4×4" in dict(about.lines())["images"]


@pytest.mark.slow
def test_super_resolution_beats_bicubic_on_a_determined_task(data: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"images": 2560, "checkpoints": 1})
    model = load_model(train(data, tmp_path / "run", MODEL, config, SAMPLING).final)
    rows = read_metrics(tmp_path / "run" / "losses.csv")
    assert rows[-1]["held_out_loss_ema"] < 0.02
    many = SAMPLING.model_copy(update={"compute_batch": 32})
    # Also of images larger than those of the training, whose blocks tiles would cut if they began elsewhere.
    for across in (4, 11):
        real = torch.from_numpy(flat_blocks(20, across, seed=9))
        small = shrink_images(real, 2)
        ours, bicubic = (
            psnr(each, real).mean() for each in (upscale(model, small, 0, many), enlarged_as_stored(small))
        )
        assert ours > bicubic + 10


def enlarged_as_stored(small: Tensor) -> Tensor:
    return to_uint8(enlarge_images(small, 2))


@given(st.integers(2, 40), st.integers(0, 200))
def test_tiles_cover_everything_and_overlap_by_a_quarter(size: int, more: int) -> None:
    begins = place_tiles(size + more, size)
    assert begins[0] == 0
    assert begins[-1] == more
    strides = np.diff(begins)
    assert (strides > 0).all()
    assert (strides <= size - max(1, size // 4)).all()


@given(st.integers(4, 19), st.integers(4, 19), st.integers(1, 3))
def test_blending_tiles_restores_the_image(height: int, width: int, scale: int) -> None:
    tiles = make_tiles(height, width, (4, 4), scale)
    canvas = torch.randn(2, 3, height * scale, width * scale, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiles.blend(tiles.cut(canvas), height * scale, width * scale), canvas)
    assert all(start % scale == 0 for place in tiles.places for start in place)


def test_tiles_that_disagree_pass_into_each_other_without_an_edge() -> None:
    tiles = make_tiles(16, 52, (16, 16), 4)
    pieces = torch.arange(len(tiles.places)).float()[:, None, None, None].expand(-1, 1, 64, 64)
    canvas = tiles.blend(pieces, 64, 208)[0, 0]
    assert canvas[:, 0].eq(0).all()
    assert canvas[:, -1].eq(len(tiles.places) - 1).all()
    # From one tile's answer to the next over all of the 16 pixels or more that both see.
    assert canvas.diff(dim=1).abs().max() < 1.5 / 16


class Oracle(nn.Module):
    """What a perfect network predicts, as x0, if pixels lie independently about those of the enlarged small image."""

    SPREAD = 0.3

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        self.sigmas = nn.Parameter(sigmas, requires_grad=False)

    def forward(self, scaled: Tensor, time: Tensor, low: Tensor, level: Tensor) -> Tensor:
        steps = np.arange(len(self.sigmas))
        sigma = torch.from_numpy(np.exp(np.interp(time.numpy(), steps, self.sigmas.log().numpy())))[:, None, None, None]
        x = scaled.double() * (sigma**2 + 1).sqrt()
        return ((self.SPREAD**2 * x + sigma**2 * low) / (self.SPREAD**2 + sigma**2)).float()


def oracle(low_resolution: int, size: int) -> DiffusionModel:
    config = MODEL.model_copy(update={"low_resolution": low_resolution})
    schedule = make_schedule(config, (1, 28, 28))
    return DDPMModel(header(config, 1, size), Oracle(schedule.sigmas), schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_tiles_give_the_image_that_the_whole_gives(sampler: str) -> None:
    config = SAMPLING_ADAPTER.validate_python({"sampler": sampler, "steps": 12, "compute_batch": 4})
    square = torch.from_numpy(random_images(3, size=14, seed=2))
    whole, in_tiles = (upscale(oracle(low, 2 * low), square, 5, config) for low in (14, 4))
    assert (whole.int() - in_tiles.int()).abs().max() <= 1
    # And it is one of the right distribution: about the small image, with its spread.
    difference = to_float(whole) - enlarge_images(square, 2)
    inside = enlarge_images(square, 2).abs() < 0.2
    assert abs(difference[inside].std() - Oracle.SPREAD) < 0.05
    assert abs(difference[inside].mean()) < 0.05


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("small", [SMALL, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("batch", [8, 3])
def test_upscaled_image_does_not_depend_on_the_batch(sampler: str, small: Tensor, batch: int) -> None:
    config = with_sampler(SAMPLING, sampler).with_changes({"compute_batch": batch, "low_resolution_noise": 0.05})
    model = untrained()
    many = upscale(model, small, 7, config)
    assert many.shape == (len(small), 1, 2 * small.shape[2], 2 * small.shape[3])
    assert many.dtype == torch.uint8
    for count in range(1, len(small)):
        assert torch.equal(upscale(model, small[:count], 7, config), many[:count])
    other = torch.cat([255 - small[:1], small[1:]])
    assert torch.equal(upscale(model, other, 7, config)[1:], many[1:])
    assert len({each.numpy().tobytes() for each in upscale(model, small[:1].expand(4, -1, -1, -1), 7, config)}) == 4
    assert not torch.equal(upscale(model, small, 8, config), many)


def test_noise_on_the_small_image_is_off_by_default() -> None:
    model = untrained()
    without, none, some = (
        upscale(model, SMALL, 7, SAMPLING.model_copy(update={"low_resolution_noise": level}))
        for level in (None, 0, 0.1)
    )
    assert torch.equal(without, none)
    assert not torch.equal(without, some)


def test_a_learned_variance_is_that_of_tiles_too() -> None:
    model = untrained(MODEL.model_copy(update={"variance": "learned_range"}))
    learned, fixed = (
        upscale(model, WIDE, 0, sampling_config(sampler="ddpm", steps=4, compute_batch=8, variance=variance))
        for variance in (None, "fixed_small")
    )
    assert not torch.equal(learned, fixed)


def test_upscale_progress_counts_steps_or_images() -> None:
    calls: list[tuple[str, int, int | None]] = []
    upscale(untrained(), WIDE[:1], 0, SAMPLING, lambda what, done, total, note="": calls.append((what, done, total)))
    assert calls == [*(("steps of enlarging", step, 4) for step in (1, 2, 3, 4)), ("images enlarged", 1, 1)]
    calls.clear()
    upscale(untrained(), WIDE, 0, SAMPLING, lambda what, done, total, note="": calls.append((what, done, total)))
    assert calls == [("images enlarged", number, 3) for number in (1, 2, 3)]


PLAIN = ModelConfig(width=16, channel_mult=(1,), attention=())
NOISY = SAMPLING.model_copy(update={"low_resolution_noise": 0.2})
GUIDED = SAMPLING.model_copy(update={"guidance": 3.0})


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda: sample(untrained(), [0], 0, SAMPLING),
            "enlarges images and generates nothing from noise .* give it a small image",
        ),
        (lambda: interpolate(untrained(), 0, 1, 3, SAMPLING), "generates nothing from noise alone"),
        (
            lambda: upscale(untrained(PLAIN), SMALL, 0, SAMPLING),
            r"not trained to enlarge any: .*low_resolution.* say 4",
        ),
        (lambda: upscale(untrained(), SMALL.expand(-1, 3, -1, -1), 0, SAMPLING), "3 channels .* make it grey"),
        (lambda: upscale(untrained(MODEL, 3), SMALL, 0, SAMPLING), "1 channel .* make it RGB"),
        (lambda: upscale(untrained(), WIDE[:, :, :3], 0, SAMPLING), r"3×12 pixels .* trained on 4×4.* nothing lower"),
        (lambda: upscale(untrained(), SMALL, 0, GUIDED), "guidance = 3 .* leave it out"),
        (lambda: upscale(untrained(), SMALL, 0, NOISY), "0.2 is more than the model was trained with, 0.1"),
        (lambda: sample(untrained(PLAIN), [0], 0, NOISY), "the model is given none .*: leave it out"),
    ],
)
def test_unsupported_task_error_lists_supported_tasks(ask: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask()


def test_too_much_low_resolution_noise_fails_before_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than the model was trained with"):
        train(data, tmp_path / "run", MODEL, CONFIG, NOISY)
    with pytest.raises(UserError, match="the model is given none"):
        preflight(data, PLAIN, CONFIG, NOISY)
    assert not (tmp_path / "run").exists()
