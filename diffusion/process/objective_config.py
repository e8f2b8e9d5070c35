"""The part of the section ``training`` that defines the objective: noise levels, their weights, and the seed."""

from typing import Literal

from pydantic import Field, model_validator

from diffusion.common.config import Config


class ObjectiveConfig(Config):
    """Training options that the families of models use."""

    batch_size: int = Field(64, ge=1, le=2**20)
    """Images per optimizer step."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, order of images, time steps and noise."""
    weighting: Literal["plain", "min_snr", "soft_min_snr", "edm"] = "edm"
    """Loss weight of each noise level: plain squared error of the prediction (arXiv 2006.11239), min-SNR-γ
    (2303.09556), soft min-SNR (2401.11605) or EDM's (2206.00364). The last two use the standard deviation of data."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """γ of min_snr; null: 5."""
    learned_uncertainty: bool = False
    """Whether a small network learns the size of the error at each level, by which the loss is divided (2312.02696,
    equation 21), so that all levels have equal weight."""
    timestep_sampling: Literal["uniform", "lognormal"] = "lognormal"
    """Distribution of noise levels: uniform over the steps of the schedule, or normal in ln σ (2206.00364)."""
    log_sigma_mean: float | None = None
    """Mean of ln σ for timestep_sampling = lognormal; null: −1.2, EDM's."""
    log_sigma_std: float | None = Field(None, gt=0)
    """Standard deviation of ln σ for timestep_sampling = lognormal; null: 1.2, EDM's."""
    stratified_timesteps: bool = True
    """Whether the times of a batch's N images are stratified: one in each N-th of the distribution."""

    @model_validator(mode="after")
    def _noise_levels_have_an_effect(self) -> "ObjectiveConfig":
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError(f"training.min_snr_gamma means nothing to weighting = {self.weighting}: use min_snr")
        if self.timestep_sampling != "lognormal" and (self.log_sigma_mean, self.log_sigma_std) != (None, None):
            raise ValueError(
                f"training.log_sigma_* mean nothing to timestep_sampling = {self.timestep_sampling}: use lognormal"
            )
        return self

    @property
    def gamma(self) -> float:
        """γ of min-SNR."""
        return 5.0 if self.min_snr_gamma is None else self.min_snr_gamma

    @property
    def log_sigma(self) -> tuple[float, float]:
        """Mean and standard deviation of ln σ."""
        return (
            -1.2 if self.log_sigma_mean is None else self.log_sigma_mean,
            1.2 if self.log_sigma_std is None else self.log_sigma_std,
        )
