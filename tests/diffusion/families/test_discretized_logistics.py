"""Discretised mixtures of logistics: probabilities that add up, and pixels sampled as they say."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, logistic
from torch import Tensor

from diffusion.families.autoregressive.network import log_probability, mixtures_of, parameter_count, sample_pixels


def numbers(seed: int, channels: int, mixtures: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(parameter_count(channels, mixtures), generator=torch.Generator().manual_seed(seed))


def alphabet(channels: int, levels: int) -> Tensor:
    """All pixels that there are, (levels^channels, channels)."""
    steps = (torch.arange(levels) / ((levels - 1) / 2) - 1).tolist()
    return torch.tensor(list(itertools.product(steps, repeat=channels)))


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3]), st.integers(1, 4), st.floats(0.1, 4))
def test_the_probabilities_of_all_pixels_add_up_to_one(seed: int, channels: int, mixtures: int, scale: float) -> None:
    pixels = alphabet(channels, 6)
    mixtures_of_pixels = mixtures_of(numbers(seed, channels, mixtures, scale), channels)
    assert log_probability(mixtures_of_pixels, pixels, levels=6).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_probability_is_scipy_s_logistic_between_the_halfway_points() -> None:
    mean, log_scale = 0.1, -3.2
    mixtures = mixtures_of(torch.tensor([0.7, mean, log_scale]), 1)
    x = torch.arange(256) / 127.5 - 1
    edges = [-math.inf, *((x[1:] + x[:-1]) / 2).tolist(), math.inf]
    expected = torch.from_numpy(logistic.cdf(edges, mean, math.exp(log_scale))).diff()
    assert torch.allclose(log_probability(mixtures, x[:, None]).exp().double(), expected, atol=1e-6)


def test_values_far_from_all_logistics_have_finite_gradients() -> None:
    numbers_of_mixture = torch.tensor([0.0, 0.9, -50.0], requires_grad=True)
    log_probabilities = log_probability(mixtures_of(numbers_of_mixture, 1), torch.tensor([[-0.9]]))
    log_probabilities.sum().backward()
    assert torch.isfinite(log_probabilities).all()
    assert torch.isfinite(numbers_of_mixture.grad).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_sampling_frequencies_match_the_probabilities(channels: int) -> None:
    levels, count = 4, 20_000
    mixtures = mixtures_of(numbers(3, channels, 3), channels)
    noise = torch.randn(count, channels + 1, generator=torch.Generator().manual_seed(0))
    pixels = sample_pixels(mixtures_of(numbers(3, channels, 3).expand(count, -1), channels), noise, levels)
    places = ((pixels + 1) * (levels - 1) / 2).round().long()
    which = (places * levels ** torch.arange(channels - 1, -1, -1)).sum(1)
    expected = log_probability(mixtures, alphabet(channels, levels), levels).exp().double() * count
    often = expected > 5
    counts = torch.bincount(which, minlength=len(expected)).double()
    rest = counts[~often].sum(), expected[~often].sum()
    observed, probable = (torch.cat([each[often], each[~often].sum()[None]]) for each in (counts, expected))
    assert abs(rest[0] - rest[1]) < 5 * math.sqrt(rest[1] + 1)
    assert chisquare(observed + 1e-9, (probable + 1e-9) * (observed.sum() / probable.sum())).pvalue > 1e-3


def test_a_value_follows_those_before_it() -> None:
    # The second value's mean is the first times tanh of its slope.
    steep = mixtures_of(torch.tensor([0.0, 0.0, 0.0, -2.0, -7.0, 9.0]), 2)
    noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    each = type(steep)(*(value.expand(100, *value.shape) for value in vars(steep).values()))
    pixels = sample_pixels(each, noise)
    assert (pixels[:, 0] - pixels[:, 1]).abs().max() < 0.03
    assert pixels[:, 0].std() > 0.1
