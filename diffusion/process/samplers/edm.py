"""The deterministic and stochastic samplers of EDM (arXiv 2206.00364): Euler and Heun, with churn."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from diffusion.common.config import Config, is_unset
from diffusion.process.samplers.base import ZERO_SNR, BaseSampling, Denoise, Noise, Sampler

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHURN = math.sqrt(2) - 1
"""Largest γ of churn in one step (arXiv 2206.00364, algorithm 2)."""


class ChurnConfig(Config):
    """Churn: noise added before each step, which corrects errors of earlier steps (arXiv 2206.00364, algorithm 2)."""

    amount: float = Field(gt=0)
    """S_churn: total noise added over all steps, relative to σ; at most √2 − 1 in each."""
    sigma_min: float = Field(0.0, ge=0)
    """S_min: lowest σ at which noise is added."""
    sigma_max: float | None = Field(None, gt=0)
    """S_max: highest σ at which noise is added; null: any."""
    noise_std: float = Field(1.0, gt=0)
    """S_noise: standard deviation of the noise; slightly above 1 counters oversmoothing."""

    @model_validator(mode="after")
    def _levels_rise(self) -> ChurnConfig:
        if self.sigma_max is not None and self.sigma_max <= self.sigma_min:
            raise ValueError("sampling.churn.sigma_max is above its sigma_min, or there is no level between them")
        return self

    def add(self, steps: int, x: Tensor, sigma: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Raise x from σ to σ̂ = σ (1 + γ) before one of ``steps`` steps; returns both."""
        if not self.sigma_min <= sigma <= (math.inf if self.sigma_max is None else self.sigma_max):
            return x, sigma
        sigma_hat = sigma * (1 + min(self.amount / steps, MAX_CHURN))
        return x + self.noise_std * float((sigma_hat**2 - sigma**2).sqrt()) * noise(), sigma_hat


class ChurnSampling(BaseSampling):
    """Options of samplers with churn."""

    churn: ChurnConfig | None = Field(None, exclude_if=is_unset)
    """Noise added before each step; null: none."""

    def build_sampler(self) -> Sampler:
        """Bind the sampler's function to the churn, spread over all steps of the process."""
        return partial(type(self).function, churn=self.churn, churn_steps=self.steps)


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, churn: ChurnConfig | None = None, churn_steps: int = 0
) -> Tensor:
    """Euler's method in σ (arXiv 2206.00364, algorithm 2 without its correction); without ``churn`` it is ``ddim``.

    ``churn_steps`` is the number of steps over which the churn is spread, of which ``sigmas`` may be a part; 0: those.
    """
    for sigma, next_sigma in pairwise(sigmas):
        x_hat, level = churn.add(churn_steps or len(sigmas) - 1, x, sigma, noise) if churn else (x, sigma)
        x0 = denoise(x_hat, level)
        x = x0 + float(next_sigma / level) * (x_hat - x0)
    return x


class EulerSampling(ChurnSampling):
    """Euler's method in σ (arXiv 2206.00364): one evaluation per step."""

    function = euler
    sampler: Literal["euler"] = "euler"
    """Name of the sampler."""


def heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, churn: ChurnConfig | None = None, churn_steps: int = 0
) -> Tensor:
    """Heun's method, two evaluations per step but the last (arXiv 2206.00364, algorithms 1, 2); else as ``euler``."""
    for sigma, next_sigma in pairwise(sigmas):
        x_hat, level = churn.add(churn_steps or len(sigmas) - 1, x, sigma, noise) if churn else (x, sigma)
        x0 = denoise(x_hat, level)
        slope = (x_hat - x0) / float(level)
        x_next = x_hat + float(next_sigma - level) * slope
        # A correction amplifies the difference of the estimates by half the ratio of the levels; from noise alone the
        # step is exact without.
        if next_sigma > 0 and level <= ZERO_SNR:
            next_slope = (x_next - denoise(x_next, next_sigma)) / float(next_sigma)
            x_next = x_hat + float(next_sigma - level) * (slope + next_slope) / 2
        x = x_next
    return x


class HeunSampling(ChurnSampling):
    """Heun's method in σ (arXiv 2206.00364): second order, with two evaluations per step."""

    function = heun
    evaluations_per_step = 2
    sampler: Literal["heun"] = "heun"
    """Name of the sampler."""
