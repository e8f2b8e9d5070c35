"""The evidence lower bound against models whose likelihood is known exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from diffusion.families.vae import kl_divergence as our_divergence
from diffusion.families.vae import negative_log_likelihood
from diffusion.models.vae import reparameterize

LATENTS, VALUES, SCALE = 3, 12, 0.4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors() -> Tensor:
    """W (VALUES, LATENTS) of probabilistic PCA, x = W z + ε with ε of deviation SCALE, its columns orthogonal."""
    directions = torch.linalg.qr(torch.randn(VALUES, LATENTS, generator=generator(0), dtype=torch.float64)).Q
    return directions * torch.tensor([2.0, 1.0, 0.3])


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the exact posterior of z, (N, LATENTS) each (Tipping and Bishop, 1999, equation 7)."""
    precision = factors().T @ factors() + SCALE**2 * torch.eye(LATENTS, dtype=torch.float64)
    covariance = SCALE**2 * torch.linalg.inv(precision)
    mean = x @ factors() @ torch.linalg.inv(precision)
    return mean, covariance.diagonal().log().expand_as(mean)


def bound(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The bound of each image, exactly: points at ±√k along each axis integrate a Gaussian's quadratics."""
    points = math.sqrt(LATENTS) * torch.cat([torch.eye(LATENTS), -torch.eye(LATENTS)]).double()
    log_scale = torch.tensor(math.log(SCALE), dtype=torch.float64)
    misfit = torch.stack(
        [
            negative_log_likelihood(
                x, reparameterize(mean, log_variance, noise.expand_as(mean)) @ factors().T, log_scale
            )
            for noise in points
        ]
    ).mean(0)
    return -misfit - our_divergence(mean, log_variance)


def likelihood(x: Tensor) -> Tensor:
    covariance = factors() @ factors().T + SCALE**2 * torch.eye(VALUES, dtype=torch.float64)
    return MultivariateNormal(torch.zeros(VALUES, dtype=torch.float64), covariance).log_prob(x)


def images(seed: int) -> Tensor:
    return torch.randn(5, VALUES, generator=generator(seed), dtype=torch.float64)


def test_with_the_exact_posterior_the_bound_is_the_likelihood() -> None:
    x = images(1)
    assert torch.allclose(bound(x, *posterior(x)), likelihood(x), atol=1e-10)


@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_with_any_other_posterior_it_lies_below_by_the_divergence_of_the_two(seed: int, far: float) -> None:
    x = images(seed)
    mean, log_variance = posterior(x)
    shift, spread = (torch.randn(5, LATENTS, generator=generator(seed + n), dtype=torch.float64) for n in (1, 2))
    other = mean + far * shift, log_variance + far * spread
    wrong, right = (Independent(Normal(m, (0.5 * v).exp()), 1) for m, v in (other, (mean, log_variance)))
    assert torch.allclose(likelihood(x) - bound(x, *other), kl_divergence(wrong, right), atol=1e-8)


@given(st.integers(0, 2**32 - 1))
def test_divergence_matches_torch_over_all_values_of_an_image(seed: int) -> None:
    mean, log_variance = torch.randn(2, 4, 3, 5, 5, generator=generator(seed), dtype=torch.float64)
    posteriors = Independent(Normal(mean, (0.5 * log_variance).exp()), 3)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    assert torch.allclose(our_divergence(mean, log_variance), kl_divergence(posteriors, prior))


def test_the_likelihood_is_that_of_a_normal_distribution() -> None:
    x, back = torch.randn(2, 4, 3, 5, 5, generator=generator(0), dtype=torch.float64)
    expected = Independent(Normal(back, 0.3), 3).log_prob(x)
    assert torch.allclose(-negative_log_likelihood(x, back, torch.tensor(0.3).double().log()), expected)


def test_sampled_latents_have_the_moments_of_the_posterior() -> None:
    noise = torch.randn(100_000, 1, generator=generator(0))
    drawn = reparameterize(torch.tensor(2.0), torch.tensor(math.log(9.0)), noise)
    assert drawn.mean().item() == pytest.approx(2, abs=0.05)
    assert drawn.std().item() == pytest.approx(3, rel=0.01)
