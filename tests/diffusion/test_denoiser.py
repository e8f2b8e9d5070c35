from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.denoiser import Denoiser
from diffusion.models.config import Prediction
from diffusion.process import cosine_schedule, linear_schedule
from tests.diffusion.ideal_denoiser import IdealDenoiser, IdealNetwork, two_tone_points

SCHEDULE = linear_schedule(1000)
POINTS = two_tone_points()


@given(st.sampled_from(["noise", "v", "x0"]), st.floats(0.02, 20))
def test_a_perfect_network_is_the_ideal_denoiser_at_any_sigma(prediction: Prediction, sigma: float) -> None:
    network = IdealNetwork(POINTS, SCHEDULE.sigmas.numpy(), prediction)
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x, level = POINTS + sigma * noise, torch.tensor(sigma)
    estimate = Denoiser(network, SCHEDULE, prediction)(x, level)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate, IdealDenoiser(POINTS)(x, level), atol=2e-3, rtol=0)


def test_one_sigma_per_picture_is_the_same_as_one_at_a_time() -> None:
    denoiser = Denoiser(IdealNetwork(POINTS, SCHEDULE.sigmas.numpy(), "v"), SCHEDULE, "v")
    x, sigmas = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    one_by_one = [denoiser(x[i : i + 1], sigmas[i]) for i in range(3)]
    torch.testing.assert_close(denoiser(x, sigmas), torch.cat(one_by_one))


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000), cosine_schedule(7)])
def test_time_finds_each_step_of_the_schedule_and_goes_straight_between(schedule) -> None:
    denoiser = Denoiser(lambda x, time: x, schedule, "x0")
    steps = torch.arange(schedule.steps).float()
    torch.testing.assert_close(denoiser.time(schedule.sigmas), steps, atol=1e-4, rtol=0)
    halfway = (schedule.sigmas[1:] * schedule.sigmas[:-1]).sqrt()
    torch.testing.assert_close(denoiser.time(halfway), steps[1:] - 0.5, atol=1e-4, rtol=0)


def test_time_stays_at_the_ends_for_sigmas_beyond_the_schedule() -> None:
    denoiser = Denoiser(lambda x, time: x, SCHEDULE, "x0")
    assert denoiser.time(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, 999]


def test_estimates_stay_in_the_range_of_pictures_unless_told_otherwise() -> None:
    denoiser = Denoiser(lambda x, time: 3 * torch.ones_like(x), SCHEDULE, "x0")
    x, sigma = torch.zeros(1, 1, 4, 4), torch.tensor(1.0)
    assert denoiser(x, sigma).unique().tolist() == [1.0]
    assert replace(denoiser, clip=False)(x, sigma).unique().tolist() == [3.0]
