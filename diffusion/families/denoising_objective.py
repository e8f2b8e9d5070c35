"""The denoising objective of diffusion models, of images or of their latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.common.device import copy_to_device
from diffusion.common.random import GaussianNoise, uniform
from diffusion.families.ddpm.network import TIMES, sinusoidal
from diffusion.families.fine_tuning import TrainableSubset
from diffusion.families.model import Conditioning, OptimizerStep, TrainingBatch, TrainingObjective
from diffusion.process.config import ObjectiveConfig
from diffusion.process.objective import Objective, sample_timesteps, timesteps_at

LEVELS = 8
"""Number of equal parts of the distribution of noise levels for which the held-out loss is logged."""
UNCERTAINTY_FEATURES = 128


class Uncertainty(nn.Module):
    """Learned uncertainty u(t), at first 0: L becomes L / e^u + u, minimal at e^u = L (arXiv 2312.02696, eq. 21)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(UNCERTAINTY_FEATURES))

    def forward(self, loss: Tensor, time: Tensor) -> Tensor:
        """Weight ``loss`` (N,) at times ``time`` (N,), from 0 to TIMES; returns the minimized loss, (N,)."""
        u = sinusoidal(time, UNCERTAINTY_FEATURES) @ self.weight
        return loss * (-u).exp() + u


@dataclass(frozen=True)
class DenoisingObjective(TrainingObjective):
    """Denoising: the loss is the weighted squared error of the prediction at a sampled noise level."""

    config: ObjectiveConfig
    objective: Objective
    center: Tensor | None
    """Mean of the images, (1, C, 1, 1), from which the network predicts the difference; None: 0."""

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Sample time steps, noise and dropout seeds; in a probe times are spread evenly over their distribution."""
        channels, height, width = x0.shape[1:]
        shape = (channels, height, width)
        schedule = self.objective.schedule.with_shape(shape)
        if probe is not None:
            t = timesteps_at(self.config, schedule, (torch.arange(len(x0)) + 0.5) / len(x0))
            noise = GaussianNoise(0, f"probe/{probe}", indices, shape)()
            return TrainingBatch(x0, conditioning, {"noise": noise, "t": t})
        t = sample_timesteps(self.config, schedule, indices)
        noise = GaussianNoise(self.config.seed, "noise", indices, shape)()
        seeds = (uniform(self.config.seed, "dropout", indices) * 2**62).long()
        return TrainingBatch(x0, conditioning, {"noise": noise, "t": t, "dropout_seeds": seeds})

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the weighted error of each image, with that of the prior in training."""
        x0, random, center = batch.x0, batch.random, batch.conditioning.get("low")
        if center is None and self.center is not None:
            center = copy_to_device(self.center, x0.device)
        times, noise, draws = random["t"], random["noise"], random.get("dropout_seeds")
        predict = partial(network, draws=draws, **batch.conditioning)
        losses = self.objective.loss(predict, x0, times, noise, center, batch.pixel_weights)
        if batch.prior is None:
            return losses
        assert isinstance(network, TrainableSubset)
        assert self.config.prior is not None
        teacher = partial(network.base, **batch.prior)
        predict = partial(network, draws=draws, **batch.prior)
        prior_losses = self.objective.loss(predict, x0, times, noise, center, teacher=teacher)
        return losses + self.config.prior.weight * prior_losses

    def validation_metrics(
        self, network: nn.Module, parts: Iterable[TrainingBatch], losses: Tensor
    ) -> dict[str, float]:
        """Compute the mean loss at each of ``LEVELS`` parts of the distribution of noise levels."""
        if len(losses) < LEVELS:
            return {}
        levels = losses.tensor_split(LEVELS)
        return {f"held_out_loss_ema_level_{number}": part.mean().item() for number, part in enumerate(levels, start=1)}

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """Train the network, together with the uncertainty of each noise level if configured."""
        losses = partial(self.losses, network)
        if not self.config.learned_uncertainty:
            return [OptimizerStep({"network": network}, losses)]
        uncertainty = Uncertainty()

        def compute_objective(losses: Tensor, batch: TrainingBatch) -> Tensor:
            loss: Tensor = uncertainty(losses, batch.random["t"] * (TIMES / self.objective.schedule.steps))
            return loss

        return [OptimizerStep({"network": network, "uncertainty": uncertainty}, losses, compute_objective)]
