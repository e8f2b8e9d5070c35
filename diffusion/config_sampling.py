"""How pictures are drawn from a trained model, and what they are to show."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from diffusion.config import Config, DeviceName, unset
from diffusion.errors import UserError

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc"]
TAKEN_BY: dict[str, tuple[SamplerName, ...]] = {
    "variance": ("ddpm",),
    "eta": ("ddim", "dpmpp_2m_sde"),
    "churn": ("euler", "heun"),
    "order": ("deis", "unipc"),
}
"""Options, and the samplers that have them."""


class SamplingConfig(Config):
    """The sampler, its number of steps, how strongly pictures are guided, and how it is computed."""

    model_config = ConfigDict(allow_inf_nan=False)

    sampler: SamplerName = "dpmpp_2m_sde"
    """ddpm (arXiv 2006.11239), ddim (2010.02502), euler or heun (2206.00364, heun with two evaluations a step),
    dpmpp_2m or its form with fresh noise, dpmpp_2m_sde (2211.01095), deis (2204.13902) or unipc (2302.04867). Fresh
    noise, which only ddpm and dpmpp_2m_sde have unless asked to, undoes earlier mistakes, of which a briefly trained
    network makes many; the others converge to one exact picture for each start, dpmpp_2m, deis and unipc in the
    fewest steps."""
    steps: int = Field(16, ge=2, le=10_000)
    """Noise levels visited; as many as model.steps, with neither sigma_min nor sigma_max, visits each level of the
    schedule, as ddpm by the book does."""
    sigma_max: float | None = Field(20.0, gt=0)
    """Noise level σ that drawing starts from, at most the schedule's highest. Where training with timestep_sampling:
    lognormal has hardly been, above and below, steps are lost; null: the schedule's, at most 80."""
    sigma_min: float | None = Field(0.04, gt=0)
    """Lowest σ visited, from which the last step goes to 0, at least the schedule's lowest; null: that."""
    variance: Literal["smaller", "larger"] | None = Field(None, exclude_if=unset)
    """How much noise ddpm adds: the least that any data could need, or what data of noise would (arXiv 2006.11239,
    section 3.2); null: what the network learned, if it was trained with model.learned_variance, or else smaller."""
    eta: float | None = Field(None, ge=0, le=1, exclude_if=unset)
    """How much of the noise is fresh in each step, from none (0) to as much as in ddpm (1); null: 0 for ddim and 1 for
    dpmpp_2m_sde."""
    churn: float | None = Field(None, gt=0, exclude_if=unset)
    """Noise that euler and heun add to be taken away again, as a share of σ in all steps together, at most √2 − 1 in
    each (S_churn of arXiv 2206.00364, algorithm 2); null: none."""
    churn_min: float | None = Field(None, ge=0, exclude_if=unset)
    """Lowest σ at which it is added (S_min); null: 0."""
    churn_max: float | None = Field(None, gt=0, exclude_if=unset)
    """Highest σ at which it is added (S_max); null: any."""
    churn_noise: float | None = Field(None, gt=0, exclude_if=unset)
    """Standard deviation of it (S_noise), a little over 1 against pictures that come out too smooth; null: 1."""
    order: Literal[2, 3] | None = Field(None, exclude_if=unset)
    """Estimates that a step of deis or unipc goes by; null: 3 for deis and 2 for unipc."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=unset)
    """How strongly pictures are drawn to what they are to show, class or prompt (arXiv 2207.12598): 1 is as the network
    was trained, 2 to 8 is clearer and less varied, 0 as if nothing were asked for. Twice the work. Null: 1."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=unset)
    """Guide only at noise levels σ above the first number and up to the second (2404.07724), such as [0.2, 5]: at high
    levels guidance takes away variety, at low ones it does nothing. Null: at all levels."""
    guidance_rescale: float | None = Field(None, gt=0, le=1, exclude_if=unset)
    """How far the contrast that guidance adds is taken back, 1 all of it (2305.08891, which takes 0.7). Null: not."""
    low_resolution_noise: float | None = Field(None, ge=0, exclude_if=unset)
    """Standard deviation of the noise over a small picture, in [−1, 1], that is enlarged; at most what the model was
    trained with. The more there is, the less the model keeps to the small picture, its faults included. Null: 0."""
    compute_batch: int = Field(64, ge=1, le=2**16)
    """Pictures computed at once, always as many: it decides the last bits of each."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 where the device has it. On a GPU fp32 is TF32."""
    device: DeviceName = Field("auto", exclude_if=unset)
    """What computes: cpu, cuda, or auto, a GPU where there is one."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "SamplingConfig":
        for option, samplers in TAKEN_BY.items():
            if getattr(self, option) is not None and self.sampler not in samplers:
                raise ValueError(
                    f"sampling.{option} means nothing to sampler = {self.sampler}: use {' or '.join(samplers)}, or "
                    "leave it out"
                )
        if self.churn is None and (self.churn_min, self.churn_max, self.churn_noise) != (None, None, None):
            raise ValueError("sampling.churn_* say how sampling.churn is added, and there is none: set it, too")
        if self.churn_max is not None and self.churn_max <= (self.churn_min or 0):
            raise ValueError("sampling.churn_max is above churn_min, or there is no level between them")
        return self

    @model_validator(mode="after")
    def _falls(self) -> "SamplingConfig":
        if self.sigma_max is not None and self.sigma_max <= (self.sigma_min or 0):
            raise ValueError("sampling.sigma_max is above sigma_min, or there is no level between them")
        return self

    @model_validator(mode="after")
    def _guides(self) -> "SamplingConfig":
        if self.guidance in (None, 1) and (self.guidance_interval, self.guidance_rescale) != (None, None):
            raise ValueError(
                f"sampling.guidance_interval and guidance_rescale mean nothing to guidance = "
                f"{'null' if self.guidance is None else 1}: set sampling.guidance, say to 3"
            )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("sampling.guidance_interval rises from a σ of 0 or more, such as [0.2, 5]")
        return self

    @property
    def guides(self) -> bool:
        """Whether anything is done besides asking the network as it was trained."""
        return self.guidance not in (None, 1)

    def changed(self, fields: Mapping[str, Any]) -> "SamplingConfig":
        """The same with these ``fields``; raises UserError for what makes no sense by itself or together."""
        return _valid({**self.model_dump(), **fields})

    def with_sampler(self, sampler: SamplerName) -> "SamplingConfig":
        """The same with another ``sampler``, whose options have their defaults."""
        options = {name for name in type(self).model_fields if name.startswith(tuple(TAKEN_BY))}
        return _valid(self.model_dump(exclude=options) | {"sampler": sampler})

    def unguided(self) -> "SamplingConfig":
        """The same without guidance."""
        return self.model_copy(update={"guidance": None, "guidance_interval": None, "guidance_rescale": None})


def _valid(fields: Mapping[str, Any]) -> SamplingConfig:
    try:
        return SamplingConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"sampling.{part}: " for part in first["loc"][:1])
        raise UserError(where + first["msg"].removeprefix("Value error, ")) from error


class Asked(Config):
    """What pictures are to show: number i the i-th label and the i-th prompt, from the front again after the last."""

    labels: tuple[str | None, ...] = ()
    """Names of classes, null: any. None at all: each as often as the data set has it, or with prompts any."""
    prompts: tuple[str | None, ...] = ()
    """In the words of captions, null: whatever comes. None at all: whatever comes."""
    negative_prompt: str | None = None
    """What guidance leads away from, instead of from whatever comes."""

    def label(self, index: int) -> str | None:
        """Of picture number ``index``."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def prompt(self, index: int) -> str | None:
        """Of picture number ``index``."""
        return self.prompts[index % len(self.prompts)] if self.prompts else None


ANYTHING = Asked()
