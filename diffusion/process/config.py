"""The options of the training objective of diffusion models, and the names of predictions; loads without torch."""

from dataclasses import replace
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from diffusion.common.config import Config, is_unset
from diffusion.common.rules import find_conflict, given, needs, only, unless

Prediction = Literal["epsilon", "v_prediction", "sample", "edm"]
SchedulerPrediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""Predictions of imported networks, as schedulers of diffusers name them; the last is ε − x_0, of flow matching."""

NOISE_LEVELS = needs("noise_levels")
"""The rule of options that have an effect only for diffusion models."""
NOT_WITH_ADAPTER = replace(unless("training.adapter"), waits_for="model")
"""The rule of options that have no effect with an adapter."""
_LOGNORMAL = only("training.timestep_sampling", "lognormal")


class DenoisingConfig(Protocol):
    """Forward process and prediction of a network: a part of the section ``model`` of the family ddpm."""

    @property
    def schedule(self) -> Literal["linear", "cosine", "sigmoid", "edm"]:
        """Noise schedule."""

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the schedule is rescaled to zero SNR at its last step."""

    @property
    def prediction(self) -> Prediction:
        """Prediction of the network."""


class StudentConfig(Config):
    """What a student is distilled for; `darkroom distill` sets it."""

    steps: int = Field(ge=1, le=8)
    """Network evaluations in which it generates."""
    landing: float | None = Field(None, gt=0, exclude_if=is_unset)
    """Noise level σ to which evaluations above it lead, while those below it lead to the image (multistep consistency
    models, arXiv 2403.06807). Null: all lead to the image."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of guidance of the teacher, which the student learns to need no more. Null: none."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=is_unset)
    """Noise levels σ at which the teacher is guided. Null: all."""
    autoguidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance of the teacher, instead. Null: none."""

    @model_validator(mode="after")
    def _guides_in_one_way(self) -> "StudentConfig":
        if self.guidance is not None and self.autoguidance is not None:
            raise ValueError("training.student.guidance and autoguidance are two kinds of guidance: leave one out")
        return self


class MaskConfig(Config):
    """How the masks of a data set (``ingest.masks``) weight the loss."""

    min_weight: float = Field(0.0, ge=0, lt=1)
    """Weight of the pixels that a mask leaves out, 0 to 1: with 0.1 the model still sees what surrounds the rest."""
    normalize_area: bool = False
    """Whether the loss of an image is divided by the mean of its weights, so that small masks count as much as large
    ones."""


class PriorConfig(Config):
    """What an adapter leaves as it was: what the base predicts for a prompt (DreamBooth, arXiv 2208.12242).

    Without images of the class: base and adapted network see the same noisy training images with this prompt, and the
    squared error between their predictions is added to the loss.
    """

    weight: float = Field(1.0, gt=0, le=1000)
    """Weight of that error, beside a loss of weight 1."""
    prompt: str | None = Field(None, min_length=1, max_length=1000)
    """Prompt of the class, such as "a photo of a dog", without the trigger. Null: no prompt."""


class ObjectiveConfig(Config):
    """The part of the section ``training`` that defines the objective: noise levels, their weights, and the seed."""

    batch_size: int | None = Field(None, ge=1, le=2**20)
    """Images per optimizer step. Null: 64, whatever the preset says; for diffusion models of images 32 from about
    48×48 pixels on, and 16 from about 96×96; doubled until there is one for each of training.cpu_threads."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, order of images, time steps and noise."""
    weighting: Annotated[Literal["plain", "min_snr", "soft_min_snr", "edm"], NOISE_LEVELS] = "edm"
    """Loss weight of each noise level: plain squared error of the prediction (arXiv 2006.11239), min-SNR-γ
    (2303.09556), soft min-SNR (2401.11605) or EDM's (2206.00364). The last two use the standard deviation of data."""
    min_snr_gamma: Annotated[float | None, NOISE_LEVELS, only("training.weighting", "min_snr")] = Field(None, gt=0)
    """γ of min_snr; null: 5."""
    learned_uncertainty: Annotated[bool, NOISE_LEVELS] = False
    """Whether a small network learns the size of the error at each level, by which the loss is divided (2312.02696,
    equation 21), so that all levels have equal weight."""
    timestep_sampling: Annotated[
        Literal["uniform", "lognormal", "scheduler"],
        NOISE_LEVELS,
        needs(
            "scheduler",
            "scheduler",
            "training.timestep_sampling = scheduler is of pipelines of diffusers: use uniform or lognormal",
        ),
    ] = "lognormal"
    """Distribution of noise levels: uniform over the steps of the schedule, or normal in ln σ (2206.00364). For
    pipelines of diffusers also scheduler, their own: normal logits of t for flow matching (2403.03206), shifted as the
    scheduler's, and uniform for all others."""
    log_sigma_mean: Annotated[float | None, NOISE_LEVELS, _LOGNORMAL] = None
    """Mean of ln σ for timestep_sampling = lognormal; null: −1.2, EDM's, and higher for images of more than 3×32×32
    values, by the logarithm of the root of their ratio (2301.11093)."""
    log_sigma_std: Annotated[float | None, NOISE_LEVELS, _LOGNORMAL] = Field(None, gt=0)
    """Standard deviation of ln σ for timestep_sampling = lognormal; null: 1.2, EDM's."""
    student: Annotated[StudentConfig | None, needs("distillation"), NOT_WITH_ADAPTER] = Field(None, exclude_if=is_unset)
    """Distil training.init_from into a student of few evaluations, as `darkroom distill` does. Null: train to
    denoise."""
    stratified_timesteps: Annotated[bool, NOISE_LEVELS] = True
    """Whether the times of a batch's N images are stratified: one in each N-th of the distribution."""

    prior: Annotated[
        PriorConfig | None,
        NOISE_LEVELS,
        replace(
            given("training.adapter"),
            because="training.prior keeps what the base predicts, which an adapter leaves aside: set training.adapter, "
            "or leave it out",
            waits_for="model",
        ),
    ] = Field(None, exclude_if=is_unset)
    """Prior preservation: hold an adapter to what its base predicts for a prompt; twice the work, and the work of the
    base. Null: none."""
    mask: Annotated[MaskConfig | None, NOISE_LEVELS, unless("training.student")] = Field(None, exclude_if=is_unset)
    """Weight the error of each pixel by the masks of the data set (masked loss), for pixels of latents by the mean of
    the pixels that they stand for. Null: all pixels count equally, also with masks."""

    @property
    def images_per_step(self) -> int:
        """``batch_size``, which is a number once the data set is known."""
        assert self.batch_size is not None
        return self.batch_size

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "ObjectiveConfig":
        if conflict := find_conflict(training=self):
            raise ValueError(conflict)
        return self
