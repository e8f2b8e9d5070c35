"""What a training run will do, and what it takes, before it begins."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from humanize import naturalsize, precisedelta
from pydantic import Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import Config, unset
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.families import family_of
from diffusion.files import make_folder
from diffusion.models.config import FamilyConfig, LatentSpace
from diffusion.models.vae import VAE
from diffusion.training.config import TrainingConfig
from diffusion.training.record import drawn_by
from diffusion.training.run import Run

PREFLIGHT = "preflight.json"
"""What a run said of itself when it began, in its folder."""
MEASURED_SECONDS = 4.0
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
    low_resolution: int | None = Field(None, exclude_if=unset)
    """Height and width of the small pictures that it is shown; None: none."""
    parameters: int
    flops: int
    """Floating-point operations of a training step for each picture, forward and backward."""
    state_bytes: int
    """Memory for weights, gradients, moments and averages, without the activations of a batch."""
    disk_bytes: int
    """What the checkpoints that are kept at the same time take."""
    images: int
    """Pictures to see in all."""
    images_per_second: float | None
    """As measured; None: as many pictures were asked for, nothing was."""
    seconds: float | None
    """How long it will take here, with what happens at each checkpoint, and captions that must be read first."""

    def lines(self) -> list[tuple[str, str]]:
        """What a person wants to know, by name."""
        channels, height, width = self.shape
        told = f", {self.classes} classes" if self.classes else ""
        told += f", {self.captions:,} captions" if self.captions else ""
        told += f", shown at {self.low_resolution}×{self.low_resolution}" if self.low_resolution else ""
        time = "seen as it goes: --dry-run measures it"
        if self.seconds is not None:
            unit = "seconds" if self.seconds < 60 else "minutes"
            length = precisedelta(self.seconds, minimum_unit=unit, format="%d")
            time = f"{length} at {self.images_per_second:.0f} pictures/s, as measured"
        return [
            ("data", f"{self.dataset}, content {self.content_digest[:12]}"),
            ("pictures", f"{self.train:,} of {width}×{height}×{channels}{told}; {self.held_out:,} held out"),
            ("network", f"{self.parameters / 1e6:.2f} million parameters"),
            ("work", f"{self.flops / 1e9:.2f} GFLOP for a picture, forward and backward"),
            ("memory", f"{naturalsize(self.state_bytes, binary=True)}, and what a batch takes on its way"),
            ("disk", f"{naturalsize(self.disk_bytes, binary=True)} of checkpoints"),
            ("length", f"{self.images:,} pictures, {self.images / self.train:.1f} epochs"),
            ("time", time),
        ]


@dataclass(frozen=True)
class Pace:
    """Seconds that things take here."""

    image: float
    """To train on one picture."""
    checkpoint: float
    """To take stock at a checkpoint."""


def count_flops(
    config: FamilyConfig, shape: tuple[int, int, int], classes: int, latents: LatentSpace | None = None
) -> int:
    """Floating-point operations of forward and backward pass of one picture, as torch counts them.

    With ``latents``, of those that bring it there as well.
    """
    family = family_of(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if latents is not None:
            VAE(latents.autoencoder, shape[0], shape[-1]).requires_grad_(False).encode(torch.empty(1, *shape))
            shape = latents.shape
        family.forward(family.network(config, shape, classes), shape).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def state_size(parameters: int, averages: int, lanes: int, opponent: int = 0) -> tuple[int, int]:
    """Bytes of memory that a run takes but for a batch, and bytes of its checkpoint: weights, two moments, averages.

    In memory there are gradients besides, of each lane and of all, and while a checkpoint is written a copy of it.
    ``opponent``: parameters of what is trained as well, and of which no average is taken.
    """
    checkpoint = parameters * (3 + averages) + opponent * 3
    return FLOAT * (2 * checkpoint + (parameters + opponent) * (1 + lanes)), FLOAT * checkpoint


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def kept_at_once(config: TrainingConfig) -> int:
    """How many files as large as a checkpoint a run has on disk at most: one is written before another goes."""
    # A snapshot has two averages, a checkpoint these and three more of the kind.
    snapshots = math.ceil(config.checkpoints * 2 / 5) if config.ema_lengths is not None else 0
    spared = config.keep_best + (config.checkpoints // config.keep_every if config.keep_every else 0)
    return min(config.keep + spared, config.checkpoints) + 2 + snapshots


def preflight_of(run: Run, pace: Pace | None, reading: float = 0) -> Preflight:
    """What ``run`` will do at this ``pace``, which must have been measured if ``training.minutes`` is given.

    ``reading`` is how many seconds the captions take first.
    """
    config, dataset = run.config, run.dataset
    images = images_in(config, pace)
    parameters, opponent = _count(run.state.network), run.state.opponent
    against = _count(opponent.network) if opponent else 0
    memory, checkpoint = state_size(parameters, len(run.state.averages), config.lanes, against)
    return Preflight(
        dataset=dataset.manifest.name,
        content_digest=dataset.manifest.content_digest,
        train=len(dataset.rows("train")),
        held_out=len(dataset.rows("held_out")),
        shape=dataset.shape,
        classes=len(run.classes),
        captions=len(run.captions.embeddings) if run.captions else 0,
        low_resolution=run.model.low_resolution,
        parameters=parameters,
        flops=count_flops(
            run.model, dataset.shape, len(run.classes), run.first_stage.space if run.first_stage else None
        ),
        state_bytes=memory,
        disk_bytes=checkpoint * kept_at_once(config),
        images=images,
        images_per_second=pace and 1 / pace.image,
        seconds=pace and images * pace.image + config.checkpoints * pace.checkpoint + reading,
    )


def measure(run: Run, sampling: SamplingConfig) -> Pace:
    """The pace of ``run`` here, by steps and one checkpoint's work on a copy."""
    trial = Run.new(run.dataset, run.model, run.config, run.pool, run.ranks, run.captions, run.first_stage)
    trial.total = 2**40
    with trial.loader:
        trial.step()
        start, steps = time.perf_counter(), 0
        while run.ranks.agreed(steps < 3 or time.perf_counter() - start < MEASURED_SECONDS):
            trial.step()
            steps += 1
        trial.settle()
    image = (time.perf_counter() - start) / (steps * run.config.batch_size)
    if trial.device.type != "cpu" and run.ranks.leads:
        # The first time compiles for these pictures, and no checkpoint after it does.
        trial.probe(trial.state.network)
    start = time.perf_counter()
    whole = trial.gathered()
    if run.ranks.leads:
        averaged = whole.averaged()
        whole.probe(averaged.network)
        drawn_by(averaged, run, sampling)
    return run.ranks.agreed(Pace(image, time.perf_counter() - start))


def images_in(config: TrainingConfig, pace: Pace | None) -> int:
    """How many images ``config`` asks for: a number, or as many as fit into its minutes at this ``pace``."""
    if config.images is not None:
        return config.images
    assert pace is not None
    assert config.minutes is not None
    pauses = pace.checkpoint * config.checkpoints
    if pauses > config.minutes * 60 / 2:
        raise UserError(
            f"{pauses:.0f} s of training.minutes = {config.minutes:g} would go into {config.checkpoints} sample grids: "
            "raise it, or lower sampling.steps or training.checkpoints"
        )
    return max(config.batch_size, int((config.minutes * 60 - pauses) / pace.image))


def require_disk(output: Path, needed: int) -> None:
    """Raise UserError if the disk that holds ``output`` has less than ``needed`` bytes free."""
    make_folder(output)
    free = shutil.disk_usage(output).free
    if free < needed:
        asked, there = (naturalsize(size, binary=True) for size in (needed, free))
        raise UserError(
            f"the checkpoints in {output} take {asked} and its disk has {there} free: free some, lower training.keep, "
            "or set training.output to a folder on another disk"
        )
