"""Images of other shapes than squares: the same bits whatever they are generated with, edits, and enlarging."""

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from diffusion.checkpoints import AVERAGED, load_model, read_tensors, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.shapes import apportion, interleave, map_by_shape, parse_size
from diffusion.families.autoregressive.model import AutoregressiveModel
from diffusion.families.config import AutoregressiveConfig, GANConfig, ModelConfig, VAEConfig, shape_conflict
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.ddpm.network import UNet
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.gan.model import GANModel
from diffusion.families.header import ModelHeader
from diffusion.families.model import Model
from diffusion.families.vae.config import LatentSpace
from diffusion.families.vae.model import VAEModel
from diffusion.families.vae.network import Latents
from diffusion.generation.config import Conditions, make_request
from diffusion.generation.generate import interpolate, sample, sample_each
from diffusion.generation.requests import answer
from diffusion.generation.super_resolution import tile_shape, upscale
from diffusion.process.samplers import sampling_config
from tests.builders.small_models import header, write_model

SAMPLING = sampling_config(sampler="dpmpp_2m_sde", steps=3, compute_batch=4)
SHAPES = {(16, 16): 3, (8, 32): 9, (32, 8): 5}
FOLDED = ModelConfig(width=16, channel_mult=(1, 1), blocks=1, attention=(1,), heads=1, patch=2)


def bucketed(about: ModelHeader) -> ModelHeader:
    return ModelHeader.model_validate(about.model_dump() | {"shapes": SHAPES})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Attention over a fold of 4 pixels, and random weights."""
    return load_model(write_model(tmp_path_factory.mktemp("model") / "model.safetensors", 0, 0, size=16, config=FOLDED))


@pytest.fixture(scope="module")
def of_shapes(model: Model) -> DiffusionModel:
    assert isinstance(model, DiffusionModel)
    return type(model).make_model(bucketed(model.header), model.network, None)


def test_images_of_one_size_have_the_same_bits_everywhere(model: Model) -> None:
    sizes = ((8, 8), (12, 20), None, (20, 8), (10, 9))
    conditions = Conditions.model_validate({"sizes": sizes})
    mixed = sample_each(model, range(10), 3, SAMPLING, conditions=conditions)
    for index, image in enumerate(mixed):
        size = sizes[index % 5] or (16, 16)
        alone = sample(model.with_size(size), [index], 3, SAMPLING)
        assert image.shape == (1, *size)
        assert torch.equal(image, alone[0])
    assert torch.equal(mixed[2], sample(model, [2], 3, SAMPLING)[0])
    some = sample_each(model, [7, 1], 3, SAMPLING, conditions=conditions)
    assert all(map(torch.equal, some, (mixed[7], mixed[1])))


def test_requests_of_several_sizes_give_each_size_s_images(model: Model) -> None:
    requests = [make_request({"count": 2, "seed": 5, "size": size}) for size in ("8x8", "20x12", None, "12x20")]
    together = answer(model, requests, SAMPLING)
    for request, images in zip(requests, together, strict=True):
        assert torch.equal(images, answer(model, [request], SAMPLING)[0])
    assert [tuple(images.shape[2:]) for images in together] == [(8, 8), (12, 20), (16, 16), (20, 12)]
    path = interpolate(model.with_size((12, 20)), 5, 6, 3, SAMPLING)
    assert (path[0].int() - together[1][0].int()).abs().max() <= 1


def test_network_takes_every_shape_as_if_padded() -> None:
    network = UNet(FOLDED, 1, 8).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 1, 10, 19, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, 1, 0, 2), mode="replicate")
    with torch.inference_mode():
        torch.testing.assert_close(network(x, torch.ones(2)), network(padded, torch.ones(2))[..., :10, :19])


def test_sampling_starts_at_the_noise_level_of_its_shape(model: Model) -> None:
    assert isinstance(model, DiffusionModel)
    for size in ((8, 8), (12, 20), (16, 9)):
        grid = SAMPLING.sigma_grid(model.with_size(size).schedule)
        assert grid[0].item() == pytest.approx(math.sqrt(math.prod(size)))
    assert torch.equal(model.with_size((12, 20)).schedule.sigmas, model.schedule.sigmas)


def test_most_frequent_shape_is_generated_by_default(of_shapes: DiffusionModel) -> None:
    assert of_shapes.shape == (1, 8, 32)
    assert of_shapes.with_size((16, 16)).with_size(None).shape == (1, 8, 32)
    assert [*of_shapes.header.trained_shapes] == [(8, 32), (32, 8), (16, 16)]
    stored = json.loads(of_shapes.header.model_dump_json())
    assert stored["shapes"] == {"16x16": 3, "32x8": 9, "8x32": 5}
    assert ModelHeader.model_validate(stored) == of_shapes.header
    assert "shapes" not in header().model_dump()


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [((50, 10), None, (8, 32)), ((16, 20), None, (16, 16)), ((9, 30), None, (32, 8)), ((32, 10), "12x20", (20, 12))],
)
def test_an_edit_has_the_trained_shape_nearest_to_its_image(
    of_shapes: DiffusionModel, image: tuple[int, int], size: str | None, expected: tuple[int, int]
) -> None:
    fields = {"task": "img2img", "image": png(*image), "strength": 0.5, "size": size}
    [edited] = answer(of_shapes, [make_request(fields)], SAMPLING)
    assert tuple(edited.shape[2:]) == expected


def test_inpainting_keeps_the_known_pixels_of_a_rectangle(model: Model) -> None:
    mask = np.zeros((12, 20), np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(mask).save(stream := io.BytesIO(), "png")
    fields = {"task": "inpaint", "image": png(20, 12), "mask": stream.getvalue(), "size": "20x12", "count": 2}
    [edited] = answer(model, [make_request(fields)], SAMPLING)
    original = torch.from_numpy(np.array(Image.open(io.BytesIO(png(20, 12)))))
    assert torch.equal(edited[:, 0, :, :10], original[:, :10].expand(2, -1, -1))
    assert not torch.equal(edited[0, 0, :, 10:], original[:, 10:])


def test_autoregressive_models_generate_any_shape_from_their_own_noise() -> None:
    config = AutoregressiveConfig(width=8, layers=2, mixtures=2)
    about = header().model_copy(update={"model": config})
    model = AutoregressiveModel(about, AutoregressiveModel.make_network(config, (1, 8, 8), 0).eval())
    images = sample(model.with_size((8, 10)), range(3), 0, SAMPLING_PLAIN)
    assert images.shape == (3, 1, 8, 10)
    assert torch.equal(images[1:2], sample(model.with_size((8, 10)), [1], 0, SAMPLING_PLAIN))


SAMPLING_PLAIN = sampling_config(compute_batch=4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GANModel, GANConfig(width=8, channel_mult=(1,), latent=4)),
        (VAEModel, VAEConfig(width=16, channel_mult=(1,), global_latent=4, latent_channels=1)),
    ],
)
def test_families_with_linear_layers_take_one_square_alone(kind: type[Model], config: GANConfig) -> None:
    about = header().model_copy(update={"model": config})
    model = kind(about, kind.make_network(config, (1, 8, 8), 0))
    assert model.with_size((8, 8)).shape == (1, 8, 8)
    with pytest.raises(UserError, match="8x8 pixels alone"):
        model.with_size((8, 12))
    assert shape_conflict(config, 8, [(8, 8)]) is None
    assert "ingest.fit" in (shape_conflict(config, 8, [(4, 16), (16, 4)]) or "")


def test_latents_of_any_shape_the_factor_divides_are_decoded() -> None:
    vae = VAEConfig(width=16, channel_mult=(1,), latent_channels=2)
    space = LatentSpace(autoencoder=vae, digest="0" * 64, channels=2, size=4)
    about = header(FOLDED.model_copy(update={"patch": 1, "channel_mult": (1,), "attention": ()})).model_copy(
        update={"latents": space}
    )
    network = UNet(about.model, 2, 4).eval()  # type: ignore[arg-type]
    model = DDPMModel.make_model(about, network, Latents(space, 1).eval())
    assert model.with_size((8, 12)).noise_shape == (2, 4, 6)
    assert sample(model.with_size((8, 12)), [0], 0, SAMPLING).shape == (1, 1, 8, 12)
    with pytest.raises(UserError, match="multiples of 2 pixels"):
        model.with_size((8, 11))


def test_a_side_below_the_fold_is_an_error(model: Model) -> None:
    with pytest.raises(UserError, match="4 pixels and more"):
        model.with_size((3, 30))


@pytest.mark.parametrize("text", ["100000x3", "64x100000"])
def test_a_too_large_size_is_told_the_range(text: str) -> None:
    with pytest.raises(UserError, match="from 8 to"):
        parse_size(text)


@pytest.mark.parametrize("text", ["96", "96x", "x64", "0x64", "96x4", "96x64x3", "9999x64", "a×b", ""])
def test_what_is_no_size_is_an_error_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"WIDTHxHEIGHT"):
        parse_size(text)
    with pytest.raises(UserError):
        make_request({"size": text or "?"})
    with pytest.raises(ValidationError):
        Conditions.model_validate({"sizes": [text]})


def test_sizes_leave_conditions_without_any_as_they_were() -> None:
    before = Conditions(labels=("a",))
    assert before.model_dump(mode="json") == {"labels": ["a"], "prompts": [], "negative_prompt": None}
    assert parse_size("96x64") == (64, 96)
    assert (
        hashlib.sha256(before.model_dump_json().encode()).hexdigest()[:8]
        == hashlib.sha256(b'{"labels":["a"],"prompts":[],"negative_prompt":null}').hexdigest()[:8]
    )


def test_small_rectangles_are_enlarged_in_tiles_of_trained_shapes() -> None:
    config = FOLDED.model_copy(update={"low_resolution": 8, "conditional": False})
    about = ModelHeader.model_validate(header(config, size=16).model_dump() | {"shapes": {(8, 32): 3, (16, 16): 1}})
    network = UNet(config, 1, 16).eval()
    model = DDPMModel.make_model(about, network, None)
    for small, tile in (((4, 16), (4, 16)), ((8, 8), (8, 8)), ((4, 40), (4, 16)), ((17, 15), (8, 8))):
        images = torch.zeros(1, 1, *small, dtype=torch.uint8)
        assert tile_shape(model, images) == tile
        assert upscale(model, images, 0, SAMPLING).shape == (1, 1, 2 * small[0], 2 * small[1])
    with pytest.raises(UserError, match="lower or narrower"):
        tile_shape(model, torch.zeros(1, 1, 4, 15, dtype=torch.uint8))


def test_any_first_images_have_the_shares_of_shapes() -> None:
    counts = {(1, 3): 50, (2, 2): 30, (3, 1): 20}
    assert apportion(counts, 10) == {(1, 3): 5, (2, 2): 3, (3, 1): 2}
    assert sum(apportion(counts, 7).values()) == 7
    order = interleave(apportion(counts, 100))
    for length in (10, 37, 100):
        for shape, count in counts.items():
            assert abs(sum(each == shape for each, _ in order[:length]) - length * count / 100) <= 1
    for shape, count in counts.items():
        assert [number for each, number in order if each == shape] == [*range(count)]


def test_results_of_several_shapes_keep_the_images_order() -> None:
    images: list[Tensor] = [torch.full((1, 2 + n % 3, 4), n) for n in range(7)]
    assert map_by_shape(images, lambda some: some.flatten(1)[:, :1]).flatten().tolist() == [*range(7)]


def test_model_file_keeps_its_shapes(of_shapes: DiffusionModel, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.safetensors", 0, 0, size=16, config=FOLDED)
    tensors = {AVERAGED + name: value for name, value in read_tensors(path, AVERAGED).items()}
    save_tensors(path, tensors, {"model_header": of_shapes.header.model_dump(mode="json")})
    again = load_model(path)
    assert again.shape == (1, 8, 32)
    assert torch.equal(sample(again, range(2), 0, SAMPLING), sample(of_shapes, range(2), 0, SAMPLING))
