"""The reverse process: pure functions from noise to pictures, over any denoiser.

All have one signature, and options of their own after it. ``x`` is σ_max ε, (N, C, H, W); ``sigmas`` falls from
σ_max to 0; ``noise`` gives fresh standard Gaussian noise of x's shape at each call (deterministic samplers never
call it); ``callback(i, x, x0_hat)`` sees each level before the step from it. Everything happens in x = x_0 + σ ε, where
DDPM's and DDIM's steps are a mean and a line (arXiv 2206.00364, appendix C).

With λ = −ln σ that line is dx/dλ = x̂_0 − x. The multistep samplers put a polynomial in λ through the estimates that
they remember, and integrate it exactly.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
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
MOST_CHURN = math.sqrt(2) - 1
"""Share of σ that a step may add at most (arXiv 2206.00364, algorithm 2)."""


class Sampler(Protocol):
    """The signature of all samplers."""

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None
    ) -> Tensor:
        """Pictures, nominally in [−1, 1]."""


def sigma_grid(
    schedule: NoiseSchedule, steps: int, sigma_max: float | None = None, sigma_min: float | None = None
) -> Tensor:
    """Noise levels to visit, (steps + 1,) float64, falling, the last 0.

    All T levels of the schedule if ``steps`` is T and neither end is given; else EDM's grid with ρ = 7
    (arXiv 2206.00364, eq. 5), which spends most steps on the low levels, between the two as far as the schedule goes.
    Raises UserError if none of it lies there.
    """
    if steps == schedule.steps and sigma_max is None and sigma_min is None:
        levels = schedule.sigmas.flip(0)
    else:
        highest, lowest = schedule.sigmas[-1], schedule.sigmas[0]
        first = highest.clamp(max=SIGMA_MAX if sigma_max is None else sigma_max)
        last = lowest.clamp(min=sigma_min or 0.0)
        if first <= last:
            raise UserError(
                f"the noise schedule has σ from {lowest:g} to {highest:g}, none of which lies between "
                f"sampling.sigma_min = {sigma_min} and sampling.sigma_max = {sigma_max}: change them, or set null"
            )
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (first ** (1 / RHO) + ramp * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO
    return torch.cat([levels, levels.new_zeros(1)])


def levels_of(config: SamplingConfig, schedule: NoiseSchedule) -> Tensor:
    """The ``sigma_grid`` that ``config`` asks for."""
    return sigma_grid(schedule, config.steps, config.sigma_max, config.sigma_min)


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


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, eta: float = 0.0
) -> Tensor:
    """DDIM, of whose noise a part is fresh (arXiv 2010.02502, equations 12 and 16).

    With ``eta`` 0 none is: that is Euler's method in σ. With 1 it is ``ddpm``.
    """
    for i, sigma, following in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        ratio = following / sigma
        x = x0 + float(ratio * (1 - eta**2 * (1 - ratio**2)).sqrt()) * (x - x0)
        if eta and following > 0:
            x = x + eta * float(smaller(sigma, following).sqrt()) * noise()
    return x


@dataclass(frozen=True)
class Churn:
    """Noise added before each step, which then takes it away with mistakes made earlier (2206.00364, algorithm 2)."""

    share: float = 0.0
    """How much of σ is added before each step: S_churn over the number of steps, and at most √2 − 1."""
    low: float = 0.0
    """S_min: the lowest σ at which there is any."""
    high: float = math.inf
    """S_max: the highest."""
    scale: float = 1.0
    """S_noise: a little over 1 makes up for denoisers that take away too much."""

    def __call__(self, x: Tensor, sigma: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x at a higher σ̂, and σ̂, before a step."""
        if not self.share or not self.low <= sigma <= self.high:
            return x, sigma
        raised = sigma * (1 + self.share)
        return x + self.scale * float((raised**2 - sigma**2).sqrt()) * noise(), raised


CALM = Churn()


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, churn: Churn = CALM
) -> Tensor:
    """Euler's method in σ; without ``churn`` the same as ``ddim`` without η."""
    for i, sigma, following in _pairs(sigmas):
        raised, level = churn(x, sigma, noise)
        x0 = denoise(raised, level)
        if callback:
            callback(i, x, x0)
        x = x0 + float(following / level) * (raised - x0)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, churn: Churn = CALM
) -> Tensor:
    """Heun's method, two evaluations a step but the last (arXiv 2206.00364, algorithms 1 and 2)."""
    for i, sigma, following in _pairs(sigmas):
        raised, level = churn(x, sigma, noise)
        x0 = denoise(raised, level)
        if callback:
            callback(i, x, x0)
        slope = (raised - x0) / float(level)
        ahead = raised + float(following - level) * slope
        if following > 0:
            slope_ahead = (ahead - denoise(ahead, following)) / float(following)
            ahead = raised + float(following - level) * (slope + slope_ahead) / 2
        x = ahead
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, eta: float = 0.0
) -> Tensor:
    """DPM-Solver++ (2M), which reuses the last estimate for second order (arXiv 2211.01095, algorithm 2).

    The first and the last step are of first order. With ``eta`` 1 it is SDE-DPM-Solver++ (2M) of the same paper, and
    between 0 and 1 a part of the noise is fresh.
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
        ratio = following / sigma
        kept = float(ratio ** (1 + eta))
        x = kept * x + (1 - kept) * estimate
        if eta and following > 0:
            x = x + float(following * (1 - ratio ** (2 * eta)).sqrt()) * noise()
        previous = x0
    return x


def deis(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, order: int = 3
) -> Tensor:
    """DEIS: a polynomial through the last ``order`` estimates of the noise, here in λ (arXiv 2204.13902).

    The last step is of first order.
    """
    levels = (-sigmas.log()).tolist()
    known: list[tuple[float, Tensor]] = []
    for i, sigma, following in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        known = [(levels[i], (x - x0) / float(sigma)), *known][: order if following > 0 else 1]
        step = levels[i + 1] - levels[i]
        # ∫ e^−τ (τ/h)^k dτ from 0 to h = step, by parts from k to k: dx is ε dσ, and dσ is −σ e^−τ dτ.
        moments = [-math.expm1(-step)]
        for k in range(1, len(known)):
            moments.append(k / step * moments[-1] - math.exp(-step))
        x = x - float(sigma) * _integral(known, step, moments)
    return x


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, order: int = 2
) -> Tensor:
    """UniPC: each estimate first corrects the step that led to it, then takes the next one (arXiv 2302.04867).

    The multistep form for x̂_0 with B_2(h). ``order`` is the predictor's, and the corrector's is one more; towards the
    end they fall.
    """
    levels, start = (-sigmas.log()).tolist(), x
    known: list[tuple[float, Tensor]] = []
    for i, sigma, _ in _pairs(sigmas):
        x0 = denoise(x, sigma)
        if callback:
            callback(i, x, x0)
        if known:
            x = _towards([*known, (levels[i], x0)], start, levels[i] - levels[i - 1])
        known = [(levels[i], x0), *known][: min(order, len(sigmas) - 1 - i)]
        start, x = x, _towards(known, x, levels[i + 1] - levels[i])
    return x


Known = Sequence[tuple[float, Tensor]]
"""Estimates with their λ, the one from which a step starts first."""


def _towards(known: Known, x: Tensor, step: float) -> Tensor:
    """x after a ``step`` of λ on which x̂_0 is the polynomial through ``known``."""
    # ∫ e^(τ−h) (τ/h)^k dτ from 0 to h = step, by parts from k to k.
    moments = [-math.expm1(-step)]
    if len(known) == 2:
        # Where there is but one difference, UniPC takes half of B_2(h), whatever h: as exact as two points can be.
        moments.append(moments[0] / 2)
    else:
        for k in range(1, len(known)):
            moments.append(1 - k / step * moments[-1])
    return math.exp(-step) * x + _integral(known, step, moments)


def _integral(known: Known, step: float, moments: Sequence[float]) -> Tensor:
    """Of the polynomial through ``known`` over a ``step``, where (τ/step)^k for k = 0, 1 … has the integral given."""
    (origin, value), *others = known
    offsets = torch.tensor([(level - origin) / step for level, _ in others], dtype=torch.float64)
    powers = offsets ** torch.arange(1, len(known))[:, None]
    shares = torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
    integral = moments[0] * value
    for share, (_, other) in zip(shares, others, strict=True):
        integral = integral + share * (other - value)
    return integral


def make_sampler(config: SamplingConfig) -> Sampler:
    """The sampler that ``config`` names, with its options."""
    churn = Churn(
        min((config.churn or 0.0) / config.steps, MOST_CHURN),
        config.churn_min or 0.0,
        math.inf if config.churn_max is None else config.churn_max,
        1.0 if config.churn_noise is None else config.churn_noise,
    )
    match config.sampler:
        case "ddpm":
            return partial(ddpm, variance=larger if config.variance == "larger" else smaller)
        case "ddim":
            return partial(ddim, eta=config.eta or 0.0)
        case "euler":
            return partial(euler, churn=churn)
        case "heun":
            return partial(heun, churn=churn)
        case "dpmpp_2m":
            return dpmpp_2m
        case "dpmpp_2m_sde":
            return partial(dpmpp_2m, eta=1.0 if config.eta is None else config.eta)
        case "deis":
            return partial(deis, order=config.order or 3)
        case "unipc":
            return partial(unipc, order=config.order or 2)


def _pairs(sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for i in range(len(sigmas) - 1):
        yield i, sigmas[i], sigmas[i + 1]
