"""The family ddpm: a U-Net that denoises images (arXiv 2006.11239) or latents (2112.10752)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.common.fingerprint import autocast
from diffusion.common.random import GaussianNoise, uniform
from diffusion.families.base import ConditioningBatch, OptimizerStep, TrainingBatch, TrainingData, TrainingObjective
from diffusion.families.model import Conditioning, DiffusionModel, ModelHeader, to_float, to_uint8
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet, sinusoidal
from diffusion.models.vae import Latents
from diffusion.process.editing import Edit, levels_for, pigdm, repaint, replace_known, whole
from diffusion.process.guidance import clipped, guided
from diffusion.process.likelihood import Terms, denoising_terms
from diffusion.process.objective_config import ObjectiveConfig
from diffusion.process.parametrization import Objective, make_objective, sample_timesteps, timesteps_at
from diffusion.process.samplers import Denoise, Noise, SamplingConfig
from diffusion.process.schedules import NoiseSchedule, make_schedule

LEVELS = 8
"""Number of equal parts of the distribution of noise levels for which the held-out loss is logged."""
UNCERTAINTY_FEATURES = 128


class Uncertainty(nn.Module):
    """Learned uncertainty u(t): a loss L becomes L / e^u + u, minimal at e^u = L (arXiv 2312.02696, equation 21).

    It equalises the gradients of all noise levels. The initial u is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(UNCERTAINTY_FEATURES))

    def forward(self, loss: Tensor, time: Tensor) -> Tensor:
        """Weight ``loss`` (N,) at time steps ``time`` (N,), in 0 … T−1; returns the minimized loss, (N,)."""
        u = sinusoidal(time, UNCERTAINTY_FEATURES) @ self.weight
        return loss * (-u).exp() + u


@dataclass(frozen=True)
class DenoisingObjective(TrainingObjective):
    """Denoising: the loss is the weighted squared error of the prediction at a sampled noise level."""

    config: ObjectiveConfig
    objective: Objective
    shape: tuple[int, int, int]
    """(C, H, W) of the noise."""
    autoencoder: Latents | None
    """Encodes images into latents; None: noise is added to pixels."""

    def make_batch(self, x0: Tensor, indices: range, conditioning: Conditioning) -> TrainingBatch:
        """Sample time steps, noise and dropout seeds."""
        t = sample_timesteps(self.config, self.objective.schedule, indices)
        noise = GaussianNoise(self.config.seed, "noise", indices, self.shape)()
        seeds = (uniform(self.config.seed, "dropout", indices) * 2**62).long()
        return TrainingBatch(x0, t, noise, seeds, conditioning)

    def make_validation_batch(
        self, x0: Tensor, split: str, indices: Sequence[int], conditioning: Conditioning
    ) -> TrainingBatch:
        """Spread time steps evenly over their distribution, with noise of a fixed seed."""
        u = (torch.arange(len(x0)) + 0.5) / len(x0)
        t = timesteps_at(self.config, self.objective.schedule, u)
        noise = GaussianNoise(0, f"probe/{split}", indices, self.shape)()
        return TrainingBatch(x0, t, noise, None, conditioning)

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the weighted error of each image."""
        assert batch.t is not None
        assert batch.noise is not None
        x0 = batch.x0
        if self.autoencoder is not None:
            with torch.no_grad():
                # Not cached: encoding takes 5 to 20 % of a step, while cached latents could go stale, would be needed
                # twice for mirrored images, and would have to be deleted when images are taken down.
                x0 = self.autoencoder.encode(x0)
        conditioned = partial(network, draws=batch.dropout_seeds, **batch.conditioning)
        return self.objective.loss(conditioned, x0, batch.t, batch.noise, batch.conditioning.get("low"))

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute the mean loss at each of ``LEVELS`` parts of the distribution of noise levels."""
        if len(losses) < LEVELS:
            return {}
        parts = losses.tensor_split(LEVELS)
        return {f"held_out_loss_ema_level_{number}": part.mean().item() for number, part in enumerate(parts, start=1)}

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """Train the network, together with the uncertainty of each noise level if configured."""
        losses = partial(self.losses, network)
        if not self.config.learned_uncertainty:
            return [OptimizerStep({"network": network}, losses)]
        uncertainty = Uncertainty()

        def minimized(losses: Tensor, batch: TrainingBatch) -> Tensor:
            weighted: Tensor = uncertainty(losses, batch.t)
            return weighted

        return [OptimizerStep({"network": network, "uncertainty": uncertainty}, losses, minimized)]


@torch.inference_mode()
def reverse_process(
    model: DiffusionModel, batch: ConditioningBatch, config: SamplingConfig, device: torch.device
) -> Tensor:
    """Generate the images of a compute batch, (N, C, H, W) uint8, with a diffusion model on ``device``."""
    sigmas = config.sigma_grid(model.schedule)
    denoise = denoiser_of(model, batch.conditioning, config, batch.negative)
    with autocast(config.precision, device):
        if batch.edit is not None:
            return edited(model, batch.edit, denoise, sigmas, batch.noise, config).cpu()
        return to_uint8(model.decoded(config.run(denoise, sigmas, batch.noise))).cpu()


def denoiser_of(model: DiffusionModel, conditioning: Conditioning, config: SamplingConfig, negative: Tensor) -> Denoise:
    """Build the conditional denoiser, guided away from the one with no class and the caption ``negative``."""
    if not config.guides:
        return model.denoiser(conditioning)
    assert config.guidance is not None
    other = {
        name: torch.full_like(value, len(model.classes)) if name == "label" else negative.expand_as(value)
        for name, value in conditioning.items()
    }
    # Only the mixture is clipped: clipped estimates would be equal where images are black or white.
    conditional, unconditional = (replace(model.denoiser(each), clip=False) for each in (conditioning, other))
    mixture = guided(conditional, unconditional, config.guidance, config.guidance_interval, config.guidance_rescale)
    return mixture if model.latents is not None else clipped(mixture)


def edited(
    model: DiffusionModel, edit: Edit, denoise: Denoise, sigmas: Tensor, noise: Noise, config: SamplingConfig
) -> Tensor:
    """Run the reverse process from the image of ``edit`` with the noise of its strength; returns uint8.

    A latent position is kept if all of its pixels are; all kept pixels are restored at the end.
    """
    levels = levels_for(sigmas, edit.strength)
    start = float(levels[0]) * noise()
    known = model.encoded(to_float(edit.seen.to(start.device))[None])
    if edit.kept is not None:
        kept = edit.kept.to(start.device)
        latent_mask = whole(kept, known.shape[-1])
        if edit.guided:
            guided_denoise = pigdm(denoise, known, latent_mask, model.header.sigma_data)
            denoise = guided_denoise if model.latents is not None else clipped(guided_denoise)
        denoise = replace_known(denoise, known, latent_mask)

    sampler = config.build_sampler()
    x = repaint(sampler, denoise, known + start, levels, noise, edit.stretch, edit.resample_steps)
    images = to_uint8(model.decoded(x))
    return images if edit.kept is None else torch.where(kept, edit.image.to(images.device), images)


def count_evaluations(config: SamplingConfig, schedule: NoiseSchedule) -> int:
    """Count the network evaluations for one image by running the sampler on a counting function."""
    evaluations = 0

    def count(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return x

    guidance = 1.0 if config.guidance is None else config.guidance
    denoise = guided(count, count, guidance, config.guidance_interval)
    config.run(denoise, config.sigma_grid(schedule), lambda: torch.zeros(1, 1, 1, 1))
    return evaluations


class DiffusionFamily:
    """Denoising diffusion models."""

    edits = True

    def make_network(self, config: ModelConfig, shape: tuple[int, int, int], classes: int) -> UNet:
        """Build the U-Net."""
        return UNet(config, shape[0], shape[-1], classes)

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """Predict at time 0 and sum."""
        assert isinstance(network, UNet)
        x = torch.empty(1, *shape)
        out: Tensor = network(x, torch.zeros(1), low=None if network.level is None else x).sum()
        return out

    def make_objective(self, config: ModelConfig, training: ObjectiveConfig, data: TrainingData) -> DenoisingObjective:
        """Build the denoising objective, in latents where there is an autoencoder."""
        objective = make_objective(config, training, data.sigma_data)
        return DenoisingObjective(training, objective, data.network_shape, data.autoencoder)

    def make_model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> DiffusionModel:
        """Wrap the network with the schedule that it was trained on."""
        assert isinstance(network, UNet)
        assert isinstance(header.model, ModelConfig)
        return DiffusionModel(header, network, make_schedule(header.model), autoencoder)

    def sample(
        self, model: DiffusionModel, batch: ConditioningBatch, config: SamplingConfig, device: torch.device
    ) -> Tensor:
        """Run the reverse process."""
        return reverse_process(model, batch, config, device)

    def passes(self, model: DiffusionModel, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the sampler's evaluations of the network and one pass through the decoder."""
        x = torch.zeros(1, *model.noise_shape)
        count = count_evaluations(config, model.schedule)
        return [(1, lambda: model.decoded(x)), (count, lambda: self.forward(model.network, model.noise_shape))]

    def terms(self, model: DiffusionModel, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute losses by noise level and the likelihood bound; in latents the losses alone."""
        pixels = model.latents is None
        return denoising_terms(
            model.denoiser(conditioning), model.encoded(x0), model.header.sigma_data, indices, pixels
        )
