"""Noise schedules of the forward process (arXiv 2006.11239)."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.process.config import DenoisingConfig

SIGMA_MAX, VALUES = 80.0, 3 * 32 * 32
"""Highest noise level, and the values of the images that it was chosen for (arXiv 2206.00364, table 1). So that as
little is left of larger images, σ grows as the root of the number of values (2301.11093, section 3.1)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) for t = 0 … T−1, with ln σ interpolated linearly between."""

    alphas_cumprod: Tensor
    """ᾱ_t, falling from nearly 1 to nearly 0: (T,) float64."""
    values: int = VALUES
    """Values C·H·W of an image, or of its latents, which decide where sampling starts."""
    zero_terminal_snr: bool = False
    """Whether nothing is left of an image at the last level, where sampling then starts."""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alphas_cumprod)

    def with_shape(self, shape: tuple[int, int, int]) -> Self:
        """Return the schedule for images, or latents, of ``shape`` (C, H, W): the same levels for other values."""
        return self if math.prod(shape) == self.values else replace(self, values=math.prod(shape))

    @cached_property
    def sigmas(self) -> Tensor:
        """σ_t = √((1 − ᾱ_t) / ᾱ_t), noise over signal: (T,) float64."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def sigmas_on(self, device: torch.device) -> Tensor:
        """Return ``sigmas`` on ``device``, where they are copied once, since each copy waits for the device."""
        if device not in self._copies:
            self._copies[device] = self.sigmas.to(device)
        return self._copies[device]

    def sigma(self, t: Tensor) -> Tensor:
        """Interpolate σ at times ``t`` (N,) from 0 to T−1, as (N,) float64: the inverse of ``time``."""
        table = self.sigmas_on(t.device)
        low = t.long().clamp(0, self.steps - 2)
        fraction = t.double() - low
        # At integral times this is the table's value, to the last bit.
        return table[low] ** (1 - fraction) * table[low + 1] ** fraction

    def time(self, sigma: Tensor) -> Tensor:
        """Find the time t with the noise level ``sigma`` (N,), as (N,) float32, clamped to the schedule."""
        table = self.sigmas_on(sigma.device).log()
        value = sigma.double().log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, value).clamp(1, len(table) - 1)
        low = high - 1
        return (low + (value - table[low]) / (table[high] - table[low])).float()

    def sigma_grid(
        self, steps: int, sigma_max: float | Literal["auto"] | None = None, sigma_min: float | None = None
    ) -> Tensor:
        """Build the noise levels for a sampler, (steps + 1,) float64, falling to 0.

        All T levels of the schedule if ``steps`` is T and neither end is given; else the grid of EDM (Karras et al.)
        with ρ = 7 (arXiv 2206.00364, equation 5), dense at low levels, between the two ends clamped to the schedule.
        ``auto`` starts at √(C·H·W), where the noise has as much brightness as white against grey, or at the last level
        of a schedule with zero terminal SNR, from which the first step goes there. Raises UserError if no level lies
        between the ends.
        """
        if steps == self.steps and sigma_max is None and sigma_min is None:
            levels = self.sigmas.flip(0)
        else:
            highest, lowest = self.sigmas[-1], self.sigmas[0]
            has_end = self.zero_terminal_snr and sigma_max in ("auto", None)
            ends = {None: SIGMA_MAX * resolution_scale(self.values), "auto": math.sqrt(self.values)}
            first = highest.clamp(max=sigma_max if isinstance(sigma_max, float | int) else ends[sigma_max])
            last = lowest.clamp(min=sigma_min or 0.0)
            if first <= last:
                raise UserError(
                    f"the noise schedule has σ from {lowest:g} to {highest:g}, none of which lies between "
                    f"sampling.sigma_min = {sigma_min} and sampling.sigma_max = {sigma_max}: change them, or set null"
                )
            ramp = torch.linspace(0, 1, steps - has_end, dtype=torch.float64)
            levels = (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7.0
            if has_end:
                levels = torch.cat([highest[None], levels])
        return torch.cat([levels, levels.new_zeros(1)])

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_t from images ``x0`` (N, C, H, W), integer steps ``t`` (N,) and standard Gaussian ``noise``."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t][:, None, None, None]
        # The roots are taken in float64: at either end 1 − ᾱ is not exact in float32.
        return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise


FLOW_END = 1 - 2**-12
"""Highest t of flow matching, at which σ = t/(1 − t) is finite, and above ``ZERO_SNR``."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow (arXiv 2209.03003): x_t = (1 − f) x_0 + f ε with f = (t + 1)/T, so σ = f/(1 − f)."""

    def sigma(self, t: Tensor) -> Tensor:
        """Compute σ at times ``t`` (N,) from 0 to T−1, as (N,) float64: the inverse of ``time``."""
        share = ((t.double() + 1) / self.steps).clamp(max=FLOW_END)
        return share / (1 - share)

    def time(self, sigma: Tensor) -> Tensor:
        """Find the time t with the noise level ``sigma`` (N,), as (N,) float32, clamped to the schedule."""
        share = sigma.double() / (1 + sigma.double())
        return torch.where(share < FLOW_END, share * self.steps - 1, self.steps - 1).clamp(min=0).float()


def flow_schedule(steps: int, values: int) -> FlowSchedule:
    """Build the schedule of flow matching with ``steps`` levels for images of ``values`` C·H·W."""
    share = (torch.arange(1, steps + 1, dtype=torch.float64) / steps).clamp(max=FLOW_END)
    alpha_bar = 1 / (1 + (share / (1 - share)) ** 2)
    return FlowSchedule(alpha_bar, values, zero_terminal_snr=True)


def linear_schedule(steps: int) -> NoiseSchedule:
    """Linear schedule: β from 1e-4 to 0.02 (arXiv 2006.11239, section 4), both scaled by 1000/T for other T."""
    scale = 1000 / steps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64).clamp(max=0.999)
    return NoiseSchedule((1 - betas).cumprod(0))


def cosine_schedule(steps: int, s: float = 0.008) -> NoiseSchedule:
    """Cosine schedule: ᾱ(t) ∝ cos²((t/T + s)/(1 + s) · π/2), β clipped at 0.999 (arXiv 2102.09672, equation 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    return _from_curve(((t + s) / (1 + s) * math.pi / 2).cos() ** 2)


def sigmoid_schedule(steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> NoiseSchedule:
    """Sigmoid schedule: ᾱ(t) follows a sigmoid from ``start`` to ``end``, β clipped at 0.999 (arXiv 2212.11972)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = torch.sigmoid((start + t * (end - start)) / tau)
    return _from_curve((curve[-1] - curve) / (curve[-1] - curve[0]))


def edm_schedule(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """EDM schedule: ln σ linear in t, which is EDM's c_noise = ¼ ln σ in another unit (arXiv 2206.00364, table 1)."""
    sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), steps, dtype=torch.float64).exp()
    return NoiseSchedule(1 / (1 + sigmas**2))


def _from_curve(alpha_bar: Tensor) -> NoiseSchedule:
    """Build a schedule from ᾱ at 0, 1/T … 1, (T + 1,), with β clipped at 0.999."""
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return NoiseSchedule((1 - betas).cumprod(0))


def rescale_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescale √ᾱ so that its last value is 0 and its first stays (arXiv 2305.08891, algorithm 1)."""
    roots = schedule.alphas_cumprod.sqrt()
    rescaled_roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return make_final_sigma_finite(NoiseSchedule(rescaled_roots**2))


def make_final_sigma_finite(schedule: NoiseSchedule) -> NoiseSchedule:
    """Set the last ᾱ of a schedule without signal there so that σ stays finite."""
    alpha_bar = schedule.alphas_cumprod.clone()
    # Below float32's resolution at 1 and less than the value before.
    alpha_bar[-1] = min(2**-24, alpha_bar[-2].item() / 4)
    return replace(schedule, alphas_cumprod=alpha_bar)


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule, "sigmoid": sigmoid_schedule}


def resolution_scale(values: int) -> float:
    """Compute the factor of noise levels for images of ``values`` C·H·W, at least 1 (arXiv 2301.11093, section 3.1)."""
    return max(1.0, math.sqrt(values / VALUES))


def make_schedule(config: DenoisingConfig, shape: tuple[int, int, int]) -> NoiseSchedule:
    """Build the schedule of ``config`` for ``shape`` (C, H, W); raises UserError if its levels are not distinct."""
    values = math.prod(shape)
    if config.schedule == "edm":
        schedule = edm_schedule(config.steps, sigma_max=SIGMA_MAX * resolution_scale(values))
    else:
        schedule = SCHEDULES[config.schedule](config.steps)
    if config.zero_terminal_snr:
        schedule = rescale_zero_terminal_snr(schedule)
    schedule = replace(schedule, values=values, zero_terminal_snr=config.zero_terminal_snr)
    if not (schedule.alphas_cumprod.diff() < 0).all():
        raise UserError(f"model.schedule {config.schedule} has no {config.steps} different steps: lower model.steps")
    return schedule
