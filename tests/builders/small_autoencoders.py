"""Autoencoders and latent models that are trained in seconds, on images of 16 pixels."""

from pathlib import Path

import numpy as np
import torch

from diffusion.families.config import ModelConfig, VAEConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import TrainResult, train
from tests.builders.shapes import blob
from tests.builders.small_datasets import write_dataset

SIZE = 16
VAE = VAEConfig(width=16, channel_mult=(1, 1), latent_channels=3)
"""Latents of 3×4×4."""
CONFIG = TrainingConfig(dataset="blobs", images=320, batch_size=16, warmup_images=32, checkpoints=4, keep=2, flip=True)
SAMPLING = sampling_config(compute_batch=36, precision="fp32")
STEPPED = SAMPLING.model_copy(update={"steps": 2})


def colours(folder: Path, count: int = 64) -> Path:
    """A data set of smooth colours, a quarter of it held out."""
    images = np.stack([np.asarray(blob(number, SIZE, "RGB")).transpose(2, 0, 1) for number in range(count)])
    write_dataset(folder, images, per_shard=16)
    return folder


def autoencoder(data: Path, output: Path, model: VAEConfig = VAE, **options: object) -> TrainResult:
    config = CONFIG.model_copy(update=options.pop("config", {}))
    return train(data, output, model, config, SAMPLING, **options)  # type: ignore[arg-type]


def denoiser(path: Path | str, **changes: object) -> ModelConfig:
    """Diffusion in the latents of the autoencoder in the file ``path``."""
    shape = {"width": 16, "channel_mult": (1,), "blocks": 1, "attention": (), "patch": 1}
    return ModelConfig.model_validate(shape | {"autoencoder": str(path)} | changes)


def latent(data: Path, output: Path, model: ModelConfig, **options: object) -> TrainResult:
    config = CONFIG.model_copy(update=options.pop("config", {}))
    return train(data, output, model, config, STEPPED, **options)  # type: ignore[arg-type]


def mean_square(images: torch.Tensor, others: torch.Tensor) -> float:
    return (images.double() - others.double()).square().mean().item()
