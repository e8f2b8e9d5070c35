"""What each family of models defines: how its networks are built, trained and sampled."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion.common.device import copy_to_device
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import autocast
from diffusion.common.shapes import shape_name
from diffusion.families.adapters import AdapterConfig
from diffusion.families.base import BaseFamilyConfig, classes_of
from diffusion.families.fine_tuning import (
    TrainableSubset,
    is_adaptable,
    merge_adapters,
    select_layers,
    train_adapters,
    train_parameters,
)
from diffusion.families.header import ModelHeader
from diffusion.families.quantization import round_weights
from diffusion.families.text_encoder import (
    MINI_LM,
    CaptionEncoder,
    Encoding,
    TextEncoder,
    check_encoder,
    prompt_length,
)
from diffusion.families.vae.network import Autoencoder, Latents
from diffusion.process.config import ObjectiveConfig
from diffusion.process.editing import Edit
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import Noise, SamplingConfig

Conditioning = dict[str, Tensor]
"""Conditioning of N images, as keywords of the network's ``forward``: ``label`` and the tensors of encoded texts, or
``low`` and ``level``; empty: unconditional."""


@dataclass(frozen=True)
class ConditioningBatch:
    """Inputs of a compute batch of N generated images."""

    conditioning: Conditioning
    noise: Noise
    """Noise of the model's ``noise_shape``, on the model's device."""
    negative: Encoding
    """The negative prompt, or none: see ``Model.encode_prompt``."""
    edit: Edit | None
    """The image to edit; None: generate from noise alone."""
    report_steps: Callable[[int, int], None] = lambda done, steps: None
    """Called with the number of steps done, and of all, before each step of the sampler, if the model has one."""


@dataclass(frozen=True)
class StartConflict:
    """Reason why a training cannot begin with a model."""

    fact: str
    """What the model is or knows, to continue a sentence about it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the section model with which training can begin with it; empty: there are none."""


class Encoder(Protocol):
    """What encodes images on its device."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode as ``Model.encode``."""


@dataclass(frozen=True)
class Model(ABC):
    """A network of some family, ready for use."""

    header: ModelHeader
    network: nn.Module
    size: tuple[int, int] | None = field(default=None, kw_only=True)
    """(H, W) of the images that it generates; None: the most frequent shape of those that it was trained on."""
    guide: nn.Module | None = field(default=None, kw_only=True)
    """Weaker network of the same configuration, away from which autoguidance leads; None: there is none."""

    trains_in_evaluation_mode: ClassVar[bool] = False
    """Whether a network of which a part is trained stays in its mode for evaluation."""

    @staticmethod
    @abstractmethod
    def make_network(config: Any, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build a network with random weights for square inputs (C, S, S): images, or an autoencoder's latents.

        For images of several shapes S² is their area.
        """

    @staticmethod
    def tensor_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """Find the tensor of ``network`` that each of the ``names`` in a file stands for; here the one of its name."""
        return {name: name for name in names}

    @staticmethod
    @abstractmethod
    def forward(network: Any, shape: tuple[int, int, int]) -> Tensor:
        """Compute a scalar that depends on all weights, as in a training step with one image."""

    @staticmethod
    @abstractmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> "TrainingObjective":
        """Build the training objective of a model with this ``header``."""

    @classmethod
    def make_model(cls, header: ModelHeader, network: Any, autoencoder: Latents | None) -> Self:
        """Wrap a trained network for use."""
        return cls(header, network)

    @classmethod
    def text_encoder(cls, config: Any) -> TextEncoder | None:
        """Name Darkroom's encoder of the captions that a network of ``config`` is conditioned on; None: it has none."""
        return None

    @classmethod
    def own_caption_encoder(cls, config: Any) -> CaptionEncoder:
        """Choose Darkroom's encoder of captions in the form that a network of ``config`` is shown."""
        return MINI_LM

    @classmethod
    def data_mean(cls, config: Any, mean: Sequence[float]) -> tuple[float, ...] | None:
        """Choose ``ModelHeader.data_mean`` for images of this ``mean``."""
        return None

    @staticmethod
    def checkpoint_gradients(network: nn.Module) -> None:
        """Have ``network`` recompute activations in the backward pass."""
        raise NotImplementedError("the family lacks the ability gradient_checkpointing")

    @property
    def config(self) -> BaseFamilyConfig:
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

    def encode_prompt(self, prompt: str | None) -> Encoding:
        """Encode ``prompt``, or None for none, as all that the network is shown of it.

        Raises UserError if the model was trained with another encoder than this version's.
        """
        encoder = replace(self.own_caption_encoder(self.config), moments=self.header.caption_moments)
        if prompt is None:
            return encoder.none
        check_encoder(self.header.encoder)
        return encoder.load_standardized()(prompt)

    def encode_negative(self, prompt: str | None) -> Encoding:
        """Encode a negative ``prompt``, which guidance leads away from, where that differs from other prompts."""
        return self.encode_prompt(prompt)

    def prompt_length(self, prompt: str) -> tuple[int, int, int]:
        """Count the tokens of ``prompt`` and of an empty one, and the most that the model's text encoder reads."""
        return prompt_length(prompt)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as what the network works on: themselves, or their latents."""
        return images

    def for_encoding(self) -> Callable[[torch.device], Encoder]:
        """Return the function, which can be pickled, from a device to what encodes images there as this model does."""
        return self.to

    def with_files(self, files: Mapping[str, bytes]) -> Self:
        """Return the model with the files besides weights that its file holds, by path, if the family uses any."""
        return self

    # A training that begins with this model asks the following.

    @property
    def has_frozen_parts(self) -> bool:
        """Whether training never changes some of its weights, so that models trained from it refer to its file."""
        return False

    @property
    def latents_digest(self) -> str | None:
        """SHA-256 of what decides the latents that training caches, besides images; None: it trains on images."""
        return None

    def conflict_as_start(self, config: BaseFamilyConfig, classes: Sequence[str]) -> StartConflict | None:
        """Describe why a training of ``config`` on ``classes`` cannot begin with this model; None if it can.

        ``classes`` are the data set's, if there are several.
        """
        actual, expected = self.config.model_dump(), config.model_dump()
        if names := [name for name in actual | expected if actual.get(name) != expected.get(name)]:
            # Fields with their defaults may be missing in the dump.
            values = {name: actual.get(name, getattr(self.config, name)) for name in names}
            return StartConflict("is another network than the section model describes", values)
        if self.classes != classes_of(config, dict.fromkeys(classes, 1)):
            known, given = (", ".join(names) or "none" for names in (self.classes, classes))
            return StartConflict(f"knows the classes {known}, and the data set has {given}")
        if self.header.encoder != self.text_encoder(config):
            return StartConflict("was trained with another text encoder")
        return None

    def select_classes(self, classes: Sequence[str]) -> Self:
        """Return the model for a training on ``classes``, which may be some of its own."""
        return self

    def caption_encoder(self, adapter: AdapterConfig | None, device: torch.device) -> CaptionEncoder:
        """Choose the encoder of captions in training on ``device``, whose encodings are on the CPU.

        Raises UserError if ``adapter`` adapts a text encoder that cannot be.
        """
        own = self.own_caption_encoder(self.config)
        return replace(own, moments=self.header.caption_moments, measures_moments=False)

    def adapter_layers(self, layers: set[str], targets: Sequence[str] | None, text_encoder: bool) -> set[str]:
        """Choose the linear and convolutional ``layers`` of the network that an adapter changes.

        Args:
            layers: Their names.
            targets: ``AdapterConfig.target_modules``.
            text_encoder: Whether layers of its text encoder are adapted as well.
        """
        return select_layers(layers, targets, layers)

    def quantized_layers(self) -> set[str]:
        """Name the linear layers that ``AdapterConfig.base_weights`` is about."""
        return set()

    def round_base(self, adapter: AdapterConfig | None) -> None:
        """Give the network the weights that it has as the base of ``adapter``, in place."""
        if adapter is not None and adapter.base_weights is not None:
            round_weights(self.network, self.quantized_layers(), adapter.base_weights)

    def trained_names(self) -> set[str]:
        """Name the parameters that training changes without an adapter."""
        return {name for name, _ in self.network.named_parameters()}

    def step_network(self, adapter: AdapterConfig | None) -> nn.Module:
        """Return the part of the network that a training step runs, which has all that is trained."""
        return self.network

    def make_trainable(self, adapter: AdapterConfig | None) -> TrainableSubset:
        """Freeze a copy of the network except an adapter, or without one what training changes.

        The copy shares its frozen weights. Raises UserError if peft is not installed or a target is not a linear or
        convolutional layer.
        """
        network = self.step_network(adapter)
        if adapter is None:
            return train_parameters(network, self.trained_names())
        layers = {name for name, module in network.named_modules() if is_adaptable(module, adapter)}
        layers = self.adapter_layers(layers, adapter.target_modules, adapter.text_encoder)
        return train_adapters(network, adapter, layers, self.quantized_layers())

    def tuned_weights(self, adapter: AdapterConfig | None, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weights that differ after training, by name, from the ``trained`` tensors.

        Raises ValueError for tensors that do not fit.
        """
        if adapter is not None:
            return merge_adapters(self.network, adapter, trained)
        names = self.trained_names() if self.has_frozen_parts else set()
        if names != set(trained) or any(trained[n].shape != self.network.get_parameter(n).shape for n in names):
            raise ValueError("tensors of another network")
        return dict(trained)

    def make_student_objective(
        self, training: ObjectiveConfig, header: ModelHeader, images: int, device: torch.device
    ) -> "TrainingObjective":
        """Build the objective of a student with this ``header`` that is distilled from this model over ``images``."""
        raise NotImplementedError(f"{type(self).__name__} is not in a family with students")

    @staticmethod
    def place(network: nn.Module, device: torch.device) -> nn.Module:
        """Copy a network of the family to ``device``, unless it is there."""
        return network if next(network.parameters()).device == device else copy.deepcopy(network).to(device)

    def share_frozen(self, network: nn.Module, trained: TrainableSubset) -> None:  # noqa: B027 (an optimization)
        """Have copies of ``network`` that differs from this model's by an adapter share what ``trained`` has frozen."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> Self:
        """Copy the model's modules to ``device``."""
        modules: dict[str, Any] = {
            name: placed
            for name, module in vars(self).items()
            if isinstance(module, nn.Module) and (placed := self.place(module, device)) is not module
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

    def check_sampling(self, config: SamplingConfig) -> None:  # noqa: B027 (most families have no noise levels)
        """Raise UserError if the sampler has no noise level for this model."""

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute likelihood terms of images ``x0``, (N, C, H, W) in [−1, 1], with indices ``indices``.

        ``BaseFamilyConfig.likelihood`` says of which kind; empty terms for a family without a likelihood.
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
    pixel_weights: Tensor | None = None
    """Weights of the pixels of the images in the loss, (N, 1, H, W) float32, 0 or more; None: all are 1."""
    prior: Conditioning | None = None
    """Conditioning for which an adapted network is to predict what its base does; None: for none."""

    def to(self, device: torch.device) -> "TrainingBatch":
        """Copy the batch to ``device``, asynchronously on a GPU."""
        return self.map(lambda values: copy_to_device(values, device))

    def split(self, count: int) -> list["TrainingBatch"]:
        """Split the batch into ``count`` parts of nearly equal size."""
        return [self.map(lambda values, n=n: values.tensor_split(count)[n]) for n in range(count)]  # type: ignore[misc]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        """``change`` each tensor."""
        conditioning, random, prior = (
            {name: change(values) for name, values in tensors.items()}
            for tensors in (self.conditioning, self.random, self.prior or {})
        )
        weights = None if self.pixel_weights is None else change(self.pixel_weights)
        return TrainingBatch(change(self.x0), conditioning, random, weights, prior or None)


@runtime_checkable
class LayeredNetwork(Protocol):
    """A network with hidden layers that Muon can train, and that can be sharded one by one."""

    def matrices(self) -> list[nn.Parameter]:
        """List the weights of hidden layers."""

    def blocks(self) -> list[nn.Module]:
        """List the modules that are sharded one by one."""


@dataclass(frozen=True)
class OptimizerStep:
    """Step of one optimizer: the modules that it trains and the loss that it minimizes."""

    modules: Mapping[str, nn.Module]
    """Modules by their name in checkpoints; the first name also names the optimizer."""
    losses: Callable[[TrainingBatch], Tensor]
    """The logged loss of each image, (N,) float32, under autocast."""
    compute_objective: Callable[[Tensor, TrainingBatch], Tensor] = lambda losses, _: losses
    """Computes the minimized losses, (N,) float32, from the logged ones."""

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Weights of hidden layers, which Muon trains where it is configured; all others are AdamW's."""
        return [
            matrix
            for module in self.modules.values()
            if isinstance(module, LayeredNetwork)
            for matrix in module.matrices()
        ]

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
        """Add random numbers by index to images (N, C, H, W) in [−1, 1]; a ``probe`` has equal ones in all runs."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the loss of each image, (N,) float32."""

    def validation_metrics(
        self, network: nn.Module, parts: Iterable[TrainingBatch], losses: Tensor
    ) -> dict[str, float]:
        """Compute further metrics of the averaged weights on held-out images, in ``parts``, with ``losses`` (N,)."""
        return {}

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """List the optimizer steps that make up a training step of ``network``, in their order."""
        return [OptimizerStep({"network": network}, partial(self.losses, network))]


def use_channels_last(module: nn.Module) -> None:
    """Arrange the weights of 2-D convolutions with channels last, in place; ``Module.to`` fails for 3-D ones."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            # Not by contiguous, which leaves the strides of kernels of one pixel, on which last bits depend.
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


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
