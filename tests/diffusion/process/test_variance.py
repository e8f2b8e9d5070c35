"""Learned variance against what is known of Gaussian data, the paper, diffusers, and torch's distributions."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.families.config import ModelConfig, training_conflict
from diffusion.families.ddpm.network import UNet
from diffusion.families.model import to_uint8
from diffusion.generation.explain import explain
from diffusion.generation.generate import sample
from diffusion.process.config import Prediction
from diffusion.process.denoiser import Denoiser
from diffusion.process.likelihood import HALF_A_LEVEL, compute_bound, interpolate_deviation, log_likelihood
from diffusion.process.objective import Objective, make_plain_weight
from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import (
    SAMPLING_ADAPTER,
    DDPMSampling,
    SamplingConfig,
    fixed_large,
    fixed_small,
    sampling_config,
)
from diffusion.process.schedules import NoiseSchedule, cosine_schedule, edm_schedule, linear_schedule
from diffusion.training.config import TrainingConfig
from diffusion.training.preflight import count_flops
from diffusion.training.train import train
from tests.builders.comparisons import evaluate_one
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt

MEAN, SPREAD = 0.1, 0.5
"""Of the Gaussian data of which everything is known."""
SCHEDULES = [linear_schedule(1000), cosine_schedule(1000), cosine_schedule(50), edm_schedule(1000)]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample", "edm")
schedules = st.sampled_from(SCHEDULES)
LEARNED = MODEL.model_copy(update={"variance": "learned_range"})


def ideal(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_0 + σ ε = x]."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def true_variance(sigma: Tensor, following: Tensor) -> Tensor:
    """Var(x_s | x_σ) = Var(x_s | x_σ, x_0) + (1 − s²/σ²)² Var(x_0 | x_σ)."""
    of_x0 = SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2)
    return fixed_small(sigma, following) + (1 - following**2 / sigma**2) ** 2 * of_x0


def exact_v(sigma: Tensor, following: Tensor) -> Tensor:
    """What a network should say so that the variance is the true one."""
    low, high = fixed_small(sigma, following), fixed_large(sigma, following)
    return 2 * (true_variance(sigma, following) / low).log() / (high / low).log() - 1


def levels(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    return schedule.sigmas[t], schedule.sigmas[t - 1]


def filled(value: Tensor, like: Tensor) -> Tensor:
    return value[:, None, None, None].to(like.dtype).expand_as(like).clone()


@given(schedules, st.data())
def test_both_bounds_are_those_of_the_paper_in_another_scale(schedule: NoiseSchedule, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, schedule.steps - 1))
    alpha_bar, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
    beta = 1 - alpha_bar / before
    sigma, following = levels(schedule, torch.tensor(t))
    torch.testing.assert_close(fixed_large(sigma, following) * before, beta)
    torch.testing.assert_close(fixed_small(sigma, following) * before, (1 - before) / (1 - alpha_bar) * beta)


@given(schedules, st.data())
def test_bounds_are_the_variances_of_one_image_and_noise(schedule: NoiseSchedule, data: st.DataObject) -> None:
    t = torch.tensor(data.draw(st.integers(1, schedule.steps - 1)))
    sigma, following = levels(schedule, t)
    # Var(x_s | x_σ) of data from N(0, c²) is Var(x_s) less Cov(x_s, x_σ)² / Var(x_σ).
    spread = data.draw(st.floats(0, 1))
    variance = (spread**2 + following**2) - (spread**2 + following**2) ** 2 / (spread**2 + sigma**2)
    low, high = fixed_small(sigma, following), fixed_large(sigma, following)
    assert low * (1 - 1e-9) <= variance <= high * (1 + 1e-9)
    for c, limit in ((0, low), (1, high)):
        torch.testing.assert_close((c + following**2) - (c + following**2) ** 2 / (c + sigma**2), limit)


@pytest.mark.parametrize("v", [-1.0, 0.0, 0.3, 1.0, 1.5])
def test_the_logarithm_goes_straight_from_one_bound_to_the_other(v: float) -> None:
    low, high = torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.09, dtype=torch.float64)
    share = (v + 1) / 2
    expected = math.exp(0.5 * (share * math.log(0.09) + (1 - share) * math.log(0.01)))
    assert interpolate_deviation(torch.tensor([v]), low, high).item() == pytest.approx(expected)


def as_in_the_paper(schedule: NoiseSchedule, t: int, x0: Tensor, noise: Tensor, errors: Tensor, v: Tensor) -> Tensor:
    """L_t by arXiv 2102.09672, equations 5, 6, 10, 11 and 15, in bits, of each value; all float64."""
    alpha_bar = schedule.alphas_cumprod
    before = alpha_bar[t - 1] if t else torch.ones(()).double()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    tilde = (1 - torch.cat([torch.ones(1).double(), alpha_bar[:-1]])) / (1 - alpha_bar) * betas
    low, high = tilde[max(t, 1)], betas[t]
    x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * noise

    def mean(image: Tensor) -> Tensor:
        of_x = (1 - betas[t]).sqrt() * (1 - before) / (1 - alpha_bar[t])
        return before.sqrt() * betas[t] / (1 - alpha_bar[t]) * image + of_x * x_t

    ours = Normal(mean(x0 + errors), (0.5 * ((v + 1) / 2 * high.log() + (1 - v) / 2 * low.log())).exp())
    if t:
        return kl_divergence(Normal(mean(x0), tilde[t].sqrt()), ours) / math.log(2)
    upper = ours.cdf(x0 + HALF_A_LEVEL).masked_fill(x0 > 0.999, 1)
    lower = ours.cdf(x0 - HALF_A_LEVEL).masked_fill(x0 < -0.999, 0)
    return -(upper - lower).log() / math.log(2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine", "short", "edm"])
def test_the_bound_is_the_papers_as_torch_distributions_have_it(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([0, 1, 2, schedule.steps // 2, schedule.steps - 1, 0])
    shape = (len(times), 1, 4, 4)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    x0[0, 0, 0], x0[0, 0, 1] = -1, 1
    noise = torch.randn(shape, generator=generator).double()
    errors = torch.randn(shape, generator=generator).double() * 0.5 * filled(schedule.sigmas[times].clamp(max=1), x0)
    v = torch.rand(shape, generator=generator).double() * 2 - 1
    each = [
        as_in_the_paper(schedule, int(t), x0[i : i + 1], noise[i : i + 1], errors[i : i + 1], v[i : i + 1]).mean()
        for i, t in enumerate(times)
    ]
    assert min(each) > 0
    torch.testing.assert_close(compute_bound(schedule, times, x0, errors, v), torch.stack(each), rtol=1e-9, atol=1e-9)
    single = compute_bound(schedule, times, x0.float(), errors.float(), v.float())
    torch.testing.assert_close(single.double(), torch.stack(each), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 255), st.floats(-3, 3), st.floats(1e-3, 1))
def test_probabilities_of_a_pixel_s_256_values_sum_to_one(level: int, mean: float, deviation: float) -> None:
    x0 = torch.arange(256).double() / 127.5 - 1
    spread = torch.full((256,), deviation, dtype=torch.float64)
    probabilities = log_likelihood(x0, torch.full_like(x0, mean), spread).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    # In float32, and far from the mean, there is no value that training could stumble over.
    narrow = torch.tensor([deviation], requires_grad=True)
    words = log_likelihood(x0[level : level + 1].float(), torch.tensor([mean]), narrow)
    words.backward()
    assert words.isfinite()
    assert narrow.grad is not None
    assert narrow.grad.isfinite()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine", "short", "edm"])
def test_bound_is_least_at_the_true_variance(schedule: NoiseSchedule) -> None:
    times = torch.tensor([1, 3, schedule.steps // 4, schedule.steps // 2, schedule.steps - 2])
    sigma, following = levels(schedule, times)
    # Errors of the ideal denoiser have the variance of x_0 given x: here all values err by just its root.
    errors = filled((SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2)).sqrt(), torch.empty(5, 1, 2, 2).double())
    true = filled(exact_v(sigma, following), errors)
    slopes = []
    for beside in (-0.1, 0.0, 0.1):
        v = (true + beside).requires_grad_()
        (slope,) = torch.autograd.grad(compute_bound(schedule, times, torch.zeros_like(errors), errors, v).sum(), v)
        slopes.append(slope)
    # It is convex in v, so there is no other minimum.
    assert (slopes[0] < 0).all()
    assert (slopes[2] > 0).all()
    assert (slopes[1].abs() < 1e-5 * slopes[2]).all()
    low, high = (filled(each(sigma, following), v) for each in (fixed_small, fixed_large))
    variance = interpolate_deviation(true, low, high) ** 2
    torch.testing.assert_close(variance[:, 0, 0, 0], true_variance(sigma, following), rtol=1e-9, atol=0)


def gaussian_network(
    schedule: NoiseSchedule, prediction: Prediction, say: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The ideal network of Gaussian data; its second half is ``say`` of σ (N,) float64."""
    parametrization = Parametrization(prediction, SPREAD)

    def answer(scaled: Tensor, time: Tensor) -> Tensor:
        sigma = schedule.sigma(time)
        level = sigma[:, None, None, None]
        x = scaled.double() / parametrization.c_in(sigma)[:, None, None, None]
        c_skip, c_out = (each(sigma)[:, None, None, None] for each in (parametrization.c_skip, parametrization.c_out))
        v = say(sigma)[:, None, None, None].expand_as(x)
        return torch.cat([(ideal(x, level) - c_skip * x) / c_out, v], dim=1)

    return answer


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_on_gaussian_data_finds_the_true_variance(prediction: Prediction) -> None:
    schedule, generator = linear_schedule(1000), torch.Generator().manual_seed(0)
    x0 = MEAN + SPREAD * torch.randn(64, 1, 16, 16, generator=generator)
    noise, parametrization = torch.randn(x0.shape, generator=generator), Parametrization(prediction, SPREAD)
    objective = Objective(schedule, parametrization, make_plain_weight(parametrization))
    for time in (1, 5, 50):
        t = torch.full((64,), time)
        true = exact_v(*levels(schedule, t[:1]))

        def loss(beside: float, t: Tensor = t, true: Tensor = true) -> float:
            network = gaussian_network(schedule, prediction, lambda sigma: (true + beside).expand_as(sigma))
            return objective.loss(network, x0, t, noise).mean().item()

        losses = [loss(beside) for beside in (-0.2, -0.1, 0.0, 0.1, 0.2)]
        assert losses.index(min(losses)) == 2, time


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_teaches_the_variance_and_nothing_else(prediction: Prediction) -> None:
    schedule, generator = cosine_schedule(500), torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (4, 3, 4, 4), generator=generator) / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.tensor([0, 1, 250, 499])
    parametrization = Parametrization(prediction, SPREAD)
    objective = Objective(schedule, parametrization, make_plain_weight(parametrization))
    output = torch.randn(4, 6, 4, 4, generator=generator) * 0.1
    output.requires_grad_()
    loss = objective.loss(lambda _x, _time: output, x0, t, noise)
    simple = objective.loss(lambda _x, _time: output[:, :3], x0, t, noise)
    both, alone = (torch.autograd.grad(each.sum(), output, retain_graph=True)[0] for each in (loss, simple))
    torch.testing.assert_close(both[:, :3], alone[:, :3], atol=0, rtol=0)
    assert not alone[:, 3:].any()
    assert both[:, 3:].ne(0).all()
    # λ = 0.001 times T terms: here half of a term is added.
    error = parametrization.c_out(schedule.sigma(t)).float()[:, None, None, None] * (
        output[:, :3] - parametrization.target(x0, noise, schedule.sigma(t))
    )
    term = compute_bound(schedule, t, x0, error, output[:, 3:])
    torch.testing.assert_close(loss - simple, 0.5 * term, rtol=1e-4, atol=1e-5)


def test_the_bound_is_float32_under_autocast() -> None:
    parametrization = Parametrization("v_prediction")
    objective = Objective(cosine_schedule(1000), parametrization, make_plain_weight(parametrization))
    x0, noise, t = torch.zeros(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 3, 700])

    def network(x: Tensor, time: Tensor) -> Tensor:
        return torch.full((3, 2, 4, 4), 0.25, dtype=torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(network, x0, t, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective.loss(network, x0, t, noise), atol=0, rtol=0)


def generate(sigmas: Tensor, schedule: NoiseSchedule, prediction: Prediction, config: SamplingConfig) -> Tensor:
    """Samples of Gaussian data by the ideal network, which knows the grid's own steps."""
    generator = torch.Generator().manual_seed(0)

    def say(sigma: Tensor) -> Tensor:
        # At the last step the smaller variance is 0, and what the network says is not used.
        i = int((sigmas[:-1] - sigma[0]).abs().argmin())
        return exact_v(sigmas[i], sigmas[i + 1]).nan_to_num(0, 0, 0).expand_as(sigma)

    denoiser = Denoiser(
        gaussian_network(schedule, prediction, say),
        schedule,
        Parametrization(prediction, SPREAD),
        clip=False,
        learned_variance=True,
    )

    def noise() -> Tensor:
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    return config.run(denoiser, sigmas, noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_few_steps_sample_gaussian_data_only_with_learned_variance(prediction: Prediction) -> None:
    schedule = linear_schedule(1000)
    sigmas = torch.cat([schedule.sigmas[[999, 600, 300, 100, 0]], torch.zeros(1).double()])
    ratios = {
        variance: generate(
            sigmas, schedule, prediction, SAMPLING_ADAPTER.validate_python({"sampler": "ddpm", "variance": variance})
        ).var()
        / SPREAD**2
        for variance in (None, "fixed_small", "fixed_large")
    }
    assert ratios[None].item() == pytest.approx(1, abs=0.03)
    assert ratios["fixed_small"] < 0.85
    assert ratios["fixed_large"] > 1.1


@pytest.fixture(scope="module")
def network() -> UNet:
    """A small network of random weights, which says something of the variance, too."""
    torch.manual_seed(0)
    config = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1, variance="learned_range")
    network = UNet(config, 1, 4).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "kind", "steps"),
    [(None, "learned_range", 1000)]
    + [
        (ours, kind, steps)
        for ours, kind in ((None, "learned_range"), ("fixed_small", "fixed_small"), ("fixed_large", "fixed_large"))
        for steps in (50, 7)
    ],
)
def test_ddpm_of_every_variance_equals_diffusers_on_any_grid(
    network: UNet, ours: str | None, kind: str, steps: int
) -> None:
    theirs = DDPMScheduler(1000, beta_schedule="linear", prediction_type="epsilon", variance_type=kind)
    theirs.set_timesteps(steps)
    schedule, inputs = linear_schedule(1000), []
    sigmas = torch.cat([schedule.sigmas[theirs.timesteps], torch.zeros(1).double()])
    generator = torch.Generator().manual_seed(5)

    class RecordingDenoiser(Denoiser):
        def estimate(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            inputs.append(x / (1 + sigma**2).sqrt().float())
            return super().estimate(x, sigma)

    denoiser = RecordingDenoiser(network, schedule, Parametrization("epsilon"), learned_variance=True)
    DDPMSampling(variance=ours).run(denoiser, sigmas, lambda: torch.randn(2, 1, 4, 4, generator=generator))
    generator = torch.Generator().manual_seed(5)
    torch.randn(2, 1, 4, 4, generator=generator)
    x = inputs[0]
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(inputs[i], x, atol=1e-4, rtol=0, msg=f"step {i}")
        answer = network(x, t.expand(2).float())
        answer = answer if ours is None else answer[:, :1]
        x = theirs.step(answer, t, x, generator=generator).prev_sample


def test_configured_sampling_variance_overrides_the_learned_one(network: UNet) -> None:
    schedule, sigmas = cosine_schedule(1000), cosine_schedule(1000).sigma_grid(5)

    def draw(denoiser: Denoiser, variance: str | None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        config = SAMPLING_ADAPTER.validate_python({"sampler": "ddpm", "variance": variance})
        return config.run(denoiser, sigmas, lambda: torch.randn(2, 1, 4, 4, generator=generator))

    learned = Denoiser(network, schedule, Parametrization("v_prediction"), learned_variance=True)
    plain = replace(learned, network=lambda x, time: network(x, time)[:, :1], learned_variance=False)
    for variance in ("fixed_small", "fixed_large"):
        assert torch.equal(draw(learned, variance), draw(plain, variance))
    assert torch.equal(draw(plain, None), draw(plain, "fixed_small"))
    images = [draw(learned, None), draw(learned, "fixed_small"), draw(learned, "fixed_large")]
    assert not any(torch.equal(one, other) for i, one in enumerate(images) for other in images[:i])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timestep_sampling": "lognormal"}, "samples levels between them: use uniform"),
        ({"learned_uncertainty": True, "timestep_sampling": "uniform"}, "divide each by another number: leave one out"),
    ],
)
def test_unsupported_learned_variance_trainings_are_an_error(settings: dict[str, object], words: str) -> None:
    config = TrainingConfig.model_validate({"images": 1} | settings)
    assert words in (training_conflict(LEARNED, config) or "")
    assert training_conflict(MODEL, config) is None


def test_configurations_that_leave_it_out_keep_their_digests() -> None:
    assert "variance" not in ModelConfig().model_dump()
    assert "variance" not in sampling_config(sampler="ddpm", steps=20).model_dump()
    assert ModelConfig.model_validate(LEARNED.model_dump()) == LEARNED
    assert sampling_config(sampler="ddpm", variance="fixed_large").model_dump()["variance"] == "fixed_large"


def test_learned_variance_doubles_the_output_channels_only() -> None:
    torch.manual_seed(0)
    plain = UNet(MODEL, 3, 8)
    torch.manual_seed(0)
    learned = UNet(LEARNED, 3, 8)
    assert learned(torch.randn(2, 3, 8, 8), torch.tensor([0.0, 5.0])).shape == (2, 6, 8, 8)
    theirs = plain.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in learned.state_dict().items() if "head" not in name)
    assert count_flops(LEARNED, (3, 8, 8), 0) > count_flops(MODEL, (3, 8, 8), 0)


@pytest.mark.slow
def test_learned_variance_training_learns_resumes_and_samples(dataset: Path, tmp_path: Path) -> None:
    shape = LEARNED.model_copy(update={"patch": 2})
    config = CONFIG.model_copy(update={"timestep_sampling": "uniform"})
    whole = train(dataset, tmp_path / "whole", shape, config, SAMPLING)
    with pytest.raises(Stop):
        train(dataset, tmp_path / "cut", shape, config, SAMPLING, track=lambda _: StopAt(240))
    with pytest.raises(UserError, match=r"differs in model\.variance"):
        train(dataset, tmp_path / "cut", shape.model_copy(update={"variance": "fixed"}), config, SAMPLING)
    resumed_run = train(dataset, tmp_path / "cut", shape, config, SAMPLING)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    model = load_model(whole.final)
    assert model.config.variance == "learned_range"
    few = sampling_config(sampler="ddpm", steps=4, compute_batch=8)
    images = sample(model, range(8), 0, few)
    assert images.shape == (8, 1, 8, 8)
    assert not torch.equal(images, sample(model, range(8), 0, few.model_copy(update={"variance": "fixed_large"})))
    assert len(explain(model, to_uint8(torch.zeros(1, 8, 8)), tmp_path / "explained")) == 3
    evaluation = evaluate_one(whole.final, dataset, EvaluationConfig(samples=10), SAMPLING, tmp_path / "report")
    assert evaluation.images == whole.images
