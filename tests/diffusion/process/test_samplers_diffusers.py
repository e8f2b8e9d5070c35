"""Every sampler beside its counterpart in diffusers: from the same noise, by the same network, step for step.

In float64, so that nothing but the steps is compared.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusion.process.config import Prediction
from diffusion.process.denoiser import Denoiser
from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import SAMPLING_ADAPTER, SamplingConfig, sampling_config
from diffusion.process.schedules import cosine_schedule, linear_schedule

THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SCHEDULES = {"linear": linear_schedule(1000), "cosine": cosine_schedule(1000)}
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 1, 4, 4)
WEIGHTS = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3

predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


Network = Callable[[Tensor, Tensor], Tensor]


def network_of(prediction: Prediction, schedule: str) -> Network:
    """Answers that stand for an image which is a random function of x_t and time, by the definitions in the papers.

    It is nonlinear, which is all that is asked of it, and bounded, so that no digits are lost.
    """

    def answer(x: Tensor, time: Tensor) -> Tensor:
        h = torch.tanh(x.flatten(1) @ WEIGHTS[0].T + (time[:, None] / 300 + torch.arange(8)).cos())
        x0 = (h @ WEIGHTS[1]).view_as(x)
        alpha_bar = 1 / (1 + SCHEDULES[schedule].sigma(time) ** 2)[:, None, None, None]
        noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
        return {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction]

    return answer


def noises(seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def after_the_start(seed: int) -> torch.Generator:
    """A generator that has given the noise from which images start, and gives the rest of ``noises(seed)``."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return generator


def denoiser_of(prediction: Prediction, schedule: str, clip: bool = False) -> Denoiser:
    return Denoiser(network_of(prediction, schedule), SCHEDULES[schedule], Parametrization(prediction), clip)


def ours(
    config: SamplingConfig, schedule: str, sigmas: Tensor, prediction: Prediction, clip: bool = False
) -> list[Tensor]:
    """x at each evaluation in turn, and the image; with the variance of the forward process."""
    inputs: list[Tensor] = []
    noise, denoiser = noises(5), denoiser_of(prediction, schedule, clip)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inputs.append(x / (1 + sigma**2).sqrt())
        return denoiser(x, sigma)

    end = config.build_sampler()(denoise, sigmas[0] * noise(), sigmas, noise)
    return [*inputs, end]


def compare(
    theirs: Any,
    config: SamplingConfig,
    schedule: str,
    prediction: Prediction,
    clip: bool = False,
    fresh: Callable[[], Tensor] | None = None,
    **step: Any,
) -> None:
    """With a scheduler whose x is that of the forward process, at whole times; ``fresh``: its noise, if it is given."""
    inputs = ours(config, schedule, levels_of(theirs, schedule), prediction, clip)
    network = network_of(prediction, schedule)
    assert len(inputs) == len(theirs.timesteps) + 1
    x = inputs[0]
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(inputs[i], x, atol=1e-6, rtol=0, msg=lambda words, i=i: f"step {i}: {words}")
        arguments = step if fresh is None else step | {"variance_noise": fresh()}
        x = theirs.step(network(x, t.expand(2)), t, x, **arguments).prev_sample
    if not isinstance(theirs, DEISMultistepScheduler):
        torch.testing.assert_close(inputs[-1], x, atol=1e-6, rtol=0)


def scheduler(kind: Callable[..., Any], schedule: str, prediction: Prediction, steps: int, **settings: Any) -> Any:
    theirs = kind(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=THEIR_SCHEDULE[schedule],
        prediction_type=prediction,
        **settings,
    )
    theirs.set_timesteps(steps)
    # What their float32 has lost of the levels would be most of the difference.
    theirs.alphas_cumprod = SCHEDULES[schedule].alphas_cumprod
    if hasattr(theirs, "sigmas"):
        theirs.sigmas = levels_of(theirs, schedule)
        if isinstance(theirs, DEISMultistepScheduler):  # which goes not to 0 but to the least noise there is
            theirs.sigmas[-1] = SCHEDULES[schedule].sigmas[0]
    return theirs


def levels_of(theirs: Any, schedule: str) -> Tensor:
    """σ of its whole times, and the 0 at the end."""
    return torch.cat([SCHEDULES[schedule].sigmas[theirs.timesteps.long()], torch.zeros(1).double()])


@pytest.mark.parametrize("steps", [1000, 50])
@predictions
def test_ddpm(prediction: Prediction, steps: int) -> None:
    theirs = scheduler(DDPMScheduler, "linear", prediction, steps, clip_sample=True)
    compare(theirs, sampling_config(sampler="ddpm"), "linear", prediction, True, generator=after_the_start(5))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@predictions
def test_ddim(prediction: Prediction, eta: float) -> None:
    theirs = scheduler(DDIMScheduler, "cosine", prediction, 20, clip_sample=False)
    config = sampling_config(sampler="ddim", eta=eta)
    compare(theirs, config, "cosine", prediction, eta=eta, generator=after_the_start(5))


@pytest.mark.parametrize("steps", [5, 20])
@predictions
def test_dpmpp_2m(prediction: Prediction, steps: int) -> None:
    theirs = scheduler(DPMSolverMultistepScheduler, "linear", prediction, steps, final_sigmas_type="zero")
    compare(theirs, sampling_config(sampler="dpmpp_2m"), "linear", prediction)


@pytest.mark.parametrize("steps", [5, 20])
@predictions
def test_dpmpp_2m_with_all_noise_fresh(prediction: Prediction, steps: int) -> None:
    theirs = scheduler(
        DPMSolverMultistepScheduler,
        "linear",
        prediction,
        steps,
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type="zero",
    )
    noise = noises(5)
    noise()
    compare(theirs, sampling_config(sampler="dpmpp_2m_sde"), "linear", prediction, fresh=noise)


@pytest.mark.parametrize("steps", [15, 40])
@pytest.mark.parametrize("order", [2, 3])
@predictions
def test_deis(prediction: Prediction, order: int, steps: int) -> None:
    theirs = scheduler(DEISMultistepScheduler, "linear", prediction, steps, solver_order=order)
    config = SAMPLING_ADAPTER.validate_python({"sampler": "deis", "order": order})
    compare(theirs, config, "linear", prediction)


@pytest.mark.parametrize("steps", [4, 10, 30])
@pytest.mark.parametrize("order", [2, 3])
@predictions
def test_unipc(prediction: Prediction, order: int, steps: int) -> None:
    theirs = scheduler(
        UniPCMultistepScheduler,
        "linear",
        prediction,
        steps,
        solver_order=order,
        solver_type="bh2",
        final_sigmas_type="zero",
    )
    config = SAMPLING_ADAPTER.validate_python({"sampler": "unipc", "order": order})
    compare(theirs, config, "linear", prediction)


@predictions
@pytest.mark.parametrize(
    ("sampler", "kind", "atol"),
    # Euler's steps are in float32 whatever it is given.
    [("euler", EulerDiscreteScheduler, 1e-4), ("heun", HeunDiscreteScheduler, 1e-6)],
)
def test_euler_and_heun(prediction: Prediction, sampler: Any, kind: type[Any], atol: float) -> None:
    theirs = scheduler(kind, "linear", prediction, 20, timestep_spacing="leading")
    sigmas = theirs.sigmas
    if sampler == "heun":  # each level but the first and the last stands there twice
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    inputs = ours(sampling_config(sampler=sampler), "linear", sigmas, prediction)
    x = inputs[0] * (1 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(theirs.timesteps):
        scaled_input = theirs.scale_model_input(x, t)
        torch.testing.assert_close(inputs[i], scaled_input, atol=atol, rtol=0)
        x = theirs.step(network_of(prediction, "linear")(scaled_input, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(inputs[-1], x, atol=atol, rtol=0)


@predictions
def test_euler_with_churn(prediction: Prediction) -> None:
    """Their scheduler asks the network before it adds noise: here it is told what the network says after it."""
    theirs = scheduler(EulerDiscreteScheduler, "linear", "sample", 20, timestep_spacing="leading")
    sigmas = theirs.sigmas
    churn = {"amount": 6, "sigma_min": 0.1, "sigma_max": 100, "noise_std": 1.003}
    config = sampling_config(sampler="euler", steps=20, churn=churn)
    inputs = ours(config, "linear", sigmas, prediction)
    denoiser, generator = denoiser_of(prediction, "linear"), after_the_start(5)
    x, churned = sigmas[0] * noises(5)(), 0
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(x, t)
        raised, level = x, sigmas[i]
        if 0.1 <= level <= 100:
            again = torch.Generator()
            again.set_state(generator.get_state())
            level = level * (1 + 6 / 20)
            fresh = torch.randn(SHAPE, generator=again, dtype=torch.float64)
            raised = x + 1.003 * (level**2 - sigmas[i] ** 2).sqrt() * fresh
            churned += 1
        torch.testing.assert_close(inputs[i], raised / (1 + level**2).sqrt(), atol=1e-4, rtol=0)
        x = theirs.step(
            denoiser(raised, level), t, x, s_churn=6, s_tmin=0.1, s_tmax=100, s_noise=1.003, generator=generator
        ).prev_sample
    torch.testing.assert_close(inputs[-1], x, atol=1e-4, rtol=0)
    assert 0 < churned < 20
