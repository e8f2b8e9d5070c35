"""The family gan: generative adversarial networks with R3GAN's loss (arXiv 2501.05441)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.common.random import GaussianNoise
from diffusion.families.base import classes_of
from diffusion.families.gan.config import GANConfig
from diffusion.families.gan.network import AUGMENTING, Discriminator, Generator, augment
from diffusion.families.header import ModelHeader
from diffusion.families.model import (
    Conditioning,
    ConditioningBatch,
    Model,
    OptimizerStep,
    TrainingBatch,
    TrainingObjective,
    to_uint8,
    use_channels_last,
)
from diffusion.process.config import ObjectiveConfig
from diffusion.process.samplers import SamplingConfig


@dataclass(frozen=True)
class GANModel(Model):
    """A generator: latents to images in one pass."""

    network: Generator

    @staticmethod
    def make_network(config: GANConfig, shape: tuple[int, int, int], classes: int) -> Generator:
        """Build the generator."""
        return Generator(config, shape[0], shape[-1], classes)

    @staticmethod
    def forward(network: Generator, shape: tuple[int, int, int]) -> Tensor:
        """Compute both networks' losses and sum."""
        config = network.config
        objective = RelativisticObjective(config, 0, Discriminator(config, shape[0], shape[-1], network.no_class))
        conditioning = {"label": torch.zeros(1, dtype=torch.long)} if network.no_class else {}
        random = {"noise": torch.empty(1, 2 * config.latent, 1, 1), "augment": torch.empty(1, AUGMENTING)}
        batch = TrainingBatch(torch.empty(1, *shape), conditioning, random)
        return objective.discriminator_losses(network, batch).sum() + objective.losses(network, batch).sum()

    @staticmethod
    def make_objective(header: ModelHeader, training: ObjectiveConfig) -> TrainingObjective:
        """Build the adversarial loss with a new discriminator."""
        assert isinstance(header.model, GANConfig)
        classes = len(classes_of(header.model, header.class_histogram))
        discriminator = Discriminator(header.model, header.channels, header.size, classes)
        use_channels_last(discriminator)
        return RelativisticObjective(header.model, training.seed, discriminator)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(latent, 1, 1)."""
        assert isinstance(self.header.model, GANConfig)
        return self.header.model.latent, 1, 1

    def generate(self, batch: ConditioningBatch, config: SamplingConfig) -> Tensor:
        """Generate in one pass."""
        return to_uint8(self.network(batch.noise(), batch.conditioning.get("label")))

    def passes(self, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """List one pass."""
        return [(1, lambda: self.network(torch.zeros(1, *self.noise_shape)))]


def gradient_penalties(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute D(x) of images (N, …), (N,), and ‖∂D/∂x‖² of each, (N,), differentiable by the weights.

    D of an image must not depend on other images. At real images the penalty is R1, at generated ones R2 (arXiv
    1801.04406, equation 9, and section 4.1).
    """
    x = x.detach().requires_grad_()
    # A view, since torch does not count the operations of modules whose input is a leaf.
    scores = discriminator(x.view_as(x))
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return scores, gradient.float().square().flatten(1).sum(1)


@dataclass(frozen=True)
class RelativisticObjective(TrainingObjective):
    """R3GAN's loss: relativistic pairing loss (arXiv 1807.00734), against mode collapse, with R1 and R2 penalties."""

    betas: ClassVar[tuple[float, float]] = (0.0, 0.99)
    """Without momentum, which destabilises adversarial training (β₁ = 0, as in 2501.05441)."""
    comparable: ClassVar[bool] = False
    """The loss is relative to a discriminator that learns as well."""
    config: GANConfig
    seed: int
    discriminator: Discriminator

    def make_batch(
        self, x0: Tensor, indices: Sequence[int], conditioning: Conditioning, probe: str | None = None
    ) -> TrainingBatch:
        """Sample the latents of two images, one for each network's step."""
        noise = GaussianNoise(self.seed, "latent", indices, (2 * self.config.latent, 1, 1))()
        uniform = torch.special.ndtr(GaussianNoise(self.seed, "augment", indices, (AUGMENTING,))())
        return TrainingBatch(x0, conditioning, {"noise": noise, "augment": uniform})

    def losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the generator's loss: softplus of the real score minus the generated one."""
        label = batch.conditioning.get("label")
        generated = network(batch.random["noise"][:, self.config.latent :], label)
        with torch.no_grad():
            real = self.discriminator(self.augment_images(batch.x0, batch), label)
        return functional.softplus(real - self.discriminator(self.augment_images(generated, batch), label))

    def discriminator_losses(self, network: nn.Module, batch: TrainingBatch) -> Tensor:
        """Compute the discriminator's loss: the opposite, plus gradient penalties at both images."""
        label = batch.conditioning.get("label")
        with torch.no_grad():
            generated = network(batch.random["noise"][:, : self.config.latent], label)
            images = torch.cat([self.augment_images(batch.x0, batch), self.augment_images(generated, batch)])
        labels = None if label is None else label.repeat(2)
        scores, penalties = gradient_penalties(lambda x: self.discriminator(x, labels), images)
        real, generated = scores.chunk(2)
        return functional.softplus(generated - real) + self.config.gamma / 2 * torch.stack(penalties.chunk(2)).sum(0)

    def augment_images(self, images: Tensor, batch: TrainingBatch) -> Tensor:
        """Augment ``images``, real or generated, as the ``batch`` is augmented."""
        return augment(images, batch.random["augment"], self.config.augment)

    def optimizer_steps(self, network: nn.Module) -> list[OptimizerStep]:
        """Train the discriminator first, then the generator against it."""
        return [
            OptimizerStep({"discriminator": self.discriminator}, partial(self.discriminator_losses, network)),
            OptimizerStep({"network": network}, partial(self.losses, network)),
        ]
