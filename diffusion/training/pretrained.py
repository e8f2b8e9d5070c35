"""Pretrained models of a training: the autoencoder of a latent diffusion model, and initial weights.

Each is identified by the digest of its weights, so that a run does not depend on where the file is.
"""

import hashlib
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
from diffusion.models.text_encoder import ENCODER
from diffusion.models.vae import Latents
from diffusion.training.config import TrainingConfig

MEASURED = 1024
"""Training images used to measure the moments of the latents: error about 0.1 %, a few seconds."""
BATCH = 32
"""Images encoded at a time."""


def with_digests(model: FamilyConfig, training: TrainingConfig) -> tuple[FamilyConfig, TrainingConfig]:
    """Replace the paths of autoencoder and initial weights by their digests; raises UserError for a missing file."""
    if isinstance(model, ModelConfig) and model.autoencoder is not None:
        digest = weights_digest(_load("model.autoencoder", model.autoencoder))
        model = model.model_copy(update={"autoencoder": digest})
    if training.init_from is not None:
        digest = weights_digest(_load("training.init_from", training.init_from))
        training = training.model_copy(update={"init_from": digest})
    return model, training


def load_autoencoder(path: str, dataset: Dataset, window: int | None) -> Latents:
    """Load the autoencoder in the file ``path`` and measure its latents' moments on training images of ``dataset``.

    Uses the first images by key; with a ``window``, images from as few shards as possible. Raises UserError if the file
    is not an autoencoder, has other channels than the images, or its factor does not divide the image size.
    """
    model = _load("model.autoencoder", path)
    if not isinstance(model, VAEModel):
        raise UserError(
            f"model.autoencoder {path} is a model of the family {model.header.model.family}, and no autoencoder: train "
            "one with model.family=vae"
        )
    config, (channels, _, size) = model.header.model, dataset.shape
    assert isinstance(config, VAEConfig)
    if model.header.channels != channels:
        raise UserError(
            f"model.autoencoder {path} was trained on images of {model.header.channels} channels and data set "
            f"{dataset.manifest.name} has {channels}: train an autoencoder on images like these"
        )
    inner = latent_shape(config, size)
    space = LatentSpace(
        autoencoder=config, digest=weights_digest(model).removeprefix("sha256:"), channels=inner[0], size=inner[1]
    )
    latents = Latents(space, dataset.shape)
    latents.network.load_state_dict(model.network.state_dict())
    latents.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = dataset.rows("train")
    if window is not None:
        rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
    _measure_moments(latents, dataset.images(rows[:MEASURED]))
    return latents


@torch.inference_mode()
def _measure_moments(latents: Latents, images: Tensor) -> None:
    """Set the moments of each channel over all positions from ``images`` (N, C, H, W) uint8, in float32 on the CPU."""
    means = [latents.network.encode(to_float(batch)).double() for batch in torch.split(images, BATCH)]
    std, mean = torch.std_mean(torch.cat(means).transpose(0, 1).flatten(1), dim=1, correction=0)
    # A constant channel keeps its scale instead of being amplified.
    std = torch.where(std > 1e-4 * std.max(), std, 1.0)
    latents.std.copy_(std.view(1, -1, 1, 1))
    latents.mean.copy_(mean.view(1, -1, 1, 1))


def load_initial_weights(path: str, model: FamilyConfig, dataset: Dataset, classes: list[str]) -> Model:
    """Load the model in the file ``path``, whose averaged weights initialize a network of ``model`` for ``dataset``.

    Optimizer, averages and learning rate start from scratch. Raises UserError if the file does not exist or fit.
    """
    given = _load("training.init_from", path)
    theirs, ours = given.header.model.model_dump(), model.model_dump()
    different = next((name for name in theirs | ours if theirs.get(name) != ours.get(name)), None)
    words = None
    if given.header.model.family != model.family:
        words = f"is a model of the family {given.header.model.family}, and this is {model.family}"
    elif different:
        words = f"has model.{different} = {theirs.get(different)}, and this is {ours.get(different)}"
    elif given.shape != dataset.shape:
        they, we = ("×".join(map(str, shape)) for shape in (given.shape, dataset.shape))
        words = f"generates images of {they} (channels × height × width), and data set {dataset.manifest.name} has {we}"
    elif given.classes != classes:
        they, we = (", ".join(names) or "none" for names in (given.classes, classes))
        words = f"knows the classes {they}, and data set {dataset.manifest.name} has {we}"
    elif model.text and given.header.encoder != ENCODER:
        words = "was trained with another text encoder"
    if words:
        raise UserError(
            f"training.init_from {path} {words}: begin with a model of the same kind, or at random "
            "(training.init_from=null)"
        )
    return given


def weights_digest(model: Model) -> str:
    """Compute ``sha256:`` and the SHA-256 over configuration, names and weights, equal for all files of a model."""
    digest = hashlib.sha256(model.header.model.model_dump_json().encode())
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _load(option: str, path: str) -> Model:
    if path == "champion" or path.startswith("models:/"):
        raise UserError(
            f"{option} = {path} names a registered model, which is not fetched here: give the path of its "
            "final.safetensors, or run `darkroom train`"
        )
    return load_model(Path(path))
