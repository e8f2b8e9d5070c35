"""How well a model foresees pictures that it has never seen: its loss by noise level, and what it bounds, their bits.

Of the bounds on a diffusion model's likelihood this is that of infinitely many steps (arXiv 2107.00630, eq. 15):

    −ln p(x_0) ≤ KL(q(x_σmax | x_0) ‖ N(0, σ_max²)) + ∫ E‖x_0 − D(x; σ)‖² / σ² d ln σ − E ln p(x_0 | x_σmin)

It is the limit of DDPM's sum (arXiv 2006.11239, equation 5) and lies below it, and depends neither on a number of steps
nor on a choice of variances. It holds for any function D, so all models are asked between the same two levels, whatever
their schedules; beyond its own a network is told the nearest time that it knows. Then models of different schedules
compare, and the integrand is the very loss that is told by noise level.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import Asked, SamplingConfig
from diffusion.data.dataset import Dataset, Rows
from diffusion.device import repeatable, resolve_device
from diffusion.families.config import VAEConfig
from diffusion.families.vae import BoundLearner, VAEModel
from diffusion.fingerprint import autocast
from diffusion.lanes import lanes
from diffusion.model import DiffusionModel, Model, Told, to_float
from diffusion.objective import edm
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise, uniform
from diffusion.samplers import SIGMA_MAX
from diffusion.sampling import meanings_of
from diffusion.upscaling import shown_small
from diffusion.variance import HALF_A_LEVEL, log_likelihood

LEVELS = 16
"""Equal parts of ln σ, at each of which every picture is looked at once."""
SIGMA_MIN = HALF_A_LEVEL
"""Where they begin: below it noise leaves nearly all pixels the values they have. Of Gaussian values the bound is then
too high by 0.03 bits; of black ones, were it known for sure that they are, by 0.25."""
STREAM = "held_out_loss"
"""Of the random numbers, which are the same for all models."""
Estimate = Callable[[Tensor, Tensor], Tensor]
"""From x = x_0 + σ ε (N, C, H, W) and σ (N,) to an estimate of x_0."""


class LevelLoss(Config):
    """The loss of noise levels between two."""

    sigma_low: float
    """The lower one: noise over signal."""
    sigma_high: float
    """The higher one."""
    loss: float
    """Mean squared error of the clean picture, weighted by 1/σ² + 1/σ_data² (EDM's λ, arXiv 2206.00364): 1, at
    every level, for the best denoiser of Gaussian values of that deviation, and less for what knows pictures."""
    loss_se: float
    """Its standard error over pictures."""


class HeldOutLoss(Config):
    """What a model makes of held-out pictures."""

    pictures: int
    levels: list[LevelLoss]
    """From the least noise to the most; none: the model takes no noise away."""
    loss: float | None
    """Mean over the levels; None: there are none."""
    loss_se: float | None
    """Its standard error over pictures."""
    bits_per_dim: float | None
    """Upper bound on −log₂ p of a held-out picture, over the number of its values; lower is better. Of a picture given
    its class, caption or small version, where the model is told those. None: the model works on latents, of whose
    likelihood no bound on that of pictures follows."""
    bits_per_dim_se: float | None
    """Its standard error over pictures."""

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        figures = {
            "held_out_loss": self.loss,
            "held_out_loss_se": self.loss_se,
            "bits_per_dim": self.bits_per_dim,
            "bits_per_dim_se": self.bits_per_dim_se,
        }
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Terms:
    """The same of each of N pictures, which of two models can be compared one by one."""

    edges: Tensor
    """σ at the ends of the levels, (L + 1,) float64; none: (0,)."""
    losses: Tensor
    """(N, L) float64."""
    bits: Tensor | None
    """Per dimension, (N,) float64."""


def held_out_loss(terms: Terms) -> HeldOutLoss:
    """Means of ``terms`` of two or more pictures, and their errors."""
    low, high = terms.edges[:-1].tolist(), terms.edges[1:].tolist()
    levels = [
        LevelLoss(sigma_low=low[n], sigma_high=high[n], loss=loss, loss_se=error)
        for n, (loss, error) in enumerate(map(_mean, terms.losses.unbind(1)))
    ]
    loss, loss_se = _mean(terms.losses.mean(1)) if levels else (None, None)
    bits, bits_se = (None, None) if terms.bits is None else _mean(terms.bits)
    return HeldOutLoss(
        pictures=len(terms.losses),
        levels=levels,
        loss=loss,
        loss_se=loss_se,
        bits_per_dim=bits,
        bits_per_dim_se=bits_se,
    )


def measure(
    model: Model, pieces: Iterable[tuple[Tensor, Told]], config: SamplingConfig, progress: Progress = silent
) -> Terms:
    """What ``model`` makes of pictures, (N, C, H, W) uint8, which come in ``pieces`` with what it is told of them.

    Computed in batches of ``config.compute_batch``, in its precision and on its device. Noise is drawn by the number of
    the picture, so that two models shown the same pictures are shown the same noise.
    """
    device = resolve_device(config.device)
    model = model.on(device)
    found: list[Terms] = []
    seen = 0

    def batch(pictures: Tensor, told: Told, first: int) -> Terms:
        # The last one filled up with its last picture, so that all have one shape.
        places = torch.arange(config.compute_batch).clamp(max=len(pictures) - 1)
        known = {name: value[places].to(device) for name, value in told.items()}
        x0 = to_float(pictures[places]).to(device)
        with torch.inference_mode(), autocast(config.precision, device):
            terms = _terms_of(model, x0, known, [first + int(place) for place in places])
        bits = None if terms.bits is None else terms.bits[: len(pictures)].cpu()
        return Terms(terms.edges, terms.losses[: len(pictures)].cpu(), bits)

    with repeatable(device), lanes(None if device.type == "cpu" else 1) as pool:
        for pictures, told in pieces:
            starts = range(0, len(pictures), config.compute_batch)
            parts = [slice(start, start + config.compute_batch) for start in starts]
            given = [{name: value[part] for name, value in told.items()} for part in parts]
            firsts = [seen + start for start in starts]
            found += pool.map(batch, [pictures[part] for part in parts], given, firsts)
            seen += len(pictures)
            progress("held-out pictures looked at", seen, None)
    bits = [each.bits for each in found if each.bits is not None]
    return Terms(found[0].edges, torch.cat([each.losses for each in found]), torch.cat(bits) if bits else None)


def told_of_rows(model: Model, dataset: Dataset, rows: Rows) -> Told:
    """What ``model`` is to be told of the pictures in ``rows``.

    Raises UserError if it knows captions, and the encoder that read them cannot be had.
    """
    told = shown_small(model.config, dataset.pictures(rows))
    if model.classes:
        told["label"] = dataset.classes(rows, model.classes)
    if model.config.text:
        captions = dataset.captions(rows)
        meanings = meanings_of(model, Asked(prompts=tuple(captions)))
        told["text"] = torch.stack([meanings[caption] for caption in captions])
    return told


def denoising_terms(
    estimate: Estimate, x0: Tensor, sigma_data: float, indices: Sequence[int], pixels: bool = True
) -> Terms:
    """Losses and bits of pictures ``x0``, (N, C, H, W) in [−1, 1], number ``indices``, under any denoiser.

    Each of the ``noise_levels`` is looked at in one place for each picture, which lies anywhere in it with equal
    probability: so sums over levels are integrals without bias. ``pixels``: whether x_0 has the values of stored
    pictures, of which alone bits are defined.
    """
    edges = noise_levels()
    noise = GaussianNoise(0, f"{STREAM}/noise", indices, tuple(x0.shape[1:]))
    u = uniform(0, f"{STREAM}/level", indices).to(x0.device)
    logs = edges.log().to(x0.device)

    def estimated(sigma: Tensor) -> Tensor:
        x = x0 + sigma.to(x0.dtype)[:, None, None, None] * noise().to(x0)
        return estimate(x, sigma).float()

    errors, sigmas = [], []
    for low, high in pairwise(logs):
        sigma = (low + u * (high - low)).exp()
        errors.append((estimated(sigma) - x0).double().square().mean((1, 2, 3)))
        sigmas.append(sigma)
    error, sigma = torch.stack(errors, 1), torch.stack(sigmas, 1)
    losses = edm(sigma_data)(sigma) * error
    if not pixels:
        return Terms(edges, losses, None)
    least = logs[0].exp().expand(len(x0))
    # The deviation of what is left to know of Gaussian values.
    deviation = torch.full_like(x0, (edges[0] ** -2 + sigma_data**-2).rsqrt().item())
    nats = (
        x0.double().square().mean((1, 2, 3)) / (2 * edges[-1].item() ** 2)
        + ((logs[1:] - logs[:-1]) * error / sigma**2).sum(1)
        - log_likelihood(x0, estimated(least), deviation).double().mean((1, 2, 3))
    )
    return Terms(edges, losses, nats / math.log(2))


def noise_levels() -> Tensor:
    """σ at the ends of LEVELS equal parts of ln σ, from SIGMA_MIN to SIGMA_MAX: (LEVELS + 1,) float64."""
    return torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), LEVELS + 1, dtype=torch.float64).exp()


def _terms_of(model: Model, x0: Tensor, told: Told, indices: Sequence[int]) -> Terms:
    if isinstance(model, DiffusionModel):
        pixels = model.latents is None
        return denoising_terms(model.denoiser(told), model.encoded(x0), model.header.sigma_data, indices, pixels)
    assert isinstance(model, VAEModel)
    assert isinstance(model.config, VAEConfig)
    # Its loss in training is the bound, but for the weight of the divergence.
    learner = BoundLearner(model.config.model_copy(update={"kl_weight": 1.0}), 0, model.header.size)
    bits = learner.losses(model.network, learner.probed(x0, "held_out", indices, told).on(x0.device)).double()
    return Terms(bits.new_zeros(0), bits.new_zeros(len(bits), 0), bits)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of ``values`` (N,)."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
