"""Data sets and models that are computed with on two devices; models to start from are trained on the CPU."""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.common.config import DeviceName
from diffusion.families.config import (
    AutoregressiveConfig,
    FamilyConfig,
    GANConfig,
    ModelConfig,
    VAEConfig,
)
from diffusion.families.header import Origin
from diffusion.process.samplers import SamplingConfig, sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import train
from tests.builders.shapes import blob
from tests.builders.small_datasets import write_dataset

SHAPE: dict[str, Any] = {"width": 16, "channel_mult": (1, 2), "blocks": 1, "attention": (1,), "heads": 1, "patch": 1}
UNET = ModelConfig(**SHAPE)
TRAINING = {
    "images": 48,
    "batch_size": 8,
    "warmup_images": 8,
    "checkpoints": 2,
    "cpu_threads": 1,
    "workers": 1,
    "precision": "fp32",
}
TRAININGS: Mapping[str, tuple[str, FamilyConfig, dict[str, Any]]] = {
    "ddpm": ("colours", UNET, {"flip": True}),
    "ddpm dropout": ("colours", ModelConfig(**SHAPE, dropout=0.1), {"optimizer": "adamw", "micro_batch": 3}),
    "learned variance": (
        "grey",
        ModelConfig(**SHAPE, schedule="cosine", prediction="epsilon", variance="learned_range"),
        {"timestep_sampling": "uniform", "weighting": "min_snr", "ema_stds": (0.05, 0.1)},
    ),
    "zero snr": (
        "grey",
        ModelConfig(**SHAPE, schedule="linear", prediction="v_prediction", zero_terminal_snr=True),
        {"weighting": "plain", "timestep_sampling": "uniform", "gradient_checkpointing": True},
    ),
    "text": ("captions", ModelConfig(**SHAPE, text=True), {"learned_uncertainty": True}),
    "low resolution": ("colours", ModelConfig(**SHAPE, low_resolution=4), {}),
    "vae": ("colours", VAEConfig(width=16, channel_mult=(1, 1), latent_channels=2), {}),
    "gan": ("colours", GANConfig(width=8, channel_mult=(1, 2)), {}),
    "autoregressive": ("grey", AutoregressiveConfig(width=8, layers=2), {}),
}
"""Data set, network and options of each training from random weights."""
TUNED: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "warm start": ("ddpm", "", {}),
    "lora": ("ddpm", "", {"adapter": {"rank": 2, "alpha": 4}, "learning_rate": 1e-2}),
    "latent lora": ("latent", "", {"adapter": {"rank": 2, "alpha": 4}, "learning_rate": 1e-2}),
}
FEW = {"steps": 3, "compute_batch": 4, "precision": "fp32"}


def digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes, types and bytes."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


def write_data(folder: Path) -> None:
    """Write the data sets that workloads use: of 8×8 pixels, grey or in colour, two classes, some captions."""
    for name, mode in (("grey", "L"), ("colours", "RGB"), ("captions", "RGB"), ("large", "RGB")):
        size = 16 if name == "large" else 8
        if (folder / "data" / name).is_dir():
            continue
        pixels = [np.asarray(blob(number, size, mode)) for number in range(48)]
        images = np.stack([each[None] if each.ndim == 2 else each.transpose(2, 0, 1) for each in pixels])
        labels = [("even", "odd")[number % 2] for number in range(48)]
        captions = [f"a {label} blob" if number % 5 else None for number, label in enumerate(labels)]
        write_dataset(
            folder / "data" / name,
            images,
            24,
            labels=None if name == "grey" else labels,
            captions=captions if name in ("captions", "large") else None,
        )


def trained(folder: Path, name: str, device: DeviceName) -> Path:
    """Train the model ``name`` on ``device``, unless it is there; its file."""
    output = folder / "runs" / device / name
    if (final := output / "final.safetensors").is_file():
        return final
    data, network, options = settings(folder, name)
    config = TrainingConfig.model_validate(TRAINING | options | {"dataset": data, "device": device})
    return train(folder / "data" / data, output, network, config, sampling_of(network, device)).final


def sampling_of(network: FamilyConfig, device: DeviceName) -> SamplingConfig:
    """How few images are sampled in a few steps, if the family has any."""
    return sampling_config(
        **{key: value for key, value in FEW.items() if key != "steps" or "noise_levels" in network.abilities},
        device=device,
    )


def settings(folder: Path, name: str) -> tuple[str, FamilyConfig, dict[str, Any]]:
    """Data set, network and options of a training, whose initial weights are from the CPU."""
    if name in TRAININGS:
        return TRAININGS[name]
    if name == "latent":
        shape = SHAPE | {"channel_mult": (1,), "attention": ()}
        return "colours", ModelConfig(**shape, autoencoder=str(trained(folder, "vae", "cpu"))), {}
    start, _, options = TUNED[name]
    data, network, _ = settings(folder, start)
    return data, network, options | {"init_from": str(trained(folder, start, "cpu"))}


def imported(folder: Path, kind: str) -> Path:
    """Import a pipeline of diffusers of this kind, unless it is there; its file."""
    from diffusion.diffusers_format.import_pipeline import import_pipeline
    from tests.builders import pipelines

    path = folder / "pipelines" / kind / "model.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        import_pipeline(pipelines.MAKERS[kind](path.parent / "pipeline"), path, Origin(source=kind))
    return path


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels."""
    return torch.from_numpy(np.array(image))


def png(image: Image.Image) -> bytes:
    """The file of an image."""
    image.save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()
