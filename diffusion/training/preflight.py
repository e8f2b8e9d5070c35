"""Preflight: size, duration and cost of a training run, measured before it begins."""

import math
import shutil
import time
from concurrent.futures import Executor
from pathlib import Path

import torch
from humanize import naturalsize, precisedelta
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from diffusion.common.config import Config, unset
from diffusion.common.errors import UserError
from diffusion.common.files import make_folder
from diffusion.common.fingerprint import describe_precision
from diffusion.families import family_of
from diffusion.models.config import FamilyConfig, LatentSpace
from diffusion.models.vae import Autoencoder
from diffusion.process.samplers import SamplingConfig
from diffusion.training.logging import Validation
from diffusion.training.setup import TrainingSetup
from diffusion.training.trainer import Trainer, scheduled_learning_rate

PREFLIGHT = "preflight.json"
"""File name of the preflight in a run's folder."""
MEASURED_SECONDS = 4.0
FLOAT = 4
"""Bytes of a weight, a gradient or an optimizer moment."""


class Preflight(Config):
    """Measured size, duration and cost of a training run."""

    dataset: str
    content_digest: str
    train: int
    held_out: int
    """Numbers of training and of held-out images."""
    shape: tuple[int, int, int]
    """Shape (C, H, W) of an image."""
    classes: int
    captions: int
    """Numbers of classes and of distinct captions that the network is conditioned on."""
    low_resolution: int | None = Field(None, exclude_if=unset)
    """Height and width, in pixels, of the inputs of a super-resolution model; None for other models."""
    arithmetic: str
    """Number format of matrix products, and why."""
    parameters: int
    flops: int
    """Floating-point operations per image of a training step, forward and backward."""
    state_bytes: int
    """Bytes of memory for weights, gradients, moments and averages, without the activations of a batch."""
    disk_bytes: int
    """Bytes of disk for the checkpoints that exist at the same time."""
    images: int
    """Images to see in all."""
    images_per_second: float | None
    """Measured training speed; None if training.images is given and nothing was measured."""
    seconds: float | None
    """Expected duration on this machine, checkpoints and the embedding of captions included."""

    def lines(self) -> list[tuple[str, str]]:
        """Format the preflight for display as pairs of name and value."""
        channels, height, width = self.shape
        conditioning = f", {self.classes} classes" if self.classes else ""
        conditioning += f", {self.captions:,} captions" if self.captions else ""
        conditioning += f", upscaled from {self.low_resolution}×{self.low_resolution}" if self.low_resolution else ""
        time = "seen as it goes: --dry-run measures it"
        if self.seconds is not None:
            length = precisedelta(self.seconds, minimum_unit="seconds" if self.seconds < 60 else "minutes", format="%d")
            time = f"{length} at {self.images_per_second:.0f} images/s, as measured"
        return [
            ("data", f"{self.dataset}, content {self.content_digest[:12]}"),
            ("images", f"{self.train:,} of {width}×{height}×{channels}{conditioning}; {self.held_out:,} held out"),
            ("network", f"{self.parameters / 1e6:.2f} million parameters"),
            ("arithmetic", self.arithmetic),
            ("work", f"{self.flops / 1e9:.2f} GFLOP for an image, forward and backward"),
            ("memory", f"{naturalsize(self.state_bytes, binary=True)}, and what a batch takes on its way"),
            ("disk", f"{naturalsize(self.disk_bytes, binary=True)} of checkpoints"),
            ("length", f"{self.images:,} images, {self.images / self.train:.1f} epochs"),
            ("time", time),
        ]


def count_flops(
    config: FamilyConfig, shape: tuple[int, int, int], classes: int, latents: LatentSpace | None = None
) -> int:
    """Count the floating-point operations of an image, forward and backward, with the encoder of ``latents`` if any."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if latents is not None:
            Autoencoder(latents.autoencoder, shape[0], shape[-1]).requires_grad_(False).encode(torch.empty(1, *shape))
            shape = latents.shape
        family = family_of(config)
        family.forward(family.make_network(config, shape, classes), shape).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def state_size(parameters: int, averages: int, threads: int, others: int = 0, matrices: int = 0) -> tuple[int, int]:
    """Compute the bytes of memory of a run without a batch, and of its checkpoint: weights, two moments, averages.

    Memory also holds gradients, per thread and in total, and a copy of the checkpoint while it is written. ``others``:
    trained parameters outside the network, which have no average; ``matrices``: those of Muon, which has one moment.
    """
    checkpoint = parameters * (3 + averages) + others * 3 - matrices
    return FLOAT * (2 * checkpoint + (parameters + others) * (1 + threads)), FLOAT * checkpoint


def make_preflight(trainer: Trainer, pace: tuple[float, float] | None, reading: float = 0) -> Preflight:
    """Compute the preflight of a run at the ``pace`` of ``measure_pace``; ``reading`` is the time to embed captions."""
    setup, config, state = trainer.setup, trainer.config, trainer.state
    dataset, images = setup.dataset, config.images
    if images is None:
        assert pace is not None
        assert config.minutes is not None
        if (pauses := pace[1] * config.checkpoints) > config.minutes * 60 / 2:
            raise UserError(
                f"{pauses:.0f} s of training.minutes = {config.minutes:g} would go into {config.checkpoints} sample "
                "grids: raise it, or lower sampling.steps or training.checkpoints"
            )
        images = max(config.batch_size, int((config.minutes * 60 - pauses) / pace[0]))
    parameters = sum(parameter.numel() for parameter in state.network.parameters())
    others = sum(parameter.numel() for step in state.steps for parameter in step.parameters) - parameters
    muon = config.optimizer == "muon"
    matrices = sum(parameter.numel() for step in state.steps for parameter in step.matrices) if muon else 0
    memory, checkpoint = state_size(parameters, len(state.averages), config.cpu_threads, others, matrices)
    # One checkpoint is written before another is removed. A snapshot holds two of a checkpoint's five parts.
    snapshots = math.ceil(config.checkpoints * 2 / 5) if config.ema_stds is not None else 0
    protected = config.keep_best + (config.checkpoints // config.keep_every if config.keep_every else 0)
    files = min(config.keep + protected, config.checkpoints) + 2 + snapshots
    latents = setup.autoencoder.space if setup.autoencoder else None
    return Preflight(
        dataset=dataset.manifest.name,
        content_digest=dataset.manifest.content_digest,
        train=len(dataset.rows("train")),
        held_out=len(dataset.rows("held_out")),
        shape=dataset.shape,
        classes=len(setup.classes),
        captions=len(setup.captions.embeddings) if setup.captions else 0,
        low_resolution=setup.model.low_resolution,
        arithmetic=describe_precision(config.precision, setup.device),
        parameters=parameters,
        flops=count_flops(setup.model, dataset.shape, len(setup.classes), latents),
        state_bytes=memory,
        disk_bytes=checkpoint * files,
        images=images,
        images_per_second=pace and 1 / pace[0],
        seconds=pace and images * pace[0] + config.checkpoints * pace[1] + reading,
    )


def measure_pace(setup: TrainingSetup, threads: Executor, sampling: SamplingConfig) -> tuple[float, float]:
    """Measure seconds for training on an image and for validation at a checkpoint, with a throw-away trainer."""
    trainer, ranks = Trainer(setup, threads), setup.ranks
    trainer.total = 2**40
    rate = scheduled_learning_rate(setup.config, 0, trainer.total)
    with trainer.loader:
        trainer.train_step(rate)
        start, steps = time.perf_counter(), 0
        while ranks.broadcast(steps < 3 or time.perf_counter() - start < MEASURED_SECONDS):
            trainer.train_step(rate)
            steps += 1
        trainer.check_finite()
    image = (time.perf_counter() - start) / (steps * setup.config.batch_size)
    validation = Validation(setup, trainer.objective, threads)
    start = time.perf_counter()
    tensors = trainer.checkpoint_tensors()
    if ranks.is_main:
        averaged, _ = validation.evaluate(tensors, trainer.state.images)
        validation.generate(averaged, sampling)
    pace: tuple[float, float] = ranks.broadcast((image, time.perf_counter() - start))
    return pace


def require_disk(output: Path, needed: int) -> None:
    """Raise UserError if the disk that holds ``output`` has less than ``needed`` bytes free."""
    make_folder(output)
    if (free := shutil.disk_usage(output).free) < needed:
        required, available = (naturalsize(size, binary=True) for size in (needed, free))
        raise UserError(
            f"the checkpoints in {output} take {required} and its disk has {available} free: free some, "
            "lower training.keep, or set training.output to a folder on another disk"
        )
