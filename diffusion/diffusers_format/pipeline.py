"""Pipeline of diffusers that generates as ``diffusion.generation.generate`` does, stepped by one of its schedulers."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.random import GaussianNoise
from diffusion.diffusers_format.network import DarkroomUNet
from diffusion.diffusers_format.schedulers import IN_SIGMA, SUPPORTED, visited
from diffusion.families.ddpm import DiffusionModel, denoiser_of
from diffusion.generation.config import Conditions
from diffusion.generation.generate import check_prompts, check_sampling, make_conditioning, prompt_embeddings
from diffusion.process.samplers import DDIMSampling

Options = Callable[[], dict[str, Any]]


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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images 0 to ``batch_size`` − 1 of ``seed``: those of ``darkroom sample``, to 1e-3 in [−1, 1].

        ``labels`` and ``prompts`` are what they show, one for all, or the i-th image the i-th, from the front again
        after the last; without either, classes come as often as the data set has them. What is None is as the folder
        says. ``eta`` is DDIM's alone. With a ``generator`` all noise comes from it, as in stock pipelines, and the seed
        only says which classes. ``output_type`` is pil, np (N, H, W, C) or pt (N, C, H, W), both in [0, 1].

        Raises UserError for conditions without training, options without effect, and a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: ask for one image or more")
        model, indices = self.unet.model, range(batch_size)
        given = {
            "steps": num_inference_steps,
            "guidance": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
        }
        known = {name: value for name, value in given.items() if value is not None}
        config = self.unet.sampling.changed(known)
        conditions = Conditions(labels=_each(labels), prompts=_each(prompts), negative_prompt=negative_prompt)
        check_prompts(conditions)
        check_sampling(model, config, conditions)
        _check_scheduler(self.scheduler, model)
        learned = isinstance(self.scheduler, DDPMScheduler) and "learned" in str(self.scheduler.config.variance_type)
        if learned and (not model.config.learned_variance or config.guides):
            raise UserError(
                "a variance is learned by one network without guidance: use "
                "DDPMScheduler.from_config(pipe.scheduler.config, variance_type='fixed_small')"
            )
        device = self._execution_device
        embeddings = prompt_embeddings(model, conditions)
        conditioning = make_conditioning(model, indices, seed, conditions, embeddings)
        conditioning = {name: each.to(device) for name, each in conditioning.items()}
        denoise = denoiser_of(model, conditioning, config, embeddings[conditions.negative_prompt].to(device))
        start, options = self._noise(model, batch_size, seed, generator, eta)
        timesteps, sigmas = visited(self.scheduler, model.schedule, config)
        in_sigma = isinstance(self.scheduler, IN_SIGMA)
        x0 = state = float(sigmas[0] if in_sigma else sigmas[0] / (1 + sigmas[0] ** 2).sqrt()) * start
        for t, sigma in self.progress_bar(list(zip(timesteps, sigmas, strict=True))):
            self.scheduler.scale_model_input(state, t)  # some insist on it; σ says the same
            x = state if in_sigma else float((1 + sigma**2).sqrt()) * state
            if learned:
                x0, v = model.denoiser(conditioning).answer(x, sigma)
                output = torch.cat([x0, v], dim=1)
            else:
                output = x0 = denoise(x, sigma)
            state = self.scheduler.step(output, t, state, **options()).prev_sample
        # The last step of our samplers goes to the last estimate; schedulers end there too, or not quite.
        samples = (x0 / 2 + 0.5).clamp(0, 1)
        images: Any = samples if output_type == "pt" else samples.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self,
        model: DiffusionModel,
        count: int,
        seed: int,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float | None,
    ) -> tuple[Tensor, Options]:
        """The noise to start from, and what the scheduler is given at each step: fresh noise, if it takes any."""
        device, accepted = self._execution_device, signature(self.scheduler.step).parameters
        if eta is not None and "eta" not in accepted:
            raise UserError(
                f"eta means nothing to {type(self.scheduler).__name__}: use a DDIMScheduler, or leave it out"
            )
        own: dict[str, Any] = {}
        if "eta" in accepted:
            configured = self.unet.sampling.eta if isinstance(self.unet.sampling, DDIMSampling) else 0.0
            own["eta"] = configured if eta is None else eta
        if generator is not None:
            start = randn_tensor((count, *model.shape), generator=generator, device=device, dtype=torch.float32)
            return start, lambda: own | ({"generator": generator} if "generator" in accepted else {})
        draws = GaussianNoise(seed, "sampling", range(count), model.shape)
        sde = isinstance(self.scheduler, DPMSolverMultistepScheduler) and "sde" in self.scheduler.config.algorithm_type
        if not (sde or own.get("eta", 0.0) > 0 or isinstance(self.scheduler, DDPMScheduler)):
            return draws().to(device), lambda: own
        if "variance_noise" not in accepted:
            raise UserError(
                f"{type(self.scheduler).__name__} takes no fresh noise but from a generator: give one, or use a "
                "scheduler that does, such as DDIMScheduler with eta=1 for DDPMScheduler"
            )
        return draws().to(device), lambda: own | {"variance_noise": draws().to(device)}


def _check_scheduler(scheduler: SchedulerMixin, model: DiffusionModel) -> None:
    """Raise UserError for a ``scheduler`` that takes steps which are none of ours, or on another noise schedule."""
    if not isinstance(scheduler, SUPPORTED):
        names = ", ".join(each.__name__ for each in SUPPORTED)
        raise UserError(f"{type(scheduler).__name__} takes none of our steps: use one of {names}")
    theirs, ours = scheduler.alphas_cumprod.cpu().double(), model.schedule.alphas_cumprod
    same = theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-4)
    if scheduler.config.prediction_type != "sample" or not same:
        name = type(scheduler).__name__
        raise UserError(
            f"the {name} is of another prediction or noise schedule than the model: make it by {name}.from_config(c), "
            "where c is the configuration of the scheduler in the model's own folder"
        )


def _each(words: str | Sequence[str | None]) -> tuple[str | None, ...]:
    return (words,) if isinstance(words, str) else tuple(words)
