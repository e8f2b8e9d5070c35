"""The reverse process: pure functions from noise to pictures, over any denoiser.

All have one signature. ``x`` is σ_max ε, (N, C, H, W); ``sigmas`` falls from σ_max to 0; ``noise`` gives
fresh standard Gaussian noise of x's shape at each call (deterministic samplers never call it);
``callback(i, x, x0_hat)`` sees each step. Everything happens in x = x_0 + σ ε, where DDPM's and DDIM's
steps are a mean and a line (arXiv 2206.00364, appendix C).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diffusion.config_sampling import SamplerName, SamplingConfig
from diffusion.process import NoiseSchedule
from diffusion.variance import Variance, larger, smaller

Denoise = Callable[[Tensor, Tensor], Tensor]
Posterior = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From x, its σ and the lower level s: x̂_0, and the standard deviation of x_s, a number or one of each value."""
Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]

SIGMA_MAX = 80.0
"""Beyond it a picture is lost in noise; cosine schedules go on to 20,000 (arXiv 2206.00364, table 1)."""
RHO = 7.0


class Sampler(Protocol):
    """The signature of all samplers."""

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None
    ) -> Tensor:
        """Pictures, nominally in [−1, 1]."""


def sigma_grid(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Noise levels to visit, (steps + 1,) float64, falling, the last 0.

    All T levels of the schedule if ``steps`` is T; else EDM's grid with ρ = 7 (arXiv 2206.00364, eq. 5),
    which spends most steps on the low levels.
    """
    if steps == schedule.steps:
        levels = schedule.sigmas.flip(0)
    else:
        first, last = schedule.sigmas[-1].clamp(max=SIGMA_MAX), schedule.sigmas[0]
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (first ** (1 / RHO) + ramp * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO
    return torch.cat([levels, levels.new_zeros(1)])


def ancestral(
    posterior: Posterior, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """From N(mean of q(x_s | x_σ, x̂_0), deviation²) again and again, at last without noise.

    arXiv 2006.11239, algorithm 2.
    """
    for i, sigma, following in _pairs(sigmas):
        x0, deviation = posterior(x, sigma, following)
        if callback:
            callback(i, x, x0)
        x = x0 + float((following / sigma) ** 2) * (x - x0)
        if following > 0:
            x = x + deviation * noise()
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    variance: Variance = smaller,
) -> Tensor:
    """Ancestral sampling whose ``variance`` is the same for all values (arXiv 2006.11239, section 3.2)."""

    def posterior(x: Tensor, sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        return denoise(x, sigma), variance(sigma, following).sqrt()

    return ancestral(posterior, x, sigmas, noise, callback)


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Deterministic DDIM, η = 0 (arXiv 2010.02502, equation 12): Euler's method in σ."""
    for i, sigma, following in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        x = x0 + float(following / sigma) * (x - x0)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Heun's method, two evaluations a step but the last (arXiv 2206.00364, algorithm 1)."""
    for i, sigma, following in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        slope = (x - x0) / float(sigma)
        ahead = x + float(following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - denoise(ahead, following)) / float(following)
            ahead = x + float(following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++ (2M), which reuses the last estimate for second order (arXiv 2211.01095, algorithm 2).

    The first and the last step are of first order.
    """
    previous: Tensor | None = None
    for i, sigma, following in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        estimate = x0
        if previous is not None and following > 0:
            step, last_step = (sigma / following).log(), (sigmas[i - 1] / sigma).log()
            ahead = float(step / (2 * last_step))
            estimate = (1 + ahead) * x0 - ahead * previous
        ratio = float(following / sigma)
        x = ratio * x + (1 - ratio) * estimate
        previous = x0
    return x


SAMPLERS: dict[SamplerName, Sampler] = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}


def make_sampler(config: SamplingConfig) -> Sampler:
    """The sampler that ``config`` names, with its options."""
    if config.variance == "larger":
        return partial(ddpm, variance=larger)
    return SAMPLERS[config.sampler]


def _pairs(sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for i in range(len(sigmas) - 1):
        yield i, sigmas[i], sigmas[i + 1]
