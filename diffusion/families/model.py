"""Trained models, stored in one safetensors file, and what each family of models defines."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from diffusion.common.config import LARGEST_SIZE, Config, PlainName, is_unset
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import autocast
from diffusion.common.shapes import Size, shape_name
from diffusion.models.config import (
    DiffusersConfig,
    FamilyConfig,
    LatentSpace,
    LoRAConfig,
    ObjectiveConfig,
    classes_of,
)
from diffusion.models.text_encoder import WIDTH, TextEncoder, check_encoder, encoder, prompt_length
from diffusion.models.vae import Autoencoder, Latents
from diffusion.process.editing import Edit
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import COMPUTING, Noise, SamplingConfig, sampling_config

Conditioning = dict[str, Tensor]
"""Conditioning of N images, as keywords of ``UNet.forward``: ``label`` and ``text``, or ``low`` and ``level``; empty:
unconditional."""


GUIDANCE_OPTIONS = {"guidance", "guidance_interval", "autoguidance"}
"""Sampling options that evaluation chooses for a model, and that its header keeps."""


class Base(Config):
    """Model whose frozen weights a fine-tuned model needs besides its own file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its file, which lies beside the fine-tuned model's, or one folder above, as SHA256.safetensors."""
    version: str | None = Field(None, exclude_if=is_unset)
    """Registered version, models:/NAME/NUMBER; None: it was a file."""


def _path_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no path of a file inside a folder")
    return name


class Origin(Config):
    """Where an imported pipeline comes from."""

    source: str
    """hf://OWNER/NAME, or the name of a folder."""
    revision: str | None = None
    """The commit of the source; null: it has none."""
    licence: str | None = None
    """Identifier of its licence, such as openrail."""
    files: dict[Annotated[str, AfterValidator(_path_inside)], str] = Field(default_factory=dict)
    """SHA-256 of each of its files by path."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that it was imported with."""


class ModelHeader(Config):
    """Metadata stored with the weights."""

    format_version: Literal[5] = 5
    model: FamilyConfig
    """Configuration of the network, with the digest of the autoencoder's weights in place of its path."""
    channels: Literal[1, 3]
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the images, in pixels; of images of several shapes those of the square of equal area."""
    shapes: dict[Size, int] | None = Field(None, min_length=1, max_length=256, exclude_if=is_unset)
    """Shapes of the images, each with its number of training images; None: all are square."""
    dataset: PlainName
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = Field(1.0, gt=0, le=1e6)
    """Standard deviation of the network's data: images in [−1, 1], residuals of super-resolution, or latents."""
    data_mean: tuple[float, ...] | None = Field(None, exclude_if=is_unset)
    """Mean of each channel of the images, in [−1, 1], around which the reverse process starts, and prediction = edm
    works; None: 0."""
    class_histogram: dict[str, int]
    """Number of images of each class of the data set, sorted by class."""
    encoder: TextEncoder | None = None
    """Text encoder of the captions; None: the network has no captions."""
    latents: LatentSpace | None = Field(None, exclude_if=is_unset)
    """Latent space of the network; None: it works on pixels."""
    base: Base | None = Field(None, exclude_if=is_unset)
    """The fine-tuned model, whose weights this file lacks; None: it has all weights."""
    lora: LoRAConfig | None = Field(None, exclude_if=is_unset)
    """Low-rank adaptation of ``base``; None: none."""
    images: int = Field(ge=0, lt=2**63)
    """Images seen in training."""
    training: dict[str, Any]
    """The resolved training configuration."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of guidance that evaluation chose, for sampling.guidance = null. None: none."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=is_unset)
    """Noise levels σ at which it guides. None: all."""
    autoguidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance that evaluation chose, for sampling.autoguidance = null. None: none."""
    guide_images: int | None = Field(None, ge=0, lt=2**63, exclude_if=is_unset)
    """Images that the weights of the guide have seen, away from which autoguidance leads. None: there is no guide."""
    origin: Origin | None = Field(None, exclude_if=is_unset)
    """Origin of an imported pipeline; None: the model was trained here."""

    @property
    def square(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or of the square of equal area."""
        return self.channels, self.size, self.size

    @property
    def pixels(self) -> str:
        """Width × height of the training images for display, the most frequent first."""
        return " or ".join(f"{width}×{height}" for height, width in self.trained_shapes)

    @property
    def trained_shapes(self) -> dict[tuple[int, int], int]:
        """Shapes (H, W) of the training images with their numbers, the most frequent first; of squares 1."""
        shapes = self.shapes or {(self.size, self.size): 1}
        return dict(sorted(shapes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def student_steps(self) -> int | None:
        """Network evaluations for which a student was distilled; None for other models."""
        return (self.training.get("student") or {}).get("steps")

    def sampling(self, config: SamplingConfig, conditional: bool = True) -> SamplingConfig:
        """Complete ``config`` with the guidance chosen for this model; a student has its own sampler and steps.

        Images that are not ``conditional`` on a class or prompt are not guided towards one. An imported pipeline whose
        prediction is unknown has its own scheduler.

        Raises UserError if the sampler is one for students, and this is none.
        """
        is_consistency = config.sampler == "consistency"
        if self.student_steps is not None and not is_consistency:
            options = config.model_dump(include={"sigma_max", "low_resolution_noise", *COMPUTING})
            return sampling_config(**options, sampler="consistency", steps=self.student_steps)
        if self.student_steps is None and is_consistency:
            raise UserError("sampling.sampler = consistency is for students (darkroom distill): use another one")
        if isinstance(self.model, DiffusersConfig) and self.model.prediction is None:
            config = config.with_sampler("scheduler")
        is_set = config.guidance is not None or config.autoguidance is not None
        if is_set or is_consistency or not (conditional or self.autoguidance is not None):
            return config
        return config.with_changes({name: getattr(self, name) for name in GUIDANCE_OPTIONS})


@dataclass(frozen=True)
class ConditioningBatch:
    """Inputs of a compute batch of N generated images."""

    conditioning: Conditioning
    noise: Noise
    """Noise of the model's ``noise_shape``, on the model's device."""
    negative: Tensor
    """Embedding of the negative prompt, (E,), or of none: see ``Model.embed``."""
    edit: Edit | None
    """The image to edit; None: generate from noise alone."""
    report_steps: Callable[[int, int], None] = lambda done, steps: None
    """Called with the number of steps done, and of all, before each step of the sampler, if the model has one."""


@dataclass(frozen=True)
class Model(ABC):
    """A network of some family, ready for use."""

    header: ModelHeader
    network: nn.Module
    size: tuple[int, int] | None = field(default=None, kw_only=True)
    """(H, W) of the images that it generates; None: the most frequent shape of those that it was trained on."""
    guide: nn.Module | None = field(default=None, kw_only=True)
    """Weaker network of the same configuration, away from which autoguidance leads; None: there is none."""

    @staticmethod
    @abstractmethod
    def make_network(config: Any, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build a network with random weights for square inputs (C, S, S): images, or an autoencoder's latents.

        For images of several shapes S² is their area.
        """

    @staticmethod
    def tensor_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """Find the tensor of ``network`` that each of the ``names`` in a file stands for; here that of its name."""
        return {name: name for name in names}

    @staticmethod
    @abstractmethod
    def forward(network: Any, shape: tuple[int, int, int]) -> Tensor:
        """Compute a scalar that depends on all weights, as in a training step with one image."""

    @staticmethod
    @abstractmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig, latents: Latents | None) -> "TrainingObjective":
        """Build the training objective of a model with this ``header``."""

    @classmethod
    def make_model(cls, header: ModelHeader, network: Any, autoencoder: Latents | None) -> Self:
        """Wrap a trained network for use."""
        return cls(header, network)

    @property
    def config(self) -> FamilyConfig:
        """Configuration of the network."""
        return self.header.model

    @property
    def autoencoder(self) -> Autoencoder | Latents | None:
        """Autoencoder between images and latents; None: the model works on pixels."""
        return None

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that an image is generated from."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.header.channels, *(self.size or next(iter(self.header.trained_shapes)))

    def with_size(self, size: tuple[int, int] | None) -> Self:
        """Return the model for images of ``size``, (H, W) pixels; None: of those that it generates by default.

        Raises UserError if its network takes no images of that size.
        """
        if size not in (None, self.shape[1:]) and (reason := self.config.one_shape) is not None:
            raise UserError(
                f"a model of the family {self.config.family} generates images of {shape_name(self.shape[1:])} pixels "
                f"alone, since {reason}: leave the size out"
            )
        return replace(self, size=size)

    @property
    def classes(self) -> list[str]:
        """Classes that it is conditioned on; empty: none."""
        return classes_of(self.config, self.header.class_histogram)

    def embed(self, prompt: str | None) -> Tensor:
        """Embed ``prompt`` as a vector (E,) float32, or None for none: (384,), zeros for none.

        Raises UserError if the model was trained with another encoder than this version's.
        """
        if prompt is None:
            return torch.zeros(WIDTH)
        check_encoder(self.header.encoder)
        return encoder()(prompt)

    def prompt_length(self, prompt: str) -> tuple[int, int, int]:
        """Count the tokens of ``prompt``, those of an empty one, and the most that the model's text encoder reads."""
        return prompt_length(prompt)

    def to(self, device: torch.device) -> Self:
        """Copy the model's modules to ``device``."""
        modules: dict[str, Any] = {
            name: copy.deepcopy(module).to(device)
            for name, module in vars(self).items()
            if isinstance(module, nn.Module) and next(module.parameters()).device != device
        }
        return replace(self, **modules) if modules else self

    def sample(self, batch: ConditioningBatch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Generate images, (N, C, H, W) uint8."""
        with torch.inference_mode(), autocast(config.precision, device):
            return self.generate(batch, config).cpu()

    @abstractmethod
    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Generate images, (N, C, H, W) uint8, on the model's device under inference mode and autocast."""

    @abstractmethod
    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the network passes that generate an image, as a count and a function for each kind of pass."""

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute likelihood terms of images ``x0``, (N, C, H, W) in [−1, 1], with indices ``indices``.

        ``Kind.likelihood`` says of which kind; empty terms for a family without a likelihood.
        """
        return Terms.without_levels(None, len(x0))


@dataclass(frozen=True)
class TrainingBatch:
    """N images of one training step with its random numbers: a pure function of seed and sample index."""

    x0: Tensor
    """Images, (N, C, H, W) in [−1, 1]."""
    conditioning: Conditioning
    random: dict[str, Tensor] = field(default_factory=dict)
    """Random numbers of the family: ``noise``, Gaussian, (N, C, H, W); ``t``, time steps, (N,); ``dropout_seeds``, (N,)
    int64."""

    def to(self, device: torch.device) -> "TrainingBatch":
        """Copy the batch to ``device``, asynchronously on a GPU."""
        if device.type == "cpu":
            return self
        # Copies from pinned memory are asynchronous.
        return self._map(lambda values: values.pin_memory().to(device, non_blocking=True))

    def split(self, count: int) -> list["TrainingBatch"]:
        """Split the batch into ``count`` parts of nearly equal size."""

        def part(number: int) -> "TrainingBatch":
            return self._map(lambda values: values.tensor_split(count)[number])

        return [part(number) for number in range(count)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        conditioning, random = (
            {name: change(values) for name, values in tensors.items()} for tensors in (self.conditioning, self.random)
        )
        return TrainingBatch(change(self.x0), conditioning, random)


@dataclass(frozen=True)
class OptimizerStep:
    """Step of one optimizer: the modules that it trains and the loss that it minimizes."""

    modules: Mapping[str, nn.Module]
    """Modules by their name in checkpoints; the first name is also that of the optimizer."""
    losses: Callable[[TrainingBatch], Tensor]
    """The logged loss of each image, (N,) float32, under autocast."""
    compute_objective: Callable[[Tensor, TrainingBatch], Tensor] = lambda losses, _: losses
    """Computes the minimized losses, (N,) float32, from the logged ones."""
    matrices: Sequence[nn.Parameter] = ()
    """Weights of hidden layers, which Muon trains where it is configured; all others are AdamW's."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters; to be read after the modules are on their device."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]


class TrainingObjective(ABC):
    """Training objective of a family; the loss of an image depends on no other image, so a batch can be split."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    """AdamW's decay rates. Its default β₂ of 0.999 averages over more steps than runs of minutes have: it was worse."""
    comparable: ClassVar[bool] = True
    """Whether losses compare between checkpoints."""

    @abstractmethod
    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Add random numbers by index to images (N, C, H, W) in [−1, 1]; those of a ``probe`` are equal in all runs."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the loss of each image, (N,) float32."""

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute further metrics of the averaged weights on held-out images."""
        return {}

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """List the optimizer steps that make up a training step of ``network``, in their order."""
        return [OptimizerStep({"network": network}, partial(self.losses, network))]


def to_float(images: Tensor) -> Tensor:
    """Convert stored images, uint8, to float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert images, nominally in [−1, 1], to uint8 with clipping; raises UserError for values that are not finite."""
    if not images.isfinite().all():
        raise UserError(
            "the model generates values that are not finite (NaN or infinity): set sampling.precision to fp32, lower "
            "the guidance, or use a checkpoint from before its training diverged"
        )
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
