"""The family gan: two networks pitted against each other, by R3GAN's loss and nothing else (arXiv 2501.05441)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from diffusion.config_sampling import Asked, SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.terms import Terms
from diffusion.families.base import Batch, Contest, Data, Family, Learner
from diffusion.fingerprint import autocast
from diffusion.grids import grid, save_png
from diffusion.model import Model, ModelHeader, Told, to_uint8
from diffusion.models.config import GANConfig
from diffusion.models.gan import Generator, Opponent
from diffusion.models.vae import Latents
from diffusion.random import GaussianNoise
from diffusion.sampling import interpolate
from diffusion.training.config import TrainingConfig, disagreement
from diffusion.training.drawn import Drawn

WAY = 8
"""Pictures on the way from one seed to another."""


@dataclass(frozen=True)
class GANModel(Model):
    """The network that makes pictures of noise."""

    network: Generator

    @property
    def coder(self) -> None:
        """It has no latents that a picture could be brought into."""
        return

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(latent, 1, 1)."""
        assert isinstance(self.header.model, GANConfig)
        return self.header.model.latent, 1, 1


def gradient_penalties(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``discriminator`` of ``x`` (N, …), (N,), and ‖∂discriminator/∂x‖² of each picture, (N,), of which weights have a gradient.

    What it says of a picture must depend on no other. By real pictures this is R1, by drawn ones R2 (arXiv 1801.04406,
    equation 9, and section 4.1).
    """
    x = x.detach().requires_grad_()
    # As a view, since torch counts no operations of modules that are given a leaf.
    said = discriminator(x.view_as(x))
    (gradient,) = torch.autograd.grad(said.sum(), x, create_graph=True)
    return said, gradient.float().square().flatten(1).sum(1)


@dataclass(frozen=True)
class PairLearner(Learner):
    """Of a real picture and one drawn beside it, each network wants the opposite answer to which of the two is real.

    The relativistic loss of pairs (arXiv 1807.00734) has no state in which the generator draws but one picture and
    nothing draws it on; the two penalties make training converge (2501.05441, section 2).
    """

    config: GANConfig
    seed: int
    opponent: Opponent

    @property
    def contest(self) -> Contest:
        """Moves before the generator does."""
        return Contest(self.opponent, self.opposing)

    @property
    def betas(self) -> tuple[float, float]:
        """Without momentum, with which two players overshoot each other (β₁ = 0, as in 2501.05441)."""
        return 0.0, 0.99

    def drawn(self, x0: Tensor, indices: range, told: Told) -> Drawn:
        """Noise of two pictures, one for each player's move."""
        noise = GaussianNoise(self.seed, "latent", indices, (2 * self.config.latent, 1, 1))()
        return Drawn(x0, None, noise, None, told)

    def probed(self, x0: Tensor, split: str, indices: Sequence[int], told: Told) -> None:
        """The loss is beside an opponent of the moment."""
        return

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """What the generator learns by: the real picture is to look no more real than the one drawn beside it."""
        assert drawn.noise is not None
        label = drawn.told.get("label")
        made = network(drawn.noise[:, self.config.latent :], label)
        with torch.no_grad():
            real = self.opponent(drawn.x0, label)
        return functional.softplus(real - self.opponent(made, label))

    def opposing(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """What the opponent learns by: the other way round, and how steep it is at either picture."""
        assert drawn.noise is not None
        label = drawn.told.get("label")
        with torch.no_grad():
            pictures = torch.cat([drawn.x0, network(drawn.noise[:, : self.config.latent], label)])
        both = None if label is None else label.repeat(2)
        said, steepness = gradient_penalties(lambda x: self.opponent(x, both), pictures)
        real, made = said.chunk(2)
        return functional.softplus(made - real) + self.config.gamma / 2 * torch.stack(steepness.chunk(2)).sum(0)

    def figures(self, network: nn.Module, drawn: Drawn, losses: Tensor) -> dict[str, float]:
        """None."""
        return {}


class GANFamily:
    """Builds, trains and draws from generators."""

    edits = False

    def network(self, config: GANConfig, shape: tuple[int, int, int], classes: int) -> Generator:
        """The generator."""
        return Generator(config, shape[0], shape[-1], classes)

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """Both players' moves."""
        assert isinstance(network, Generator)
        config = network.config
        learner = PairLearner(config, 0, Opponent(config, shape[0], shape[-1], network.no_class))
        told = {"label": torch.zeros(1, dtype=torch.long)} if network.no_class else {}
        drawn = Drawn(torch.empty(1, *shape), None, torch.empty(1, 2 * config.latent, 1, 1), None, told)
        return learner.opposing(network, drawn).sum() + learner.losses(network, drawn).sum()

    def learner(self, config: GANConfig, training: TrainingConfig, data: Data) -> PairLearner:
        """With a new opponent; UserError if ``training`` says something that means nothing to it."""
        if words := disagreement(config, training):
            raise UserError(words)
        opponent = Opponent(config, data.shape[0], data.shape[-1], data.classes)
        return PairLearner(config, training.seed, opponent.to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> GANModel:
        """The generator alone."""
        assert isinstance(network, Generator)
        return GANModel(header, network)

    def sample(self, model: GANModel, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """One pass."""
        with torch.inference_mode(), autocast(config.precision, device):
            return to_uint8(model.network(batch.noise(), batch.told.get("label"))).cpu()

    def passes(self, model: GANModel, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """One."""
        return [(1, lambda: model.network(torch.zeros(1, *model.noise_shape)))]

    def terms(self, model: GANModel, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
        """It cannot say how probable a picture is."""
        return Terms.without_levels(None, len(x0))

    def illustrations(self, model: GANModel, told: Told | None) -> dict[str, Image.Image]:
        """None: it draws in one go."""
        return {}

    def explain(self, model: GANModel, picture: Tensor, output: Path, seed: int) -> list[Path]:
        """The way from one picture to another through noise; of a model told classes, a row for each."""
        path = output / "way.png"
        asks = [Asked(labels=(name,)) for name in model.classes] or [Asked()]
        config = SamplingConfig(compute_batch=WAY)
        ways = [interpolate(model, seed, seed + 1, WAY, config, asked=asked) for asked in asks]
        save_png(path, grid(torch.cat(ways), columns=WAY))
        return [path]


FAMILY: Family[GANConfig, GANModel] = GANFamily()
