"""The pretrained autoencoder of a latent diffusion model, identified by the digest of its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.families.model import Model, to_float
from diffusion.families.vae import VAEModel, latent_shape
from diffusion.models.config import FamilyConfig, LatentSpace, ModelConfig, VAEConfig
from diffusion.models.vae import Latents

MEASURED = 1024
"""Training images used to measure the moments of the latents: error about 0.1 %, a few seconds."""
BATCH = 32
"""Images encoded at a time."""
DIGEST = "sha256:"
"""Prefix of the digest that replaces the path in a resolved configuration."""


@dataclass(frozen=True)
class LatentAutoencoder:
    """A pretrained autoencoder and the space of its latents."""

    space: LatentSpace
    latents: Latents


def with_autoencoder_digest(model: FamilyConfig) -> FamilyConfig:
    """Replace the path of ``model``'s autoencoder by its digest, so that the run does not depend on where the file is.

    Raises UserError if the file does not exist.
    """
    if not isinstance(model, ModelConfig) or model.autoencoder is None or model.autoencoder.startswith(DIGEST):
        return model
    digest = weights_digest(_load(model.autoencoder))
    return model.model_copy(update={"autoencoder": DIGEST + digest})


def open_autoencoder(path: str, dataset: Dataset, window: int | None) -> LatentAutoencoder:
    """Load the autoencoder in the file ``path`` and measure its latents' moments on training images of ``dataset``.

    Uses the first images by key; with a ``window``, images from as few shards as possible. Raises UserError if the file
    is not an autoencoder, has other channels than the images, or its factor does not divide the image size.
    """
    found = _load(path)
    config, (channels, _, size) = found.header.model, dataset.shape
    assert isinstance(config, VAEConfig)
    if found.header.channels != channels:
        raise UserError(
            f"model.autoencoder {path} was trained on images of {found.header.channels} channels and data set "
            f"{dataset.manifest.name} has {channels}: train an autoencoder on images like these"
        )
    inner = latent_shape(config, size)
    space = LatentSpace(autoencoder=config, digest=weights_digest(found), channels=inner[0], size=inner[1])
    latents = Latents.with_random_weights(space, dataset.shape)
    latents.network.load_state_dict(found.network.state_dict())
    latents.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = dataset.rows("train")
    if window is not None:
        rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
    measure_moments(latents, dataset.images(rows[:MEASURED]))
    return LatentAutoencoder(space, latents)


@torch.inference_mode()
def measure_moments(latents: Latents, images: Tensor) -> None:
    """Set the moments of ``latents`` per channel from ``images``, (N, C, H, W) uint8, over all positions.

    Computed once, in float32 on one thread, whatever device trains.
    """
    means = [latents.network.encode(to_float(batch)).double() for batch in torch.split(images, BATCH)]
    channels = torch.cat(means).transpose(0, 1).flatten(1)
    spread, centre = torch.std_mean(channels, dim=1, correction=0)
    # A constant channel keeps its scale instead of being amplified.
    spread = torch.where(spread > 1e-4 * spread.max(), spread, 1.0)
    for moment, value in ((latents.mean, centre), (latents.std, spread)):
        moment.copy_(value.float().view(1, -1, 1, 1))


def weights_digest(model: Model) -> str:
    """Compute the SHA-256 over configuration, names and weights, equal in checkpoints, final files and the registry."""
    digest = hashlib.sha256(model.header.model.model_dump_json().encode())
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(path: str) -> VAEModel:
    if path.startswith("models:/"):
        raise UserError(
            f"model.autoencoder = {path} names a registered model, which is not fetched here: give the path of its "
            "final.safetensors, or run `darkroom train`"
        )
    model = load_model(Path(path))
    if not isinstance(model, VAEModel):
        raise UserError(
            f"model.autoencoder {path} is a model of the family {model.header.model.family}, and no autoencoder: train "
            "one with model.family=vae"
        )
    return model
