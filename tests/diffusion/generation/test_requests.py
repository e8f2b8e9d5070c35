"""Requests: each task through one door, what a model cannot do or would ignore is rejected before it generates."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import to_uint8
from diffusion.generation.config import REQUESTS, GenerationRequest, make_request
from diffusion.generation.generate import interpolate, sample
from diffusion.generation.requests import answer, encode, render_input, tasks_of
from diffusion.generation.super_resolution import upscale
from diffusion.process.samplers import sampling_config
from tests.builders.small_models import CONFIG, write_model

SAMPLING = sampling_config(steps=3, compute_batch=4)
SIZE = 8


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
HOLE = np.zeros((SIZE, SIZE), np.uint8)
HOLE[:, 4:] = 255
EXAMPLES: dict[str, Any] = {
    "task": "sample",
    "count": 2,
    "seed": 3,
    "index": 1,
    "to_seed": 4,
    "label": "cat",
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "image": png(PIXELS),
    "mask": png(HOLE),
    "strength": 0.5,
    "method": "repaint",
    "resample_steps": 2,
    "sampler": "ddim",
    "steps": 5,
    "guidance": 2.0,
}
"""A value for every field."""


@pytest.fixture
def model(tmp_path: Path) -> DiffusionModel:
    return load_model(write_model(tmp_path / "model.safetensors", seed=0, images=0, size=SIZE))


@pytest.fixture
def enlarging(tmp_path: Path) -> DiffusionModel:
    """A model that generates images of 4×4 as 8×8."""
    config = CONFIG.model_copy(update={"low_resolution": 4, "conditional": False})
    return load_model(write_model(tmp_path / "enlarging.safetensors", seed=0, images=0, size=SIZE, config=config))


def needs(task: str) -> list[str]:
    return [name for name, field in REQUESTS[task].model_fields.items() if field.is_required()]  # type: ignore[index]


def request(task: str, **fields: Any) -> GenerationRequest:
    needed = {name: EXAMPLES[name] for name in needs(task)}
    return make_request({"task": task} | needed | fields)


def test_a_sample_is_the_image_of_its_seed_and_number(model: DiffusionModel) -> None:
    [images] = answer(model, [request("sample", seed=7, index=5, count=3)], SAMPLING)
    assert torch.equal(images, sample(model, [5, 6, 7], 7, SAMPLING))


def test_rows_of_one_seed_get_what_each_would_get_alone(model: DiffusionModel) -> None:
    rows = [
        request("sample", seed=1, index=6),
        request("img2img", seed=1, count=2),
        request("sample", seed=1, index=0, count=2),
    ]
    together = answer(model, rows, SAMPLING)
    for row, images in zip(rows, together, strict=True):
        assert torch.equal(images, answer(model, [row], SAMPLING)[0])


def test_inpainting_keeps_black_and_repaints_white_mask_pixels(model: DiffusionModel) -> None:
    [images] = answer(model, [request("inpaint", count=3)], SAMPLING)
    known_pixels = torch.from_numpy(PIXELS)[:, :4].expand(3, 1, -1, -1)
    assert torch.equal(images[..., :4], known_pixels)
    assert not torch.equal(images[0, ..., 4:], images[1, ..., 4:])


def test_image_and_mask_are_cropped_and_scaled_alike(model: DiffusionModel) -> None:
    """Twice as large and wider than high: what is kept is what ingesting the image would have made of it."""
    wide = np.zeros((16, 24), np.uint8)
    wide[:, 4:20] = np.kron(PIXELS, np.ones((2, 2), np.uint8))
    mask = np.zeros_like(wide)
    mask[:, 12:] = 255
    [images] = answer(model, [request("inpaint", image=png(wide), mask=png(mask))], SAMPLING)
    [whole] = answer(model, [request("img2img", image=png(wide), strength=0.01)], SAMPLING)
    assert images.shape == whole.shape == (1, 1, SIZE, SIZE)
    expected_left = torch.from_numpy(wide[:, 4:20]).float().reshape(8, 2, 8, 2).mean((1, 3))[:, :4]
    # Bicubic, over a window twice as wide as a mean's.
    assert (images[0, 0, :, :4].float() - expected_left).abs().mean() < 20


def test_lower_img2img_strength_stays_closer_to_the_image(model: DiffusionModel) -> None:
    sampling = sampling_config(steps=20, compute_batch=4, sampler="ddim")
    source = torch.from_numpy(PIXELS).float()
    distances = [
        (answer(model, [request("img2img", strength=strength)], sampling)[0].float() - source).abs().mean()
        for strength in (0.1, 0.4, 0.95)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_interpolation_request_starts_and_ends_at_both_images(model: DiffusionModel) -> None:
    [images] = answer(model, [request("interpolate", seed=3, to_seed=9, count=5)], SAMPLING)
    assert torch.equal(images, interpolate(model, 3, 9, 5, SAMPLING))


def test_upscale_request_returns_the_requested_number_of_variants(enlarging: DiffusionModel) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 9), dtype=np.uint8)
    row = request("upscale", image=png(pixels), seed=2, count=3)
    [images] = answer(enlarging, [row], SAMPLING)
    small = torch.from_numpy(pixels)[None, None].expand(3, -1, -1, -1)
    assert torch.equal(images, upscale(enlarging, small, 2, SAMPLING))
    assert not torch.equal(images[0], images[1])
    [third] = answer(enlarging, [request("upscale", image=png(pixels), seed=2, index=2)], SAMPLING)
    assert torch.equal(third[0], images[2])
    [begun_with] = render_input(enlarging, row)
    assert torch.equal(begun_with, torch.from_numpy(np.kron(pixels, np.ones((2, 2), np.uint8)))[None])


def test_super_resolution_model_supports_upscaling_only(enlarging: DiffusionModel) -> None:
    assert tasks_of(enlarging) == ("upscale",)
    with pytest.raises(UserError, match="the model was not trained to sample: it can upscale"):
        answer(enlarging, [request("sample")], SAMPLING)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((3, 9), np.uint8), "3×9 pixels .*it enlarges nothing lower or narrower"),
        (np.zeros((8, 2050), np.uint8), "2050×8 pixels: a side of more than 2047"),
    ],
)
def test_invalid_upscale_request_is_an_error(enlarging: DiffusionModel, pixels: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        answer(enlarging, [request("upscale", image=png(pixels))], SAMPLING)


def test_request_overrides_the_sampling_settings(model: DiffusionModel) -> None:
    [images] = answer(model, [request("sample", sampler="heun", steps=5)], SAMPLING)
    assert torch.equal(images, sample(model, [0], 0, sampling_config(sampler="heun", steps=5, compute_batch=4)))


def test_another_sampler_does_not_get_the_configured_one_s_options(model: DiffusionModel) -> None:
    configured = sampling_config(sampler="heun", churn={"amount": 2}, steps=3, compute_batch=4)
    assert request("sample", sampler="ddim").sampling(configured) == sampling_config(
        sampler="ddim", steps=3, compute_batch=4
    )
    assert request("sample", steps=7).sampling(configured) == configured.with_changes({"steps": 7})


def test_another_sampler_visits_the_noise_levels_that_are_configured() -> None:
    configured = sampling_config(sampler="ddpm", steps=1000, sigma_max=None, sigma_min=None, variance="fixed_large")
    sampling = request("sample", sampler="ddim", steps=50).sampling(configured)
    assert sampling == sampling_config(sampler="ddim", steps=50, sigma_max=None, sigma_min=None)


def test_a_guidance_of_1_is_none_however_guidance_is_configured() -> None:
    configured = sampling_config(guidance=3, guidance_interval=(0.2, 5), guidance_rescale=0.7)
    assert not request("sample", guidance=1).sampling(configured).guides
    assert not request("sample", guidance=1).sampling(sampling_config(autoguidance=3)).is_guided
    assert request("sample").sampling(configured) == configured


def test_partially_masked_pixel_of_a_larger_mask_is_repainted(model: DiffusionModel) -> None:
    large = np.kron(PIXELS, np.ones((8, 8), np.uint8))
    mask = np.zeros_like(large)
    # A bar of three pixels, less than half of what each of those generated stands for.
    mask[34:37] = 255
    [bar] = render_input(model, request("inpaint", image=png(large), mask=png(mask)))
    assert (bar[0, 4] == 128).all()
    assert not (bar[0, :3] == 128).all(1).any()


@pytest.mark.parametrize("task", REQUESTS)
def test_fields_unknown_to_a_task_are_an_error(task: str) -> None:
    for name in EXAMPLES.keys() - REQUESTS[task].model_fields.keys() - {"task"}:  # type: ignore[index]
        with pytest.raises(UserError, match=f"{name} means nothing to {task}"):
            request(task, **{name: EXAMPLES[name]})


@pytest.mark.parametrize("task", REQUESTS)
def test_missing_task_fields_are_named(task: str) -> None:
    for name in needs(task):
        with pytest.raises(UserError, match=f"{task} needs {name}"):
            request(task, **{name: None})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "paint"}, "there is no task 'paint': use sample, inpaint"),
        ({"task": ["sample"]}, "there is no task"),
        ({"colour": "red"}, "there is no colour to ask for; there is count, seed"),
        ({"colour": "red", "strength": 1, "x" * 99: 1}, f"there is no colour, {'x' * 40} to ask for"),
        ({"count": 0}, "count: .*greater than or equal to 1"),
        ({"count": 1.5}, "count: .*integer"),
        ({"label": []}, "label: "),
        ({"label": ["cat", 3]}, "label: "),
        ({"prompt": "x" * 10_001}, "prompt: "),
        ({"seed": -1}, "seed: .*greater than or equal to 0 .got -1"),
        ({"task": "img2img", "image": b"", "strength": 2}, "strength: .*less than 1 .got 2"),
        ({"task": "inpaint", "image": b"", "mask": b"", "method": "magic"}, "method is replace, repaint or pigdm"),
        ({"task": "inpaint", "image": b"", "mask": b"", "resample_steps": 3}, "resample_steps .*use repaint or pigdm"),
    ],
)
def test_invalid_request_is_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_request(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": "cat"}, "trained without classes"),
        ({"prompt": "a cat"}, "trained without captions"),
        ({"sampler": "magic"}, "there is no sampler 'magic': use ddpm"),
        ({"guidance": 3.0}, "label or prompt, and there is none"),
        ({"task": "img2img", "image": png(PIXELS), "size": "1032x1032"}, "size"),
        ({"task": "img2img", "image": b"hello"}, "the image cannot be used: not an image"),
        ({"task": "img2img", "image": png(PIXELS), "strength": 1.0}, "strength: .*less than 1"),
        ({"task": "img2img", "image": png(PIXELS), "strength": 1.5}, "strength: .*less than 1"),
        ({"task": "inpaint", "image": png(PIXELS), "mask": png(np.zeros_like(HOLE))}, "keeps all of the image"),
        ({"task": "inpaint", "image": png(PIXELS), "mask": png(np.full_like(HOLE, 255))}, "keeps nothing"),
        ({"task": "inpaint", "image": png(PIXELS), "mask": png(HOLE[:, :4])}, "mask has 4×8 pixels and the image 8×8"),
        ({"task": "upscale", "image": png(PIXELS)}, "not trained to upscale: it can sample, inpaint, img2img, inter"),
        ({"task": "interpolate", "to_seed": 0, "count": 2}, "from seed 0 to seed 0: give two seeds"),
        ({"task": "interpolate", "to_seed": 1}, "ask for two or more"),
        ({"count": 10**12}, "64,000,000,000,064 values, and 2,147,483,648 are held at once: ask for fewer"),
    ],
)
def test_one_invalid_row_prevents_all_generation(model: DiffusionModel, fields: dict[str, Any], words: str) -> None:
    calls: list[str] = []
    with pytest.raises(UserError, match=words):
        answer(model, [request("sample"), make_request(fields)], SAMPLING, lambda what, *_: calls.append(what))
    assert not calls


def test_model_lists_its_supported_tasks(model: DiffusionModel) -> None:
    assert tasks_of(model) == ("sample", "inpaint", "img2img", "interpolate")


def test_errors_name_the_row_that_cannot_be_answered(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match="row 1: the model was trained without classes"):
        answer(model, [request("sample"), request("sample", label="cat")], SAMPLING)


def test_interpolation_between_classes_is_an_error(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "conditional.safetensors", 0, 0, size=SIZE, classes={"cat": 5, "dog": 5}))
    calls: list[str] = []
    rows = [request("img2img"), request("interpolate", seed=1, to_seed=2, count=6)]
    with pytest.raises(UserError, match=r"row 1: .*nothing between classes: give a label, one of cat, dog"):
        answer(model, rows, SAMPLING, lambda what, *_: calls.append(what))
    assert not calls
    [images] = answer(model, [request("interpolate", seed=1, to_seed=2, count=6, label="dog")], SAMPLING)
    ends = [answer(model, [request("sample", seed=seed, label="dog")], SAMPLING)[0] for seed in (1, 2)]
    assert torch.equal(torch.cat([images[:1], images[-1:]]), torch.cat(ends))


def test_more_pixels_than_fit_into_memory_are_rejected(enlarging: DiffusionModel) -> None:
    with pytest.raises(UserError, match=r"16\.0 million pixels in all would be generated at once"):
        answer(enlarging, [request("upscale", image=png(np.zeros((2000, 2000), np.uint8)))], SAMPLING)


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("task", ["sample", "inpaint"])
def test_progress_counts_the_steps_of_the_sampler(model: DiffusionModel, sampler: str, task: str) -> None:
    # Two compute batches; resampling goes back, which counts nothing.
    sampling, reports = sampling_config(sampler=sampler, steps=6, compute_batch=2), list[tuple[str, int, int | None]]()
    asked = request(task, count=4, **({"method": "repaint"} if task == "inpaint" else {}))

    def progress(what: str, done: int, total: int | None, note: str = "") -> None:
        reports.append((what, done, total))

    [images] = answer(model, [asked], sampling, progress)
    done = [number for _, number, _ in reports]
    assert {(what, total) for what, _, total in reports} == {("steps", 12)}
    assert sorted(done) == done
    assert {*done} == {*range(13)}
    assert torch.equal(images, answer(model, [asked], sampling)[0])


def test_the_learned_variance_is_used_while_steps_are_counted(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"variance": "learned_range", "prediction": "epsilon"})
    model = load_model(write_model(tmp_path / "model.safetensors", seed=0, images=0, size=SIZE, config=config))
    assert isinstance(model, DiffusionModel)
    sampling = sampling_config(sampler="ddpm", steps=4, compute_batch=2, precision="fp32")
    noise = GaussianNoise(3, "sampling", [0, 1], model.noise_shape)
    with torch.inference_mode():
        x0 = sampling.run(model.denoiser(), sampling.sigma_grid(model.schedule), noise)
    [images] = answer(model, [request("sample", seed=3, count=2)], sampling)
    assert torch.equal(images, to_uint8(x0))


def test_a_file_says_what_it_was_conditioned_on(tmp_path: Path) -> None:
    asked = request("sample", label="cat", prompt=["a cat", "a dog"], count=2)
    png = Image.open(io.BytesIO(encode(torch.zeros(1, 8, 8, dtype=torch.uint8), 1, asked, {"model": "m"})))
    texts = {name.removeprefix("darkroom:"): text for name, text in png.info.items() if name.startswith("darkroom:")}
    assert texts == {"model": "m", "task": "sample", "seed": "0", "index": "1", "label": "cat", "prompt": "a dog"}
