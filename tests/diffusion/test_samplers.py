"""Every sampler with every option against data of which the reverse process is known in closed form."""

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.config_sampling import TAKEN_BY, SamplerName, SamplingConfig
from diffusion.errors import UserError
from diffusion.process import NoiseSchedule, cosine_schedule, edm_schedule, linear_schedule
from diffusion.samplers import levels_of, make_sampler, sigma_grid
from tests.diffusion.ideal_denoiser import IdealDenoiser, two_tone_points

DETERMINISTIC = (
    SamplingConfig(sampler="ddim"),
    SamplingConfig(sampler="euler"),
    SamplingConfig(sampler="heun"),
    SamplingConfig(sampler="dpmpp_2m"),
    SamplingConfig(sampler="deis"),
    SamplingConfig(sampler="deis", order=2),
    SamplingConfig(sampler="unipc"),
    SamplingConfig(sampler="unipc", order=3),
)
STOCHASTIC = (
    SamplingConfig(sampler="ddpm"),
    SamplingConfig(sampler="ddpm", variance="larger"),
    SamplingConfig(sampler="ddim", eta=0.5),
    SamplingConfig(sampler="ddim", eta=1),
    SamplingConfig(sampler="dpmpp_2m_sde", eta=0.5),
    SamplingConfig(sampler="dpmpp_2m_sde"),
    SamplingConfig(sampler="euler", churn=10),
    SamplingConfig(sampler="heun", churn=10, churn_min=0.05, churn_max=50),
)
POINTS = two_tone_points(6)


def options(config: SamplingConfig) -> str:
    """What is set, to name a test by."""
    fields = config.model_dump(include={"sampler", *TAKEN_BY, "churn_min", "churn_max", "churn_noise"})
    return " ".join(f"{name}={value}" if name != "sampler" else value for name, value in fields.items())


every = pytest.mark.parametrize("config", DETERMINISTIC + STOCHASTIC, ids=options)
deterministic = pytest.mark.parametrize("config", DETERMINISTIC, ids=options)
stochastic = pytest.mark.parametrize("config", STOCHASTIC, ids=options)


def noises(seed: int, count: int, size: int = 4) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, size, size, generator=generator)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asks for no noise")


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000)], ids=["linear", "cosine"])
@every
def test_every_sampler_lands_on_the_points_of_a_finite_set_and_reaches_all(
    config: SamplingConfig, schedule: NoiseSchedule
) -> None:
    noise, sigmas = noises(0, 256), sigma_grid(schedule, 50)
    pictures = make_sampler(config)(IdealDenoiser(POINTS), sigmas[0].float() * noise(), sigmas, noise)
    distances = (pictures[:, None] - POINTS).flatten(2).abs().amax(-1)
    assert (distances.min(1).values < 0.02).float().mean() > 0.98
    shares = torch.bincount(distances.argmin(1), minlength=len(POINTS)) / len(pictures)
    assert shares.min() > 0.5 / len(POINTS)


@deterministic
def test_what_needs_no_noise_asks_for_none(config: SamplingConfig) -> None:
    sigmas = sigma_grid(linear_schedule(1000), 7)
    make_sampler(config)(IdealDenoiser(POINTS), sigmas[0].float() * noises(0, 3)(), sigmas, no_noise)


@stochastic
def test_fresh_noise_makes_another_picture_of_the_same_start(config: SamplingConfig) -> None:
    sigmas, start = sigma_grid(linear_schedule(1000), 20), noises(0, 64)()
    ends = [
        make_sampler(config)(IdealDenoiser(POINTS), sigmas[0].float() * start, sigmas, noises(seed, 64))
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
    return (make_sampler(config)(gaussian_denoiser, x, sigmas, no_noise) - exact).abs().item()


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
def test_fresh_noise_leaves_the_distribution_of_the_data_as_it_is(config: SamplingConfig) -> None:
    schedule = cosine_schedule(1000)
    noise, sigmas = noises(1, 4000, 1), sigma_grid(schedule, 500)
    sampler = make_sampler(config.changed({"steps": 500}))
    pictures = sampler(gaussian_denoiser, sigmas[0].float() * noise(), sigmas, noise)
    assert pictures.std().item() == pytest.approx(SPREAD, rel=0.06)
    assert pictures.mean().item() == pytest.approx(0, abs=0.05)


@every
def test_callback_sees_every_level_in_turn_with_picture_and_estimate(config: SamplingConfig) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    denoiser, sigmas = IdealDenoiser(POINTS), sigma_grid(linear_schedule(1000), 7)
    noise = noises(0, 3)
    make_sampler(config)(denoiser, sigmas[0].float() * noise(), sigmas, noise, lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == list(range(7))
    for i, x, x0 in seen:
        assert x.shape == x0.shape == (3, 1, 4, 4)
        if config.churn is None:
            torch.testing.assert_close(x0, denoiser(x, sigmas[i]))


@every
def test_evaluations_are_one_a_step_and_two_for_heun(config: SamplingConfig) -> None:
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma))
        return torch.zeros_like(x)

    sigmas, noise = sigma_grid(linear_schedule(1000), 7), noises(0, 1)
    make_sampler(config)(denoise, sigmas[0].float() * noise(), sigmas, noise)
    assert len(asked) == (13 if config.sampler == "heun" else 7)


def test_ddim_and_dpmpp_with_all_noise_fresh_are_ddpm_and_between_they_are_neither() -> None:
    """DDIM's η = 1 is DDPM with the smaller variance (arXiv 2010.02502, section 4.1)."""
    sigmas = sigma_grid(cosine_schedule(1000), 25)

    def drawn(grid: Tensor = sigmas, **settings: object) -> Tensor:
        noise = noises(3, 8)
        sampler = make_sampler(SamplingConfig.model_validate({"sampler": "ddpm"} | settings))
        return sampler(gaussian_denoiser, grid[0].float() * noise(), grid, noise)

    torch.testing.assert_close(drawn(sampler="ddim", eta=1), drawn(), atol=1e-5, rtol=0)
    assert not torch.allclose(drawn(sampler="ddim", eta=0.9), drawn(), atol=1e-2)
    # Over two steps DPM-Solver++ has nothing to extrapolate from, and is of first order.
    two = sigmas[[0, 12, -1]]
    torch.testing.assert_close(drawn(two, sampler="dpmpp_2m_sde"), drawn(two), atol=1e-5, rtol=0)
    assert not torch.allclose(drawn(two, sampler="dpmpp_2m_sde", eta=0.9), drawn(two), atol=1e-3)


def test_nothing_fresh_is_the_sampler_without_and_euler_is_ddim() -> None:
    sigmas, start = sigma_grid(cosine_schedule(1000), 25), noises(3, 8)()

    def drawn(**settings: object) -> Tensor:
        sampler = make_sampler(SamplingConfig.model_validate(settings))
        return sampler(gaussian_denoiser, sigmas[0].float() * start, sigmas, no_noise)

    assert torch.equal(drawn(sampler="ddim", eta=0), drawn(sampler="ddim"))
    assert torch.equal(drawn(sampler="dpmpp_2m_sde", eta=0), drawn(sampler="dpmpp_2m"))
    assert torch.equal(drawn(sampler="euler"), drawn(sampler="ddim"))


def as_in_algorithm_2(
    x: Tensor, sigmas: Tensor, noise: Callable[[], Tensor], config: SamplingConfig, second: bool
) -> Tensor:
    """arXiv 2206.00364, algorithm 2, line by line; without its lines 9 and 10 it is Euler's method."""
    t, steps = sigmas.tolist(), len(sigmas) - 1
    assert config.churn is not None
    low, high = config.churn_min or 0.0, config.churn_max or float("inf")
    for i in range(steps):
        gamma = min(config.churn / steps, 2**0.5 - 1) if low <= t[i] <= high else 0.0
        raised = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + (raised**2 - t[i] ** 2) ** 0.5 * (config.churn_noise or 1.0) * noise()
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
        {"churn": 5},
        {"churn": 40, "churn_min": 0.05, "churn_max": 50, "churn_noise": 1.003},
        {"churn": 1e6, "churn_max": 1},
    ],
    ids=str,
)
def test_churn_is_that_of_algorithm_2(sampler: str, churn: dict[str, float]) -> None:
    config = SamplingConfig.model_validate({"sampler": sampler, "steps": 18} | churn)
    sigmas = sigma_grid(linear_schedule(1000), 18)
    start = sigmas[0].float() * noises(0, 4)()
    ours = make_sampler(config)(gaussian_denoiser, start, sigmas, noises(1, 4))
    theirs = as_in_algorithm_2(start, sigmas, noises(1, 4), config, second=sampler == "heun")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_each_step_of_a_part_of_the_way_is_churned_as_it_is_on_the_whole_way(sampler: SamplerName) -> None:
    sigmas = sigma_grid(linear_schedule(1000), 18)
    churned = make_sampler(SamplingConfig(sampler=sampler, steps=18, churn=3))
    start = sigmas[0].float() * noises(0, 4)()
    noise = noises(1, 4)
    halfway = churned(gaussian_denoiser, start, sigmas[:10], noise)
    torch.testing.assert_close(
        churned(gaussian_denoiser, halfway, sigmas[9:], noise),
        churned(gaussian_denoiser, start, sigmas, noises(1, 4)),
    )


def mixture_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of a mixture of Gaussians about ``POINTS``, in float64."""
    means, variance = POINTS.double() / 2, 0.1**2
    distances = (x[:, None] - means).flatten(2).square().sum(-1)
    weights = torch.softmax(-distances / (2 * (variance + sigma**2)), dim=1)
    middle = torch.einsum("nk,kchw->nchw", weights, means)
    return (variance * x + sigma**2 * middle) / (variance + sigma**2)


def test_the_multistep_samplers_earn_their_place_by_how_near_they_come_in_as_many_evaluations() -> None:
    schedule = linear_schedule(1000)
    start = noises(0, 64)().double() * sigma_grid(schedule, 20)[0]

    def drawn(config: SamplingConfig, steps: int) -> Tensor:
        return make_sampler(config)(mixture_denoiser, start, sigma_grid(schedule, steps), no_noise)

    exact = drawn(SamplingConfig(sampler="heun"), 999)

    def distance(config: SamplingConfig, evaluations: int) -> float:
        steps = (evaluations + 1) // 2 if config.sampler == "heun" else evaluations
        return (drawn(config, steps) - exact).square().mean((1, 2, 3)).sqrt().mean().item()

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
            "sampling.eta means nothing to sampler = ddpm: use ddim or dpmpp_2m_sde, or leave",
        ),
        ({"sampler": "unipc", "eta": 0.0}, "sampling.eta means nothing to sampler = unipc"),
        ({"sampler": "ddim", "churn": 4}, "sampling.churn means nothing to sampler = ddim: use euler or heun"),
        ({"sampler": "dpmpp_2m", "order": 3}, "sampling.order means nothing to sampler = dpmpp_2m: use deis or unipc"),
        ({"sampler": "heun", "variance": "larger"}, "sampling.variance means nothing to sampler = heun: use ddpm"),
        ({"sampler": "heun", "churn_min": 0.05}, r"sampling.churn_\* say how sampling.churn is added"),
        ({"sampler": "ddpm", "churn_noise": 1.003}, r"sampling.churn_\* say how sampling.churn is added"),
        ({"sampler": "heun", "churn": 4, "churn_min": 1, "churn_max": 0.5}, "sampling.churn_max is above churn_min"),
        ({"sampler": "heun", "churn": 0}, "greater than 0"),
        ({"sampler": "ddim", "eta": 1.5}, "less than or equal to 1"),
        ({"sampler": "unipc", "order": 4}, "2 or 3"),
        ({"sigma_min": 20}, "sampling.sigma_max is above sigma_min"),
        ({"sigma_max": 0, "sigma_min": None}, "greater than 0"),
    ],
    ids=str,
)
def test_options_without_effect_or_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingConfig.model_validate(settings)


def test_every_option_belongs_to_a_sampler_and_is_left_out_of_digests_until_it_is_set() -> None:
    assert {name for names in TAKEN_BY.values() for name in names} <= set(get_args(SamplerName))
    assert SamplingConfig().model_dump().keys() == {
        *("sampler", "steps", "sigma_max", "sigma_min", "compute_batch", "precision")
    }
    for config in DETERMINISTIC + STOCHASTIC:
        assert SamplingConfig.model_validate(config.model_dump()) == config
    assert SamplingConfig(sampler="ddim", eta=0).model_dump()["eta"] == 0


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000), cosine_schedule(20)])
@pytest.mark.parametrize("steps", [2, 20, 250, 1000])
def test_grids_fall_from_the_schedules_noisiest_usable_level_to_nothing(schedule: NoiseSchedule, steps: int) -> None:
    for ends in [(None, None), (20, None), (None, 0.04), (20, 0.04), (1e9, 1e-9)]:
        sigmas = sigma_grid(schedule, steps, *ends)
        assert_falls(sigmas, schedule, steps)


def assert_falls(sigmas: Tensor, schedule: NoiseSchedule, steps: int) -> None:
    assert len(sigmas) == steps + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-9)
    assert sigmas[-2] >= schedule.sigmas[0] * (1 - 1e-9)


def test_as_many_steps_as_the_schedule_has_are_the_schedule() -> None:
    schedule = cosine_schedule(50)
    torch.testing.assert_close(sigma_grid(schedule, 50)[:-1], schedule.sigmas.flip(0), atol=0, rtol=0)


@pytest.mark.parametrize("steps", [2, 20, 1000])
def test_a_grid_between_two_levels_goes_from_one_to_the_other_in_edms_steps(steps: int) -> None:
    sigmas = sigma_grid(linear_schedule(1000), steps, 20, 0.04)[:-1]
    assert (sigmas[0].item(), sigmas[-1].item()) == pytest.approx((20, 0.04))
    # Equation 5 of arXiv 2206.00364: the seventh roots lie at equal distances.
    roots = sigmas ** (1 / 7)
    torch.testing.assert_close(roots.diff(), ((roots[-1] - roots[0]) / (steps - 1)).expand(steps - 1))


def test_levels_beyond_the_schedule_are_its_ends() -> None:
    schedule = edm_schedule(1000, sigma_min=0.01, sigma_max=50)
    torch.testing.assert_close(sigma_grid(schedule, 9, 70, 0.001), sigma_grid(schedule, 9))
    config = SamplingConfig(steps=9, sigma_max=None, sigma_min=None)
    assert torch.equal(levels_of(config, schedule), sigma_grid(schedule, 9))
    assert torch.equal(levels_of(SamplingConfig(steps=9), schedule), sigma_grid(schedule, 9, 20, 0.04))


def test_a_grid_that_the_schedule_does_not_touch_is_refused() -> None:
    with pytest.raises(UserError, match=r"σ from 0\.1\S* to \S+, none of which .* sampling\.sigma_max = 0\.05: change"):
        sigma_grid(linear_schedule(10), 4, 0.05, 0.01)
