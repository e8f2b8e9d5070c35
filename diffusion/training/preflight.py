"""Preflight: size, duration and cost of a training run, measured before it begins."""

import math
import shutil
import time
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from humanize import naturalsize, precisedelta
from pydantic import Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import make_folder
from diffusion.common.fingerprint import describe_precision
from diffusion.common.shapes import Shape, shape_name
from diffusion.families import family_of
from diffusion.families.config import FamilyConfig
from diffusion.families.fine_tuning import TrainableSubset, share
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import WrittenTensors
from diffusion.training.config import TrainingConfig
from diffusion.training.logging import Validation
from diffusion.training.setup import TrainingSetup
from diffusion.training.trainer import Trainer, scheduled_learning_rate

PREFLIGHT = "preflight.json"
"""File name of the preflight in a run's folder."""
MEASURED_SECONDS = 4.0
FLOAT = 4
"""Bytes of a weight or a moment."""


class Preflight(Config):
    """Measured size, duration and cost of a training run."""

    dataset: str
    content_digest: str
    train: int
    held_out: int
    """Numbers of training and of held-out images."""
    shape: tuple[int, int, int]
    """Shape (C, H, W) of an image; with buckets, of the square of about as many pixels."""
    shapes: list[Shape] | None = Field(None, exclude_if=is_unset)
    """Shapes (H, W) of the images; None: all are square."""
    classes: int
    captions: int
    """Numbers of classes, and of distinct captions of training images, that the network is conditioned on."""
    low_resolution: int | None = Field(None, exclude_if=is_unset)
    """Height and width, in pixels, of the inputs of a super-resolution model; None for other models."""
    arithmetic: str
    """Number format of matrix products, and why."""
    parameters: int
    frozen: int
    """Parameters that training does not change: those below an adapter, and an autoencoder's."""
    flops: int
    """Floating-point operations per image of a training step, forward and backward."""
    disk_bytes: int
    """Bytes of disk for the checkpoints that exist at the same time."""
    checkpoint_bytes: int
    """Bytes of one of them."""
    batch_size: int
    images: int
    """Images to see in all."""
    checkpoints: int
    """Number of checkpoints, each with a sample grid."""
    requested_checkpoints: int
    """``training.checkpoints``: there are fewer if their sample grids would take over half of training.minutes."""
    checkpoint_seconds: float | None
    """Measured duration of validation and sample grid at a checkpoint; None if nothing was measured."""
    images_per_second: float | None
    """Measured training speed; None if training.images is given and nothing was measured."""
    seconds: float | None
    """Expected duration on this machine, checkpoints and the embedding of captions included."""

    @property
    def fewer_checkpoints(self) -> str | None:
        """Return why there are fewer checkpoints than training.checkpoints, in words; None if there are not."""
        if self.checkpoint_seconds is None or self.checkpoints == self.requested_checkpoints:
            return None
        return (
            f"{pluralize(self.checkpoints, 'checkpoint')} instead of {self.requested_checkpoints}, as each takes "
            f"{self.checkpoint_seconds:.2g} s for its sample grid"
        )

    def lines(self) -> list[tuple[str, str]]:
        """Format the preflight for display as pairs of name and value."""
        channels, height, width = self.shape
        conditioning = f", {self.classes} classes" if self.classes else ""
        conditioning += f", {self.captions:,} captions" if self.captions else ""
        conditioning += f", upscaled from {self.low_resolution}×{self.low_resolution}" if self.low_resolution else ""
        size = f"{width}×{height}×{channels}"
        if self.shapes is not None:
            size = f"{len(self.shapes)} shapes of about {size}, {', '.join(map(shape_name, self.shapes))}"
        frozen = f" on {self.frozen / 1e6:.2f} million frozen ones" if self.frozen else ""
        time, steps = "seen as it goes: --dry-run measures it", ""
        if self.seconds is not None and self.images_per_second is not None:
            length = precisedelta(self.seconds, minimum_unit="seconds" if self.seconds < 60 else "minutes", format="%d")
            time = f"{length} at {self.images_per_second:.0f} images/s, as measured"
            time += f"; {self.fewer_checkpoints}" if self.fewer_checkpoints else ""
            steps = f" ({self.batch_size / self.images_per_second:.2g} s each)"
        checkpoint = naturalsize(self.checkpoint_bytes, binary=True)
        return [
            ("data", f"{self.dataset}, content {self.content_digest[:12]}"),
            ("images", f"{self.train:,} of {size}{conditioning}; {self.held_out:,} held out"),
            ("network", f"{self.parameters / 1e6:.2f} million parameters{frozen}"),
            ("arithmetic", self.arithmetic),
            ("work", f"{self.flops / 1e9:.2f} GFLOP for an image, forward and backward"),
            ("disk", f"{naturalsize(self.disk_bytes, binary=True)} of checkpoints"),
            ("length", f"{self.images:,} images, {self.images / self.train:.1f} epochs"),
            ("time", time),
            ("at SIGTERM", f"ends after up to two steps{steps} and the writing of two checkpoints ({checkpoint} each)"),
        ]


def count_flops(
    config: FamilyConfig, shape: tuple[int, int, int], classes: int, network: nn.Module | None = None
) -> int:
    """Count the floating-point operations of an image, forward and backward, or of latents of this ``shape``.

    ``network`` is a meta network of the kind; None: all weights of a new one are trained.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = network or family_of(config).make_network(config, shape, classes)
        family_of(config).forward(network, shape).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def meta_network(setup: TrainingSetup) -> nn.Module:
    """Build the network that a run trains, without memory."""
    checkpointing = setup.config.gradient_checkpointing
    if setup.initial is not None and setup.base is not None:
        empty = replace(setup.initial, network=share(setup.initial.network).to("meta"))
        network = replace(setup, initial=empty).make_network(checkpointing)
        assert isinstance(network, TrainableSubset)
        return network.network
    with torch.device("meta"):
        return replace(setup, initial=None).make_network(checkpointing).train()


def count_captions(setup: TrainingSetup) -> int:
    """Count the distinct captions of training images that the network is conditioned on."""
    if setup.captions is None:
        return 0
    numbers = setup.captions.numbers[setup.dataset.rows("train")]
    return len(np.unique(numbers[numbers >= 0]))


def plan_length(config: TrainingConfig, pace: tuple[float, float] | None) -> tuple[int, int]:
    """Compute the numbers of images and of checkpoints of a run at the ``pace`` of ``measure_pace``."""
    if config.images is not None:
        return config.images, config.checkpoints
    assert pace is not None
    assert config.minutes is not None
    # On a slow machine sample grids take at most half of the time, unless a single one takes longer.
    half_seconds = config.minutes * 60 / 2
    checkpoints = max(1, min(config.checkpoints, int(half_seconds / pace[1])))
    training_seconds = max(half_seconds, 2 * half_seconds - checkpoints * pace[1])
    return max(config.images_per_step, int(training_seconds / pace[0])), checkpoints


def make_preflight(trainer: Trainer, pace: tuple[float, float] | None, reading: float = 0) -> Preflight:
    """Compute the preflight of a run at the ``pace`` of ``measure_pace``; ``reading`` is the time to embed captions."""
    setup, config, state = trainer.setup, trainer.config, trainer.state
    dataset, (images, checkpoints) = setup.dataset, plan_length(config, pace)
    parameters = sum(parameter.numel() for parameter in state.network.parameters())
    others = sum(parameter.numel() for step in state.steps for parameter in step.parameters) - parameters
    muon = config.optimizer == "muon"
    matrices = sum(parameter.numel() for step in state.steps for parameter in step.matrices) if muon else 0
    frozen = sum(parameter.numel() for parameter in setup.autoencoder.parameters()) if setup.autoencoder else 0
    if isinstance(state.network, TrainableSubset):
        frozen += sum(weight.numel() for weight in state.network.network.parameters() if not weight.requires_grad)
    averages = len(state.averages) + bool(state.guide)
    checkpoint = FLOAT * round((parameters + others) * (1 + config.moments) + parameters * averages - matrices)
    passes = 1 if config.prior is None else 2  # and one of the base, without gradients
    flops = passes * count_flops(setup.model, setup.shape, len(setup.classes), meta_network(setup))
    # One checkpoint is written before another is removed, and there may be one from a signal. A snapshot holds averages
    # and guide alone.
    snapshots = (
        math.ceil(checkpoints * averages / (1 + config.moments + averages)) if config.ema_stds is not None else 0
    )
    extra_files = config.keep_best + (checkpoints // config.keep_every if config.keep_every else 0)
    files = min(config.keep + extra_files, checkpoints) + 3 + snapshots
    return Preflight(
        dataset=dataset.manifest.name,
        content_digest=dataset.manifest.content_digest,
        train=len(dataset.rows("train")),
        held_out=len(dataset.rows("held_out")),
        shape=dataset.shape,
        shapes=None if dataset.manifest.storage.buckets is None else dataset.shapes,
        classes=len(setup.classes),
        captions=count_captions(setup),
        low_resolution=setup.model.low_resolution,
        arithmetic=describe_precision(config.precision, setup.device),
        parameters=parameters,
        frozen=frozen,
        flops=flops,
        disk_bytes=checkpoint * files,
        checkpoint_bytes=checkpoint,
        batch_size=config.images_per_step,
        images=images,
        checkpoints=checkpoints,
        requested_checkpoints=config.checkpoints,
        checkpoint_seconds=pace and pace[1],
        images_per_second=pace and 1 / pace[0],
        seconds=pace and images * pace[0] + checkpoints * pace[1] + reading,
    )


def measure_pace(
    setup: TrainingSetup, threads: Executor, sampling: SamplingConfig, output: Path | None = None
) -> tuple[float, float]:
    """Measure seconds for training on an image and for validation at a checkpoint, with a throw-away trainer.

    Processes that share a network write it to the folder ``output`` for this.
    """
    trainer, ranks = Trainer(setup, threads, output), setup.ranks
    trainer.total = 2**40
    rate = scheduled_learning_rate(setup.config, 0, trainer.total)
    with trainer.loader:
        trainer.train_step(rate)
        start, steps = time.perf_counter(), 0
        while ranks.broadcast(steps < 3 or time.perf_counter() - start < MEASURED_SECONDS):
            trainer.train_step(rate)
            steps += 1
        trainer.check_finite()
    image = (time.perf_counter() - start) / (steps * setup.config.images_per_step)
    validation = Validation(setup, trainer.objective, threads, trainer.state.network)
    start = time.perf_counter()
    tensors = trainer.checkpoint_tensors(trainer.checkpoint_header())
    if ranks.is_main:
        model, _ = validation.evaluate(tensors, trainer.state.images)
        validation.generate(model, sampling)
    if isinstance(tensors, WrittenTensors):
        tensors.path.unlink()
    pace: tuple[float, float] = ranks.broadcast((image, time.perf_counter() - start))
    return pace


def require_disk(output: Path, required_bytes: int) -> None:
    """Raise UserError if the disk that holds ``output`` has less than ``required_bytes`` free."""
    make_folder(output)
    if (free := shutil.disk_usage(output).free) < required_bytes:
        size_text, free_text = (naturalsize(size, binary=True) for size in (required_bytes, free))
        raise UserError(
            f"the checkpoints in {output} take {size_text} and its disk has {free_text} free: free some, "
            "lower training.keep, or set training.output to a folder on another disk"
        )
