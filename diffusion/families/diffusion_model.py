"""Diffusion models of any family: sampling, guidance, edits and likelihood by a denoiser."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from diffusion.common.shapes import height_and_width
from diffusion.families.model import Conditioning, ConditioningBatch, Model, to_float, to_uint8
from diffusion.families.text_encoder import Encoding
from diffusion.families.vae.network import Latents
from diffusion.process.denoiser import Denoiser, ReportingDenoiser, apply_guidance, clip_estimates
from diffusion.process.editing import Edit, downsample_mask, fill_hole, pigdm, repaint, replace_known, select_levels
from diffusion.process.likelihood import Terms, denoising_terms
from diffusion.process.samplers import ZERO_SNR, Denoise, SamplingConfig
from diffusion.process.schedules import NoiseSchedule

EDIT_STEPS = 8
"""Fewest noise levels for edits by students."""


@dataclass(frozen=True)
class DiffusionModel(Model):
    """Diffusion model of images or of their latents."""

    schedule: NoiseSchedule
    latents: Latents | None = None
    """Autoencoder of latent diffusion; None: the network works on pixels."""

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

    @abstractmethod
    def check_size(self) -> None:
        """Raise UserError if the network, or its autoencoder, does not take images of this height and width."""

    @abstractmethod
    def forward_pass(self) -> Tensor:
        """Evaluate the network once, for one image."""

    def decode(self, x: Tensor) -> Tensor:
        """Decode states of the reverse process, (N, *noise_shape), to images (N, C, H, W), nominally in [−1, 1]."""
        return x if self.latents is None else self.latents.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as states of the reverse process, (N, *noise_shape)."""
        return images if self.latents is None else self.latents.encode(images)

    @abstractmethod
    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser of the model for batches with ``conditioning``."""

    def start(self, conditioning: Conditioning) -> Tensor | None:
        """Return what is known of clean images: the small image enlarged, their mean, (1, C, 1, 1), or None."""
        return conditioning.get("low", self.header.mean)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Run the reverse process."""
        sigmas = config.sigma_grid(self.schedule)
        denoise = denoiser_of(self, batch.conditioning, config, batch.negative)
        if batch.edit is not None:
            if self.header.student_steps is not None:
                # With few levels all strengths would be the same.
                config = config.with_changes({"steps": max(config.steps, EDIT_STEPS), "eta": 1})
                sigmas = config.sigma_grid(self.schedule)
            return run_edit(self, batch.edit, denoise, sigmas, batch, config)
        denoise = ReportingDenoiser(denoise, sigmas, batch.report_steps)
        return to_uint8(self.decode(config.run(denoise, sigmas, batch.noise, self.start(batch.conditioning))))

    def evaluations(self, config: SamplingConfig) -> int:
        """Count the evaluations of the network for one image."""
        return count_evaluations(config, self.schedule)

    def check_sampling(self, config: SamplingConfig) -> None:
        """Raise UserError if there is no noise level between the ends of the sampler's."""
        config.sigma_grid(self.schedule)

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the sampler's evaluations of the network and one pass through the decoder."""
        x = torch.zeros(1, *self.noise_shape)
        return [(1, lambda: self.decode(x)), (self.evaluations(config), self.forward_pass)]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute losses by noise level and the likelihood bound; in latents the losses alone."""
        denoiser, sigma_data = self.denoiser(conditioning), self.header.sigma_data
        return denoising_terms(denoiser, self.encode(x0), sigma_data, indices, self.latents is None)


def make_unconditional(model: DiffusionModel, conditioning: Conditioning, negative: Encoding) -> Conditioning:
    """Replace ``conditioning`` by no class and the ``negative`` prompt."""
    return {
        name: torch.full_like(value, len(model.classes)) if name == "label" else negative[name].expand_as(value)
        for name, value in conditioning.items()
    }


def denoiser_of(
    model: DiffusionModel, conditioning: Conditioning, config: SamplingConfig, negative: Encoding
) -> Denoise:
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
    assert model.guide is not None
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
