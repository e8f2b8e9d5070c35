"""The protocol of a family of models, and the values that pass between families and the rest of the code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffusion.families.model import Conditioning, Model, ModelHeader
from diffusion.models.vae import Latents
from diffusion.process.editing import Edit
from diffusion.process.likelihood import Terms
from diffusion.process.objective_config import ObjectiveConfig
from diffusion.process.samplers import Noise, SamplingConfig

Config_contra = TypeVar("Config_contra", contravariant=True)
ModelOf = TypeVar("ModelOf", bound=Model)
BETAS = (0.9, 0.99)
"""AdamW's decay rates. Its default β₂ of 0.999 averages over more steps than a run of minutes has: measured worse."""


@dataclass(frozen=True)
class TrainingData:
    """Properties of the training images on which a family's objective depends."""

    shape: tuple[int, int, int]
    """(C, H, W) of each image."""
    network_shape: tuple[int, int, int]
    """(C, H, W) of the network's input: the image's, or that of the autoencoder's latents."""
    sigma_data: float
    """Standard deviation of the network's input values."""
    autoencoder: Latents | None = None
    """Encodes images into latents; None: the network works on pixels."""
    classes: int = 0
    """Classes that the network is conditioned on; 0: none."""


@dataclass(frozen=True)
class TrainingBatch:
    """N images of one training step with its random numbers: a pure function of seed and sample index."""

    x0: Tensor
    """Images, (N, C, H, W) in [−1, 1]."""
    t: Tensor | None
    """Time steps, (N,); None: the family has none."""
    noise: Tensor | None
    """Standard Gaussian noise, (N, C, H, W); None: the family has none."""
    dropout_seeds: Tensor | None
    """(N,) int64; None: no dropout."""
    conditioning: Conditioning

    def on(self, device: torch.device) -> "TrainingBatch":
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
        t, noise, seeds = (None if each is None else change(each) for each in (self.t, self.noise, self.dropout_seeds))
        conditioning = {name: change(values) for name, values in self.conditioning.items()}
        return TrainingBatch(change(self.x0), t, noise, seeds, conditioning)


@dataclass(frozen=True)
class ConditioningBatch:
    """Inputs of a compute batch of N generated images."""

    conditioning: Conditioning
    noise: Noise
    """Noise of the model's ``noise_shape``, on the model's device."""
    negative: Tensor
    """Embedding of the negative prompt, (384,); zeros: none."""
    edit: Edit | None
    """The image to edit; None: generate from noise alone."""


def unchanged(losses: Tensor, batch: TrainingBatch) -> Tensor:
    """Minimize the losses themselves."""
    return losses


@dataclass(frozen=True)
class OptimizerStep:
    """Step of one optimizer: the modules that it trains and the loss that it minimizes."""

    modules: Mapping[str, nn.Module]
    """Modules by their name in checkpoints; the first name is also that of the optimizer."""
    losses: Callable[[TrainingBatch], Tensor]
    """The logged loss of each image, (N,) float32, under autocast."""
    minimized: Callable[[Tensor, TrainingBatch], Tensor] = unchanged
    """From the logged losses to the minimized ones, (N,) float32."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters; to be read after the modules are on their device."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]


class TrainingObjective(Protocol):
    """Training objective of a family.

    The loss of an image depends on no other image, so the batch can be split over threads and processes.
    """

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's decay rates of the two moments."""
        return BETAS

    def make_batch(self, x0: Tensor, indices: range, conditioning: Conditioning) -> TrainingBatch:
        """Add the random numbers of a training step to images ``x0``, (N, C, H, W) in [−1, 1], by sample index."""

    def make_validation_batch(
        self, x0: Tensor, split: str, indices: Sequence[int], conditioning: Conditioning
    ) -> TrainingBatch | None:
        """Add fixed random numbers, for comparable losses over time; None: the losses are not comparable."""

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the loss of each image, (N,) float32."""

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute further metrics of the averaged weights on held-out images."""

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """List the optimizer steps that make up a training step of ``network``, in their order."""
        return [OptimizerStep({"network": network}, partial(self.losses, network))]


class Family(Protocol[Config_contra, ModelOf]):
    """A kind of model: builds its network, its training objective and the finished model, and generates with it."""

    edits: bool
    """Whether its models can edit images, in the steps of a reverse process."""

    def make_network(self, config: Config_contra, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build a network with random weights for inputs (C, H, W): images, or an autoencoder's latents."""

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """Compute a scalar that depends on all weights, as in a training step with one image."""

    def make_objective(self, config: Config_contra, training: ObjectiveConfig, data: TrainingData) -> TrainingObjective:
        """Build the objective by which ``config`` learns from ``data``."""

    def make_model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> ModelOf:
        """Wrap a trained network for use."""

    def sample(self, model: ModelOf, batch: ConditioningBatch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Generate images, (N, C, H, W) uint8."""

    def passes(self, model: ModelOf, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the network passes that generate an image, as a count and a function for each kind of pass."""

    def terms(self, model: ModelOf, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute likelihood terms of images ``x0``, (N, C, H, W) in [−1, 1], with indices ``indices``.

        ``Kind.likelihood`` says of which kind; families without a likelihood return empty terms.
        """
