"""The family ddpm: a U-Net learns to take noise away, from pictures (arXiv 2006.11239) or latents (2112.10752)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.config_sampling import SamplingConfig
from diffusion.evaluation.cost import evaluations
from diffusion.evaluation.terms import Terms, denoising_terms
from diffusion.families.base import Batch, Data, Family, Learner
from diffusion.model import DiffusionModel, ModelHeader, Told
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.models.vae import Latents
from diffusion.objective import Objective
from diffusion.process import make_schedule
from diffusion.random import GaussianNoise, uniform
from diffusion.sampling import reverse_process
from diffusion.training.config import TrainingConfig
from diffusion.training.drawn import Drawn
from diffusion.training.objective import draw_times, make_objective, times_at

LEVELS = 8
"""Parts of the distribution of noise levels, from the least to the most, whose losses are told apart."""


@dataclass(frozen=True)
class NoiseLearner(Learner):
    """Draws a time and noise for each picture; the loss is how far the network is from telling them apart."""

    config: TrainingConfig
    objective: Objective
    shape: tuple[int, int, int]
    """(C, H, W) of what is noised."""
    autoencoder: Latents | None
    """What pictures are brought into first."""

    def drawn(self, x0: Tensor, indices: range, told: Told) -> Drawn:
        """Times, noise and what dropout goes by."""
        t = draw_times(self.config, self.objective.schedule, indices)
        noise = GaussianNoise(self.config.seed, "noise", indices, self.shape)()
        draws = (uniform(self.config.seed, "dropout", indices) * 2**62).long()
        return Drawn(x0, t, noise, draws, told)

    def probed(self, x0: Tensor, split: str, indices: Sequence[int], told: Told) -> Drawn:
        """Times evenly over their distribution, and noise of a seed of its own."""
        u = (torch.arange(len(x0)) + 0.5) / len(x0)
        t = times_at(self.config, self.objective.schedule, u)
        noise = GaussianNoise(0, f"probe/{split}", indices, self.shape)()
        return Drawn(x0, t, noise, None, told)

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """The objective of each picture."""
        assert drawn.t is not None
        assert drawn.noise is not None
        x0 = drawn.x0
        if self.autoencoder is not None:
            with torch.no_grad():
                # Each time anew: measured to be 5 to 20 % of a step, and there are no kept latents to go stale, to be
                # made twice for mirrored pictures, or to be cleared when pictures are taken down.
                x0 = self.autoencoder.encode(x0)
        told = partial(network, draws=drawn.draws, **drawn.told)
        return self.objective.loss(told, x0, drawn.t, drawn.noise, drawn.told.get("low"))

    def figures(self, network: nn.Module, drawn: Drawn, losses: Tensor) -> dict[str, float]:
        """The mean loss by how noisy the pictures were, in so many equal parts."""
        if len(losses) < LEVELS:
            return {}
        parts = losses.tensor_split(LEVELS)
        return {f"held_out_loss_ema_level_{number}": part.mean().item() for number, part in enumerate(parts, start=1)}


class NoiseFamily:
    """Builds, trains and draws from denoising networks."""

    edits = True

    def network(self, config: ModelConfig, shape: tuple[int, int, int], classes: int) -> UNet:
        """The U-Net."""
        return UNet(config, shape[0], shape[-1], classes)

    def forward(self, network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
        """At time 0."""
        assert isinstance(network, UNet)
        x = torch.empty(1, *shape)
        out: Tensor = network(x, torch.zeros(1), low=None if network.level is None else x).sum()
        return out

    def learner(self, config: ModelConfig, training: TrainingConfig, data: Data) -> Learner:
        """Learns the noise of latents where there is an autoencoder."""
        objective = make_objective(config, training, data.sigma_data)
        return NoiseLearner(training, objective, data.inner, data.autoencoder)

    def model(self, header: ModelHeader, network: nn.Module, autoencoder: Latents | None) -> DiffusionModel:
        """With the schedule that it was trained on."""
        assert isinstance(network, UNet)
        assert isinstance(header.model, ModelConfig)
        return DiffusionModel(header, network, make_schedule(header.model), autoencoder)

    def sample(self, model: DiffusionModel, batch: Batch, config: SamplingConfig, device: torch.device) -> Tensor:
        """The reverse process."""
        return reverse_process(model, batch, config, device)

    def passes(self, model: DiffusionModel, config: SamplingConfig) -> list[tuple[int, Callable[[], Tensor]]]:
        """As many as the sampler asks for, and out of the latents."""
        x = torch.zeros(1, *model.noise_shape)
        asked = evaluations(config, model.schedule)
        return [(1, lambda: model.decoded(x)), (asked, lambda: self.forward(model.network, model.noise_shape))]

    def terms(self, model: DiffusionModel, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
        """Losses by noise level, and the bound that they add up to; of latents alone losses."""
        pixels = model.latents is None
        return denoising_terms(model.denoiser(told), model.encoded(x0), model.header.sigma_data, indices, pixels)

    def illustrations(self, model: DiffusionModel, told: Told | None) -> dict[str, Image.Image]:
        """A strip of the reverse process."""
        from diffusion.explain import strip  # matplotlib, which the served model does not bring

        return {"reverse": strip(model, told)}

    def explain(self, model: DiffusionModel, picture: Tensor, output: Path, seed: int) -> list[Path]:
        """The forward process, a step of training and the reverse process."""
        from diffusion.explain import explain

        return explain(model, picture, output, seed)


FAMILY: Family[ModelConfig, DiffusionModel] = NoiseFamily()
