"""The forward process q: how a picture turns into noise, T steps long (arXiv 2006.11239)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion.models.config import ModelConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) for t = 0 … T−1."""

    alphas_cumprod: Tensor
    """ᾱ_t, falling from nearly 1 to nearly 0: (T,) float64."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """σ_t = √((1 − ᾱ_t) / ᾱ_t), noise over signal: (T,) float64."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t) = 1/σ_t²: (T,) float64."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_t for integer steps ``t`` (N,), as (N, 1, 1, 1) float64 to go with pictures."""
        return self.alphas_cumprod.to(t.device)[t][:, None, None, None]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for pictures ``x0`` (N, C, H, W), integer steps ``t`` (N,) and standard Gaussian ``noise``."""
        signal, spread = scales(self.alpha_bar(t), x0)
        return signal * x0 + spread * noise


def scales(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 − ᾱ), the shares of picture and noise in x_t, in the type of ``like``.

    The roots are taken in float64: at either end float32 has lost 1 − ᾱ.
    """
    alpha_bar = alpha_bar.double()
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)


def linear_schedule(steps: int) -> NoiseSchedule:
    """β rises from 1e-4 to 0.02 in a straight line (arXiv 2006.11239, section 4).

    For T other than 1000 the ends scale by 1000/T, so that as much noise is added in all.
    """
    scale = 1000 / steps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64).clamp(max=0.999)
    return NoiseSchedule((1 - betas).cumprod(0))


def cosine_schedule(steps: int, s: float = 0.008) -> NoiseSchedule:
    """ᾱ(t) ∝ cos²((t/T + s)/(1 + s) · π/2), β clipped at 0.999 (arXiv 2102.09672, equation 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((t + s) / (1 + s) * math.pi / 2).cos() ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return NoiseSchedule((1 - betas).cumprod(0))


def make_schedule(config: ModelConfig) -> NoiseSchedule:
    """The schedule that ``config`` names."""
    return {"linear": linear_schedule, "cosine": cosine_schedule}[config.schedule](config.steps)
