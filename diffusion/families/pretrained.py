"""The family diffusers: imported pipelines, sampled by Darkroom's samplers or by their own scheduler."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion.common.config import LARGEST_SIDE
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import CPU
from diffusion.common.shapes import shape_name
from diffusion.families.ddpm import (
    DenoisingObjective,
    DiffusionModel,
    count_evaluations,
    encode_known_part,
    make_unconditional,
    paste_kept,
)
from diffusion.families.model import Conditioning, ConditioningBatch, ModelHeader, TrainingObjective, to_uint8
from diffusion.models.config import DiffusersConfig, ObjectiveConfig
from diffusion.models.pretrained import PipelineNetwork, build, tensor_names
from diffusion.models.vae import Latents
from diffusion.process.denoiser import Denoiser, rescale_guidance
from diffusion.process.likelihood import Terms
from diffusion.process.parametrization import Objective, Parametrization, make_weight
from diffusion.process.samplers import Noise, SamplingConfig, SchedulerSampling
from diffusion.process.schedules import NoiseSchedule, flow_schedule, make_final_sigma_finite


@dataclass(frozen=True)
class PretrainedModel(DiffusionModel):
    """An imported pipeline."""

    network: PipelineNetwork  # type: ignore[assignment]

    @staticmethod
    def make_network(config: DiffusersConfig, shape: tuple[int, int, int], classes: int) -> PipelineNetwork:  # type: ignore[override]
        """Build all components."""
        return PipelineNetwork(config)

    tensor_names = staticmethod(tensor_names)

    def check_size(self) -> None:
        """Raise UserError if the network's fold divides no such images, or it has no positions for so large ones."""
        shape, fold = self.shape[1:], self.config.fold
        max_positions = self.config.denoiser.config.get("pos_embed_max_size")
        limit = LARGEST_SIDE if max_positions is None else int(max_positions) * fold
        if any(side % fold or side > limit for side in shape):
            raise UserError(
                f"the pipeline's network takes images whose height and width are multiples of {fold} up to {limit}, "
                f"and {shape_name(shape)} is none: choose another size"
            )

    @staticmethod
    def forward(network: PipelineNetwork, shape: tuple[int, int, int]) -> Tensor:  # type: ignore[override]
        """Predict at time 0 and sum; the ``shape`` is the network's own."""
        inputs = {}
        if network.config.network_classes is not None:
            inputs["label"] = torch.zeros(1, dtype=torch.long)
        if network.config.text:
            inputs["text"] = torch.zeros(1, network.embedding_size)
        out: Tensor = network(torch.zeros(1, *network.config.noise_shape), torch.zeros(1), **inputs).sum()
        return out

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig, latents: Latents | None) -> TrainingObjective:
        """Build the denoising objective of the pipeline's own prediction, for images or latents as the network's."""
        assert isinstance(header.model, DiffusersConfig)
        if training.timestep_sampling == "scheduler":
            training = training.model_copy(update=own_timesteps(header.model))
        assert header.model.prediction is not None
        parametrization = Parametrization(header.model.prediction, header.sigma_data)
        objective = Objective(
            make_pipeline_schedule(header.model), parametrization, make_weight(training, parametrization)
        )
        return DenoisingObjective(training, objective, None, None)

    @classmethod
    def make_model(cls, header: ModelHeader, network: Any, autoencoder: Any) -> Self:
        """Wrap the components with the schedule of the pipeline's scheduler."""
        assert isinstance(header.model, DiffusersConfig)
        latents = network if header.model.latents is not None else None
        return cls(header, network, make_pipeline_schedule(header.model), latents).with_size(None)

    def to(self, device: torch.device) -> Self:
        """Copy the components to ``device``."""
        if next(self.network.parameters()).device == device:
            return self
        return self.make_model(self.header, copy.deepcopy(self.network).to(device), None).with_size(self.size)

    @property
    def config(self) -> DiffusersConfig:  # type: ignore[override]
        """Configuration of the pipeline."""
        assert isinstance(self.header.model, DiffusersConfig)
        return self.header.model

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        _, height, width = self.shape
        return self.config.noise_shape[0], height // self.config.factor, width // self.config.factor

    def embed(self, prompt: str | None) -> Tensor:
        """Embed ``prompt`` by the pipeline's text encoders, flat: (E,) float32; None as an empty one."""
        return self.network.embed(prompt or "") if self.config.text else super().embed(prompt)

    def prompt_length(self, prompt: str) -> tuple[int, int, int]:
        """Count the tokens of ``prompt``, those of an empty one, and the most that the text encoder reads."""
        length, limit = self.network.prompt_length(prompt)
        return length, self.network.prompt_length("")[0], limit

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser; UserError if the network's prediction is unknown."""
        if self.config.prediction is None:
            raise UserError(
                f"Darkroom's samplers do not know what a network of the {self.config.scheduler.kind} predicts: use "
                "sampling.sampler=scheduler"
            )
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        network = partial(self.network, **conditioning or {})
        return Denoiser(network, self.schedule, parametrization, clip=self.latents is None)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Run the reverse process, by the pipeline's own scheduler if ``config`` says so."""
        if not isinstance(config, SchedulerSampling):
            return super().generate(batch, config)
        config.sigma_grid(self.schedule)  # raises for more steps than there are
        x = noise = batch.noise()
        scheduler, edit, content, mask = self._scheduler(config.steps, x.device), batch.edit, None, None
        timesteps = scheduler.timesteps
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        if edit is not None:
            if edit.guided or edit.resample_steps > 1:
                raise UserError(
                    "a pipeline's own scheduler only replaces what is known: use the method replace, or another "
                    "sampling.sampler"
                )
            content, mask = encode_known_part(self, edit, x.device)
            offset = (config.steps - max(1, int(config.steps * edit.strength))) * scheduler.order
            timesteps = timesteps[offset:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(offset)
            if edit.strength < 1:
                x = _add_noise(scheduler, content, noise, timesteps[:1])
        predict = self._build_prediction(batch, config)
        for number, t in enumerate(timesteps):
            batch.report_steps(number, len(timesteps))
            model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            with _NoiseOverride(batch.noise):
                x = scheduler.step(predict(model_input, t), t, x, return_dict=False)[0]
            if content is not None and mask is not None:
                t_next = timesteps[number + 1 : number + 2]
                x = torch.where(mask, _add_noise(scheduler, content, noise, t_next) if len(t_next) else content, x)
        images = to_uint8(self.decode(x))
        return images if edit is None else paste_kept(edit, images)

    def _scheduler(self, steps: int, device: torch.device = CPU) -> Any:
        """Make the scheduler, set to ``steps`` as the pipeline sets it."""
        scheduler, options = self._make_scheduler(), {}
        if scheduler.config.get("use_dynamic_shifting"):
            _, height, width = self.noise_shape
            patch = self.config.denoiser.config.get("patch_size", 1)
            defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
            min_length, max_length, low, high = (scheduler.config.get(name, value) for name, value in defaults.items())
            share = ((height // patch) * (width // patch) - min_length) / (max_length - min_length)
            options["mu"] = low + share * (high - low)
        scheduler.set_timesteps(steps, device=device, **options)
        return scheduler

    def _make_scheduler(self) -> Any:
        """Make the scheduler as the pipeline does, which may change what its configuration says."""
        if self.config.pipeline == "DDIMPipeline":
            return build(self.config.scheduler.model_copy(update={"kind": "DDIMScheduler"}))
        scheduler = build(self.config.scheduler)
        if self.config.pipeline == "StableDiffusionPipeline":
            right = {"steps_offset": 1, "clip_sample": False}
            scheduler.register_to_config(**{name: value for name, value in right.items() if name in scheduler.config})
        return scheduler

    def _build_prediction(self, batch: ConditioningBatch, config: SamplingConfig) -> Callable[[Tensor, Tensor], Tensor]:
        """Build the prediction of the network, guided as pipelines guide: in one batch, on what it predicts."""
        conditioning = batch.conditioning
        if not config.guides:
            return lambda x, t: self.network.predict(x, t, **conditioning)
        assert config.guidance is not None
        scale, null_conditioning = config.guidance, make_unconditional(self, conditioning, batch.negative)
        joint = {name: torch.cat([null_conditioning[name], value]) for name, value in conditioning.items()}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if config.guidance_interval is not None:
                sigma = float(self.schedule.sigma(t[None] - self.network.time_offset))
                if not config.guidance_interval[0] < sigma <= config.guidance_interval[1]:
                    return self.network.predict(x, t, **conditioning)
            base, ours = self.network.predict(torch.cat([x, x]), t, **joint).chunk(2)
            prediction = base + scale * (ours - base)
            share = config.guidance_rescale
            return prediction if share is None else rescale_guidance(prediction, ours, share)

        return predict

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the evaluations of the network for one image and one pass through the decoder."""
        x, conditioning = torch.zeros(1, *self.noise_shape), {}
        if self.classes:
            conditioning["label"] = torch.zeros(1, dtype=torch.long)
        if self.config.text:
            conditioning["text"] = torch.zeros(1, self.network.embedding_size)
        if isinstance(config, SchedulerSampling):
            count = len(self._scheduler(config.steps).timesteps) * (2 if config.guides else 1)
        else:
            count = count_evaluations(config, self.schedule)
        return [(1, lambda: self.decode(x)), (count, lambda: self.network(x, torch.zeros(1), **conditioning))]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute losses by noise level, and bits in pixels; nothing if the network's prediction is unknown."""
        if self.config.prediction is None:
            return Terms.without_levels(None, len(x0))
        return super().terms(x0, conditioning, indices)


class _NoiseOverride(TorchFunctionMode):
    """Have schedulers take their fresh noise from ``noise``, of each image by itself, instead of ``torch.randn``."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.noise() if func is torch.randn else func(*args, **kwargs or {})


def _add_noise(scheduler: Any, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Add ``noise`` (N, C, H, W) to ``x0`` at ``timestep`` (1,) as the scheduler has it."""
    add = getattr(scheduler, "scale_noise", None)
    result: Tensor = add(x0, timestep, noise) if add else scheduler.add_noise(x0, noise, timestep)
    return result


def own_timesteps(config: DiffusersConfig) -> dict[str, Any]:
    """Choose the distribution of times in training that a pipeline's scheduler implies, as fields of the objective.

    Flow matching has normal logits of t, shifted as the scheduler shifts its times (arXiv 2403.03206, sections 3.1 and
    5.3.2), and logit t is ln σ; all others have uniform times.
    """
    if config.prediction != "flow_prediction":
        return {"timestep_sampling": "uniform"}
    shift = float(config.scheduler.config.get("shift") or 1.0)
    return {"timestep_sampling": "lognormal", "log_sigma_mean": math.log(shift), "log_sigma_std": 1.0}


def make_pipeline_schedule(config: DiffusersConfig) -> NoiseSchedule:
    """Build the noise schedule of a pipeline's scheduler; raises UserError if its levels are not distinct."""
    channels, height, width = config.noise_shape
    values, scheduler = channels * height * width, build(config.scheduler)
    if config.prediction == "flow_prediction":
        return flow_schedule(scheduler.config.num_train_timesteps, values)
    schedule = NoiseSchedule(scheduler.alphas_cumprod.double().cpu(), values)
    if scheduler.config.get("rescale_betas_zero_snr"):
        schedule = replace(make_final_sigma_finite(schedule), zero_terminal_snr=True)
    if not ((schedule.alphas_cumprod.diff() < 0).all() and schedule.alphas_cumprod[-1] > 0):
        raise UserError(f"the {config.scheduler.kind} has no distinct noise levels: its configuration is damaged")
    return schedule
