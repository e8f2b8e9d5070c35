"""The family autoregressive: a network that says of each pixel how probable its values are, given those before it.

A gated PixelCNN (arXiv 1606.05328) with PixelCNN++'s mixtures of logistics (1701.05517): the likelihood is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.terms import Terms
from diffusion.families.base import Batch, Data, Family, Learner
from diffusion.fingerprint import autocast
from diffusion.grids import above, save_png
from diffusion.logistics import LEVELS, log_probability, mixtures_of
from diffusion.model import Model, ModelHeader, Told, to_float, to_uint8
from diffusion.models.autoregressive import PixelCNN, draw
from diffusion.models.config import AutoregressiveConfig
from diffusion.models.vae import Latents
from diffusion.training.config import TrainingConfig, disagreement
from diffusion.training.drawn import Drawn

MOST_BITS = 8
"""Of a value, on the figure of how surprising pixels are: more are white as well."""


@dataclass(frozen=True)
class AutoregressiveModel(Model):
    """A network that knows how probable every picture is."""

    network: PixelCNN

    @property
    def coder(self) -> None:
        """It works on pixels."""
        return

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C + 1, H, W): of each pixel a number for each value, and one by which the logistic is chosen."""
        channels, height, width = self.shape
        return channels + 1, height, width


def bits_of_pixels(network: nn.Module, x0: Tensor, told: Told, levels: int = LEVELS) -> Tensor:
    """−log₂ p of each pixel of ``x0``, (N, C, H, W) in [−1, 1], given those before it: (N, H, W) float32."""
    found = mixtures_of(network(x0, told.get("label")).movedim(1, -1), x0.shape[1])
    return -log_probability(found, x0.movedim(1, -1), levels) / math.log(2)


@dataclass(frozen=True)
class LikelihoodLearner(Learner):
    """The loss is −log₂ p of a picture over the number of its values: bits per dimension, exactly."""

    def drawn(self, x0: Tensor, indices: range, told: Told) -> Drawn:
        """Nothing."""
        return Drawn(x0, None, None, None, told)

    def probed(self, x0: Tensor, split: str, indices: Sequence[int], told: Told) -> Drawn:
        """Nothing."""
        return Drawn(x0, None, None, None, told)

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """Bits per dimension."""
        return bits_of_pixels(network, drawn.x0, drawn.told).flatten(1).sum(1) / drawn.x0[0].numel()

    def figures(self, network: nn.Module, drawn: Drawn, losses: Tensor) -> dict[str, float]:
        """The same by the name under which other families' bounds stand."""
        return {"held_out_bits_per_dim_ema": losses.mean().item()}


class AutoregressiveFamily:
    """Builds, trains and draws from networks that go pixel by pixel."""

    edits = False

    def network(self, config: AutoregressiveConfig, shape: tuple[int, int, int], classes: int) -> PixelCNN:
        """The PixelCNN, of pictures of any size."""
        return PixelCNN(config, shape[0], classes)

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """All pixels at once."""
        out: Tensor = network(torch.empty(1, *shape)).sum()
        return out

    def learner(self, config: AutoregressiveConfig, training: TrainingConfig, data: Data) -> LikelihoodLearner:
        """Learns the likelihood; UserError if ``training`` says something that means nothing to it."""
        if words := disagreement(config, training):
            raise UserError(words)
        return LikelihoodLearner()

    def model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> AutoregressiveModel:
        """The network."""
        assert isinstance(network, PixelCNN)
        return AutoregressiveModel(header, network)

    def sample(self, model: AutoregressiveModel, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Pixel by pixel, each from its own noise."""
        with torch.inference_mode(), autocast(config.precision, device):
            return to_uint8(draw(model.network, batch.noise(), batch.told.get("label"))).cpu()

    def passes(self, model: AutoregressiveModel, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """One in all: each column of the network is computed once."""
        return [(1, lambda: model.network(torch.zeros(1, *model.shape)))]

    def terms(self, model: AutoregressiveModel, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
        """Bits, exactly."""
        bits = bits_of_pixels(model.network, x0, told).double().flatten(1).sum(1) / x0[0].numel()
        return Terms.without_levels(bits, len(bits))

    def illustrations(self, model: AutoregressiveModel, told: Told | None) -> dict[str, Image.Image]:
        """None."""
        return {}

    def explain(self, model: AutoregressiveModel, picture: Tensor, output: Path, seed: int) -> list[Path]:
        """The picture above how surprising each of its pixels is: white is eight bits a value, black none."""
        path = output / "surprise.png"
        with torch.inference_mode():
            bits = bits_of_pixels(model.network, to_float(picture[None]), {}) / picture.shape[0]
        shown = (bits / MOST_BITS * 255).clamp(0, 255).to(torch.uint8)[:, None].expand(-1, len(picture), -1, -1)
        save_png(path, above(picture[None], shown, scale=8))
        return [path]


FAMILY: Family[AutoregressiveConfig, AutoregressiveModel] = AutoregressiveFamily()
