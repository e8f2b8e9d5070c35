from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffusion.config_sampling import SamplerName
from diffusion.denoiser import Denoiser
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.objective import Parametrization
from diffusion.process import NoiseSchedule, cosine_schedule, linear_schedule
from diffusion.samplers import SAMPLERS, sigma_grid
from tests.diffusion.ideal_denoiser import IdealDenoiser, two_tone_points

DETERMINISTIC: tuple[SamplerName, ...] = ("ddim", "heun", "dpmpp_2m")
POINTS = two_tone_points(6)


def noises(seed: int, count: int, size: int = 4) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, size, size, generator=generator)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asks for no noise")


@pytest.fixture(scope="module")
def network() -> UNet:
    """A small network of random weights: nonlinear in picture and time, which is all that is asked of it."""
    torch.manual_seed(0)
    config = ModelConfig(width=16, multipliers=(1,), blocks=1, attention=(), patch=1)
    network = UNet(config, 1, 4).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_sampler_lands_on_the_points_of_a_finite_set_and_reaches_all(
    name: SamplerName, schedule: NoiseSchedule
) -> None:
    noise, sigmas = noises(0, 256), sigma_grid(schedule, 50)
    pictures = SAMPLERS[name](IdealDenoiser(POINTS), sigmas[0].float() * noise(), sigmas, noise)
    distances = (pictures[:, None] - POINTS).flatten(2).abs().amax(-1)
    assert (distances.min(1).values < 0.02).float().mean() > 0.98
    shares = torch.bincount(distances.argmin(1), minlength=len(POINTS)) / len(pictures)
    assert shares.min() > 0.5 / len(POINTS)


def test_ddpm_over_all_steps_is_that_of_diffusers_step_for_step(network: UNet) -> None:
    theirs = DDPMScheduler(1000, beta_schedule="linear", prediction_type="v_prediction", clip_sample=True)
    schedule = linear_schedule(1000)
    seen: list[Tensor] = []
    noise, sigmas = noises(5, 2), sigma_grid(schedule, 1000)
    start = noise()
    SAMPLERS["ddpm"](
        Denoiser(network, schedule, Parametrization("v")),
        sigmas[0].float() * start,
        sigmas,
        noise,
        lambda i, x, x0: seen.append(x / (1 + sigmas[i] ** 2).sqrt().float()),
    )

    generator = torch.Generator().manual_seed(5)
    torch.randn(start.shape, generator=generator)
    x = seen[0]
    theirs.set_timesteps(1000)
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(seen[i], x, atol=1e-4, rtol=1e-4, msg=f"step {i}")
        x = theirs.step(network(x, t.expand(2).float()), t, x, generator=generator).prev_sample


def test_ddim_is_that_of_diffusers_step_for_step(network: UNet) -> None:
    theirs = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=False)
    theirs.set_timesteps(20)
    schedule = cosine_schedule(1000)
    sigmas = torch.cat([schedule.sigmas[theirs.timesteps], torch.zeros(1).double()])
    seen: list[Tensor] = []
    result = SAMPLERS["ddim"](
        Denoiser(network, schedule, Parametrization("noise"), clip=False),
        sigmas[0].float() * noises(0, 2)(),
        sigmas,
        no_noise,
        lambda i, x, x0: seen.append(x / (1 + sigmas[i] ** 2).sqrt().float()),
    )
    x = seen[0]
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(seen[i], x, atol=1e-4, rtol=1e-4, msg=f"step {i}")
        x = theirs.step(network(x, t.expand(2).float()), t, x).prev_sample
    torch.testing.assert_close(result, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_is_that_of_diffusers_step_for_step(network: UNet, steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        1000, beta_schedule="linear", prediction_type="v_prediction", final_sigmas_type="zero"
    )
    theirs.set_timesteps(steps)
    schedule = linear_schedule(1000)
    sigmas = torch.cat([schedule.sigmas[theirs.timesteps], torch.zeros(1).double()])
    seen: list[Tensor] = []
    result = SAMPLERS["dpmpp_2m"](
        Denoiser(network, schedule, Parametrization("v"), clip=False),
        sigmas[0].float() * noises(0, 2)(),
        sigmas,
        no_noise,
        lambda i, x, x0: seen.append(x / (1 + sigmas[i] ** 2).sqrt().float()),
    )
    x = seen[0]
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(seen[i], x, atol=1e-4, rtol=1e-4, msg=f"step {i}")
        x = theirs.step(network(x, t.expand(2).float()), t, x).prev_sample
    torch.testing.assert_close(result, x, atol=1e-4, rtol=1e-4)


SPREAD = 0.5


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of data from N(0, SPREAD²), whose reverse ODE has a closed form."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def error_of(name: SamplerName, steps: int) -> float:
    x = torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    sigmas = torch.cat([torch.from_numpy(np.geomspace(10, 1e-4, steps)), torch.zeros(1)])
    exact = x * SPREAD / (SPREAD**2 + 10.0**2) ** 0.5
    return (SAMPLERS[name](gaussian_denoiser, x, sigmas, no_noise) - exact).abs().item()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_deterministic_samplers_converge_to_the_exact_solution_at_their_order(name: SamplerName, order: int) -> None:
    coarse, fine = error_of(name, 200), error_of(name, 400)
    assert fine < 0.01
    assert coarse / fine == pytest.approx(2**order, rel=0.2)


def test_ddpm_draws_from_the_distribution_of_the_data() -> None:
    schedule = cosine_schedule(1000)
    noise, sigmas = noises(1, 2000, 1), sigma_grid(schedule, 1000)
    pictures = SAMPLERS["ddpm"](gaussian_denoiser, sigmas[0].float() * noise(), sigmas, noise)
    assert pictures.std().item() == pytest.approx(SPREAD, rel=0.06)
    assert pictures.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_callback_sees_every_level_in_turn_with_picture_and_estimate(name: SamplerName) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    denoiser, sigmas = IdealDenoiser(POINTS), sigma_grid(linear_schedule(1000), 7)
    noise = noises(0, 3)
    SAMPLERS[name](denoiser, sigmas[0].float() * noise(), sigmas, noise, lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == list(range(7))
    for i, x, x0 in seen:
        torch.testing.assert_close(x0, denoiser(x, sigmas[i]))


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000), cosine_schedule(20)])
@pytest.mark.parametrize("steps", [2, 20, 250, 1000])
def test_grids_fall_from_the_schedules_noisiest_usable_level_to_nothing(schedule: NoiseSchedule, steps: int) -> None:
    sigmas = sigma_grid(schedule, steps)
    assert len(sigmas) == steps + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-9)
    assert sigmas[-2] >= schedule.sigmas[0] * (1 - 1e-9)


def test_as_many_steps_as_the_schedule_has_are_the_schedule() -> None:
    schedule = cosine_schedule(50)
    torch.testing.assert_close(sigma_grid(schedule, 50)[:-1], schedule.sigmas.flip(0), atol=0, rtol=0)
