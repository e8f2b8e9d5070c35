import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.models.config import Prediction
from diffusion.objective import per_sample_loss, target, to_x0
from diffusion.process import NoiseSchedule, cosine_schedule, linear_schedule

PREDICTIONS: tuple[Prediction, ...] = ("noise", "v", "x0")
predictions = st.sampled_from(PREDICTIONS)
schedules = st.sampled_from([linear_schedule(1000), cosine_schedule(1000)])
steps = st.integers(0, 998)  # at the cosine schedule's last step a float32 picture is all noise


def pictures(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@given(predictions, st.floats(0.01, 0.9999))
def test_a_perfect_prediction_gives_back_the_picture(prediction: Prediction, alpha_bar: float) -> None:
    x0, noise, level = pictures(0), pictures(1), torch.tensor(alpha_bar, dtype=torch.float64)
    x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise
    recovered = to_x0(prediction, target(prediction, x0, noise, level), x_t, level)
    torch.testing.assert_close(recovered, x0, atol=1e-5, rtol=1e-5)


def test_v_is_the_velocity_of_diffusers() -> None:
    x0, noise, t = pictures(0, 1000), pictures(1, 1000), torch.arange(1000)
    expected = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").get_velocity(x0, noise, t)
    ours = target("v", x0, noise, cosine_schedule(1000).alpha_bar(t))
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=0)


def network_wrong_by(error: float, prediction: Prediction, schedule: NoiseSchedule, x0: Tensor) -> object:
    """A network whose answers stand for the picture ``x0 + error``, by the definitions in the papers."""

    def answer(x_t: Tensor, time: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[time.long()][:, None, None, None]
        believed = x0.double() + error
        noise = (x_t - alpha_bar.sqrt() * believed) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * believed
        return {"noise": noise, "v": v, "x0": believed}[prediction]

    return answer


@given(predictions, schedules, steps, st.none() | st.floats(0.5, 20))
def test_an_error_of_the_picture_weighs_what_the_papers_say(
    prediction: Prediction, schedule: NoiseSchedule, t: int, gamma: float | None
) -> None:
    snr = schedule.snr[t].item()
    plain = {"noise": snr, "x0": 1.0, "v": snr + 1}[prediction]
    expected = plain if gamma is None else min(snr, gamma)
    x0, noise = pictures(0), pictures(1)
    network = network_wrong_by(0.5, prediction, schedule, x0)
    loss = per_sample_loss(network, schedule, prediction, gamma, x0, torch.tensor([t, t]), noise)  # type: ignore[arg-type]
    # An error of x_0 that float32 noise and v can hardly show is what the absolute part allows for.
    torch.testing.assert_close(loss, torch.full((2,), 0.25 * expected), rtol=2e-3, atol=1e-9)


def test_each_picture_has_its_own_step_and_its_own_loss() -> None:
    schedule, x0, noise = cosine_schedule(1000), pictures(0, 3), pictures(1, 3)
    t = torch.tensor([10, 500, 900])

    def network(x: Tensor, time: Tensor) -> Tensor:
        return x * time[:, None, None, None] / 1000

    together = per_sample_loss(network, schedule, "v", 5.0, x0, t, noise)
    apart = [
        per_sample_loss(network, schedule, "v", 5.0, x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_loss_are_float32_under_autocast(prediction: Prediction) -> None:
    schedule, x0, noise, t = cosine_schedule(1000), pictures(0), pictures(1), torch.tensor([3, 700])
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        loss = per_sample_loss(network, schedule, prediction, 5.0, x0, t, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(seen[0], schedule.q_sample(x0, t, noise), atol=0, rtol=0)
    torch.testing.assert_close(loss, per_sample_loss(network, schedule, prediction, 5.0, x0, t, noise), atol=0, rtol=0)
