"""The family diffusers: imported pipelines, sampled by Darkroom's samplers or by their own scheduler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion.common.device import CPU, device_name, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.shapes import shape_name
from diffusion.families.adapters import AdapterConfig
from diffusion.families.base import BaseFamilyConfig
from diffusion.families.denoising_objective import DenoisingObjective
from diffusion.families.diffusion_model import DiffusionModel, encode_known_part, make_unconditional, paste_kept
from diffusion.families.fine_tuning import TrainableSubset, select_layers
from diffusion.families.header import ModelHeader
from diffusion.families.model import Conditioning, ConditioningBatch, StartConflict, TrainingObjective, to_uint8
from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.network import PickledNetwork, PipelineNetwork, parts_digest, tensor_names
from diffusion.families.pretrained.pipeline import Pipeline
from diffusion.families.pretrained.placement import Resident
from diffusion.families.pretrained.schedule import make_pipeline_schedule
from diffusion.families.quantization import quantizable_layers
from diffusion.families.text_encoder import CaptionEncoder, Encoding
from diffusion.process.config import ObjectiveConfig
from diffusion.process.denoiser import Denoiser, rescale_guidance
from diffusion.process.likelihood import Terms
from diffusion.process.objective import Objective, make_weight
from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import Noise, SamplingConfig, SchedulerSampling


@dataclass(frozen=True)
class PretrainedModel(DiffusionModel):
    """An imported pipeline."""

    network: PipelineNetwork
    # Dropout of diffusers takes random numbers from a state that resuming lacks.
    trains_in_evaluation_mode: ClassVar[bool] = True

    @staticmethod
    def make_network(config: DiffusersConfig, shape: tuple[int, int, int], classes: int) -> PipelineNetwork:
        """Build all components."""
        return PipelineNetwork(config)

    tensor_names = staticmethod(tensor_names)

    def check_size(self) -> None:
        """Raise UserError if the network's fold divides no such images, or it has no positions for so large ones."""
        shape, fold, limit = self.shape[1:], self.pipeline.fold, self.pipeline.max_side
        if any(side % fold or side > limit for side in shape):
            raise UserError(
                f"the pipeline's network takes images whose height and width are multiples of {fold} up to {limit}, "
                f"and {shape_name(shape)} is none: choose another size"
            )

    @staticmethod
    def forward(network: PipelineNetwork, shape: tuple[int, int, int]) -> Tensor:
        """Predict at time 0 for images of ``shape`` and sum."""
        pipeline = network.pipeline
        height, width = (side // pipeline.factor for side in shape[1:])
        return _forward(network, (pipeline.noise_shape[0], height, width)).sum()

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> TrainingObjective:
        """Build the denoising objective of the pipeline's own prediction, for images or latents as the network's."""
        assert isinstance(header.model, DiffusersConfig)
        pipeline = header.model.imported
        if training.timestep_sampling == "scheduler":
            shape = pipeline.noise_shape[0], *(header.size // pipeline.factor,) * 2
            training = training.model_copy(update=pipeline.training_times(shape))
        assert pipeline.prediction is not None
        parametrization = Parametrization(pipeline.prediction, header.sigma_data)
        objective = Objective(make_pipeline_schedule(pipeline), parametrization, make_weight(training, parametrization))
        return DenoisingObjective(training, objective, None)

    @classmethod
    def make_model(cls, header: ModelHeader, network: Any, autoencoder: Any) -> Self:
        """Wrap the components with the schedule of the pipeline's scheduler."""
        assert isinstance(header.model, DiffusersConfig)
        pipeline = header.model.imported
        latents = network if pipeline.autoencoder is not None else None
        return cls(header, network, make_pipeline_schedule(pipeline), latents).with_size(None)

    @staticmethod
    def checkpoint_gradients(network: nn.Module) -> None:
        """Recompute the activations inside the denoiser's layers."""
        assert isinstance(network, PipelineNetwork)
        network.component(network.pipeline.denoiser_name).enable_gradient_checkpointing()

    @property
    def pipeline(self) -> Pipeline:
        """What there is to know of the pipeline."""
        return self.network.pipeline

    def with_files(self, files: Mapping[str, bytes]) -> Self:
        """Return the model with the files of which tokenizers are made."""
        self.network.files = files
        return self

    @property
    def has_frozen_parts(self) -> bool:
        """Whether training never changes some weights: autoencoder and text encoders."""
        return True

    @property
    def latents_digest(self) -> str | None:
        """SHA-256 of the autoencoder; None: the denoiser works on pixels."""
        return None if self.latents is None else parts_digest(self.network, self.pipeline.autoencoder_name)

    def conflict_as_start(self, config: BaseFamilyConfig, classes: Sequence[str]) -> StartConflict | None:
        """Describe why a training of ``config`` on ``classes`` cannot begin with this pipeline."""
        if getattr(config, "pipeline", None) is not None and config != self.config:
            return StartConflict("is another pipeline than the section model describes, which may be left to it")
        if self.pipeline.prediction is None:
            return StartConflict(
                f"predicts what its {self.pipeline.scheduler.kind} alone knows, so it cannot be trained"
            )
        if self.classes and (len(classes) < 2 or not set(classes) <= set(self.classes)):
            names = ", ".join(self.classes[:8]) + (" …" if len(self.classes) > 8 else "")
            given = ", ".join(classes[:8]) or "none"
            return StartConflict(f"knows the classes {names}, and the data set has {given}")
        return None

    def select_classes(self, classes: Sequence[str]) -> Self:
        """Return the pipeline with the numbers of ``classes``, sorted, among its own."""
        if not self.classes:
            return self
        numbers = dict(zip(self.classes, self.config.class_ids, strict=True))
        config = self.config.model_copy(update={"class_ids": tuple(numbers[label] for label in sorted(classes))})
        self.network.set_classes(config)
        return replace(self, header=self.header.model_copy(update={"model": config}))

    def caption_encoder(self, adapter: AdapterConfig | None, device: torch.device) -> CaptionEncoder:
        """Choose tokens where the pipeline's text encoder is trained, else what the denoiser is shown."""
        network = self.network
        if adapter is not None and adapter.text_encoder:
            if not self.pipeline.text_adapter_targets:
                raise UserError(
                    f"training.adapter.text_encoder adapts those of Stable Diffusion and SDXL, and not those of a "
                    f"{self.config.pipeline}: leave it out"
                )
            tokenize = partial(self.pipeline.tokenize, network.select(()))
            return CaptionEncoder(parts_digest(network, "tokenizer"), partial(partial, tokenize), tokenize(None))
        parts = parts_digest(network, "tokenizer", "text_encoder")
        # The denoiser decides how wide encodings are, and libraries their last bits.
        shapes = self.pipeline.encoding_shapes(network)
        key = [parts, self.config.pipeline, shapes, torch.__version__, version("transformers")]
        if device != CPU:
            key.append(device_name(device))
        encoders = network.select(name for name, _ in network.named_children() if name.startswith("text_encoder"))
        load = partial(_load_text_encoders, PickledNetwork(encoders), device != CPU)
        return CaptionEncoder(digest_of(key), load, load()(None), device="cpu" if device == CPU else "auto")

    def for_encoding(self) -> Callable[[torch.device], PipelineNetwork]:
        """Return the function that copies the autoencoder alone to a device."""
        return PickledNetwork(self.network.select([self.pipeline.autoencoder_name])).to

    def adapter_layers(self, layers: set[str], targets: Sequence[str] | None, text_encoder: bool) -> set[str]:
        """Choose layers of the denoiser, and of the text encoders their attention, as far as it has an effect."""
        pipeline = self.pipeline
        denoiser = {name for name in layers if name.startswith(f"{pipeline.denoiser_name}.")}
        names = select_layers(denoiser, targets, pipeline.adapter_targets)
        if text_encoder:
            encoders, idle = (tuple(f"{each}." for each in of) for of in (pipeline.text_encoders, pipeline.idle_layers))
            encoder = {name for name in layers if name.startswith(encoders) and not name.startswith(idle)}
            names |= select_layers(encoder, None, pipeline.text_adapter_targets)
        return names

    def quantized_layers(self) -> set[str]:
        """Name all linear layers of the denoiser."""
        name = self.pipeline.denoiser_name
        return {f"{name}.{layer}" for layer in quantizable_layers(self.network.get_submodule(name))}

    def trained_names(self) -> set[str]:
        """Name the parameters of the denoiser that have an effect, without copies of others."""
        denoiser = f"{self.pipeline.denoiser_name}."
        idle = tuple(f"{layer}." for layer in self.pipeline.idle_layers)
        names = (name for name, _ in self.network.named_parameters())
        return {name for name in names if name.startswith(denoiser) and not name.startswith(idle)}

    def step_network(self, adapter: AdapterConfig | None) -> PipelineNetwork:
        """Leave out the autoencoder, and text encoders that are not trained."""
        used = {self.pipeline.denoiser_name}
        if adapter is not None and adapter.text_encoder:
            used.update(self.pipeline.text_encoders)
        return self.network.select(name for name, _ in self.network.named_children() if name in used)

    @staticmethod
    def place(network: nn.Module, device: torch.device) -> PipelineNetwork:
        """Return the network as it works on ``device``, to which components are copied when they are used."""
        assert isinstance(network, PipelineNetwork)
        return network.on(device)

    def share_frozen(self, network: nn.Module, trained: TrainableSubset) -> None:
        """Have copies of ``network`` share the weights that ``trained`` has on its device."""
        assert isinstance(network, PipelineNetwork)
        network.resident = Resident.of(trained)

    @property
    def device(self) -> torch.device:
        """Where the components work."""
        return self.network.device

    def to(self, device: torch.device) -> Self:
        """Return the pipeline as it works on ``device``; the weights stay in the memory of the CPU, too."""
        if self.device == device:
            return self
        return self.make_model(self.header, self.network.on(device), None).with_size(self.size)

    @property
    def config(self) -> DiffusersConfig:
        """Configuration of the pipeline."""
        assert isinstance(self.header.model, DiffusersConfig)
        return self.header.model

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images, or of their latents."""
        _, height, width = self.shape
        factor = self.pipeline.factor
        return self.pipeline.noise_shape[0], height // factor, width // factor

    def encode_prompt(self, prompt: str | None) -> Encoding:
        """Encode ``prompt`` by the pipeline's text encoders."""
        return self.network.encode_prompt(prompt) if self.config.text else super().encode_prompt(prompt)

    def encode_negative(self, prompt: str | None) -> Encoding:
        """Encode a negative ``prompt`` by the pipeline's text encoders."""
        return self.network.encode_negative(prompt) if self.config.text else super().encode_negative(prompt)

    def prompt_length(self, prompt: str) -> tuple[int, int, int]:
        """Count the tokens of ``prompt``, those of an empty one, and the most that the text encoder reads."""
        length, limit = self.network.prompt_length(prompt)
        return length, self.network.prompt_length("")[0], limit

    def denoiser(self, conditioning: Conditioning | None = None) -> Denoiser:
        """Build the denoiser; UserError if the network's prediction is unknown."""
        if self.pipeline.prediction is None:
            raise UserError(
                f"Darkroom's samplers do not know what a network of the {self.pipeline.scheduler.kind} predicts: use "
                "sampling.sampler=scheduler"
            )
        parametrization = Parametrization(self.pipeline.prediction, self.header.sigma_data)
        network = partial(self.network, **conditioning or {})
        return Denoiser(network, self.schedule, parametrization, clip=self.latents is None)

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Run the reverse process, by the pipeline's own scheduler if ``config`` says so."""
        if self.pipeline.embeds_guidance:
            scale = 1.0 if config.guidance is None else config.guidance
            states = batch.conditioning["states"]
            shown = {"guidance": states.new_full((len(states),), scale)}
            batch, config = replace(batch, conditioning=batch.conditioning | shown), config.without_guidance()
        if not isinstance(config, SchedulerSampling):
            return super().generate(batch, config)
        config.sigma_grid(self.schedule)  # raises for more steps than there are
        x = noise = batch.noise()
        scheduler, edit, content, mask = (
            self.pipeline.make_scheduler(config.steps, self.noise_shape, x.device),
            batch.edit,
            None,
            None,
        )
        timesteps = scheduler.timesteps
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        if edit is not None:
            if edit.guided or edit.resample_steps > 1:
                raise UserError(
                    "a pipeline's own scheduler only replaces what is known: use the method replace, or another "
                    "sampling.sampler"
                )
            content, mask = encode_known_part(self, edit, x.device)
            offset = self.pipeline.first_step(config.steps, edit.strength) * scheduler.order
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
            unconditional, conditional = self.network.predict(torch.cat([x, x]), t, **joint).chunk(2)
            prediction = self.pipeline.guide(conditional, unconditional, scale)
            share = config.guidance_rescale
            return prediction if share is None else rescale_guidance(prediction, conditional, share)

        return predict

    def forward_pass(self) -> Tensor:
        """Evaluate the denoiser once, for one image."""
        return _forward(self.network, self.noise_shape)

    def evaluations(self, config: SamplingConfig) -> int:
        """Count the evaluations of the denoiser for one image."""
        if self.pipeline.embeds_guidance:
            config = config.without_guidance()
        if not isinstance(config, SchedulerSampling):
            return super().evaluations(config)
        scheduler = self.pipeline.make_scheduler(config.steps, self.noise_shape, CPU)
        return len(scheduler.timesteps) * (2 if config.guides else 1)

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute losses by noise level, and bits in pixels; nothing if the network's prediction is unknown."""
        if self.pipeline.prediction is None:
            return Terms.without_levels(None, len(x0))
        return super().terms(x0, conditioning, indices)


def _load_text_encoders(network: PickledNetwork, on_gpu: bool) -> Callable[[str | None], Encoding]:
    # Whoever drops the function releases the text encoders there.
    encoder = network.to(resolve_device("auto") if on_gpu else CPU)
    return lambda prompt: {name: value.to(CPU) for name, value in encoder.encode_prompt(prompt).items()}


def _forward(network: PipelineNetwork, shape: tuple[int, int, int]) -> Tensor:
    """Predict at time 0 from zeros of ``shape``, and of all that the denoiser is conditioned on."""
    shapes = network.pipeline.encoding_shapes(network)
    # Without a mask, as if prompts were as long as they can be.
    inputs = {name: torch.zeros(1, *sizes) for name, sizes in shapes.items() if name != "mask"}
    if network.pipeline.network_classes is not None:
        inputs["label"] = torch.zeros(1, dtype=torch.long)
    out: Tensor = network(torch.zeros(1, *shape), torch.zeros(1), **inputs)
    return out


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
