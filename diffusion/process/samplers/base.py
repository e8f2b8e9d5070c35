"""What samplers share: their signature, the options of all of them, and the errors of these; loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, model_validator

from diffusion.common.config import Config, DeviceName, is_unset
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.rules import FieldRule, find_conflict, needs, only, unless
from diffusion.process.config import NOISE_LEVELS

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.process.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[["Tensor", "Tensor"], "Tensor"]
"""From x = x_0 + σ ε and σ to the estimate x̂_0."""
Noise: TypeAlias = Callable[[], "Tensor"]
Sampler: TypeAlias = Callable[..., "Tensor"]
"""From denoise, x, sigmas and noise, as in ``diffusion.process.samplers``, to images, nominally in [−1, 1],
(N, C, H, W)."""

ZERO_SNR = 4000.0
"""Noise level σ above which nothing is left of an image: the last level of schedules with zero terminal SNR."""

_GUIDED = replace(unless("sampling.guidance", None, 1), hint="set sampling.guidance, say to 3")


class BaseSampling(Config):
    """Options of all samplers: noise levels, guidance and computation."""

    model_config = ConfigDict(allow_inf_nan=False)

    function: ClassVar[Sampler]
    """The sampler; it takes the configuration's own options as keyword arguments."""
    evaluations_per_step: ClassVar[int] = 1
    """Most evaluations of the denoiser in a step."""
    sampler: Annotated[str, NOISE_LEVELS]
    """Name of the sampler, which determines the other options."""
    steps: Annotated[int, NOISE_LEVELS] = Field(16, ge=2, le=10_000)
    """Number of noise levels; if it equals model.steps, and sigma_min and sigma_max are null, all levels of the
    schedule are used, as in DDPM."""
    sigma_max: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"] | None, NOISE_LEVELS] = "auto"
    """Noise level σ at which sampling starts, at most the schedule's highest. auto: √(C·H·W), at which nothing is left
    even of an image's brightness, 28 for grey images of 28×28 and 111 for colour at 64×64; the schedule's last level
    where model.zero_terminal_snr is set. Null: the schedule's highest, at most 80, or more above 3×32×32 values."""
    sigma_min: Annotated[float | None, NOISE_LEVELS] = Field(0.04, gt=0)
    """Lowest σ, from which the last step goes to 0, at least the schedule's lowest. Null: the schedule's lowest."""
    guidance: Annotated[float | None, NOISE_LEVELS] = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of classifier-free guidance towards the class or prompt (arXiv 2207.12598): 1 is no
    guidance, 2 to 8 gives clearer and less varied images, 0 is unconditional. Twice the work. Null: what evaluation
    chose for the model (evaluation.guidance), or 1."""
    guidance_interval: Annotated[tuple[float, float] | None, NOISE_LEVELS, _GUIDED] = Field(None, exclude_if=is_unset)
    """Guide only at noise levels σ above the first number and up to the second (2404.07724), such as [0.2, 5]: at high
    levels guidance reduces variety, at low levels it has no effect. Null: at all levels."""
    guidance_rescale: Annotated[float | None, NOISE_LEVELS, _GUIDED] = Field(None, gt=0, le=1, exclude_if=is_unset)
    """Share of the contrast added by guidance that is removed, in (0, 1] (2305.08891 uses 0.7). Null: none."""
    autoguidance: Annotated[
        float | None,
        needs("guide"),
        replace(
            only("sampling.guidance", None, 1),
            because="sampling.guidance and sampling.autoguidance each say what to lead away from: leave one out",
            harmless=(1,),
        ),
    ] = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance (2406.02507): at all levels away from what the model itself estimated early in training
    (training.guide). 1 is none; 1.5 to 3 gives clearer images, with or without classes and prompts. Twice the work.
    Instead of guidance. Null: what evaluation chose for the model (evaluation.guidance), or 1."""
    low_resolution_noise: Annotated[float | None, NOISE_LEVELS] = Field(None, ge=0, exclude_if=is_unset)
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
    def _options_fit_each_other(self) -> Self:
        if conflict := find_conflict(sampling=self):
            raise ValueError(conflict)
        if isinstance(self.sigma_max, float) and self.sigma_max <= (self.sigma_min or 0):
            raise ValueError("sampling.sigma_max is above sigma_min, or there is no level between them")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("sampling.guidance_interval rises from a σ of 0 or more, such as [0.2, 5]")
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

    def with_changes(self, fields: Mapping[str, Any]) -> Self:
        """Return a copy with these ``fields``; raises UserError for invalid or contradictory options."""
        try:
            return self.model_validate({**self.model_dump(), **fields})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(describe_sampling_error(first, (self.sampler, *first["loc"]), (type(self),))) from error

    def without_guidance(self) -> Self:
        """Return a copy without classifier-free guidance."""
        return self.with_changes({"guidance": None, "guidance_interval": None, "guidance_rescale": None})


COMPUTING = {
    name
    for name, info in BaseSampling.model_fields.items()
    if not any(isinstance(rule, FieldRule) for rule in info.metadata)
}
"""Fields that have an effect for all families of models."""


def fixed_small(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Compute s² (1 − s²/σ²), the variance of x_s for data of a single image: β̃ (arXiv 2006.11239, eq. 7) over ᾱ_s."""
    return next_sigma**2 * (1 - (next_sigma / sigma) ** 2)


def fixed_large(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Compute the variance (1 + s²)(σ² − s²)/(1 + σ²) of x_s, exact for data from N(0, I): β (section 3.2) over ᾱ_s."""
    return (1 + next_sigma**2) * (sigma**2 - next_sigma**2) / (1 + sigma**2)


def describe_sampling_error(
    error: Mapping[str, Any], location: Sequence[int | str], kinds: Sequence[type[BaseSampling]]
) -> str:
    """Describe pydantic's error at ``location`` in the section ``sampling``, one of ``kinds``, and how to fix it."""
    sampler, *path = map(str, location or ("",))
    key, known = ".".join(("sampling", *path)) if path else "", list[str]()
    if path[:1] == ["sigma_max"]:  # of a union, whose types pydantic names
        key, error = "sampling.sigma_max", {**error, "msg": "give a number above 0, auto or null"}
    if error["type"] == "unknown_sampler":
        key, error = "sampling", {**error, "type": "value_error"}
    if error["type"] == "extra_forbidden":
        samplers = [str(kind.model_fields["sampler"].default) for kind in kinds if path[0] in kind.model_fields]
        if samplers and sampler not in samplers:
            return f"{key} means nothing to sampler = {sampler}: use {' or '.join(samplers)}, or leave it out"
        known = next([*kind.model_fields] for kind in kinds if kind.model_fields["sampler"].default == sampler)
    return describe_validation_error(error, key, known)
