"""The family autoregressive: a gated PixelCNN (arXiv 1606.05328), each pixel given those before it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.families.autoregressive.config import AutoregressiveConfig
from diffusion.families.autoregressive.network import LEVELS, PixelCNN, log_probability, mixtures_of, sample_images
from diffusion.families.header import ModelHeader
from diffusion.families.model import Conditioning, ConditioningBatch, Model, TrainingBatch, TrainingObjective, to_uint8
from diffusion.process.config import ObjectiveConfig
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import SamplingConfig


@dataclass(frozen=True)
class AutoregressiveModel(Model):
    """Autoregressive model with an exact likelihood."""

    network: PixelCNN

    @staticmethod
    def make_network(config: AutoregressiveConfig, shape: tuple[int, int, int], classes: int) -> PixelCNN:
        """Build the PixelCNN, which takes images of any size."""
        return PixelCNN(config, shape[0], classes)

    @staticmethod
    def forward(network: PixelCNN, shape: tuple[int, int, int]) -> Tensor:
        """Predict all pixels at once and sum."""
        out: Tensor = network(torch.empty(1, *shape)).sum()
        return out

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> TrainingObjective:
        """Build the likelihood objective."""
        return ExactLikelihoodObjective()

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C + 1, H, W): a number for each value of a pixel, and one that selects the mixture component."""
        channels, height, width = self.shape
        return channels + 1, height, width

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Sample pixel by pixel, each from its own noise."""
        return to_uint8(sample_images(self.network, batch.noise(), batch.conditioning.get("label")))

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List one pass: the cached evaluation computes each column of the network once."""
        return [(1, lambda: self.network(torch.zeros(1, *self.shape)))]

    def terms(self, x0: Tensor, conditioning: Conditioning, indices: Sequence[int]) -> Terms:
        """Compute exact bits per dimension."""
        bits = bits_of_pixels(self.network, x0, conditioning).double().flatten(1).sum(1) / x0[0].numel()
        return Terms.without_levels(bits, len(bits))


def bits_of_pixels(network: nn.Module, x0: Tensor, conditioning: Conditioning, levels: int = LEVELS) -> Tensor:
    """Compute −log₂ p of each pixel of ``x0``, (N, C, H, W) in [−1, 1], given those before it: (N, H, W) float32."""
    mixtures = mixtures_of(network(x0, conditioning.get("label")).movedim(1, -1), x0.shape[1])
    return -log_probability(mixtures, x0.movedim(1, -1), levels) / math.log(2)


@dataclass(frozen=True)
class ExactLikelihoodObjective(TrainingObjective):
    """Maximum likelihood: the loss is −log₂ p of an image per value, exact bits per dimension."""

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Make a batch without random numbers, of which the loss has none."""
        return TrainingBatch(x0, conditioning)

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute bits per dimension."""
        return bits_of_pixels(network, batch.x0, batch.conditioning).flatten(1).sum(1) / batch.x0[0].numel()

    def validation_metrics(
        self, network: nn.Module, parts: Iterable[TrainingBatch], losses: Tensor
    ) -> dict[str, float]:
        """Report the loss under the name of other families' bounds."""
        return {"held_out_bits_per_dim_ema": losses.mean().item()}
