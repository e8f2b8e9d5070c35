"""Predictions and weightings against the papers' own words, diffusers, and each other."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.families.config import ModelConfig
from diffusion.families.denoising_objective import Uncertainty
from diffusion.process.config import Prediction
from diffusion.process.denoiser import Denoiser
from diffusion.process.objective import Objective, make_edm_weight, make_objective, make_plain_weight, make_weight
from diffusion.process.parametrization import Parametrization
from diffusion.process.schedules import NoiseSchedule, cosine_schedule, edm_schedule, linear_schedule, sigmoid_schedule
from diffusion.training.config import TrainingConfig

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample", "edm")
SIGMA_DATA = 0.5
predictions = st.sampled_from(PREDICTIONS)
weightings = st.sampled_from(["plain", "min_snr", "soft_min_snr", "edm"])
schedules = st.sampled_from([linear_schedule(1000), cosine_schedule(1000), sigmoid_schedule(1000), edm_schedule(1000)])
sigmas = st.floats(0.002, 80)


def images(seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def level(sigma: float, count: int = 2) -> Tensor:
    return torch.full((count,), sigma, dtype=torch.float64)


@given(predictions, sigmas)
def test_a_perfect_prediction_gives_back_the_image(prediction: Prediction, sigma: float) -> None:
    x0, noise, ours = images(0), images(1), Parametrization(prediction, SIGMA_DATA)
    recovered = ours.to_x0(ours.target(x0, noise, level(sigma)), x0 + sigma * noise, level(sigma))
    # Of x_0 + σ ε float32 keeps seven digits.
    torch.testing.assert_close(recovered, x0, atol=2e-6 * (1 + sigma), rtol=0)


@given(st.sampled_from(["epsilon", "v_prediction", "sample"]), st.integers(0, 999))
def test_predictions_and_inputs_match_diffusers(prediction: Prediction, t: int) -> None:
    schedule, x0, noise, at = cosine_schedule(1000), images(0), images(1), torch.tensor([t, t])
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    ours, sigma = Parametrization(prediction), schedule.sigma(at)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(x0, noise, at)}[prediction]
    # Theirs takes the roots in float32, which is where the last digits differ.
    torch.testing.assert_close(ours.target(x0, noise, sigma), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        ours.make_noisy_input(x0, noise, sigma), theirs.add_noise(x0, noise, at), atol=2e-5, rtol=0
    )


@given(sigmas)
def test_edms_preconditioning_is_that_of_diffusers(sigma: float) -> None:
    theirs, ours = EDMEulerScheduler(sigma_data=SIGMA_DATA), Parametrization("edm", SIGMA_DATA)
    x0, noise, output = images(0), images(1), images(2)
    x = x0 + sigma * noise
    torch.testing.assert_close(
        ours.make_noisy_input(x0, noise, level(sigma)),
        theirs.precondition_inputs(x, torch.tensor(sigma)),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        ours.to_x0(output, x, level(sigma)),
        theirs.precondition_outputs(x, output, torch.tensor(sigma)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_edms_time_is_its_c_noise_in_another_unit() -> None:
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    time, noise = edm_schedule(1000).time(sigma).double(), sigma.log() / 4
    torch.testing.assert_close((time - time[0]) / (time[-1] - time[0]), (noise - noise[0]) / (noise[-1] - noise[0]))


def network_wrong_by(
    error: float, prediction: Prediction, schedule: NoiseSchedule, x0: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network whose answers stand for the image ``x0 + error``, by the definitions in the papers."""

    def answer(scaled: Tensor, time: Tensor) -> Tensor:
        sigma = schedule.sigmas[time.long()][:, None, None, None]
        believed = x0.double() + error
        if prediction == "edm":
            x = scaled * (sigma**2 + SIGMA_DATA**2).sqrt()
            c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
            return (believed - c_skip * x) * (sigma**2 + SIGMA_DATA**2).sqrt() / (sigma * SIGMA_DATA)
        alpha_bar = schedule.alphas_cumprod[time.long()][:, None, None, None]
        noise = (scaled - alpha_bar.sqrt() * believed) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * believed
        return {"epsilon": noise, "v_prediction": v, "sample": believed}[prediction]

    return answer


def as_tabled(weighting: str, prediction: Prediction, snr: float, gamma: float) -> float:
    """What an error of x_0 weighs: arXiv 2303.09556 (section 3), 2206.00364 (table 1), 2401.11605."""
    of_plain = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1, "edm": snr + 1 / SIGMA_DATA**2}
    return {
        "plain": of_plain[prediction],
        "min_snr": min(snr, gamma),
        "soft_min_snr": 1 / (1 / snr + SIGMA_DATA**2),
        "edm": snr + 1 / SIGMA_DATA**2,
    }[weighting]


@given(predictions, weightings, schedules, st.integers(0, 998), st.floats(0.5, 20))
def test_an_error_of_the_image_weighs_what_the_papers_say(
    prediction: Prediction, weighting: str, schedule: NoiseSchedule, t: int, gamma: float
) -> None:
    config = TrainingConfig.model_validate(
        {"images": 1, "weighting": weighting, "min_snr_gamma": gamma if weighting == "min_snr" else None}
    )
    parametrization = Parametrization(prediction, SIGMA_DATA)
    objective = Objective(schedule, parametrization, make_weight(config, parametrization))
    x0, noise = images(0), images(1)
    loss = objective.loss(network_wrong_by(0.5, prediction, schedule, x0), x0, torch.tensor([t, t]), noise)
    expected = 0.25 * as_tabled(weighting, prediction, (schedule.sigmas[t] ** -2).item(), gamma)
    # At the noisiest levels float32 can hardly show an error of x_0 in what is predicted.
    torch.testing.assert_close(loss, torch.full((2,), expected), rtol=5e-3, atol=1e-9)


@given(weightings.filter(lambda weighting: weighting != "plain"), st.integers(0, 990))
def test_weights_of_image_errors_do_not_depend_on_the_prediction(weighting: str, t: int) -> None:
    schedule, x0, noise = cosine_schedule(1000), images(0), images(1)
    losses = []
    for prediction in PREDICTIONS:
        model = ModelConfig(prediction=prediction, schedule="cosine")
        config = TrainingConfig.model_validate({"images": 1, "weighting": weighting})
        objective = make_objective(model, config, SIGMA_DATA, (1, 8, 8))
        network = network_wrong_by(0.5, prediction, schedule, x0)
        losses.append(objective.loss(network, x0, torch.tensor([t, t]), noise))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=5e-3, atol=1e-9)


def test_each_image_has_its_own_step_and_its_own_loss() -> None:
    objective = make_objective(ModelConfig(), TrainingConfig(images=1, weighting="min_snr"), SIGMA_DATA, (1, 8, 8))
    x0, noise, t = images(0, 3), images(1, 3), torch.tensor([10, 500, 900])

    def network(x: Tensor, time: Tensor) -> Tensor:
        return x * time[:, None, None, None] / 1000

    together = objective.loss(network, x0, t, noise)
    apart = [objective.loss(network, x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_loss_are_float32_under_autocast(prediction: Prediction) -> None:
    parametrization = Parametrization(prediction, SIGMA_DATA)
    objective = Objective(cosine_schedule(1000), parametrization, make_plain_weight(parametrization))
    x0, noise, t = images(0), images(1), torch.tensor([3, 700])
    inputs: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        inputs.append(x)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(network, x0, t, noise)
    assert (loss.dtype, inputs[0].dtype) == (torch.float32, torch.float32)
    again = objective.loss(network, x0, t, noise)
    torch.testing.assert_close(inputs[0], inputs[1], atol=0, rtol=0)
    torch.testing.assert_close(loss, again, atol=0, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_residual_objective_equals_training_on_the_difference(prediction: Prediction) -> None:
    objective = Objective(edm_schedule(1000), Parametrization(prediction, 0.2), make_edm_weight(0.2))
    generator = torch.Generator().manual_seed(0)
    x0, around, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(3))
    t = torch.tensor([1.0, 300.0, 600.0, 990.0])

    def network(x: Tensor, time: Tensor) -> Tensor:
        return 0.3 * x.flip(-1) + time[:, None, None, None] / 1000

    loss = objective.loss(network, x0, t, noise, around)
    assert torch.equal(loss, objective.loss(network, x0 - around, t, noise))
    # And what a denoiser makes of it has the very error that was minimised.
    sigma = objective.schedule.sigma(t)
    denoiser = Denoiser(network, objective.schedule, objective.parametrization, clip=False, around=around)
    error = denoiser(x0 + sigma.float()[:, None, None, None] * noise, sigma) - x0
    torch.testing.assert_close(
        (objective.weight(sigma) * error.double().square().mean((1, 2, 3))).float(), loss, rtol=1e-3, atol=1e-5
    )


def test_learned_uncertainty_converges_to_the_log_loss_per_time() -> None:
    time = torch.linspace(0, 999, 64)
    loss = (time / 200).sin().exp()
    uncertainty = Uncertainty()
    optimizer = torch.optim.Adam(uncertainty.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        uncertainty(loss, time).mean().backward()
        optimizer.step()
    # L / e^u + u is 1 + ln L where e^u is L.
    torch.testing.assert_close(uncertainty(loss, time), 1 + loss.log(), atol=0.01, rtol=0)


def test_learned_uncertainty_starts_without_effect() -> None:
    loss = torch.tensor([0.1, 2.0])
    assert torch.equal(Uncertainty()(loss, torch.tensor([0.0, 999.0])), loss)
