"""Pipeline of diffusers that generates as ``darkroom sample`` does, stepped by an equivalent scheduler of diffusers."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.diffusers_format.network import DarkroomUNet, samples_with_learned_variance
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.diffusion_model import denoiser_of
from diffusion.generation.config import Conditions, is_conditional
from diffusion.generation.generate import check_prompts, check_sampling, encode_prompts, make_conditioning
from diffusion.process.samplers import (
    ZERO_SNR,
    DDIMSampling,
    Denoise,
    DPMSolverSDESampling,
    EulerSampling,
    HeunSampling,
    SamplingConfig,
)
from diffusion.process.schedules import NoiseSchedule

WHOLE = (DDPMScheduler, DDIMScheduler)
"""Schedulers limited to integral times."""
IN_SIGMA = (EulerDiscreteScheduler, HeunDiscreteScheduler)
"""Schedulers whose state is x_0 + σ ε, as in Darkroom; that of the others is x_t."""
SUPPORTED = (*WHOLE, *IN_SIGMA, DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler)


class DarkroomPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pipeline for Darkroom models with classes, captions and guidance, for any scheduler of ``SUPPORTED``.

    Another one: ``pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)``. All but DDPM's and
    DDIM's visit the noise levels that ``darkroom sample`` does.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: DarkroomUNet, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seed: int = 0,
        labels: str | Sequence[str | None] = (),
        prompts: str | Sequence[str | None] = (),
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        autoguidance_scale: float | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images 0 to ``batch_size`` − 1 of ``seed``: those of ``darkroom sample``, to 1e-3 in [−1, 1].

        ``labels`` and ``prompts`` are what they show, one for all, or the i-th image the i-th, from the front again
        after the last; without either, classes come as often as the data set has them. ``height`` and ``width`` are in
        pixels, both or none: the most frequent shape of the training images. What else is None is as the
        folder says. ``eta`` is DDIM's alone. With a ``generator`` all noise comes from it, as in stock pipelines, and
        the seed only says which classes. ``output_type`` is pil, np (N, H, W, C) or pt (N, C, H, W), both in [0, 1].

        Raises UserError for conditions without training, options without effect, and a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: ask for one image or more")
        if (height is None) != (width is None):
            raise UserError("only one of height and width is given: give both, or none")
        size = None if height is None or width is None else (height, width)
        model, indices = self.unet.model.with_size(size), range(batch_size)
        labels, prompts = ((texts,) if isinstance(texts, str) else tuple(texts) for texts in (labels, prompts))
        conditions = Conditions(labels=labels, prompts=prompts, negative_prompt=negative_prompt)
        config = self._sampling(
            model,
            conditions,
            steps=num_inference_steps,
            guidance=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            autoguidance=autoguidance_scale,
        )
        device = self._execution_device
        encodings = encode_prompts(model, conditions)
        conditioning = make_conditioning(model, indices, seed, conditions, encodings)
        conditioning = {name: tensor.to(device) for name, tensor in conditioning.items()}
        negative = {name: value.to(device) for name, value in encodings[conditions.negative_prompt].items()}
        denoise = denoiser_of(model, conditioning, config, negative)
        start, options = self._noise(model, batch_size, seed, generator, eta)
        x0 = self._run_scheduler(model, denoise, conditioning, config, start, options)
        # The last step of Darkroom's samplers goes to the last estimate; schedulers end there too, or not quite.
        samples = (x0 / 2 + 0.5).clamp(0, 1)
        images: Any = samples if output_type == "pt" else samples.cpu().permute(0, 2, 3, 1).numpy()
        images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _run_scheduler(
        self,
        model: DDPMModel,
        denoise: Denoise,
        conditioning: dict[str, Tensor],
        config: SamplingConfig,
        start: Tensor,
        options: Callable[[], dict[str, Any]],
    ) -> Tensor:
        """Go from standard Gaussian noise ``start``, (N, C, H, W), through the scheduler's levels to the last x̂_0."""
        timesteps, sigmas = set_noise_levels(self.scheduler, model.schedule, config)
        in_sigma = isinstance(self.scheduler, IN_SIGMA)
        mean = model.start(conditioning)
        first_sigma = config.sigma_grid(model.schedule)[0]
        if first_sigma > ZERO_SNR and isinstance(self.scheduler, HeunDiscreteScheduler):
            mean = denoise(float(first_sigma) * start, first_sigma)
        start = float(sigmas[0]) * start
        if mean is not None:
            start = start + mean.to(start)
        x0 = state = start if in_sigma else start / float((1 + sigmas[0] ** 2).sqrt())
        for t, sigma in self.progress_bar(list(zip(timesteps, sigmas, strict=True))):
            self.scheduler.scale_model_input(state, t)  # some insist on it; σ says the same
            x = state if in_sigma else float((1 + sigma**2).sqrt()) * state
            if self._has_learned_variance:
                x0, v = model.denoiser(conditioning).estimate(x, sigma)
                output = torch.cat([x0, v], dim=1)
            else:
                output = x0 = denoise(x, sigma)
            state = self.scheduler.step(output, t, state, **options()).prev_sample
        return x0

    @property
    def _has_learned_variance(self) -> bool:
        """Whether the scheduler takes the variance from the network."""
        return isinstance(self.scheduler, DDPMScheduler) and "learned" in str(self.scheduler.config.variance_type)

    def _sampling(self, model: DDPMModel, conditions: Conditions, **options: Any) -> SamplingConfig:
        """Complete the ``options`` that are not None; raises UserError for those that do not fit."""
        # A given guidance replaces autoguidance, as in a request.
        changes: dict[str, Any] = {} if options["guidance"] is None else {"autoguidance": None}
        changes |= {name: value for name, value in options.items() if value is not None}
        config = self.unet.sampling.with_changes(changes)
        config = model.header.sampling(config, is_conditional(model.classes, conditions))
        check_prompts(conditions, model.prompt_length)
        check_sampling(model, config, conditions)
        _check_scheduler(self.scheduler, model)
        if self._has_learned_variance and (model.config.variance == "fixed" or config.is_guided):
            raise UserError(
                "a variance is learned by one network without guidance: use "
                "DDPMScheduler.from_config(pipe.scheduler.config, variance_type='fixed_small')"
            )
        return config

    def _noise(
        self,
        model: DDPMModel,
        count: int,
        seed: int,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float | None,
    ) -> tuple[Tensor, Callable[[], dict[str, Any]]]:
        """The noise to start from, and what the scheduler is given at each step: fresh noise, if it takes any."""
        device, parameters = self._execution_device, signature(self.scheduler.step).parameters
        if eta is not None and "eta" not in parameters:
            raise UserError(
                f"eta means nothing to {type(self.scheduler).__name__}: use a DDIMScheduler, or leave it out"
            )
        options: dict[str, Any] = {}
        if "eta" in parameters:
            default_eta = self.unet.sampling.eta if isinstance(self.unet.sampling, DDIMSampling) else 0.0
            options["eta"] = default_eta if eta is None else eta
        if generator is not None:
            start = randn_tensor((count, *model.shape), generator=generator, device=device, dtype=torch.float32)
            return start, lambda: options | ({"generator": generator} if "generator" in parameters else {})
        noise = GaussianNoise(seed, "sampling", range(count), model.shape)
        sde = isinstance(self.scheduler, DPMSolverMultistepScheduler) and "sde" in self.scheduler.config.algorithm_type
        if not (sde or options.get("eta", 0.0) > 0 or isinstance(self.scheduler, DDPMScheduler)):
            return noise().to(device), lambda: options
        if "variance_noise" not in parameters:
            raise UserError(
                f"{type(self.scheduler).__name__} takes no fresh noise but from a generator: give one, or use a "
                "scheduler that does, such as DDIMScheduler with eta=1 for DDPMScheduler"
            )
        return noise().to(device), lambda: options | {"variance_noise": noise().to(device)}


def _check_scheduler(scheduler: SchedulerMixin, model: DDPMModel) -> None:
    """Raise UserError for a ``scheduler`` that takes other steps than Darkroom, or is on another noise schedule."""
    if not isinstance(scheduler, SUPPORTED):
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise UserError(f"{type(scheduler).__name__} takes other steps: use one of {names}")
    actual, expected = scheduler.alphas_cumprod.cpu().double(), model.schedule.alphas_cumprod
    is_same = actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-4)
    if scheduler.config.prediction_type != "sample" or not is_same:
        name = type(scheduler).__name__
        raise UserError(
            f"the {name} is of another prediction or noise schedule than the model: make it by {name}.from_config(c), "
            "where c is the configuration of the scheduler in the model's own folder"
        )


def scheduler_of(model: DDPMModel, sampling: SamplingConfig) -> SchedulerMixin:
    """Make the scheduler that takes the steps of ``sampling`` for ``model``; raises UserError if diffusers has none."""
    if isinstance(sampling, EulerSampling | HeunSampling) and sampling.churn is not None:
        raise UserError(
            "schedulers of diffusers keep no sampling.churn: leave it out, or use dpmpp_2m_sde, whose noise is fresh"
        )
    if isinstance(sampling, DPMSolverSDESampling) and sampling.eta != 1:
        raise UserError(
            f"diffusers samples dpmpp_2m_sde with all noise fresh, not with sampling.eta = {sampling.eta:g}: leave it "
            "out, or use sampling.sampler=dpmpp_2m for none"
        )
    if sampling.sampler in ("ddpm", "ddim") and sampling.steps > model.schedule.steps:
        raise UserError(
            f"in diffusers {sampling.sampler} visits whole times, of which there are {model.schedule.steps}, and "
            f"sampling.steps = {sampling.steps}: lower it"
        )
    alpha_bar = model.schedule.alphas_cumprod
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    shared_options: dict[str, Any] = {
        "num_train_timesteps": model.schedule.steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    variance = getattr(sampling, "variance", None) or "fixed_small"
    if samples_with_learned_variance(model, sampling):
        variance = "learned_range"
    order = getattr(sampling, "order", None)
    karras = {"use_karras_sigmas": True}
    to_zero = karras | {"final_sigmas_type": "zero"}
    kinds: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
        "ddpm": (DDPMScheduler, {"variance_type": variance, "clip_sample": False}),
        "ddim": (DDIMScheduler, {"clip_sample": False}),
        "euler": (EulerDiscreteScheduler, karras),
        "heun": (HeunDiscreteScheduler, karras),
        "dpmpp_2m": (DPMSolverMultistepScheduler, to_zero),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, to_zero | {"algorithm_type": "sde-dpmsolver++"}),
        "deis": (DEISMultistepScheduler, karras | {"solver_order": order, "lower_order_final": False}),
        "unipc": (UniPCMultistepScheduler, to_zero | {"solver_order": order, "solver_type": "bh2"}),
    }
    kind, options = kinds[sampling.sampler]
    scheduler = kind(**shared_options, **options)
    if not isinstance(scheduler, WHOLE):
        levels = sampling.sigma_grid(model.schedule)
        if isinstance(scheduler, HeunDiscreteScheduler):
            levels = levels[levels <= ZERO_SNR]
        # Not among its arguments, but it looks there when it lays out levels as Karras et al. do.
        scheduler.register_to_config(sigma_max=float(levels[0]), sigma_min=float(levels[-2]))
    return scheduler


def set_noise_levels(
    scheduler: SchedulerMixin, schedule: NoiseSchedule, config: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Set the noise levels of ``config`` in ``scheduler``; returns its times, and σ at each as float64."""
    # DDPM and DDIM keep their own integral times, which equal Darkroom's if all steps of the schedule are used.
    scheduler.set_timesteps(config.steps)
    if isinstance(scheduler, WHOLE):
        return scheduler.timesteps, schedule.sigma(scheduler.timesteps)
    sigmas = config.sigma_grid(schedule)
    if isinstance(scheduler, DEISMultistepScheduler):
        sigmas[-1] = sigmas[-2]  # it cannot go to 0
    if isinstance(scheduler, HeunDiscreteScheduler):  # which evaluates twice at each level but the first
        sigmas = sigmas[sigmas <= ZERO_SNR]  # from above, the step is the pipeline's
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = sigmas[:-1]
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), schedule.time(levels)
    # By number, as two levels may have one time.
    scheduler.set_begin_index(0)
    return scheduler.timesteps, levels
