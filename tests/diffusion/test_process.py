import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion.models.config import ModelConfig
from diffusion.process import NoiseSchedule, cosine_schedule, linear_schedule, make_schedule

THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
schedules = st.builds(
    lambda make, steps: make(steps),
    st.sampled_from([linear_schedule, cosine_schedule]),
    st.integers(2, 2000),
)


@pytest.fixture(params=["linear", "cosine"])
def pair(request: pytest.FixtureRequest) -> tuple[NoiseSchedule, DDPMScheduler]:
    ours = make_schedule(ModelConfig(schedule=request.param))
    return ours, DDPMScheduler(1000, beta_schedule=THEIR_NAME[request.param])


def test_alphas_cumprod_are_those_of_diffusers(pair: tuple[NoiseSchedule, DDPMScheduler]) -> None:
    ours, theirs = pair
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)


def test_noising_is_that_of_diffusers(pair: tuple[NoiseSchedule, DDPMScheduler]) -> None:
    ours, theirs = pair
    x0, noise = torch.rand(1000, 1, 2, 2) * 2 - 1, torch.randn(1000, 1, 2, 2)
    t = torch.arange(1000)
    # Theirs takes the roots in float32, which is where the last digits differ.
    expected = theirs.add_noise(x0, noise, t)
    torch.testing.assert_close(ours.q_sample(x0, t, noise), expected, atol=2e-5, rtol=0)


@given(schedules)
def test_signal_falls_strictly_from_nearly_all_to_nearly_nothing(schedule: NoiseSchedule) -> None:
    alpha_bar = schedule.alphas_cumprod
    assert 0 < alpha_bar[-1] < 0.06
    assert alpha_bar[0] < 1
    assert (alpha_bar.diff() < 0).all()


@given(schedules)
def test_sigma_and_snr_are_two_views_of_the_same_levels(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(schedule.snr * schedule.sigmas**2, torch.ones(schedule.steps).double())
    torch.testing.assert_close(1 / (1 + schedule.sigmas**2), schedule.alphas_cumprod)


@given(schedules, st.data())
def test_shares_of_picture_and_noise_keep_float32_precision_at_every_step(
    schedule: NoiseSchedule, data: st.DataObject
) -> None:
    t = data.draw(st.integers(0, schedule.steps - 1))
    one, zero, at = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([t])
    alpha_bar = schedule.alphas_cumprod[t].item()
    assert schedule.q_sample(one, at, zero).item() == pytest.approx(math.sqrt(alpha_bar), rel=1e-6)
    assert schedule.q_sample(zero, at, one).item() == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-6)


def test_each_picture_is_noised_at_its_own_step() -> None:
    schedule = cosine_schedule(1000)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    one_by_one = [schedule.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(schedule.q_sample(x0, t, noise), torch.cat(one_by_one), atol=0, rtol=0)


def test_a_shorter_linear_schedule_adds_as_much_noise_in_all() -> None:
    long, short = linear_schedule(1000).alphas_cumprod[-1], linear_schedule(250).alphas_cumprod[-1]
    assert short.log().item() == pytest.approx(long.log().item(), rel=0.1)
