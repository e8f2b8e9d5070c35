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
"""AdamW's. Its own 0.999 remembers more steps than a run of minutes has to give: measured worse."""


@dataclass(frozen=True)
class TrainingData:
    """Facts about the training images that decide how a family learns from them."""

    shape: tuple[int, int, int]
    """(C, H, W) of each image."""
    network_shape: tuple[int, int, int]
    """(C, H, W) of the network's input: the image's, or that of the autoencoder's latents."""
    sigma_data: float
    """Standard deviation of the values that the network sees."""
    autoencoder: Latents | None = None
    """Encodes images into latents; None: the network works on pixels."""
    classes: int = 0
    """Classes that the network is conditioned on; 0: none."""


@dataclass(frozen=True)
class TrainingBatch:
    """N images of one training step with everything random about it: a pure function of seed and sample index."""

    x0: Tensor
    """Images, (N, C, H, W) in [−1, 1]."""
    t: Tensor | None
    """Time steps, (N,); None: the family has none."""
    noise: Tensor | None
    """Standard Gaussian, (N, C, H, W) of whatever the family adds noise to; None: it adds none."""
    dropout_seeds: Tensor | None
    """(N,) int64; None: no dropout."""
    conditioning: Conditioning

    def on(self, device: torch.device) -> "TrainingBatch":
        """Copy the batch to ``device``, asynchronously on a GPU."""
        if device.type == "cpu":
            return self
        # From pinned memory nobody waits for a copy.
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
class Batch:
    """Inputs of a compute batch of N generated images."""

    conditioning: Conditioning
    noise: Noise
    """Noise of the model's ``noise_shape``, on the model's device."""
    negative: Tensor
    """(384,), embedding of the negative prompt; zeros: none."""
    edit: Edit | None
    """The image to edit; None: generate from noise alone."""


def unchanged(losses: Tensor, batch: TrainingBatch) -> Tensor:
    """Minimize the losses themselves."""
    return losses


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer's share of a training step: the modules that it trains and the loss that it minimizes."""

    modules: Mapping[str, nn.Module]
    """By the name under which a checkpoint stores them; the first names the optimizer as well."""
    losses: Callable[[TrainingBatch], Tensor]
    """The logged loss of each image, (N,) float32, under autocast."""
    minimized: Callable[[Tensor, TrainingBatch], Tensor] = unchanged
    """From those losses to what is minimized instead, (N,) float32."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that move; to be asked for when the modules lie where they are trained."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]


class TrainingObjective(Protocol):
    """How a family learns. The loss of an image is a function of network, image and its own random numbers.

    It depends on no other image, so that sums over threads and processes are those over the batch.
    """

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's decay rates of both moments."""
        return BETAS

    def make_batch(self, x0: Tensor, indices: range, conditioning: Conditioning) -> TrainingBatch:
        """Add the random numbers of a training step to images ``x0``, (N, C, H, W) in [−1, 1], by sample index."""

    def make_validation_batch(
        self, x0: Tensor, split: str, indices: Sequence[int], conditioning: Conditioning
    ) -> TrainingBatch | None:
        """Add fixed random numbers, for losses that are compared over time; None: such losses have no meaning."""

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the loss of each image, (N,) float32."""

    def validation_metrics(self, network: nn.Module, batch: TrainingBatch, losses: Tensor) -> dict[str, float]:
        """Compute further metrics of the averaged weights on held-out images, beside their mean loss."""

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """List the optimizer steps that make up a training step of ``network``, in their order."""
        return [OptimizerStep({"network": network}, partial(self.losses, network))]


class Family(Protocol[Config_contra, ModelOf]):
    """A kind of model: builds its network, its training objective and the finished model, and generates with it."""

    edits: bool
    """Whether generation can begin with an image, as it has steps in which to change it."""

    def make_network(self, config: Config_contra, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build a network with random weights for inputs (C, H, W): images, or an autoencoder's latents."""

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """Compute a scalar as one image in a training step does, in whose graph all weights are."""

    def make_objective(self, config: Config_contra, training: ObjectiveConfig, data: TrainingData) -> TrainingObjective:
        """Build the objective by which ``config`` learns from ``data``."""

    def make_model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> ModelOf:
        """Wrap a trained network for use."""

    def sample(self, model: ModelOf, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Generate images, (N, C, H, W) uint8."""

    def passes(self, model: ModelOf, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List the network passes by which an image is generated: how often, and one of each."""

    def terms(self, model: ModelOf, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute likelihood terms of images ``x0``, (N, C, H, W) in [−1, 1], number ``indices``.

        As ``Kind.likelihood`` says; without one a family has no terms.
        """
