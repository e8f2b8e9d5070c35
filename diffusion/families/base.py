"""What a family of models has to say of itself; all else, from loader to registry, is the same for every family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.config_sampling import SamplingConfig
from diffusion.editing import Edit
from diffusion.evaluation.terms import Terms
from diffusion.model import Model, ModelHeader, Told
from diffusion.models.vae import Latents
from diffusion.samplers import Noise
from diffusion.training.config import TrainingConfig
from diffusion.training.drawn import Drawn

Config_contra = TypeVar("Config_contra", contravariant=True)
ModelOf = TypeVar("ModelOf", bound=Model)
BETAS = (0.9, 0.99)
"""Of AdamW. Its own 0.999 remembers more steps than a run of minutes has to give: measured worse."""


@dataclass(frozen=True)
class Data:
    """What a family is told of the pictures that it learns from."""

    shape: tuple[int, int, int]
    """(C, H, W) of each."""
    inner: tuple[int, int, int]
    """(C, H, W) of what the network works on: the same, or the latents of the autoencoder."""
    sigma_data: float
    """Standard deviation of the values of that."""
    autoencoder: Latents | None = None
    """Into whose latents they are brought first; None: into none."""
    classes: int = 0
    """How many the network is told of; 0: none."""


@dataclass(frozen=True)
class Batch:
    """What a compute batch of N pictures is drawn from."""

    told: Told
    """What they are to show."""
    noise: Noise
    """Noise of the model's ``noise_shape``, on the model's device."""
    negative: Tensor
    """(384,), the caption that guidance leads away from; zeros: none."""
    edit: Edit | None
    """What they are versions of; None: nothing."""


@dataclass(frozen=True)
class Contest:
    """What is trained beside a network and against it; in each step it moves before the network does.

    It is no part of the model.
    """

    opponent: nn.Module
    losses: Callable[[nn.Module, Drawn], Tensor]
    """What the opponent learns by, of each picture, (N,) float32, while the network stands still."""


class Learner(Protocol):
    """How a family learns. Losses are pure functions of network, pictures and draws, draws of seed and index.

    That of a picture depends on no other picture, so that sums over lanes and processes are those over the batch.
    """

    @property
    def contest(self) -> Contest | None:
        """What the network learns against; None: nothing but the pictures."""
        return None

    @property
    def betas(self) -> tuple[float, float]:
        """How much AdamW's two moments remember."""
        return BETAS

    def drawn(self, x0: Tensor, indices: range, told: Told) -> Drawn:
        """What a step draws for the pictures ``x0``, (N, C, H, W) in [−1, 1], of these global sample ``indices``."""

    def probed(self, x0: Tensor, split: str, indices: Sequence[int], told: Told) -> Drawn | None:
        """The same for pictures of ``split`` on which losses are compared over time: the draws never change.

        None: losses say nothing from one time to another.
        """

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """Of each picture, (N,) float32."""

    def figures(self, network: nn.Module, drawn: Drawn, losses: Tensor) -> dict[str, float]:
        """What is worth knowing of how averaged weights did on held-out pictures, besides their mean loss."""


class Family(Protocol[Config_contra, ModelOf]):
    """A kind of model."""

    edits: bool
    """Whether it can begin with a picture instead of with nothing, as it has steps in which to change it."""

    def network(self, config: Config_contra, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A network with random weights for what is (C, H, W): pictures, or the latents of an autoencoder."""

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """Some sum over the answers to one picture in a step of training, of which all weights have a gradient."""

    def learner(self, config: Config_contra, training: TrainingConfig, data: Data) -> Learner:
        """How ``config`` learns from ``data``; raises UserError if ``training`` does not fit it."""

    def model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> ModelOf:
        """A trained network ready for use."""

    def sample(self, model: ModelOf, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """Pictures from noise, (N, C, H, W) uint8."""

    def passes(self, model: ModelOf, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """What a picture is drawn by: how often, and what each time."""

    def terms(self, model: ModelOf, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
        """How well it foresees pictures ``x0``, (N, C, H, W) in [−1, 1], number ``indices``, of which it is ``told``.

        As ``Kind.likelihood`` says; without one a family has no terms.
        """

    def illustrations(self, model: ModelOf, told: Told | None) -> dict[str, Image.Image]:
        """What shows at the end of training how the model draws, by name; ``told``: what it is shown, if it is."""

    def explain(self, model: ModelOf, picture: Tensor, output: Path, seed: int) -> list[Path]:
        """Figures for people, drawn into folder ``output``; ``picture``: a real one, (C, H, W) uint8."""
