"""The first stage of latent diffusion: an autoencoder that was trained before, known by its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.families.vae import VAEModel, latent_shape
from diffusion.model import Model, to_float
from diffusion.models.config import FamilyConfig, LatentSpace, ModelConfig, VAEConfig
from diffusion.models.vae import Latents

MEASURED = 1024
"""Training pictures of whose latents the moments are taken: a per mille of error, and seconds."""
BATCH = 32
"""Of them at a time."""
DIGEST = "sha256:"
"""Before the digest of a model, where a configuration had its path."""


@dataclass(frozen=True)
class FirstStage:
    """What leads from pictures to latents and back."""

    space: LatentSpace
    latents: Latents


def identified(model: FamilyConfig) -> FamilyConfig:
    """``model`` with its autoencoder named by what it is, instead of where it lies: the same run wherever that is.

    Raises UserError if there is none at its path.
    """
    if not isinstance(model, ModelConfig) or model.autoencoder is None or model.autoencoder.startswith(DIGEST):
        return model
    return known_as(model, weights_digest(_autoencoder(model.autoencoder)))


def known_as(model: FamilyConfig, digest: str) -> FamilyConfig:
    """``model`` with the autoencoder whose weights have this ``digest``."""
    return model.model_copy(update={"autoencoder": DIGEST + digest})


def open_first_stage(path: str, dataset: Dataset, window: int | None) -> FirstStage:
    """The autoencoder in the file ``path``, the moments of its latents measured on training pictures of ``dataset``.

    These are the first by key; with a ``window`` of as few shards as possible. Raises UserError if the file is no
    autoencoder, or one of pictures with other channels, or its factor does not divide the size of the pictures.
    """
    found = _autoencoder(path)
    config, (channels, _, size) = found.header.model, dataset.shape
    assert isinstance(config, VAEConfig)
    if found.header.channels != channels:
        raise UserError(
            f"model.autoencoder {path} was trained on pictures of {found.header.channels} channels and data set "
            f"{dataset.manifest.name} has {channels}: train an autoencoder on pictures like these"
        )
    inner = latent_shape(config, size)
    space = LatentSpace(autoencoder=config, digest=weights_digest(found), channels=inner[0], size=inner[1])
    latents = Latents.with_random_weights(space, dataset.shape)
    latents.network.load_state_dict(found.network.state_dict())
    latents.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = dataset.rows("train")
    if window is not None:
        rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
    measure(latents, dataset.pictures(rows[:MEASURED]))
    return FirstStage(space, latents)


@torch.inference_mode()
def measure(latents: Latents, pictures: Tensor) -> None:
    """Set the moments of ``latents`` to those of ``pictures``, (N, C, H, W) uint8, each channel's over all positions.

    In float32 on one thread, whatever trains: it is done once.
    """
    means = [latents.network.encode(to_float(batch)).double() for batch in torch.split(pictures, BATCH)]
    channels = torch.cat(means).transpose(0, 1).flatten(1)
    spread, centre = torch.std_mean(channels, dim=1, correction=0)
    # A channel that says nothing stays where it is, instead of being blown up.
    spread = torch.where(spread > 1e-4 * spread.max(), spread, 1.0)
    for moment, value in ((latents.mean, centre), (latents.std, spread)):
        moment.copy_(value.float().view(1, -1, 1, 1))


def weights_digest(model: Model) -> str:
    """SHA-256 over configuration, names and weights: the same in a checkpoint, a final file and the registry."""
    digest = hashlib.sha256(model.header.model.model_dump_json().encode())
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _autoencoder(path: str) -> VAEModel:
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
