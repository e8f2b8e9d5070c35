"""Short trainings, and trackers that stop them."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.data.manifest import FileEntry
from diffusion.families.config import ModelConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import TrainResult, train

MODEL = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1)

CONFIG = TrainingConfig(dataset="blobs", images=320, batch_size=16, warmup_images=32, checkpoints=4, keep=2, flip=True)

FINE_TUNING: dict[str, Any] = {
    "batch_size": 8,
    "checkpoints": 2,
    "warmup_images": 0,
    "learning_rate": 1e-2,
    "weighting": "plain",
    "timestep_sampling": "scheduler",
    "precision": "fp32",
}

SAMPLING = sampling_config(steps=2, compute_batch=36)


class Stop(Exception):
    pass


class StopAt:
    """A tracker that ends the run when the given number of images is logged, as a kill between steps would."""

    def __init__(self, images: int) -> None:
        self.images = images

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if images >= self.images:
            raise Stop

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        assert image.width > 0

    def sync(self) -> None:
        pass


def run(dataset: Path, output: Path, config: TrainingConfig = CONFIG, **options: object) -> TrainResult:
    return train(dataset, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


class Away:
    """The shards of the data set in a folder, moved to another."""

    def __init__(self, folder: Path, elsewhere: Path) -> None:
        (folder / "shards").rename(elsewhere)
        self.elsewhere = elsewhere

    def fetch(self, entry: FileEntry, path: Path) -> None:
        path.write_bytes((self.elsewhere / Path(entry.name).name).read_bytes())


def require_skipped(optimizer: Any, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Take a step whose gradients are not numbers; nothing may change."""
    before, state = [parameter.detach().clone() for parameter in parameters], copy.deepcopy(optimizer.state_dict())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, parameters, before))
    for index, moments in state["state"].items():
        for name, value in moments.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value), name
