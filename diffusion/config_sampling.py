"""How pictures are drawn from a trained model, and what they are to show."""

from typing import Literal

from pydantic import Field, model_validator

from diffusion.config import Config

SamplerName = Literal["ddpm", "ddim", "heun", "dpmpp_2m"]


class SamplingConfig(Config):
    """The sampler, its number of steps, how strongly pictures are guided, and how it is computed."""

    sampler: SamplerName = "ddpm"
    """ddpm (arXiv 2006.11239), ddim (2010.02502), heun (2206.00364, two evaluations a step) or dpmpp_2m
    (2211.01095). ddpm's fresh noise undoes earlier mistakes, of which a briefly trained network makes many;
    the others need no noise and converge to one exact picture for each start."""
    steps: int = Field(20, ge=2, le=10_000)
    """Noise levels visited; as many as model.steps visits each level of the schedule, as ddpm by the book does."""
    guidance: float | None = Field(None, ge=0)
    """How strongly pictures are drawn to what they are to show, class or prompt (arXiv 2207.12598): 1 is as the network
    was trained, 2 to 8 is clearer and less varied, 0 as if nothing were asked for. Twice the work. Null: 1."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels σ above the first number and up to the second (2404.07724), such as [0.2, 5]: at high
    levels guidance takes away variety, at low ones it does nothing. Null: at all levels."""
    guidance_rescale: float | None = Field(None, gt=0, le=1)
    """How far the contrast that guidance adds is taken back, 1 all of it (2305.08891, which takes 0.7). Null: not."""
    compute_batch: int = Field(64, ge=1)
    """Pictures computed at once, always as many: it decides the last bits of each."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 where the processor has it."""

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

    def unguided(self) -> "SamplingConfig":
        """The same without guidance."""
        return self.model_copy(update={"guidance": None, "guidance_interval": None, "guidance_rescale": None})


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
