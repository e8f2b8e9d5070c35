"""What Darkroom has to know of a pipeline of diffusers to run and train it; loads without torch.

A pipeline is a file beside this module with a class of the name that diffusers has for it, and a line in
``diffusion.families.pretrained.config``. The defaults below are of a U-Net that works on pixels or on the latents of an
autoencoder. Others override what differs: text encoders and what comes of them (``encode_prompt``, ``inputs``), what
the denoiser takes and gives (``predict``), guidance (``guide``), latents (``encode``, ``decode``), and times
(``timesteps``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from diffusion.common.config import MAX_SIDE
from diffusion.common.errors import UserError
from diffusion.families.pretrained.components import FAULTS, SCHEDULERS, Component, build, first_line, text_config
from diffusion.process.config import SchedulerPrediction

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

DEFAULT_STEPS = 50
"""Steps for which times of training are shifted, where the shift depends on them: those of most pipelines."""
TRIAL_STEPS = 8
"""Steps that a scheduler has to take when its pipeline is imported."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers with these ``components``; the class has the name of diffusers' own."""

    components: Mapping[str, Component]
    settings: Mapping[str, bool] = field(default_factory=dict)
    """Settings of ``default_settings`` that model_index.json changes."""

    kinds: ClassVar[Mapping[str, Collection[str]]]
    """The allow-list: the classes of each component but the scheduler, which is one of ``SCHEDULERS``."""
    optional: ClassVar[Collection[str]] = ()
    """Components that it may do without."""
    default_settings: ClassVar[Mapping[str, bool]] = {}
    """What model_index.json says besides its components, and the values where it says nothing."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Classes by the names that they had in older versions of diffusers."""
    denoiser_name: ClassVar[str] = "unet"
    autoencoder_name: ClassVar[str] = "vae"
    """Names of the components that denoise, and that are between images and latents."""
    unsupported: ClassVar[Collection[str]] = (
        "time_cond_proj_dim",
        "class_embed_type",
        "addition_embed_type",
        "encoder_hid_dim_type",
        "quantization_config",
        "auto_map",
    )
    """Fields of components that have to be missing, null or false."""
    widths: ClassVar[Collection[str]] = ()
    """Fields of the denoiser that have to be whole numbers, of which the shapes of encoded prompts are made."""
    classes_field: ClassVar[str] = "num_class_embeds"
    """Field of the denoiser with the number of classes that it has embeddings of."""
    has_null_class: ClassVar[bool] = False
    """Whether the denoiser was trained without a class, too, as guidance needs."""
    one_shape: ClassVar[str | None] = None
    """Why the denoiser takes images of one square shape alone; None: it takes any height and width."""
    scheduler_kind: ClassVar[str | None] = None
    scheduler_settings: ClassVar[Mapping[str, Any]] = {}
    """Class and settings of the scheduler that the pipeline uses whatever its configuration says."""
    adapter_targets: ClassVar[Collection[str]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers of the denoiser that low-rank matrices adapt by default: its attention."""
    text_adapter_targets: ClassVar[Collection[str]] = ()
    """Layers of the text encoders that they can adapt; empty: only the denoiser can be adapted."""
    adds_special_tokens: ClassVar[bool] = True
    """Whether tokenizers add the marks of beginnings and ends, which ``prompt_text`` does not write."""
    padding_side: ClassVar[str | None] = None
    """Where prompts are padded, whatever tokenizers say; None: where they say."""
    loads_adapters: ClassVar[bool] = False
    """Whether diffusers' pipeline has ``load_lora_weights``."""

    def setting(self, name: str) -> bool:
        """Return a setting of ``default_settings``."""
        return self.settings.get(name, self.default_settings[name])

    @property
    def guidance(self) -> float | None:
        """Scale of guidance by which diffusers samples unless another one is given; None: it does not guide."""
        return None

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser is shown the scale of guidance, so that one evaluation is guided (arXiv 2210.03142)."""
        return False

    @property
    def idle_layers(self) -> Collection[str]:
        """Layers of components without effect on what is predicted, which are not trained."""
        return ()

    @property
    def denoiser(self) -> Component:
        """The component that denoises."""
        return self.components[self.denoiser_name]

    @property
    def autoencoder(self) -> Component | None:
        """The component between images and latents; None: the denoiser works on pixels."""
        return self.components.get(self.autoencoder_name)

    @property
    def scheduler(self) -> Component:
        """The component that knows the noise levels."""
        return self.components["scheduler"]

    @property
    def architecture(self) -> str:
        """Name of the architecture in the metadata of adapters: ``modelspec.architecture`` without ``/lora``."""
        return type(self).__name__

    @property
    def kohya_version(self) -> str:
        """Name of the architecture in the metadata of adapters by kohya: ``ss_base_model_version``."""
        return self.architecture

    @property
    def text_encoders(self) -> list[str]:
        """Names of the text encoders."""
        return sorted(name for name in self.components if name.startswith("text_encoder"))

    @property
    def network_classes(self) -> int | None:
        """Number of classes that the denoiser has embeddings of; None: it is not conditioned on classes."""
        return self.denoiser.config.get(self.classes_field)

    @property
    def text(self) -> bool:
        """Whether the denoiser is conditioned on captions."""
        return "text_encoder" in self.components

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise of square images."""
        channels, size = (self.denoiser.config[name] for name in ("in_channels", "sample_size"))
        return channels, size, size

    @property
    def factor(self) -> int:
        """Pixels per position of images or latents along each side."""
        if self.autoencoder is None:
            return 1
        return int(2 ** (len(self.autoencoder.config.get("block_out_channels", (64,))) - 1))

    @property
    def fold(self) -> int:
        """Pixels of which height and width of images are multiples."""
        config = self.denoiser.config
        levels = 2 ** (len(config.get("block_out_channels", ())) - 1) if self.denoiser_name == "unet" else 1
        return self.factor * int(levels * config.get("patch_size", 1))

    @property
    def max_side(self) -> int:
        """Pixels that images have at most along each side, as far as the denoiser has positions."""
        positions = self.denoiser.config.get("pos_embed_max_size")
        return MAX_SIDE if positions is None else int(positions) * self.fold

    @property
    def prediction(self) -> SchedulerPrediction | None:
        """Prediction of the denoiser; None: it is one that only its own scheduler knows."""
        if self.scheduler.kind == "FlowMatchEulerDiscreteScheduler":
            return "flow_prediction"
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        is_known = self.scheduler.kind != "LCMScheduler" and kind in get_args(SchedulerPrediction)
        return kind if is_known else None

    def check_components(self) -> None:
        """Raise ValueError unless all components are there, on the allow-list, and fit each other."""
        name, kinds = type(self).__name__, {**self.kinds, "scheduler": SCHEDULERS}
        for part, component in self.components.items():
            if component.kind not in kinds.get(part, ()):
                raise ValueError(
                    f"{part} is a {component.kind}, and in a {name} "
                    + (f"only {', '.join(kinds[part])} is supported" if part in kinds else "there is none")
                )
        if missing_names := sorted(kinds.keys() - self.components.keys() - {*self.optional}):
            raise ValueError(f"a {name} needs {missing_names[0]}, and there is none")
        if unknown := sorted(self.settings.keys() - self.default_settings.keys()):
            raise ValueError(f"a {name} has no setting {unknown[0]}")
        classes, latents = self.network_classes, self.autoencoder
        widths = latents and latents.config.get("block_out_channels", ())
        if not isinstance(classes, int | None) or not isinstance(widths, list | tuple | None):
            raise ValueError("its classes are no number, or block_out_channels of its autoencoder no list")
        if self.text and classes is not None:
            raise ValueError("its network is conditioned on classes beside captions, which is not supported")
        for field_name in self.unsupported:
            for part, component in self.components.items():
                if component.config.get(field_name) not in (None, False):
                    raise ValueError(f"{part} has {field_name}, which is not supported")
        for field_name in self.widths:
            if not isinstance(value := self.denoiser.config.get(field_name), int) or value < 1:
                raise ValueError(f"{field_name} of its network is not a whole number")
        self.check_channels()

    def check_channels(self) -> None:
        """Raise ValueError unless the denoiser takes and gives what the autoencoder, if any, makes of images."""
        size, channels = (self.denoiser.config.get(name) for name in ("sample_size", "in_channels"))
        if not isinstance(size, int) or not isinstance(channels, int) or size < 1 or channels < 1:
            raise ValueError("sample_size and in_channels of its network are no whole numbers: one square is supported")
        if (out := self.denoiser.config.get("out_channels")) not in (None, channels) and not self._allows_outputs():
            raise ValueError(f"its network has {channels} channels in and {out} out, and only as many are supported")
        latent_channels = channels if self.autoencoder is None else self.autoencoder.config.get("latent_channels")
        if latent_channels not in (None, channels):
            raise ValueError(
                f"its network has {channels} channels and its autoencoder {latent_channels}: "
                "networks that are shown more than the latents are not supported"
            )

    def check_text_width(self, **widths: int) -> None:
        """Raise ValueError unless fields of the denoiser have these ``widths``, those of the text encoders."""
        for name, width in widths.items():
            if (actual := self.denoiser.config.get(name)) != width:
                raise ValueError(f"{name} of its network is {actual}, and its text encoders give {width}")

    def text_width(self, name: str = "text_encoder", field_name: str = "hidden_size") -> int:
        """Return the width of a text encoder's states, or another of its widths; 0 if its configuration has none."""
        config = self.components[name].config
        width = config.get(field_name) or config.get("text_config", {}).get(field_name)
        return width if isinstance(width, int) else 0

    def _allows_outputs(self) -> bool:
        """Whether the denoiser may have other outputs than inputs, which ``predict`` leaves out."""
        return False

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt for the tokenizer ``name``."""
        config = text_config(self.components[name.replace("tokenizer", "text_encoder")])
        return min(int(network.tokenizer(name).model_max_length), int(config.max_position_embeddings))

    @property
    def limiting_tokenizer(self) -> str:
        """Tokenizer that reads most of a prompt."""
        return "tokenizer"

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` as the text encoders are to read it, such as a message to a language model."""
        return prompt

    def tokenize(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Tokenize ``prompt``, or None for none, for text encoders that are trained: ``tokens``, (L,), of each."""
        names = sorted(name for name in self.components if name.startswith("tokenizer"))
        return {name.replace("tokenizer", "tokens"): network.tokens(name, prompt or "")[0][0] for name in names}

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt``, or None for none, as all that the denoiser is shown of it, from all text encoders."""
        raise NotImplementedError(f"{type(self).__name__} is not conditioned on captions")

    def encode_negative(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode a negative ``prompt``, which guidance leads away from, as all that the denoiser is shown of it."""
        return self.encode_prompt(network, prompt)

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of ``encode_prompt``, which are those of all prompts."""
        return {}

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the denoiser's further arguments from ``label``, (N,), or from the tensors of ``encode_prompt``."""
        return {"class_labels": network.class_ids[conditioning["label"]]} if "label" in conditioning else {}

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict from noisy images or latents ``x``, (N, *noise_shape), at the scheduler's ``timestep``, (N,)."""
        inputs = self.inputs(network, x, conditioning)
        output: Tensor = network.component(self.denoiser_name)(x, timestep=timestep, **inputs, return_dict=False)[0]
        return output[:, : x.shape[1]]

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Combine two predictions, (N, *noise_shape), as the pipeline does (arXiv 2207.12598, eq. 6)."""
        return unconditional + scale * (conditional - unconditional)

    def encode(self, network: PipelineNetwork, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as means of scaled latents, (N, *noise_shape)."""
        output = network.component(self.autoencoder_name).encode(images)
        z: Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        scale, shift = self._latent_scale(network)
        return (z - shift) * scale

    def decode(self, network: PipelineNetwork, z: Tensor) -> Tensor:
        """Decode scaled latents (N, *noise_shape) to images (N, C, H, W), nominally in [−1, 1]."""
        scale, shift = self._latent_scale(network)
        images: Tensor = network.component(self.autoencoder_name).decode(z / scale + shift).sample
        return images.float()

    def _latent_scale(self, network: PipelineNetwork) -> tuple[float | Tensor, float | Tensor]:
        """Return scale and shift of latents, numbers or for each channel (C, 1, 1)."""
        config: Any = network.get_submodule(self.autoencoder_name).config
        return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0

    def make_scheduler(self, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Make the scheduler as the pipeline uses it, set to ``steps`` for noise of ``shape`` (C, H, W)."""
        component = self.scheduler
        if self.scheduler_kind is not None:
            component = component.model_copy(update={"kind": self.scheduler_kind})
        scheduler = build(component)
        settings = {name: value for name, value in self.scheduler_settings.items() if name in scheduler.config}
        scheduler.register_to_config(**settings)
        try:
            scheduler.set_timesteps(**self.timesteps(scheduler, steps, shape), device=device)
            if not scheduler.timesteps.isfinite().all():  # one step alone cannot end at shift_terminal
                raise ValueError("its times are not finite")
        except FAULTS as error:
            raise UserError(
                f"the {component.kind} has no {steps} noise levels by its configuration ({first_line(error)}): "
                "import a pipeline with another scheduler, or choose another sampling.steps"
            ) from error
        return scheduler

    def check_scheduler(self) -> None:
        """Raise UserError unless the scheduler goes from noise to images by finite numbers, small images and large."""
        import torch

        channels, height, width = self.noise_shape
        least = self.fold // self.factor
        try:
            steps = min(TRIAL_STEPS, self.scheduler.config.get("num_train_timesteps", TRIAL_STEPS))
            for shape in ((channels, least, least), (channels, height, width)):
                scheduler, x = self.make_scheduler(steps, shape, torch.device("cpu")), torch.ones(1, channels, 1, 1)
                # The states of random numbers stay as they are.
                with torch.random.fork_rng(devices=[]):
                    for time in scheduler.timesteps:
                        model_input = (
                            scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
                        )
                        x = scheduler.step(model_input / 2, time, x, return_dict=False)[0]
                numbers = [*self.training_times(shape).values(), x.sum()]
                if not all(math.isfinite(number) for number in numbers if not isinstance(number, str)):
                    raise ValueError("numbers are not finite")
        except FAULTS as error:
            raise UserError(
                f"its {self.scheduler.kind} cannot generate by its configuration ({first_line(error)}): import a "
                "pipeline with another scheduler"
            ) from error

    def timesteps(self, scheduler: Any, steps: int, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Choose the arguments of ``set_timesteps`` for ``steps`` and noise of ``shape`` (C, H, W)."""
        is_shifted = scheduler.config.get("use_dynamic_shifting")
        return {"num_inference_steps": steps} | ({"mu": self.time_shift(steps, shape)} if is_shifted else {})

    def first_step(self, steps: int, strength: float) -> int:
        """Choose which of ``steps`` an edit of ``strength``, above 0 to 1, begins with, as diffusers does."""
        if self.prediction == "flow_prediction":
            return min(int(steps - steps * strength), steps - 1)
        return steps - max(1, int(steps * strength))

    def time_shift(self, steps: int, shape: tuple[int, int, int]) -> float:
        """Compute μ, by which a scheduler shifts the logits of its times: linear in the number of tokens of ``shape``.

        As in arXiv 2403.03206, section 5.3.2, and ``calculate_shift`` of diffusers.
        """
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        least, most, low, high = (self.scheduler.config.get(name, value) for name, value in defaults.items())
        return float(low + (self.count_tokens(shape) - least) / (most - least) * (high - low))

    def count_tokens(self, shape: tuple[int, int, int]) -> int:
        """Count the tokens of a transformer for noise of ``shape``, (C, H, W)."""
        _, height, width = shape
        patch = int(self.denoiser.config.get("patch_size", 1))
        return (height // patch) * (width // patch)

    def training_times(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Choose the distribution of times in training that the scheduler implies, as fields of the objective.

        Flow matching has normal logits of t, shifted as the scheduler shifts its times for noise of ``shape`` (arXiv
        2403.03206, sections 3.1 and 5.3.2), and logit t is ln σ; all others have uniform times.
        """
        if self.prediction != "flow_prediction":
            return {"timestep_sampling": "uniform"}
        if self.scheduler.config.get("use_dynamic_shifting"):
            mean = self.time_shift(DEFAULT_STEPS, shape)
            if self.scheduler.config.get("time_shift_type") == "linear":
                mean = math.log(mean)
        else:
            config = self.scheduler.config
            mean = math.log(config.get("flow_shift") or config.get("shift") or 1.0)
        return {"timestep_sampling": "lognormal", "log_sigma_mean": mean, "log_sigma_std": 1.0}
