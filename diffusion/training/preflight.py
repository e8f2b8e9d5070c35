"""What a training run will do, and what it takes, before it begins."""

import math
import shutil
from pathlib import Path

import torch
from humanize import naturalsize, precisedelta
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import Config
from diffusion.errors import UserError
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.training.config import TrainingConfig

FLOAT = 4
"""Bytes of a weight, a gradient or a moment."""


class Preflight(Config):
    """A run as it is about to begin."""

    dataset: str
    content_digest: str
    train: int
    """Pictures to train on."""
    held_out: int
    """Pictures that training never sees."""
    shape: tuple[int, int, int]
    """(C, H, W) of each."""
    classes: int
    """Classes that the network is told of."""
    captions: int
    """Different captions that it is told."""
    parameters: int
    flops: int
    """Floating-point operations of a training step for each picture, forward and backward."""
    state_bytes: int
    """Memory for weights, gradients, moments and averages, without the activations of a batch."""
    disk_bytes: int
    """What the checkpoints that are kept at the same time take."""
    images: int
    """Pictures to see in all."""
    images_per_second: float
    """As measured."""
    seconds: float
    """How long it will take here, with what happens at each checkpoint, and captions that must be read first."""

    def lines(self) -> list[tuple[str, str]]:
        """What a person wants to know, by name."""
        channels, height, width = self.shape
        told = f", {self.classes} classes" if self.classes else ""
        told += f", {self.captions:,} captions" if self.captions else ""
        length = precisedelta(self.seconds, minimum_unit="seconds" if self.seconds < 60 else "minutes", format="%d")
        return [
            ("data", f"{self.dataset}, content {self.content_digest[:12]}"),
            ("pictures", f"{self.train:,} of {width}×{height}×{channels}{told}; {self.held_out:,} held out"),
            ("network", f"{self.parameters / 1e6:.2f} million parameters"),
            ("work", f"{self.flops / 1e9:.2f} GFLOP for a picture, forward and backward"),
            ("memory", f"{naturalsize(self.state_bytes, binary=True)}, and what a batch takes on its way"),
            ("disk", f"{naturalsize(self.disk_bytes, binary=True)} of checkpoints"),
            ("length", f"{self.images:,} pictures, {self.images / self.train:.1f} epochs"),
            ("time", f"{length} at {self.images_per_second:.0f} pictures/s, as measured"),
        ]


def count_flops(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> int:
    """Floating-point operations of forward and backward pass of one picture, as torch counts them."""
    with torch.device("meta"):
        network = UNet(config, shape[0], shape[1], classes)
        x, time = torch.empty(1, *shape), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            network(x, time).sum().backward()
    return int(counter.get_total_flops())


def state_size(parameters: int, averages: int, lanes: int) -> tuple[int, int]:
    """Bytes of memory that a run takes but for a batch, and bytes of its checkpoint: weights, two moments, averages.

    In memory there are gradients besides, of each lane and of all, and while a checkpoint is written a copy of it.
    """
    checkpoint = 3 + averages
    return FLOAT * parameters * (2 * checkpoint + 1 + lanes), FLOAT * parameters * checkpoint


def kept_at_once(config: TrainingConfig) -> int:
    """How many files as large as a checkpoint a run has on disk at most: one is written before another goes."""
    # A snapshot has two averages, a checkpoint these and three more of the kind.
    snapshots = math.ceil(config.checkpoints * 2 / 5) if config.ema_lengths is not None else 0
    spared = config.keep_best + (config.checkpoints // config.keep_every if config.keep_every else 0)
    return min(config.keep + spared, config.checkpoints) + 2 + snapshots


def require_disk(output: Path, needed: int) -> None:
    """Raise UserError if the disk that holds ``output`` has less than ``needed`` bytes free."""
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < needed:
        asked, there = (naturalsize(size, binary=True) for size in (needed, free))
        raise UserError(
            f"the checkpoints in {output} take {asked} and its disk has {there} free: free some, lower training.keep, "
            "or set training.output to a folder on another disk"
        )
