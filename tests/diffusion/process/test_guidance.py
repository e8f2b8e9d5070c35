"""Guidance against closed forms: where both denoisers are those of known Gaussians, so is what they make together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.process.denoiser import apply_guidance, clip_estimates, rescale_guidance
from diffusion.process.samplers.edm import heun
from diffusion.process.schedules import linear_schedule

SHAPE = (1, 4, 4)


class Gaussian:
    """E[x_0 | x_0 + σ ε = x] for x_0 ~ N(mean, deviation²), each value by itself; counts how often it is asked."""

    def __init__(self, mean: float, deviation: float) -> None:
        self.mean, self.deviation, self.calls = mean, deviation, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        noise = sigma.expand(len(x))[:, None, None, None].to(x) ** 2
        return (self.deviation**2 * x + noise * self.mean) / (self.deviation**2 + noise)


def noisy(seed: int = 0, count: int = 5) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LEVELS = st.floats(0.05, 20)


@given(LEVELS, st.floats(0, 8), st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 1), st.floats(0.1, 1))
def test_two_gaussians_make_the_denoiser_of_their_powers_product(
    level: float, scale: float, conditional: float, unconditional: float, narrow: float, wide: float
) -> None:
    x, sigma = noisy(), torch.tensor(level)
    estimate = apply_guidance(Gaussian(conditional, narrow), Gaussian(unconditional, wide), scale)(x, sigma)
    # The density p_c^w p_u^(1−w) at this noise level has the score −precision (x − centre); Tweedie's formula.
    shares = np.array([scale, 1 - scale]) / (np.array([narrow, wide]) ** 2 + level**2)
    slope = -(shares.sum() * x - float(shares @ np.array([conditional, unconditional])))
    torch.testing.assert_close(estimate, x + level**2 * slope, atol=1e-4, rtol=1e-4)


def test_guidance_shifts_the_mean_of_equally_wide_gaussians() -> None:
    denoise = apply_guidance(Gaussian(0.5, 0.3), Gaussian(0.1, 0.3), 3.0)
    sigmas = linear_schedule(1000).sigma_grid(40)
    images = heun(denoise, sigmas[0] * noisy(1, count=4000), sigmas, noisy)
    assert images.mean().item() == pytest.approx(0.1 + 3 * 0.4, abs=0.01)
    assert images.std().item() == pytest.approx(0.3, abs=0.01)


def test_scale_one_is_the_conditional_alone_and_zero_the_unconditional() -> None:
    conditional, unconditional, x, sigma = Gaussian(0.5, 0.3), Gaussian(-0.5, 0.6), noisy().float(), torch.tensor(0.7)
    assert torch.equal(apply_guidance(conditional, unconditional, 1.0)(x, sigma), conditional(x, sigma))
    assert unconditional.calls == 0
    assert torch.equal(apply_guidance(conditional, unconditional, 0.0)(x, sigma), unconditional(x, sigma))


@pytest.mark.parametrize(("level", "inside"), [(0.1, False), (0.2, False), (0.21, True), (5.0, True), (5.1, False)])
def test_outside_its_interval_guidance_leaves_the_conditional_alone(level: float, inside: bool) -> None:
    conditional, unconditional, x, sigma = (
        Gaussian(0.5, 0.3),
        Gaussian(-0.5, 0.6),
        noisy(),
        torch.tensor(level, dtype=torch.float64),
    )
    estimate = apply_guidance(conditional, unconditional, 3.0, interval=(0.2, 5.0))(x, sigma)
    assert torch.equal(estimate, conditional(x, sigma)) == (not inside)
    assert unconditional.calls == inside


def test_each_image_has_its_own_level() -> None:
    conditional, unconditional, x = Gaussian(0.5, 0.3), Gaussian(-0.5, 0.6), noisy(count=3)
    denoise, sigmas = (
        apply_guidance(conditional, unconditional, 3.0, interval=(0.2, 5.0)),
        torch.tensor([0.1, 1.0, 10.0]),
    )
    one_by_one = [denoise(x[i : i + 1], sigmas[i]) for i in range(3)]
    torch.testing.assert_close(denoise(x, sigmas), torch.cat(one_by_one))


@given(st.floats(0.01, 1), st.integers(0, 100))
def test_rescaling_gives_back_the_spread_that_the_conditional_had(share: float, seed: int) -> None:
    strong, conditional = 3 * noisy(seed) + 0.2, noisy(seed + 1)
    spreads = [each.flatten(1).numpy().std(1, ddof=1) for each in (strong, conditional)]
    whole, part = (
        rescale_guidance(strong, conditional, each).flatten(1).numpy().std(1, ddof=1) for each in (1.0, share)
    )
    np.testing.assert_allclose(whole, spreads[1])
    np.testing.assert_allclose(part, share * spreads[1] + (1 - share) * spreads[0])


def test_flat_estimates_have_no_spread_to_give_back() -> None:
    flat = torch.full((2, *SHAPE), 0.5)
    assert rescale_guidance(flat, noisy(count=2).float(), 1.0).isfinite().all()
    conditional, unconditional, x, sigma = Gaussian(0.5, 0.3), Gaussian(-0.5, 0.6), noisy(), torch.tensor(0.7)
    estimate = apply_guidance(conditional, unconditional, 6.0, rescale=1.0)(x, sigma)
    torch.testing.assert_close(estimate.std((1, 2, 3)), conditional(x, sigma).std((1, 2, 3)))


def test_only_what_comes_out_is_clipped() -> None:
    conditional, unconditional, x, sigma = Gaussian(0.9, 0.3), Gaussian(-0.9, 0.3), noisy(), torch.tensor(2.0)
    estimate = clip_estimates(apply_guidance(conditional, unconditional, 5.0))(x, sigma)
    assert estimate.max() == 1
    assert torch.equal(estimate, apply_guidance(conditional, unconditional, 5.0)(x, sigma).clamp(-1, 1))
