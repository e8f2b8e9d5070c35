"""The family ddpm: a U-Net that denoises images (arXiv 2006.11239) or latents (2112.10752)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise, uniform
from diffusion.common.shapes import height_and_width, shape_name
from diffusion.families.model import (
    Conditioning,
    ConditioningBatch,
    Model,
    ModelHeader,
    OptimizerStep,
    TrainingBatch,
    TrainingObjective,
    to_float,
    to_uint8,
)
from diffusion.models.config import LatentSpace, ModelConfig, ObjectiveConfig
from diffusion.models.unet import TIMES, UNet, sinusoidal
from diffusion.models.vae import Latents, latent_shape
from diffusion.process.denoiser import Denoiser, ReportingDenoiser, apply_guidance, clip_estimates
from diffusion.process.editing import Edit, downsample_mask, fill_hole, pigdm, repaint, replace_known, select_levels
from diffusion.process.likelihood import Terms, denoising_terms
from diffusion.process.parametrization import (
    Objective,
    Parametrization,
    make_objective,
    sample_timesteps,
    timesteps_at,
)
from diffusion.process.samplers import ZERO_SNR, Denoise, SamplingConfig
from diffusion.process.schedules import NoiseSchedule, make_schedule

LEVELS = 8
"""Number of equal parts of the distribution of noise levels for which the held-out loss is logged."""
UNCERTAINTY_FEATURES = 128
EDIT_STEPS = 8
"""Fewest noise levels for edits by students."""


@dataclass(frozen=True)
class DiffusionModel(Model):
    """Diffusion model of images or of their latents."""

    network: UNet
    schedule: NoiseSchedule
    latents: Latents | None = None
    """Autoencoder of latent diffusion; None: the network works on pixels."""

    @staticmethod
    def make_network(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> UNet:
        """Build the U-Net."""
        return UNet(config, shape[0], shape[-1], classes)

    @staticmethod
    def forward(network: UNet, shape: tuple[int, int, int]) -> Tensor:
        """Predict at time 0 and sum."""
        x = torch.empty(1, *shape)
        out: Tensor = network(x, torch.zeros(1), low=None if network.level is None else x).sum()
        return out

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig, latents: Latents | None) -> TrainingObjective:
        """Build the denoising objective, in latents where there is an autoencoder."""
        assert isinstance(header.model, ModelConfig)
        shape = header.latents.shape if header.latents else header.square
        objective = make_objective(header.model, training, header.sigma_data, shape)
        # EDM's coefficients are derived for data of zero mean (arXiv 2206.00364, appendix B.6).
        center = _mean(header) if header.model.prediction == "edm" else None
        return DenoisingObjective(training, objective, latents, center)

    @classmethod
    def make_model(cls, header: ModelHeader, network: UNet, autoencoder: Latents | None) -> Self:
        """Wrap the network with the schedule that it was trained on."""
        assert isinstance(header.model, ModelConfig)
        shape = header.latents.shape if header.latents else header.square
        return cls(header, network, make_schedule(header.model, shape), autoencoder).with_size(None)

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        assert isinstance(self.header.model, ModelConfig)
        return self.header.model

    @property
    def autoencoder(self) -> Latents | None:
        """Autoencoder of latent diffusion."""
        return self.latents

    def with_size(self, size: tuple[int, int] | None) -> Self:
        """Return the model for images of ``size``; sampling starts at the noise level of their number of values."""
        model = super().with_size(size)
        if model.shape != self.shape:
            model.check_size()
        return replace(model, schedule=self.schedule.with_shape(model.noise_shape))

    def check_size(self) -> None:
        """Raise UserError if its autoencoder, or the network, does not take images of this height and width."""
        factor = 1 if self.header.latents is None else self.header.latents.autoencoder.factor
        if any(side % factor for side in self.shape[1:]):
            raise UserError(
                f"the model's autoencoder takes images whose sides are multiples of {factor} pixels, and "
                f"{shape_name(self.shape[1:])} is no such size: choose another one"
            )
        fold = self.network.fold * factor
        if min(self.shape[1:]) < fold:
            raise UserError(
                f"the model's network takes images of {fold} pixels and more along each side, and "
                f"{shape_name(self.shape[1:])} has fewer: choose a larger size"
            )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        return noise_shape(self.shape, self.header.latents)

    def decode(self, x: Tensor) -> Tensor:
        """Decode states of the reverse process, (N, *noise_shape), to images (N, C, H, W), nominally in [−1, 1]."""
        return x if self.latents is None else self.latents.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as states of the reverse process, (N, *noise_shape)."""
        return images if self.latents is None else self.latents.encode(images)

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser of the model for batches with ``conditioning``."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        conditioning, mean = conditioning or {}, _mean(self.header)
        return Denoiser(
            partial(self.network, **conditioning),
            self.schedule,
            parametrization,
            # Latents are unbounded.
            clip=self.latents is None,
            learned_variance=self.config.variance == "learned_range",
            around=conditioning.get("low", mean if self.config.prediction == "edm" else None),
        )

    def start(self, conditioning: Conditioning) -> Tensor | None:
        """Return what is known of clean images: the small image enlarged, their mean, (1, C, 1, 1), or None."""
        return conditioning["low"] if "low" in conditioning else _mean(self.header)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Run the reverse process."""
        sigmas = config.sigma_grid(self.schedule)
        denoise = denoiser_of(self, batch.conditioning, config, batch.negative)
        if batch.edit is not None:
            if self.header.student_steps is not None:
                # With few levels all strengths would be the same.
                sigmas = config.with_changes({"steps": max(config.steps, EDIT_STEPS)}).sigma_grid(self.schedule)
            return run_edit(self, batch.edit, denoise, sigmas, batch, config)
        denoise = ReportingDenoiser(denoise, sigmas, batch.report_steps)
        return to_uint8(self.decode(config.run(denoise, sigmas, batch.noise, self.start(batch.conditioning))))

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the sampler's evaluations of the network and one pass through the decoder."""
        x = torch.zeros(1, *self.noise_shape)
        forward = partial(self.network, x, torch.zeros(1), low=None if self.network.level is None else x)
        return [(1, lambda: self.decode(x)), (count_evaluations(config, self.schedule), forward)]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute losses by noise level and the likelihood bound; in latents the losses alone."""
        denoiser, sigma_data = self.denoiser(conditioning), self.header.sigma_data
        return denoising_terms(denoiser, self.encode(x0), sigma_data, indices, self.latents is None)


def noise_shape(shape: tuple[int, int, int], latents: LatentSpace | None) -> tuple[int, int, int]:
    """Compute (C, H, W) of the noise of images (C, H, W), or of their latents; UserError if the factor does not fit."""
    return shape if latents is None else latent_shape(latents.autoencoder, *shape[1:])


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
    autoencoder: Latents | None
    """Encodes images into latents; None: noise is added to pixels."""
    center: Tensor | None
    """Mean of the images, (1, C, 1, 1), from which the network predicts the difference; None: 0."""
    _centers: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Sample time steps, noise and dropout seeds; in a probe times are spread evenly over their distribution."""
        channels, height, width = x0.shape[1:]
        space = None if self.autoencoder is None else self.autoencoder.space
        shape = noise_shape((channels, height, width), space)
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
        """Compute the weighted error of each image."""
        x0, random, center = batch.x0, batch.random, batch.conditioning.get("low")
        if center is None and self.center is not None:
            if x0.device not in self._centers:  # each copy would wait for the device
                self._centers[x0.device] = self.center.to(x0.device)
            center = self._centers[x0.device]
        if self.autoencoder is not None:
            with torch.no_grad():
                # Not cached: encoding takes 5 to 20 % of a step, while cached latents could go stale, would be needed
                # twice for mirrored images, and would have to be deleted when images are taken down.
                x0 = self.autoencoder.encode(x0)
        predict = partial(network, draws=random.get("dropout_seeds"), **batch.conditioning)
        return self.objective.loss(predict, x0, random["t"], random["noise"], center)

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute the mean loss at each of ``LEVELS`` parts of the distribution of noise levels."""
        if len(losses) < LEVELS:
            return {}
        parts = losses.tensor_split(LEVELS)
        return {f"held_out_loss_ema_level_{number}": part.mean().item() for number, part in enumerate(parts, start=1)}

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """Train the network, together with the uncertainty of each noise level if configured."""
        losses = partial(self.losses, network)
        matrices = network.matrices() if isinstance(network, UNet) else []
        if not self.config.learned_uncertainty:
            return [OptimizerStep({"network": network}, losses, matrices=matrices)]
        uncertainty = Uncertainty()

        def compute_objective(losses: Tensor, batch: TrainingBatch) -> Tensor:
            loss: Tensor = uncertainty(losses, batch.random["t"] * (TIMES / self.objective.schedule.steps))
            return loss

        return [OptimizerStep({"network": network, "uncertainty": uncertainty}, losses, compute_objective, matrices)]


def _mean(header: ModelHeader) -> Tensor | None:
    return None if header.data_mean is None else torch.tensor(header.data_mean).view(1, -1, 1, 1)


def make_unconditional(model: DiffusionModel, conditioning: Conditioning, negative: Tensor) -> Conditioning:
    """Replace ``conditioning`` by no class and the embedding of the negative prompt, (E,)."""
    return {
        name: torch.full_like(value, len(model.classes)) if name == "label" else negative.expand_as(value)
        for name, value in conditioning.items()
    }


def denoiser_of(model: DiffusionModel, conditioning: Conditioning, config: SamplingConfig, negative: Tensor) -> Denoise:
    """Build the conditional denoiser, guided as configured.

    Away from the one with no class and the caption ``negative``, or by autoguidance away from the model's guide.
    """
    # Only the mixture is clipped: clipped estimates would be equal where images are black or white.
    conditional = replace(model.denoiser(conditioning), clip=False)
    if config.autoguidance is not None and config.autoguides:
        mixture = apply_guidance(conditional, guide_denoiser(model, conditioning), config.autoguidance)
    elif config.guidance is not None and config.guides:
        reference = replace(model.denoiser(make_unconditional(model, conditioning, negative)), clip=False)
        mixture = apply_guidance(
            conditional, reference, config.guidance, config.guidance_interval, config.guidance_rescale
        )
    else:
        return model.denoiser(conditioning)
    return mixture if model.latents is not None else clip_estimates(mixture)


def guide_denoiser(model: DiffusionModel, conditioning: Conditioning) -> Denoiser:
    """Build the denoiser of the model's guide, whose estimates are not clipped."""
    assert isinstance(model.guide, UNet)
    return replace(replace(model, network=model.guide).denoiser(conditioning), clip=False)


def run_edit(
    model: DiffusionModel,
    edit: Edit,
    denoise: Denoise,
    sigmas: Tensor,
    batch: ConditioningBatch,
    config: SamplingConfig,
) -> Tensor:
    """Run the reverse process from the image of ``edit`` with the noise of its strength; restores all kept pixels."""
    noise = batch.noise
    # An edit has an image to start around, and nothing to gain from a level without signal.
    levels = select_levels(sigmas[sigmas <= ZERO_SNR], edit.strength)
    start = float(levels[0]) * noise()
    content, mask = encode_known_part(model, edit, start.device)
    if mask is not None:
        if edit.guided:
            denoise = pigdm(denoise, content, mask, model.header.sigma_data)
            denoise = denoise if model.latents is not None else clip_estimates(denoise)
        denoise = replace_known(denoise, content, mask)
    denoise = ReportingDenoiser(denoise, levels, batch.report_steps)
    x = repaint(config.build_sampler(), denoise, content + start, levels, noise, edit.stretch, edit.resample_steps)
    return paste_kept(edit, to_uint8(model.decode(x)))


def encode_known_part(model: DiffusionModel, edit: Edit, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Encode what is known of an edit's image, (1, *noise_shape), and its mask there, (1, h, w); None: no mask."""
    # At full strength the reverse process gets nothing of the hole.
    image = edit.image if edit.kept is None or edit.strength < 1 else fill_hole(edit.image, edit.kept)
    content = model.encode(to_float(image.to(device))[None])
    return content, None if edit.kept is None else downsample_mask(edit.kept.to(device), height_and_width(content))


def paste_kept(edit: Edit, images: Tensor) -> Tensor:
    """Restore all kept pixels of an edit in ``images`` (N, C, H, W) uint8."""
    if edit.kept is None:
        return images
    return torch.where(edit.kept.to(images.device), edit.image.to(images.device), images)


def count_evaluations(config: SamplingConfig, schedule: NoiseSchedule) -> int:
    """Count the network evaluations for one image by running the sampler on a counting function."""
    evaluations = 0

    def count(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return x

    scale, interval = 1.0 if config.guidance is None else config.guidance, config.guidance_interval
    if config.autoguidance is not None and config.autoguides:
        scale, interval = config.autoguidance, None
    denoise = apply_guidance(count, count, scale, interval)
    config.run(denoise, config.sigma_grid(schedule), lambda: torch.zeros(1, 1, 1, 1))
    return evaluations
