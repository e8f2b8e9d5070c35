"""Samplers: pure functions from noise to images over any denoiser, and their configurations.

To add a sampler, write its function and its configuration here and add the configuration to ``SamplingConfig``; that
makes it available to the command line, ``params.yaml``, requests and the documentation.

All functions share one signature, followed by their own options. ``x`` is σ_max ε, (N, C, H, W); ``sigmas`` falls
from σ_max to 0, (steps + 1,) float64; ``noise`` returns fresh standard Gaussian noise of x's shape at each call
(deterministic samplers never call it). All states are x = x_0 + σ ε, in which DDIM's steps are straight lines (arXiv
2206.00364, appendix C).

With λ = −ln σ the ODE is dx/dλ = x̂_0 − x. The multistep samplers interpolate their last estimates by a polynomial in
λ, and integrate it exactly.

This module loads without torch, for processes that only read configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from diffusion.common.config import Config, DeviceName, is_unset
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.models.config import DiffusersConfig, FamilyConfig, ModelConfig, tag

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.process.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[["Tensor", "Tensor"], "Tensor"]
"""From x = x_0 + σ ε and σ to the estimate x̂_0."""
Noise: TypeAlias = Callable[[], "Tensor"]
FixedVariance: TypeAlias = Literal["fixed_small", "fixed_large"]
Sampler: TypeAlias = Callable[..., "Tensor"]
"""From denoise, x, sigmas and noise, as above, to images, nominally in [−1, 1], (N, C, H, W)."""

ZERO_SNR = 4000.0
"""Noise level σ above which nothing is left of an image: the last level of schedules with zero terminal SNR."""
LAST_LEVEL = 1.6
"""Noise level of a student's last evaluation of two; of more it is 4/steps, if that is less. Measured on digits."""
MAX_CHURN = math.sqrt(2) - 1
"""Largest γ of churn in one step (arXiv 2206.00364, algorithm 2)."""


class BaseSampling(Config):
    """Options of all samplers: noise levels, guidance and computation."""

    model_config = ConfigDict(allow_inf_nan=False)

    function: ClassVar[Sampler]
    """The sampler; it takes the configuration's own options as keyword arguments."""
    evaluations_per_step: ClassVar[int] = 1
    """Most evaluations of the denoiser in a step."""
    sampler: str
    """Name of the sampler, which determines the other options."""
    steps: int = Field(16, ge=2, le=10_000)
    """Number of noise levels; if it equals model.steps, and sigma_min and sigma_max are null, all levels of the
    schedule are used, as in DDPM."""
    sigma_max: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Noise level σ at which sampling starts, at most the schedule's highest. auto: √(C·H·W), at which nothing is left
    even of an image's brightness, 28 for grey images of 28×28 and 111 for colour at 64×64; the schedule's last level
    where model.zero_terminal_snr is set. Null: the schedule's highest, at most 80, or more above 3×32×32 values."""
    sigma_min: float | None = Field(0.04, gt=0)
    """Lowest σ, from which the last step goes to 0, at least the schedule's lowest. Null: the schedule's lowest."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of classifier-free guidance towards the class or prompt (arXiv 2207.12598): 1 is no
    guidance, 2 to 8 gives clearer and less varied images, 0 is unconditional. Twice the work. Null: what evaluation
    chose for the model (evaluation.guidance), or 1."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=is_unset)
    """Guide only at noise levels σ above the first number and up to the second (2404.07724), such as [0.2, 5]: at high
    levels guidance reduces variety, at low levels it has no effect. Null: at all levels."""
    guidance_rescale: float | None = Field(None, gt=0, le=1, exclude_if=is_unset)
    """Share of the contrast added by guidance that is removed, in (0, 1] (2305.08891 uses 0.7). Null: none."""
    autoguidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance (2406.02507): at all levels away from what the model itself estimated early in training
    (training.guide). 1 is none; 1.5 to 3 gives clearer images, with or without classes and prompts. Twice the work.
    Instead of guidance. Null: what evaluation chose for the model (evaluation.guidance), or 1."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=is_unset)
    """Super-resolution: standard deviation of the noise added to the small image, in [−1, 1]; at most that of
    the model's training. More noise makes the result follow the small image, faults included, less closely. Null: 0."""
    compute_batch: int = Field(64, ge=1, le=2**16)
    """Images per compute batch, always full; the last bits of each image depend on it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 on GPUs that support it and CPUs that are faster in it
    (AMX, or AMD with AVX512_BF16), else fp32. On a GPU fp32 is TF32."""
    device: DeviceName = Field("auto", exclude_if=is_unset)
    """Compute device: cpu, cuda, or auto, a GPU if there is one."""

    def build_sampler(self) -> Sampler:
        """Bind the sampler's function to the options of this configuration."""
        names = type(self).model_fields.keys() - BaseSampling.model_fields.keys()
        return partial(type(self).function, **{name: getattr(self, name) for name in names})

    def run(self, denoise: Denoise, sigmas: Tensor, noise: Noise, mean: Tensor | None = None) -> Tensor:
        """Generate images (N, C, H, W) over the levels ``sigmas``, from noise around their known ``mean`` (None: 0)."""
        x = float(sigmas[0]) * noise()
        return self.build_sampler()(denoise, x if mean is None else x + mean.to(x), sigmas, noise)

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> BaseSampling:
        if isinstance(self.sigma_max, float) and self.sigma_max <= (self.sigma_min or 0):
            raise ValueError("sampling.sigma_max is above sigma_min, or there is no level between them")
        if not self.guides and (self.guidance_interval, self.guidance_rescale) != (None, None):
            raise ValueError(
                f"sampling.guidance_interval and guidance_rescale mean nothing to guidance = "
                f"{'null' if self.guidance is None else 1}: set sampling.guidance, say to 3"
            )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("sampling.guidance_interval rises from a σ of 0 or more, such as [0.2, 5]")
        if self.guides and self.autoguides:
            raise ValueError(
                "sampling.guidance and sampling.autoguidance each say what to lead away from: leave one out"
            )
        return self

    @property
    def guides(self) -> bool:
        """Whether classifier-free guidance has an effect."""
        return self.guidance not in (None, 1)

    @property
    def autoguides(self) -> bool:
        """Whether autoguidance has an effect."""
        return self.autoguidance not in (None, 1)

    @property
    def is_guided(self) -> bool:
        """Whether guidance of either kind has an effect."""
        return self.guides or self.autoguides

    @property
    def guidance_text(self) -> str:
        """Description of guidance, such as ``2 at σ from 0.2 to 5`` or ``2 by autoguidance``."""
        if self.autoguidance is not None and self.autoguides:
            return f"{self.autoguidance:g} by autoguidance"
        if self.guidance is None or not self.guides:
            return "none"
        levels = "all σ" if self.guidance_interval is None else "σ from {:g} to {:g}".format(*self.guidance_interval)
        return f"{self.guidance:g} at {levels}"

    @property
    def guidance_options(self) -> str:
        """Guidance as options of the command line, such as ``--set sampling.autoguidance=2``; empty for none."""
        names = ("autoguidance",) if self.autoguides else ("guidance", "guidance_interval", "guidance_rescale")
        fields = {name: getattr(self, name) for name in names} if self.is_guided else {}
        texts = {
            name: "[{:g},{:g}]".format(*value) if isinstance(value, tuple) else f"{value:g}"
            for name, value in fields.items()
            if value is not None
        }
        return " ".join(f"--set sampling.{name}={text}" for name, text in texts.items())

    def sigma_grid(self, schedule: NoiseSchedule) -> Tensor:
        """Build the noise levels, (steps + 1,) float64, falling to 0; see ``NoiseSchedule.sigma_grid``."""
        return schedule.sigma_grid(self.steps, self.sigma_max, self.sigma_min)

    def with_changes(self, fields: Mapping[str, Any]) -> SamplingConfig:
        """Return a copy with these ``fields``; raises UserError for invalid or contradictory options."""
        return sampling_config(**{**self.model_dump(), **fields})

    def with_sampler(self, sampler: str) -> SamplingConfig:
        """Return a copy with another ``sampler`` and the defaults of its own options."""
        fields = self.model_dump(include=set(BaseSampling.model_fields))
        if "consistency" in (sampler, self.sampler):  # whose few levels are others
            del fields["steps"], fields["sigma_min"]
        if "scheduler" in (sampler, self.sampler):  # whose levels are the pipeline's
            fields = {name: value for name, value in fields.items() if name not in ("sigma_max", "sigma_min")}
        return sampling_config(**fields | {"sampler": sampler})

    def without_guidance(self) -> SamplingConfig:
        """Return a copy without classifier-free guidance."""
        return self.with_changes({"guidance": None, "guidance_interval": None, "guidance_rescale": None})


def fixed_small(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Compute s² (1 − s²/σ²), the variance of x_s for data of a single image: β̃ (arXiv 2006.11239, eq. 7) over ᾱ_s."""
    return next_sigma**2 * (1 - (next_sigma / sigma) ** 2)


def fixed_large(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Compute the variance (1 + s²)(σ² − s²)/(1 + σ²) of x_s, exact for data from N(0, I): β (section 3.2) over ᾱ_s."""
    return (1 + next_sigma**2) * (sigma**2 - next_sigma**2) / (1 + sigma**2)


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, variance: FixedVariance | None = None) -> Tensor:
    """DDPM's ancestral sampling (arXiv 2006.11239, algorithm 2 and section 3.2), without noise in the last step.

    Without ``variance``: the learned one (2102.09672) if ``denoise`` is a ``Denoiser`` with one, else ``fixed_small``.
    """
    is_learned = variance is None and getattr(denoise, "learned_variance", False)
    compute_variance = fixed_large if variance == "fixed_large" else fixed_small
    for sigma, next_sigma in pairwise(sigmas):
        if is_learned:
            x0, deviation = denoise.posterior(x, sigma, next_sigma)  # type: ignore[attr-defined]
        else:
            x0, deviation = denoise(x, sigma), compute_variance(sigma, next_sigma).sqrt()
        x = x0 + float((next_sigma / sigma) ** 2) * (x - x0)
        if next_sigma > 0:
            x = x + deviation * noise()
    return x


class DDPMSampling(BaseSampling):
    """DDPM's ancestral sampling (arXiv 2006.11239): fresh noise in each step, best with many steps."""

    function = ddpm
    sampler: Literal["ddpm"] = "ddpm"
    """Name of the sampler."""
    variance: FixedVariance | None = Field(None, exclude_if=is_unset)
    """Variance of the noise in each step: its lower or its upper bound (section 3.2). Null: the variance learned with
    model.variance = learned_range, or else fixed_small."""


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM with a share ``eta`` of fresh noise (arXiv 2010.02502, eq. 12, 16): 0 is Euler's method, 1 is ``ddpm``."""
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoise(x, sigma)
        ratio = next_sigma / sigma
        x = x0 + float(ratio * (1 - eta**2 * (1 - ratio**2)).sqrt()) * (x - x0)
        if eta and next_sigma > 0:
            x = x + eta * float(fixed_small(sigma, next_sigma).sqrt()) * noise()
    return x


class DDIMSampling(BaseSampling):
    """DDIM (arXiv 2010.02502): first order, deterministic or with a share of fresh noise."""

    function = ddim
    sampler: Literal["ddim"] = "ddim"
    """Name of the sampler."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the noise that is fresh in each step, from none (0) to as much as in ddpm (1)."""


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


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Tensor:
    """DPM-Solver++ (2M), second order by reuse of the last estimate (arXiv 2211.01095, algorithm 2).

    The first and the last step are of first order. With a share ``eta`` of fresh noise of 1 it is SDE-DPM-Solver++.
    """
    previous: Tensor | None = None
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        estimate = x0
        if previous is not None and next_sigma > 0:
            step, last_step = (sigma / next_sigma).log(), (sigmas[i - 1] / sigma).log()
            extrapolation = float(step / (2 * last_step))
            estimate = (1 + extrapolation) * x0 - extrapolation * previous
        ratio = next_sigma / sigma
        weight = float(ratio ** (1 + eta))
        x = weight * x + (1 - weight) * estimate
        if eta and next_sigma > 0:
            x = x + float(next_sigma * (1 - ratio ** (2 * eta)).sqrt()) * noise()
        previous = x0
    return x


class DPMSolverSampling(BaseSampling):
    """DPM-Solver++ (2M) (arXiv 2211.01095): deterministic, second order with one evaluation per step."""

    function = dpmpp_2m
    sampler: Literal["dpmpp_2m"] = "dpmpp_2m"
    """Name of the sampler."""


class DPMSolverSDESampling(BaseSampling):
    """SDE-DPM-Solver++ (2M) (arXiv 2211.01095), the default: fresh noise corrects errors of earlier steps."""

    function = dpmpp_2m
    sampler: Literal["dpmpp_2m_sde"] = "dpmpp_2m_sde"
    """Name of the sampler."""
    eta: float = Field(1.0, ge=0, le=1)
    """Share of the noise that is fresh in each step, from none (0, which is dpmpp_2m) to as much as in ddpm (1)."""


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 3) -> Tensor:
    """DEIS: polynomial extrapolation of the last ``order`` estimates of the noise, here in λ (arXiv 2204.13902)."""
    levels = (-sigmas.log()).tolist()
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        history = [(levels[i], (x - x0) / float(sigma)), *history][: order if next_sigma > 0 else 1]
        step = levels[i + 1] - levels[i]
        # ∫ e^−τ (τ/h)^k dτ from 0 to h = step, by parts from k to k: dx is ε dσ, and dσ is −σ e^−τ dτ.
        moments = [-math.expm1(-step)]
        for k in range(1, len(history)):
            moments.append(k / step * moments[-1] - math.exp(-step))
        x = x - float(sigma) * _integral(history, step, moments)
    return x


class DEISSampling(BaseSampling):
    """DEIS (arXiv 2204.13902): deterministic multistep, accurate in few steps."""

    function = deis
    sampler: Literal["deis"] = "deis"
    """Name of the sampler."""
    order: Literal[2, 3] = 3
    """Number of estimates used in a step."""


def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 2) -> Tensor:
    """UniPC: each estimate first corrects the last step, then predicts the next one (arXiv 2302.04867), with B_2(h).

    ``order`` is that of the predictor; that of the corrector is one higher. Both fall towards the end.
    """
    levels, start = (-sigmas.log()).tolist(), x
    history: list[tuple[float, Tensor]] = []
    for i, sigma in enumerate(sigmas[:-1]):
        x0 = denoise(x, sigma)
        if history:
            x = _advance([*history, (levels[i], x0)], start, levels[i] - levels[i - 1])
        history = [(levels[i], x0), *history][: min(order, len(sigmas) - 1 - i)]
        start, x = x, _advance(history, x, levels[i + 1] - levels[i])
    return x


class UniPCSampling(BaseSampling):
    """UniPC (arXiv 2302.04867): deterministic multistep predictor-corrector, accurate in few steps."""

    function = unipc
    sampler: Literal["unipc"] = "unipc"
    """Name of the sampler."""
    order: Literal[2, 3] = 2
    """Number of estimates used by the predictor; the corrector uses one more."""


def consistency(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Multistep consistency sampling: each estimate is noised to the next level (arXiv 2303.01469, algorithm 1)."""
    for sigma, next_sigma in pairwise(sigmas):
        x = denoise(x, sigma)
        if next_sigma > 0:
            x = x + float(next_sigma) * noise()
    return x


class ConsistencySampling(BaseSampling):
    """Consistency sampling (arXiv 2303.01469), for students of ``darkroom distill``: one to four evaluations."""

    function = consistency
    sampler: Literal["consistency"] = "consistency"
    """Name of the sampler."""
    steps: int = Field(2, ge=1, le=10_000)
    """Number of network evaluations, one at each noise level."""
    sigma_min: float | None = Field(None, gt=0)
    """Lowest σ, at which the last evaluation starts, if there are two or more. Null: 1.6, or 4/steps if that is less,
    and more for images of more than 3×32×32 values."""

    def sigma_grid(self, schedule: NoiseSchedule) -> Tensor:
        """Build the noise levels of the evaluations and 0, (steps + 1,) float64, falling geometrically."""
        import torch

        from diffusion.process.schedules import resolution_scale

        # Students know no higher levels, whatever the schedule has.
        highest = min(math.sqrt(schedule.values), float(schedule.sigmas[-1]))
        if isinstance(self.sigma_max, float):
            highest = min(highest, self.sigma_max)
        lowest = min(LAST_LEVEL, 4 / self.steps) * resolution_scale(schedule.values)
        first, last, end = schedule.sigma_grid(2, highest, self.sigma_min or min(lowest, highest / 2))
        levels = first * (last / first) ** torch.linspace(0, 1, self.steps, dtype=torch.float64)
        return torch.cat([levels, end[None]])


class SchedulerSampling(BaseSampling):
    """The own scheduler of an imported pipeline, stepped as diffusers steps it; for other models there is none."""

    sampler: Literal["scheduler"] = "scheduler"
    """Name of the sampler."""
    steps: int = Field(50, ge=1, le=10_000)
    """Number of inference steps, whose times the scheduler chooses."""
    sigma_max: None = None
    """Null: the scheduler has its own levels."""
    sigma_min: None = None
    """Null: the scheduler has its own levels."""

    def sigma_grid(self, schedule: NoiseSchedule) -> Tensor:
        """Build levels as many as the scheduler's; raises UserError for more steps than there are levels."""
        if self.steps > schedule.steps:
            raise UserError(
                f"sampling.steps = {self.steps} are more than the {schedule.steps} noise levels of the pipeline's "
                "scheduler: lower it"
            )
        return super().sigma_grid(schedule)


def _advance(history: Sequence[tuple[float, Tensor]], x: Tensor, step: float) -> Tensor:
    """Advance x by a ``step`` of λ with x̂_0 as the polynomial through ``history``, the estimate at its start first."""
    # ∫ e^(τ−h) (τ/h)^k dτ from 0 to h = step, by parts from k to k.
    moments = [-math.expm1(-step)]
    if len(history) == 2:
        # With a single difference UniPC uses half of B_2(h), which is of the same order.
        moments.append(moments[0] / 2)
    else:
        for k in range(1, len(history)):
            moments.append(1 - k / step * moments[-1])
    return math.exp(-step) * x + _integral(history, step, moments)


def _integral(history: Sequence[tuple[float, Tensor]], step: float, moments: Sequence[float]) -> Tensor:
    """Integrate the polynomial through ``history`` over a ``step``; ``moments`` are the integrals of (τ/step)^k."""
    import torch

    (origin, value), *others = history
    offsets = torch.tensor([(level - origin) / step for level, _ in others], dtype=torch.float64)
    powers = offsets ** torch.arange(1, len(history))[:, None]
    shares = torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
    integral = moments[0] * value
    for share, (_, point) in zip(shares, others, strict=True):
        integral = integral + share * (point - value)
    return integral


SamplingConfig: TypeAlias = Annotated[
    Annotated[DDPMSampling, Tag("ddpm")]
    | Annotated[DDIMSampling, Tag("ddim")]
    | Annotated[EulerSampling, Tag("euler")]
    | Annotated[HeunSampling, Tag("heun")]
    | Annotated[DPMSolverSampling, Tag("dpmpp_2m")]
    | Annotated[DPMSolverSDESampling, Tag("dpmpp_2m_sde")]
    | Annotated[DEISSampling, Tag("deis")]
    | Annotated[UniPCSampling, Tag("unipc")]
    | Annotated[ConsistencySampling, Tag("consistency")]
    | Annotated[SchedulerSampling, Tag("scheduler")],
    Discriminator(
        lambda fields: tag(fields, "sampler", "dpmpp_2m_sde"),
        custom_error_type="unknown_sampler",
        custom_error_message="sampler is ddpm, ddim, euler, heun, dpmpp_2m, dpmpp_2m_sde (default), deis, unipc, "
        "consistency for students, or scheduler for imported pipelines",
    ),
]
"""The section ``sampling`` of a configuration; options of other samplers are unknown keys."""
SAMPLING_ADAPTER: TypeAdapter[SamplingConfig] = TypeAdapter(SamplingConfig)
SAMPLERS: tuple[type[BaseSampling], ...] = tuple(get_args(kind)[0] for kind in get_args(get_args(SamplingConfig)[0]))
"""The configurations in the union."""


def sampling_config(**fields: Any) -> SamplingConfig:
    """Make the configuration with these ``fields`` and defaults; raises UserError for invalid options."""
    try:
        return SAMPLING_ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(describe_error(first, first["loc"])) from error


COMPUTING = {"compute_batch", "precision", "device"}
"""Fields that have an effect for all families of models."""


def effective_sampling(model: FamilyConfig, sampling: SamplingConfig) -> SamplingConfig:
    """Reset the fields of ``sampling`` without effect for the family of ``model`` to their defaults."""
    if isinstance(sampling, SchedulerSampling) and isinstance(model, ModelConfig):
        return sampling.with_sampler(sampling_config().sampler)
    if isinstance(model, DiffusersConfig):
        return sampling.with_changes({"autoguidance": None})
    return sampling if isinstance(model, ModelConfig) else sampling_config(**sampling.model_dump(include=COMPUTING))


def sampling_conflict(model: FamilyConfig, sampling: SamplingConfig) -> str | None:
    """Describe a field of ``sampling`` that has no effect for the family of ``model``; None if there is none."""
    if isinstance(sampling, SchedulerSampling) and isinstance(model, ModelConfig):
        return None  # beside what is trained, which it does not fit, imported versions are sampled
    theirs, ours = sampling.model_dump(), effective_sampling(model, sampling).model_dump()
    names = [name for name in sorted(theirs) if theirs[name] != ours.get(name)]
    if not names:
        return None
    return f"sampling.{names[0]} means nothing to model.family = {model.family}: leave it out"


def describe_error(error: Mapping[str, Any], location: Sequence[int | str]) -> str:
    """Describe pydantic's error at ``location`` in the section ``sampling``, and how to fix it."""
    sampler, *path = map(str, location or ("",))
    key, known = ".".join(("sampling", *path)) if path else "", list[str]()
    if path[:1] == ["sigma_max"]:  # of a union, whose types pydantic names
        key, error = "sampling.sigma_max", {**error, "msg": "give a number above 0, auto or null"}
    if error["type"] == "unknown_sampler":
        key, error = "sampling", {**error, "type": "value_error"}
    if error["type"] == "extra_forbidden":
        samplers = [str(kind.model_fields["sampler"].default) for kind in SAMPLERS if path[0] in kind.model_fields]
        if samplers and sampler not in samplers:
            return f"{key} means nothing to sampler = {sampler}: use {' or '.join(samplers)}, or leave it out"
        known = next([*kind.model_fields] for kind in SAMPLERS if kind.model_fields["sampler"].default == sampler)
    return describe_validation_error(error, key, known)
