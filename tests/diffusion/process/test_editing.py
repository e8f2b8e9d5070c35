"""Editing with denoisers that are known exactly: what must be kept is, and what is filled in is what it should be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.generation.config import Conditions
from diffusion.generation.generate import interpolate, sample
from diffusion.process.editing import Edit, pigdm, repaint, replace_known, select_levels, slerp
from diffusion.process.samplers import SamplingConfig, sampling_config, with_sampler
from diffusion.process.schedules import edm_schedule
from tests.builders.ideal_denoiser import IdealDenoiser, two_tone_points
from tests.builders.sampler_options import DETERMINISTIC, STOCHASTIC, noises, options
from tests.builders.training_runs import run

CORRELATION = 0.95
COVARIANCE = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
SIGMAS = edm_schedule(1000).sigma_grid(20)
DDPM = sampling_config(sampler="ddpm").build_sampler()


def of_two_pixels(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of images of two correlated Gaussian pixels, (N, 1, 1, 2)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
    return (x.double() @ gain.T).to(x.dtype)


def two_pixels(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Known images, a mask that keeps the first pixel, and a start; the second pixel's mean is then CORRELATION."""
    known_pixels = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(count, 1, 1, 2)
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    return (
        known_pixels,
        mask,
        SIGMAS[0].float() * torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(seed)),
    )


@pytest.mark.parametrize("config", DETERMINISTIC + STOCHASTIC, ids=options)
def test_inpainting_keeps_known_pixels_exactly_with_every_sampler(config: SamplingConfig) -> None:
    points = two_tone_points(6)
    known_pixels = points[0:1].expand(4, -1, -1, -1)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    noise = noises(0, 4)
    grid = edm_schedule(1000).sigma_grid(60)
    denoise = replace_known(IdealDenoiser(points), known_pixels, mask)
    images = config.build_sampler()(denoise, grid[0].float() * noise(), grid, noise)
    assert torch.equal(images[..., :2], known_pixels[..., :2])
    nearest = torch.cdist(images.flatten(1), points.flatten(1)).min(1)
    assert (images[..., 2:] - points[nearest.indices][..., 2:]).abs().max() < 0.05


def test_resampling_makes_the_hole_consistent_with_its_surroundings() -> None:
    count = 4000
    known_pixels, mask, start = two_pixels(0, count)
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 2, generator=generator)

    denoise = replace_known(of_two_pixels, known_pixels, mask)
    once = DDPM(denoise, start, SIGMAS, noise)[:, 0, 0, 1]
    again = repaint(DDPM, denoise, start, SIGMAS, noise, stretch=2, resample_steps=10)[:, 0, 0, 1]
    # Given that the first pixel is 1, the second has this mean and this variance.
    assert abs(again.mean() - CORRELATION) < 0.04
    assert abs(again.std() - (1 - CORRELATION**2) ** 0.5) < 0.06
    assert abs(once.mean() - CORRELATION) > 3 * abs(again.mean() - CORRELATION)


def test_pigdm_makes_the_hole_consistent_with_its_surroundings() -> None:
    count = 4000
    known_pixels, mask, start = two_pixels(0, count)
    noise = (lambda generator: lambda: torch.randn(count, 1, 1, 2, generator=generator))(
        torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        corrected_denoiser = replace_known(pigdm(of_two_pixels, known_pixels, mask, sigma_data=1.0), known_pixels, mask)
        once = DDPM(corrected_denoiser, start, SIGMAS, noise)[:, 0, 0]
        replaced = DDPM(replace_known(of_two_pixels, known_pixels, mask), start, SIGMAS, noise)[:, 0, 0]
    assert torch.equal(once[:, 0], torch.ones(count))
    # It takes each value to be as unsure as the others, which they are not, so that a little is missing.
    assert abs(once[:, 1].mean() - CORRELATION) < 0.06
    assert abs(once[:, 1].std() - (1 - CORRELATION**2) ** 0.5) < 0.06
    assert abs(replaced[:, 1].mean() - CORRELATION) > 3 * abs(once[:, 1].mean() - CORRELATION)


@given(st.floats(0.01, 80), st.floats(0.2, 2))
def test_pigdm_correction_is_exact_for_gaussian_images(sigma: float, sigma_data: float) -> None:
    """With pixels that know nothing of each other the posterior mean is known: where one is kept, it is what it is."""
    x = torch.tensor([0.3, -1.2]).view(1, 1, 1, 2)
    known_pixels, mask = torch.tensor([0.7, 0.0]).view(1, 1, 1, 2), torch.tensor([True, False]).view(1, 1, 1, 2)
    level = torch.tensor(sigma)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        return x * sigma_data**2 / (sigma_data**2 + sigma**2)

    correction = pigdm(exact, known_pixels, mask, sigma_data)(x, level)
    torch.testing.assert_close(correction, torch.where(mask, known_pixels, exact(x, level)))


def test_repaint_with_one_resample_step_equals_the_sampler() -> None:
    known_pixels, mask, start = two_pixels(0, 3)
    denoise = replace_known(of_two_pixels, known_pixels, mask)
    noise = (lambda generator: lambda: torch.randn(3, 1, 1, 2, generator=generator))(torch.Generator().manual_seed(2))
    same = (lambda generator: lambda: torch.randn(3, 1, 1, 2, generator=generator))(torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        repaint(DDPM, denoise, start, SIGMAS, noise, stretch=3, resample_steps=1), DDPM(denoise, start, SIGMAS, same)
    )


@given(st.floats(0.01, 1), st.integers(2, 100))
def test_the_stronger_the_change_the_more_steps_and_noise(strength: float, steps: int) -> None:
    sigmas = edm_schedule(1000).sigma_grid(steps)
    levels = select_levels(sigmas, strength)
    assert levels[-1] == 0
    assert len(levels) >= 2
    assert abs((len(levels) - 1) - max(1.0, strength * steps)) <= 0.5
    assert torch.equal(select_levels(sigmas, 1), sigmas)


@given(st.integers(0, 1000))
def test_interpolated_noise_keeps_its_variance(seed: int) -> None:
    one, other = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    path = slerp(one, other, torch.linspace(0, 1, 7))
    torch.testing.assert_close(path[0], one)
    torch.testing.assert_close(path[-1], other)
    norms = path.flatten(1).norm(dim=1)
    low, high = sorted((one.norm(), other.norm()))
    # Between two ends of different length it swings over neither by more than a little.
    assert (norms > 0.95 * low).all()
    assert (norms < 1.05 * high).all()


@pytest.fixture
def model(dataset: Path, tmp_path: Path) -> DiffusionModel:
    return load_model(run(dataset, tmp_path / "run").final)


def test_hidden_pixels_matter_only_below_full_strength(model: DiffusionModel) -> None:
    hidden = torch.where(LEFT, IMAGE, 255 - IMAGE)
    assert not torch.equal(hidden, IMAGE)

    def filled(image: Tensor, strength: float) -> Tensor:
        return sample(model, range(2), 0, CONFIG, edit=Edit(image, LEFT, strength))

    assert torch.equal(filled(IMAGE, 1), filled(hidden, 1))
    assert not torch.equal(filled(IMAGE, 0.5), filled(hidden, 0.5))


IMAGE = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LEFT = torch.zeros(8, 8, dtype=torch.bool)
LEFT[:, :4] = True
CONFIG = sampling_config(steps=6, compute_batch=8)


@pytest.mark.parametrize(("resample_steps", "guided"), [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("sampler", [pytest.param("ddpm", marks=pytest.mark.slow), "dpmpp_2m"])
def test_inpainting_keeps_known_pixels_independent_of_the_batch(
    model: DiffusionModel, resample_steps: int, guided: bool, sampler: str
) -> None:
    config = with_sampler(CONFIG, sampler)
    edit = Edit(IMAGE, LEFT, resample_steps=resample_steps, stretch=2, guided=guided)
    many = sample(model, range(12), 3, config, edit=edit)
    assert torch.equal(many[..., :4], IMAGE[..., :4].expand(12, -1, -1, -1))
    assert len({each.numpy().tobytes() for each in many[..., 4:]}) == 12
    assert torch.equal(sample(model, [9], 3, config, edit=edit)[0], many[9])


def test_stronger_changes_leave_less_of_the_image(model: DiffusionModel) -> None:
    finer = CONFIG.model_copy(update={"steps": 20})
    changes = [
        (sample(model, range(8), 0, finer, edit=Edit(IMAGE, strength=strength)).float() - IMAGE).abs().mean()
        for strength in (0.05, 0.15, 0.25, 0.4)
    ]
    assert changes == sorted(changes)
    assert changes[0] < changes[3] / 5


def test_interpolation_starts_and_ends_at_the_images_of_its_seeds(model: DiffusionModel) -> None:
    even = Conditions(labels=("even",))
    path = interpolate(model, 3, 4, 9, CONFIG, conditions=even).int()
    ends = torch.stack([sample(model, [0], seed, CONFIG, conditions=even)[0] for seed in (3, 4)]).int()
    # Beside others in its batch, the last bits of an image are others.
    assert (path[[0, -1]] - ends).abs().max() <= 3
    steps = (path[1:] - path[:-1]).abs().float().mean((1, 2, 3))
    assert steps.max() < (ends[1] - ends[0]).abs().float().mean()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Edit(IMAGE, strength=0), "is not above 0 and at most 1"),
        (lambda: Edit(IMAGE), "give a mask, or a strength below 1"),
        (lambda: Edit(IMAGE, strength=0.5, resample_steps=3), "nothing for the image to fit"),
        (lambda: Edit(IMAGE, strength=0.5, guided=True), "nothing for the image to fit"),
        (lambda: Edit(IMAGE, LEFT, resample_steps=0), "use 1 or more of either"),
        (lambda: Edit(IMAGE, LEFT, stretch=0), "use 1 or more of either"),
        (lambda: Edit(IMAGE, LEFT[:, :4]), "the mask has 8×4 pixels and the image 8×8"),
        (lambda: Edit(IMAGE, torch.ones(8, 8, dtype=torch.bool)), "keeps all of the image"),
        (lambda: Edit(IMAGE, torch.zeros(8, 8, dtype=torch.bool)), "keeps nothing of the image"),
    ],
)
def test_edits_without_effect_are_an_error(make: Callable[[], Edit], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(("one", "other", "count"), [(3, 3, 9), (3, 4, 1)])
def test_interpolation_needs_two_seeds_and_images(model: DiffusionModel, one: int, other: int, count: int) -> None:
    with pytest.raises(UserError, match="give two seeds, and ask for two or more"):
        interpolate(model, one, other, count, CONFIG)


def test_image_of_another_size_is_an_error(model: DiffusionModel) -> None:
    edit = Edit(torch.zeros(1, 9, 9, dtype=torch.uint8), strength=0.5)
    with pytest.raises(UserError, match=r"the image has 1×9×9 .* and the model generates 1×8×8"):
        sample(model, [0], 0, CONFIG, edit=edit)
