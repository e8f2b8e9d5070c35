"""Every sampler with every option against data of which the reverse process is known in closed form."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.families.config import ModelConfig
from diffusion.process.samplers import SAMPLING_ADAPTER, EulerSampling, HeunSampling, SamplingConfig, sampling_config
from diffusion.process.schedules import NoiseSchedule, cosine_schedule, edm_schedule, linear_schedule, make_schedule
from tests.builders.ideal_denoiser import IdealDenoiser, two_tone_points
from tests.builders.sampler_options import DETERMINISTIC, STOCHASTIC, noises, options

POINTS = two_tone_points(6)


every = pytest.mark.parametrize("config", DETERMINISTIC + STOCHASTIC, ids=options)
deterministic = pytest.mark.parametrize("config", DETERMINISTIC, ids=options)
stochastic = pytest.mark.parametrize("config", STOCHASTIC, ids=options)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asks for no noise")


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000)], ids=["linear", "cosine"])
@every
def test_every_sampler_reaches_all_points_of_a_finite_set(config: SamplingConfig, schedule: NoiseSchedule) -> None:
    noise, sigmas = noises(0, 256), schedule.sigma_grid(50)
    images = config.build_sampler()(IdealDenoiser(POINTS), sigmas[0].float() * noise(), sigmas, noise)
    distances = (images[:, None] - POINTS).flatten(2).abs().amax(-1)
    assert (distances.min(1).values < 0.02).float().mean() > 0.98
    shares = torch.bincount(distances.argmin(1), minlength=len(POINTS)) / len(images)
    assert shares.min() > 0.5 / len(POINTS)


@deterministic
def test_deterministic_samplers_draw_no_noise(config: SamplingConfig) -> None:
    sigmas = linear_schedule(1000).sigma_grid(7)
    config.build_sampler()(IdealDenoiser(POINTS), sigmas[0].float() * noises(0, 3)(), sigmas, no_noise)


@stochastic
def test_fresh_noise_gives_another_image_from_the_same_start(config: SamplingConfig) -> None:
    sigmas, start = linear_schedule(1000).sigma_grid(20), noises(0, 64)()
    ends = [
        config.build_sampler()(IdealDenoiser(POINTS), sigmas[0].float() * start, sigmas, noises(seed, 64))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], atol=0.5)


SPREAD = 0.5


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of data from N(0, SPREAD²), whose reverse ODE has a closed form."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def error_of(config: SamplingConfig, steps: int) -> float:
    x = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    sigmas = torch.cat([torch.from_numpy(np.geomspace(80, 1e-5, steps)), torch.zeros(1)])
    exact = x * SPREAD / (SPREAD**2 + 80.0**2) ** 0.5
    return (config.build_sampler()(gaussian_denoiser, x, sigmas, no_noise) - exact).abs().item()


@pytest.mark.parametrize(
    ("config", "order"),
    [pytest.param(*pair, id=options(pair[0])) for pair in zip(DETERMINISTIC, (1, 1, 2, 2, 3, 2, 3, 4), strict=True)],
)
def test_deterministic_samplers_converge_to_the_exact_solution_at_their_order(
    config: SamplingConfig, order: int
) -> None:
    coarse, fine = error_of(config, 100), error_of(config, 200)
    assert fine < 0.02
    # A little more where errors of the two halves of the way cancel, as those of deis do on such data.
    assert order - 0.35 < math.log2(coarse / fine) < order + 1


@stochastic
def test_fresh_noise_keeps_the_distribution_of_the_data(config: SamplingConfig) -> None:
    schedule = cosine_schedule(1000)
    noise, sigmas = noises(1, 4000, 1), schedule.sigma_grid(500)
    sampler = config.with_changes({"steps": 500}).build_sampler()
    images = sampler(gaussian_denoiser, sigmas[0].float() * noise(), sigmas, noise)
    assert images.std().item() == pytest.approx(SPREAD, rel=0.06)
    assert images.mean().item() == pytest.approx(0, abs=0.05)


@every
def test_evaluations_are_one_a_step_and_two_for_heun(config: SamplingConfig) -> None:
    sigmas_seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigmas_seen.append(float(sigma))
        return torch.zeros_like(x)

    sigmas, noise = linear_schedule(1000).sigma_grid(7), noises(0, 1)
    config.build_sampler()(denoise, sigmas[0].float() * noise(), sigmas, noise)
    assert len(sigmas_seen) == (13 if config.sampler == "heun" else 7)
    if getattr(config, "churn", None) is None:
        assert sorted(set(sigmas_seen), reverse=True) == sigmas[:-1].tolist()


def test_ddim_and_dpmpp_with_all_noise_fresh_are_ddpm() -> None:
    """DDIM's η = 1 is DDPM with the smaller variance (arXiv 2010.02502, section 4.1)."""
    sigmas = cosine_schedule(1000).sigma_grid(25)

    def generate(grid: Tensor = sigmas, **settings: object) -> Tensor:
        noise = noises(3, 8)
        sampler = SAMPLING_ADAPTER.validate_python({"sampler": "ddpm"} | settings).build_sampler()
        return sampler(gaussian_denoiser, grid[0].float() * noise(), grid, noise)

    torch.testing.assert_close(generate(sampler="ddim", eta=1), generate(), atol=1e-5, rtol=0)
    assert not torch.allclose(generate(sampler="ddim", eta=0.9), generate(), atol=1e-2)
    # Over two steps DPM-Solver++ has nothing to extrapolate from, and is of first order.
    two = sigmas[[0, 12, -1]]
    torch.testing.assert_close(generate(two, sampler="dpmpp_2m_sde"), generate(two), atol=1e-5, rtol=0)
    assert not torch.allclose(generate(two, sampler="dpmpp_2m_sde", eta=0.9), generate(two), atol=1e-3)


def test_eta_zero_equals_the_deterministic_sampler_and_euler_is_ddim() -> None:
    sigmas, start = cosine_schedule(1000).sigma_grid(25), noises(3, 8)()

    def generate(**settings: object) -> Tensor:
        sampler = SAMPLING_ADAPTER.validate_python(settings).build_sampler()
        return sampler(gaussian_denoiser, sigmas[0].float() * start, sigmas, no_noise)

    assert torch.equal(generate(sampler="ddim", eta=0), generate(sampler="ddim"))
    assert torch.equal(generate(sampler="dpmpp_2m_sde", eta=0), generate(sampler="dpmpp_2m"))
    assert torch.equal(generate(sampler="euler"), generate(sampler="ddim"))


def as_in_algorithm_2(
    x: Tensor, sigmas: Tensor, noise: Callable[[], Tensor], config: SamplingConfig, second: bool
) -> Tensor:
    """arXiv 2206.00364, algorithm 2, line by line; without its lines 9 and 10 it is Euler's method."""
    t, steps = sigmas.tolist(), len(sigmas) - 1
    assert isinstance(config, EulerSampling | HeunSampling)
    churn = config.churn
    assert churn is not None
    low, high = churn.sigma_min, churn.sigma_max or float("inf")
    for i in range(steps):
        gamma = min(churn.amount / steps, 2**0.5 - 1) if low <= t[i] <= high else 0.0
        raised = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + (raised**2 - t[i] ** 2) ** 0.5 * churn.noise_std * noise()
        d = (x - gaussian_denoiser(x, torch.tensor(raised))) / raised
        ahead = x + (t[i + 1] - raised) * d
        if t[i + 1] != 0 and second:
            d_ahead = (ahead - gaussian_denoiser(ahead, torch.tensor(t[i + 1]))) / t[i + 1]
            ahead = x + (t[i + 1] - raised) * (d / 2 + d_ahead / 2)
        x = ahead
    return x


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize(
    "churn",
    [
        {"amount": 5},
        {"amount": 40, "sigma_min": 0.05, "sigma_max": 50, "noise_std": 1.003},
        {"amount": 1e6, "sigma_max": 1},
    ],
    ids=str,
)
def test_churn_is_that_of_algorithm_2(sampler: str, churn: dict[str, float]) -> None:
    config = SAMPLING_ADAPTER.validate_python({"sampler": sampler, "steps": 18, "churn": churn})
    sigmas = linear_schedule(1000).sigma_grid(18)
    start = sigmas[0].float() * noises(0, 4)()
    ours = config.build_sampler()(gaussian_denoiser, start, sigmas, noises(1, 4))
    theirs = as_in_algorithm_2(start, sigmas, noises(1, 4), config, second=sampler == "heun")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_churn_per_step_is_the_same_on_a_partial_grid(sampler: str) -> None:
    sigmas = linear_schedule(1000).sigma_grid(18)
    churned = sampling_config(sampler=sampler, steps=18, churn={"amount": 3}).build_sampler()
    start = sigmas[0].float() * noises(0, 4)()
    noise = noises(1, 4)
    halfway = churned(gaussian_denoiser, start, sigmas[:10], noise)
    torch.testing.assert_close(
        churned(gaussian_denoiser, halfway, sigmas[9:], noise), churned(gaussian_denoiser, start, sigmas, noises(1, 4))
    )


def mixture_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of a mixture of Gaussians about ``POINTS``, in float64."""
    means, variance = POINTS.double() / 2, 0.1**2
    distances = (x[:, None] - means).flatten(2).square().sum(-1)
    weights = torch.softmax(-distances / (2 * (variance + sigma**2)), dim=1)
    middle = torch.einsum("nk,kchw->nchw", weights, means)
    return (variance * x + sigma**2 * middle) / (variance + sigma**2)


def test_multistep_samplers_come_nearer_in_as_many_evaluations() -> None:
    schedule = linear_schedule(1000)
    start = noises(0, 64)().double() * schedule.sigma_grid(20)[0]

    def generate(config: SamplingConfig, steps: int) -> Tensor:
        return config.build_sampler()(mixture_denoiser, start, schedule.sigma_grid(steps), no_noise)

    exact = generate(sampling_config(sampler="heun"), 999)

    def distance(config: SamplingConfig, evaluations: int) -> float:
        steps = (evaluations + 1) // 2 if config.sampler == "heun" else evaluations
        return (generate(config, steps) - exact).square().mean((1, 2, 3)).sqrt().mean().item()

    by_name = {options(config): config for config in DETERMINISTIC}
    at_15, at_30 = ({name: distance(config, count) for name, config in by_name.items()} for count in (15, 30))
    assert at_15["deis"] < at_15["dpmpp_2m"] < at_15["ddim"]
    assert at_15["unipc"] < at_15["dpmpp_2m"]
    assert at_30["unipc order=3"] < 0.6 * at_30["dpmpp_2m"]
    assert at_30["unipc"] < at_30["dpmpp_2m"] < at_30["heun"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sampler": "ddpm", "eta": 0.5},
            "sampling.eta means nothing to sampler = ddpm: use ddim or dpmpp_2m_sde or consistency, or",
        ),
        ({"sampler": "unipc", "eta": 0.0}, "sampling.eta means nothing to sampler = unipc"),
        ({"sampler": "ddim", "churn": {"amount": 4}}, "sampling.churn means nothing to sampler = ddim: use euler"),
        ({"sampler": "dpmpp_2m", "order": 3}, "sampling.order means nothing to sampler = dpmpp_2m: use deis or unipc"),
        ({"sampler": "heun", "variance": "fixed_large"}, "sampling.variance means nothing to sampler = heun: use ddpm"),
        ({"sampler": "heun", "churn": {"sigma_min": 0.05}}, "sampling.churn.amount: Field required"),
        (
            {"sampler": "heun", "churn": {"amount": 4, "sigma_min": 1, "sigma_max": 0.5}},
            "sampling.churn.sigma_max is above its sigma_min",
        ),
        ({"sampler": "heun", "churn": {"amount": 0}}, "sampling.churn.amount: .*greater than 0"),
        ({"stpes": 3}, "unknown key sampling.stpes: did you mean steps"),
        ({"sampler": "magic"}, "sampling: sampler is ddpm, ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "less than or equal to 1"),
        ({"sampler": "unipc", "order": 4}, "2 or 3"),
        ({"sigma_max": 20, "sigma_min": 20}, "sampling.sigma_max is above sigma_min"),
        ({"sigma_max": 0, "sigma_min": None}, r"sampling\.sigma_max: give a number above 0, auto or null"),
        ({"sigma_max": "most"}, r"sampling\.sigma_max: give a number above 0, auto or null"),
    ],
    ids=str,
)
def test_options_without_effect_or_sense_are_rejected(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sampling_config(**settings)


def test_a_configuration_is_read_back_as_it_was_written() -> None:
    for config in DETERMINISTIC + STOCHASTIC:
        assert SAMPLING_ADAPTER.validate_python(config.model_dump()) == config
    assert sampling_config(sampler="ddim", eta=0).model_dump()["eta"] == 0


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000), cosine_schedule(20)])
@pytest.mark.parametrize("steps", [2, 20, 250, 1000])
def test_grids_fall_from_the_schedules_noisiest_usable_level_to_nothing(schedule: NoiseSchedule, steps: int) -> None:
    for ends in [(None, None), (20, None), (None, 0.04), (20, 0.04), (1e9, 1e-9)]:
        sigmas = schedule.sigma_grid(steps, *ends)
        assert_falls(sigmas, schedule, steps)


def assert_falls(sigmas: Tensor, schedule: NoiseSchedule, steps: int) -> None:
    assert len(sigmas) == steps + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-9)
    assert sigmas[-2] >= schedule.sigmas[0] * (1 - 1e-9)


def test_as_many_steps_as_the_schedule_has_are_the_schedule() -> None:
    schedule = cosine_schedule(50)
    torch.testing.assert_close(schedule.sigma_grid(50)[:-1], schedule.sigmas.flip(0), atol=0, rtol=0)


@pytest.mark.parametrize("steps", [2, 20, 1000])
def test_grid_between_two_levels_has_edm_s_steps(steps: int) -> None:
    sigmas = linear_schedule(1000).sigma_grid(steps, 20, 0.04)[:-1]
    assert (sigmas[0].item(), sigmas[-1].item()) == pytest.approx((20, 0.04))
    # Equation 5 of arXiv 2206.00364: the seventh roots lie at equal distances.
    roots = sigmas ** (1 / 7)
    torch.testing.assert_close(roots.diff(), ((roots[-1] - roots[0]) / (steps - 1)).expand(steps - 1))


def test_levels_beyond_the_schedule_are_its_ends() -> None:
    schedule = edm_schedule(1000, sigma_min=0.01, sigma_max=50)
    torch.testing.assert_close(schedule.sigma_grid(9, 70, 0.001), schedule.sigma_grid(9))
    config = sampling_config(steps=9, sigma_max=None, sigma_min=None)
    assert torch.equal(config.sigma_grid(schedule), schedule.sigma_grid(9))
    assert torch.equal(sampling_config(steps=9).sigma_grid(schedule), schedule.sigma_grid(9, "auto", 0.04))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 128, 128)], ids=str)
@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_2m", "heun"])
def test_default_noise_levels_keep_brightness_variety_at_every_resolution(
    sampler: str, shape: tuple[int, int, int]
) -> None:
    # Plain images, whose brightness is normal: the best denoiser averages the values and shrinks the result.
    values, spread = math.prod(shape), 0.3

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x * spread**2 / (spread**2 + sigma.to(x) ** 2 / values)

    # It depends on the mean of the noise alone, whose standard deviation is 1/√(C·H·W).
    config, schedule = sampling_config(sampler=sampler), make_schedule(ModelConfig(), shape)
    means = noises(0, 20_000, 1)
    images = config.run(denoise, config.sigma_grid(schedule), lambda: means() / math.sqrt(values))
    assert images.std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_schedules_without_terminal_signal_are_sampled_from_their_end(schedule: Literal["linear", "cosine"]) -> None:
    noise_schedule = make_schedule(
        ModelConfig(schedule=schedule, zero_terminal_snr=True, prediction="v_prediction"), (3, 64, 64)
    )
    sigmas = sampling_config(steps=12).sigma_grid(noise_schedule)
    assert len(sigmas) == 13
    assert sigmas[0] == noise_schedule.sigmas[-1] > 4_000
    assert sigmas[1].item() == pytest.approx(math.sqrt(3 * 64 * 64))
    assert (sigmas.diff() < 0).all()
    # Bright images: from a level at which they are seen, a start at pure noise would make them darker.
    bright = torch.full((1, 1, 4, 4), 0.9)
    for config in DETERMINISTIC + STOCHASTIC:
        x = config.run(IdealDenoiser(bright), sigmas, noises(0, 4))
        torch.testing.assert_close(x, bright.expand(4, -1, -1, -1), atol=0.05, rtol=0)
        images = config.run(IdealDenoiser(POINTS), sigmas, noises(0, 128))
        distances = (images[:, None] - POINTS).flatten(2).abs().amax(-1)
        assert (distances.min(1).values < 0.05).float().mean() > 0.9


def test_initial_noise_is_centred_on_the_images_mean() -> None:
    mean, inputs = torch.tensor([0.5, -0.7, 0.1]).view(1, 3, 1, 1), list[Tensor]()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inputs.append(x)
        return x

    config, schedule = sampling_config(), make_schedule(ModelConfig(), (3, 16, 16))
    config.run(denoise, config.sigma_grid(schedule), lambda: torch.zeros(2, 3, 16, 16), mean)
    assert torch.equal(inputs[0], mean.expand(2, 3, 16, 16))


def test_a_grid_that_the_schedule_does_not_touch_is_rejected() -> None:
    with pytest.raises(UserError, match=r"σ from 0\.1\S* to \S+, none of which .* sampling\.sigma_max = 0\.05: change"):
        linear_schedule(10).sigma_grid(4, 0.05, 0.01)
