from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.process.config import Prediction
from diffusion.process.denoiser import Denoiser
from diffusion.process.parametrization import Parametrization
from diffusion.process.schedules import linear_schedule
from tests.builders.ideal_denoiser import IdealDenoiser, IdealNetwork, two_tone_points

SCHEDULE = linear_schedule(1000)
POINTS = two_tone_points()
SIGMA_DATA = 0.7


@given(st.sampled_from(["epsilon", "v_prediction", "sample", "edm"]), st.floats(0.02, 20))
def test_a_perfect_network_is_the_ideal_denoiser_at_any_sigma(prediction: Prediction, sigma: float) -> None:
    network = IdealNetwork(POINTS, SCHEDULE.sigmas.numpy(), prediction, SIGMA_DATA)
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x, level = POINTS + sigma * noise, torch.tensor(sigma)
    estimate = Denoiser(network, SCHEDULE, Parametrization(prediction, SIGMA_DATA))(x, level)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate, IdealDenoiser(POINTS)(x, level), atol=2e-3, rtol=0)


def test_one_sigma_per_image_equals_one_at_a_time() -> None:
    denoiser = Denoiser(
        IdealNetwork(POINTS, SCHEDULE.sigmas.numpy(), "v_prediction"), SCHEDULE, Parametrization("v_prediction")
    )
    x, sigmas = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    one_by_one = [denoiser(x[i : i + 1], sigmas[i]) for i in range(3)]
    torch.testing.assert_close(denoiser(x, sigmas), torch.cat(one_by_one))


def test_estimates_are_clipped_to_the_image_range_by_default() -> None:
    denoiser = Denoiser(lambda x, time: 3 * torch.ones_like(x), SCHEDULE, Parametrization("sample"))
    x, sigma = torch.zeros(1, 1, 4, 4), torch.tensor(1.0)
    assert denoiser(x, sigma).unique().tolist() == [1.0]
    assert replace(denoiser, clip=False)(x, sigma).unique().tolist() == [3.0]
