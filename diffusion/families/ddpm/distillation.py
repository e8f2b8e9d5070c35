"""Distillation of a diffusion model into a student of one to four evaluations (consistency models, arXiv 2303.01469).

The student begins with the teacher's weights and is tuned to be consistent (easy consistency tuning, 2406.14548): from
the same image with the same noise it predicts at σ what it predicts itself at a lower level, and without noise the
image as it is. The two levels are far apart at first, which is denoising, and move together. Guidance of the teacher
shifts the image, so that the student generates what the guided teacher does without being guided.

A student of several evaluations lands in between (multistep consistency models, 2403.06807): above a level s it learns
to reach the noisy image at s, from which its last evaluation goes on to the image. Estimates x̂ stand for where they
land, x̂ + s/σ (x − x̂), so that the target at σ is a mixture of the estimate at the lower level ρ, with the weight
(1 − s/ρ) / (1 − s/σ), and the image itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.common.random import GaussianNoise, uniform
from diffusion.families.diffusion_model import DiffusionModel, guide_denoiser, make_unconditional
from diffusion.families.header import ModelHeader
from diffusion.families.model import Conditioning, TrainingBatch, TrainingObjective
from diffusion.process.config import ObjectiveConfig
from diffusion.process.denoiser import apply_guidance
from diffusion.process.likelihood import broadcast_to_images

LOG_SIGMA_STD = 1.8
"""Standard deviation of ln σ, wider than that of denoising, as the first evaluation starts from pure noise; its mean is
ln σ_max − ln 28, 0 for grey images of 28×28."""
FIRST_GAP, LAST_GAP = 0.6, 0.05
"""1 − ρ/σ for the lower level ρ, at the start and at the end of training; it falls geometrically."""
HUBER = 1e-3
"""c of the pseudo-Huber loss √(d² + c²) − c of a root mean square d (2310.14189, section 3.3)."""


@dataclass(frozen=True)
class ConsistencyObjective(TrainingObjective):
    """Consistency of a student that begins as ``teacher``, guided as ``config.student`` says, over ``images``."""

    config: ObjectiveConfig
    teacher: DiffusionModel
    header: ModelHeader
    """Of the student, whose data may have other moments than the teacher's."""
    images: int

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Sample noise levels, noise and dropout seeds; in a probe levels are spread evenly, as close as at the end."""
        channels, height, width = x0.shape[1:]
        shape = (channels, height, width)
        seed, schedule, random = self.config.seed, self.teacher.schedule.with_shape(shape), {}
        if probe is not None:
            u, progress = (torch.arange(len(x0)) + 0.5) / len(x0), torch.ones(len(x0))
            random["noise"] = GaussianNoise(0, f"probe/{probe}", indices, shape)()
        else:
            numbers, size = torch.tensor(indices), self.config.images_per_step
            u, progress = (numbers % size + uniform(seed, "time", indices)) / size, numbers / self.images
            random["noise"] = GaussianNoise(seed, "noise", indices, shape)()
            random["dropout_seeds"] = (uniform(seed, "dropout", indices) * 2**62).long()
        highest = math.sqrt(schedule.values)
        sigma = highest / 28 * (LOG_SIGMA_STD * torch.special.ndtri(u.double())).exp()
        sigma = sigma.clamp(2 * float(schedule.sigmas[0]), min(highest, float(schedule.sigmas[-1])))
        lower = sigma * (1 - FIRST_GAP * (LAST_GAP / FIRST_GAP) ** progress.double())
        assert self.config.student is not None
        if (landing := self.config.student.landing) is not None:
            end = torch.where(sigma > landing, landing, 0.0)
            lower = torch.maximum(lower, end)
            random["lower_weight"] = (1 - end / lower) / (1 - end / sigma)
        return TrainingBatch(x0, conditioning, random | {"sigma": sigma, "lower": lower})

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the pseudo-Huber distance of each image's two estimates, weighted by 1/σ + 1/σ_data."""
        teacher, random, conditioning = self.teacher, batch.random, batch.conditioning
        sigma, lower_sigma = random["sigma"], random["lower"]
        predict = partial(network, draws=random.get("dropout_seeds"), **conditioning)
        model = replace(teacher, header=self.header)
        student = replace(model.denoiser(conditioning), network=predict, clip=False)
        with torch.no_grad():
            x0 = batch.x0
            x = x0 + broadcast_to_images(x0, sigma) * random["noise"]
            x0 = x0 + self._shift(x, sigma, conditioning)
            target = student(x0 + broadcast_to_images(x, lower_sigma / sigma) * (x - x0), lower_sigma).float()
            if (weight := random.get("lower_weight")) is not None:
                target = x0 + broadcast_to_images(x0, weight) * (target - x0)
        # Before 2.11, PyTorch uses weights again that it cast to bfloat16 without gradients.
        torch.clear_autocast_cache()
        estimate = student(x, sigma).float()
        if teacher.latents is None:
            # Sampling clips estimates, so one beyond black or white is right where the target is there: without this
            # the network never gets rid of the last grain on plain areas. The target itself is clipped: the student
            # made it, and each one beyond would take the next one further, without end.
            constant = estimate.detach()
            target = torch.where(
                target <= -1, constant.clamp(max=-1), torch.where(target >= 1, constant.clamp(min=1), target)
            )
        distance = ((estimate - target).square().mean((1, 2, 3)) + HUBER**2).sqrt() - HUBER
        return distance * (1 / sigma + 1 / self.header.sigma_data).to(distance.dtype)

    def _shift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Compute by how much guidance moves the teacher's estimate."""
        student = self.config.student
        assert student is not None
        scale, interval = student.autoguidance, None
        if scale is not None:
            reference = guide_denoiser(self.teacher, conditioning)
        elif student.guidance is not None:
            scale, interval = student.guidance, student.guidance_interval
            no_text = {name: value.to(x.device) for name, value in self.teacher.encode_prompt(None).items()}
            null_conditioning = make_unconditional(self.teacher, conditioning, no_text)
            reference = replace(self.teacher.denoiser(null_conditioning), clip=False)
        else:
            return torch.zeros_like(x)
        estimate = replace(self.teacher.denoiser(conditioning), clip=False)(x, sigma)
        mixture = apply_guidance(lambda *_: estimate, reference, scale, interval)(x, sigma)
        if self.teacher.latents is None:
            mixture, estimate = mixture.clamp(-1, 1), estimate.clamp(-1, 1)
        return mixture - estimate
