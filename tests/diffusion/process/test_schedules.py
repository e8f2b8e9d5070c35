import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.families.config import ModelConfig
from diffusion.process.schedules import (
    NoiseSchedule,
    cosine_schedule,
    edm_schedule,
    linear_schedule,
    make_schedule,
    rescale_zero_terminal_snr,
    sigmoid_schedule,
)

THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
schedules = st.builds(
    lambda make, steps: make(steps),
    st.sampled_from([linear_schedule, cosine_schedule, sigmoid_schedule, edm_schedule]),
    st.integers(2, 2000),
)


@pytest.fixture(params=["linear", "cosine"])
def pair(request: pytest.FixtureRequest) -> tuple[NoiseSchedule, DDPMScheduler]:
    ours = make_schedule(ModelConfig(schedule=request.param), (1, 28, 28))
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
def test_sigma_is_another_view_of_the_same_levels(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(1 / (1 + schedule.sigmas**2), schedule.alphas_cumprod)


@given(schedules, st.data())
def test_image_and_noise_shares_keep_float32_precision_everywhere(schedule: NoiseSchedule, data: st.DataObject) -> None:
    t = data.draw(st.integers(0, schedule.steps - 1))
    one, zero, at = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([t])
    alpha_bar = schedule.alphas_cumprod[t].item()
    assert schedule.q_sample(one, at, zero).item() == pytest.approx(math.sqrt(alpha_bar), rel=1e-6)
    assert schedule.q_sample(zero, at, one).item() == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-6)


def test_each_image_is_noised_at_its_own_step() -> None:
    schedule = cosine_schedule(1000)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    one_by_one = [schedule.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(schedule.q_sample(x0, t, noise), torch.cat(one_by_one), atol=0, rtol=0)


def test_a_shorter_linear_schedule_adds_as_much_noise_in_all() -> None:
    long, short = linear_schedule(1000).alphas_cumprod[-1], linear_schedule(250).alphas_cumprod[-1]
    assert short.log().item() == pytest.approx(long.log().item(), rel=0.1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_without_terminal_signal_equals_that_of_diffusers(name: str) -> None:
    ours = make_schedule(ModelConfig.model_validate({"schedule": name, "zero_terminal_snr": True}), (1, 28, 28))
    theirs = DDPMScheduler(1000, beta_schedule=THEIR_NAME[name], rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)
    assert ours.q_sample(torch.ones(1, 1, 1, 1), torch.tensor([999]), torch.zeros(1, 1, 1, 1)).item() < 3e-4


@given(schedules)
def test_stretching_keeps_the_first_level_and_the_order_of_all(schedule: NoiseSchedule) -> None:
    stretched = rescale_zero_terminal_snr(schedule)
    assert stretched.alphas_cumprod[0].item() == pytest.approx(schedule.alphas_cumprod[0].item())
    assert (stretched.alphas_cumprod.diff() < 0).all()
    assert stretched.sigmas.isfinite().all()


def test_the_sigmoid_falls_as_its_paper_says() -> None:
    # arXiv 2212.11972: half the signal is left in the middle, and as much is lost on one side as is left on the other.
    alpha_bar = sigmoid_schedule(1000).alphas_cumprod
    curve = torch.cat([torch.ones(1).double(), alpha_bar])
    assert curve[500].item() == pytest.approx(0.5)
    torch.testing.assert_close(curve[1:999], 1 - curve.flip(0)[1:999], atol=1e-4, rtol=0)
    expected = (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(-1.5))) / (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(3)))
    assert curve[750].item() == pytest.approx(expected, rel=1e-6)


def test_edm_s_levels_rise_by_equal_factors() -> None:
    sigmas = edm_schedule(1000).sigmas
    assert [sigmas[0].item(), sigmas[-1].item()] == pytest.approx([0.002, 80])
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], (sigmas[1] / sigmas[0]).expand(999), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("shape", "highest"), [((1, 28, 28), 80), ((3, 32, 32), 80), ((3, 128, 128), 320)])
def test_highest_level_of_edm_grows_with_the_resolution(shape: tuple[int, int, int], highest: float) -> None:
    assert make_schedule(ModelConfig(), shape).sigmas[-1].item() == pytest.approx(highest)


@given(schedules)
def test_time_interpolates_between_the_steps_of_the_schedule(schedule: NoiseSchedule) -> None:
    steps = torch.arange(schedule.steps)
    torch.testing.assert_close(schedule.time(schedule.sigmas), steps.float(), atol=1e-3, rtol=0)
    assert torch.equal(schedule.sigma(steps), schedule.sigmas)
    halfway = (schedule.sigmas[1:] * schedule.sigmas[:-1]).sqrt()
    torch.testing.assert_close(schedule.time(halfway), steps[1:] - 0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(schedule.sigma(steps[1:] - 0.5), halfway)


def test_time_stays_at_the_ends_for_sigmas_beyond_the_schedule() -> None:
    assert linear_schedule(1000).time(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, 999]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_terminal_snr": True, "schedule": "cosine", "prediction": "epsilon"}, "use v_prediction, sample or edm"),
        ({"zero_terminal_snr": True, "schedule": "edm"}, "leave one out"),
    ],
)
def test_contradicting_schedule_settings_are_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig.model_validate(settings)
