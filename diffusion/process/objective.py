"""Objective of denoising: the loss of a training step, its weights over noise levels, and the times it is taken at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.common.random import uniform
from diffusion.process.config import DenoisingConfig, ObjectiveConfig
from diffusion.process.likelihood import broadcast_to_images, compute_bound
from diffusion.process.parametrization import Parametrization
from diffusion.process.schedules import NoiseSchedule, make_schedule, resolution_scale

Weight = Callable[[Tensor], Tensor]
"""Weight of the squared error of the image as a function of σ (N,)."""


def make_plain_weight(parametrization: Parametrization) -> Weight:
    """Make the weight of the plain squared error, for epsilon DDPM's L_simple (arXiv 2006.11239, equation 14)."""
    return lambda sigma: parametrization.c_out(sigma) ** -2


def make_edm_weight(sigma_data: float) -> Weight:
    """Make λ = 1/σ² + 1/σ_data², which equalises the error of EDM's network over all levels (2206.00364, table 1)."""
    return lambda sigma: sigma**-2 + sigma_data**-2


@dataclass(frozen=True)
class Objective:
    """Denoising loss: add noise, predict, compare."""

    schedule: NoiseSchedule
    parametrization: Parametrization
    weight: Weight

    def loss(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        around: Tensor | None = None,
        pixel_weights: Tensor | None = None,
        teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute the weighted mean squared error of images ``x0`` (N, C, H, W), (N,), in float32 at any precision.

        ``network`` maps noisy images and times to predictions; if these have 2C channels, it learns its variance, and
        the variational bound is added. ``t`` are times (N,), integral with a learned variance, ``noise`` is standard
        Gaussian, ``around`` as in ``Denoiser``. ``pixel_weights`` (N, 1, H', W') weight the squared errors; a larger
        grid is averaged over the pixels that each of ``x0`` stands for. What ``teacher`` predicts is to be predicted;
        None: the image and the noise.
        """
        sigma = self.schedule.sigma(t)
        clean = x0 if around is None else x0 - around.to(x0)
        noisy = self.parametrization.make_noisy_input(clean, noise, sigma)
        prediction, v = network(noisy, t.float()).float().tensor_split([x0.shape[1]], dim=1)
        if teacher is None:
            target = self.parametrization.target(clean, noise, sigma)
        else:
            with torch.no_grad():
                target = teacher(noisy, t.float()).float()[:, : x0.shape[1]]
        difference = prediction - target
        squares = difference.square()
        if pixel_weights is not None:
            squares = squares * functional.adaptive_avg_pool2d(pixel_weights, (squares.shape[2], squares.shape[3]))
        error = squares.mean((1, 2, 3))
        # The error of the output is the image's error divided by c_out.
        loss = (self.weight(sigma) * self.parametrization.c_out(sigma) ** 2).to(error.dtype) * error
        if not v.shape[1] or teacher is not None:
            return loss
        # L_hybrid = L_simple + λ L_vlb with λ = 0.001, where L_vlb is the sum of T terms, in bits per value, one of
        # which is sampled; it has no gradient by the mean (arXiv 2102.09672, equation 16 and section 3.1).
        error_x0 = broadcast_to_images(x0, self.parametrization.c_out(sigma)) * difference.detach()
        return loss + self.schedule.steps / 1000 * compute_bound(self.schedule, t, x0, error_x0, v)


def make_objective(
    model: DenoisingConfig, config: ObjectiveConfig, sigma_data: float, shape: tuple[int, int, int]
) -> Objective:
    """Build the objective for data of standard deviation ``sigma_data`` and ``shape`` (C, H, W)."""
    parametrization = Parametrization(model.prediction, sigma_data)
    return Objective(make_schedule(model, shape), parametrization, make_weight(config, parametrization))


def make_weight(config: ObjectiveConfig, parametrization: Parametrization) -> Weight:
    """Build the loss weight that ``config`` names."""
    sigma_data = parametrization.sigma_data
    match config.weighting:
        case "plain":
            return make_plain_weight(parametrization)
        case "min_snr":
            gamma = 5.0 if config.min_snr_gamma is None else config.min_snr_gamma
            return lambda sigma: (sigma**-2).clamp(max=gamma)
        case "soft_min_snr":  # section 4.4
            return lambda sigma: 1 / (sigma**2 + sigma_data**2)
        case "edm":
            return make_edm_weight(sigma_data)


def sample_timesteps(config: ObjectiveConfig, schedule: NoiseSchedule, indices: Sequence[int]) -> Tensor:
    """Sample times from 0 to T−1 for the images ``indices``, a rank's part of a batch: (N,), integral if uniform."""
    u = uniform(config.seed, "time", indices)
    if config.stratified_timesteps:
        # One in each equal part of the distribution: at no cost the loss has less variance between batches.
        place = torch.tensor(indices) % config.images_per_step
        u = (place + u) / config.images_per_step
    return timesteps_at(config, schedule, u)


def timesteps_at(config: ObjectiveConfig, schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """Compute the times at the quantiles ``u`` (N,), in [0, 1), of the distribution that ``config`` names."""
    if config.timestep_sampling == "uniform":
        return (u * schedule.steps).long().clamp(max=schedule.steps - 1)
    # ln σ is normal (arXiv 2206.00364, table 1).
    mean = config.log_sigma_mean
    if mean is None:
        mean = -1.2 + math.log(resolution_scale(schedule.values))
    std = 1.2 if config.log_sigma_std is None else config.log_sigma_std
    return schedule.time((mean + std * torch.special.ndtri(u)).exp())
