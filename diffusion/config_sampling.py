"""How pictures are drawn from a trained model."""

from typing import Literal

from pydantic import Field, model_validator

from diffusion.config import Config, unset

SamplerName = Literal["ddpm", "ddim", "heun", "dpmpp_2m"]


class SamplingConfig(Config):
    """The sampler, its number of steps, and how it is computed."""

    sampler: SamplerName = "ddpm"
    """ddpm (arXiv 2006.11239), ddim (2010.02502), heun (2206.00364, two evaluations a step) or dpmpp_2m
    (2211.01095). ddpm's fresh noise undoes earlier mistakes, of which a briefly trained network makes many;
    the others need no noise and converge to one exact picture for each start."""
    steps: int = Field(20, ge=2, le=10_000)
    """Noise levels visited; as many as model.steps visits each level of the schedule, as ddpm by the book does."""
    variance: Literal["smaller", "larger"] | None = Field(None, exclude_if=unset)
    """How much noise ddpm adds: the least that any data could need, or what data of noise would (arXiv 2006.11239,
    section 3.2); null: what the network learned, if it was trained with model.learned_variance, or else smaller."""
    compute_batch: int = Field(64, ge=1)
    """Pictures computed at once, always as many: it decides the last bits of each."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 where the processor has it."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "SamplingConfig":
        if self.variance is not None and self.sampler != "ddpm":
            raise ValueError(f"sampling.variance means nothing to sampler = {self.sampler}: use ddpm, or leave it out")
        return self
