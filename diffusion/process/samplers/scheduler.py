"""The own schedulers of imported pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffusion.common.errors import UserError
from diffusion.process.samplers.base import BaseSampling

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.process.schedules import NoiseSchedule


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
