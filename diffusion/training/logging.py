"""Logging of a run: metrics by images seen in CSV files, in a tracker and on the screen; samples as PNG files."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from diffusion.checkpoints import AVERAGED
from diffusion.common.files import sync_file, write_bytes
from diffusion.common.fingerprint import CPU
from diffusion.common.image_grids import save_png
from diffusion.common.progress import Progress
from diffusion.families.model import DiffusionModel
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import CheckpointWriter
from diffusion.training.post_hoc_ema import SNAPSHOTS, save_snapshot
from diffusion.training.state import NETWORK
from diffusion.training.training_monitor import TrainingMonitor
from diffusion.training.validation import Validation

METRICS = ("loss", "gradient_norm", "learning_rate", "images_per_second", "data_wait", "skipped")
"""Columns of history.csv; ``data_wait`` is the share of time spent waiting for images, ``skipped`` the total number of
steps skipped because of a non-finite loss or gradient."""
LOSSES = ("train_loss", "train_loss_ema", "held_out_loss", "held_out_loss_ema")
"""Columns of losses.csv."""
METRICS_BUFFER = "metrics_buffer"
"""Subfolder of a run in which a tracker keeps its files; deleted with the run."""
RESTARTED = "restarted"
"""Marker file in it: the previous run was discarded, and a tracker has not processed this yet."""


class Tracker(Protocol):
    """Tracker of metrics and images during training; positions are counted in images seen."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Log ``metrics`` after ``images``."""

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Log ``image`` under ``name`` after ``images``."""

    def sync(self) -> None:
        """Make everything logged so far durable, as a checkpoint follows and earlier steps are not repeated."""


class NoTracker:
    """Tracker that logs nothing: the run's folder holds the files that training itself writes."""

    def __init__(self, anew: bool = True) -> None:
        """Ignore whether the run starts from scratch."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Drop ``metrics``."""

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Drop ``image``."""

    def sync(self) -> None:
        """Do nothing: nothing was logged."""


@dataclass(frozen=True)
class MetricsFile:
    """CSV file of metrics whose first column, ``images``, is increasing."""

    path: Path
    columns: tuple[str, ...]

    def rewind(self, images: int) -> None:
        """Drop the rows beyond ``images`` and an incomplete last line.

        Columns missing from a file of an earlier version become ``nan``.
        """
        columns = ("images", *self.columns)
        kept = [",".join(columns)]
        if self.path.is_file():
            # A power cut may leave zeros after the synced data.
            complete = csv.DictReader(self.path.read_text().split("\0")[0].split("\n")[:-1], restval="nan")
            kept += [
                ",".join(row.get(name, "nan") for name in columns) for row in complete if int(row["images"]) <= images
            ]
        write_bytes(self.path, ("\n".join(kept) + "\n").encode())

    def append(self, images: int, metrics: Mapping[str, float]) -> None:
        """Append a row."""
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([images, *(metrics[name] for name in self.columns)])

    def sync(self) -> None:
        """Make all rows written so far durable."""
        sync_file(self.path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all rows of a ``MetricsFile``, oldest first."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@dataclass
class TrainingLog:
    """Log of a run in the folder ``output``, with ``tracker`` and on the screen; also starts its checkpoints.

    Only the main process has one.
    """

    validation: Validation
    output: Path
    sampling: SamplingConfig
    writer: CheckpointWriter
    tracker: Tracker
    progress: Progress
    images: int
    """Images seen when the log is opened: later rows, left by a killed process, are dropped and written again."""
    total: int
    """Total number of images to see."""
    monitor: TrainingMonitor = field(default_factory=TrainingMonitor)

    def __post_init__(self) -> None:
        """Rewind the files, and restore the training monitor from the remaining history."""
        for file in (self.history, self.losses):
            file.rewind(self.images)
        self.monitor.losses.extend(row["loss"] for row in read_metrics(self.history.path) if math.isfinite(row["loss"]))
        self.monitor.validation_losses.extend(
            (row["train_loss_ema"], row["held_out_loss_ema"]) for row in read_metrics(self.losses.path)
        )

    @cached_property
    def history(self) -> MetricsFile:
        """Return the CSV file of metrics of the steps."""
        return MetricsFile(self.output / "history.csv", METRICS)

    @cached_property
    def losses(self) -> MetricsFile:
        """Return the CSV file of losses on the validation images."""
        return MetricsFile(self.output / "losses.csv", LOSSES)

    def log_metrics(self, metrics: dict[str, float], images: int) -> None:
        """Log ``METRICS`` of the steps since the last call."""
        self.monitor.check_loss(metrics["loss"], images)
        self.history.append(images, metrics)
        self.tracker.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, images)
        self.progress("images trained on", images, self.total, f"loss {metrics['loss']:.4f}")

    def checkpoint(self, tensors: dict[str, Tensor], counts: dict[str, int], save_every: int) -> None:
        """Validate the averaged weights in ``tensors``, log the results and start a checkpoint.

        The checkpoint comes last, so that a killed process repeats the rest.
        """
        setup, images = self.validation.setup, counts["images"]
        averaged = setup.model_from(tensors, images)
        metrics = self.validation.metrics({"": setup.network_from(tensors, NETWORK), "_ema": averaged.network})
        self.losses.append(images, {name: metrics.get(name, math.nan) for name in LOSSES})
        generated = self.validation.generate(averaged, self.sampling)
        self.tracker.log_metrics(metrics | self.validation.colour_drift(generated), images)
        sample_grid = self.validation.sample_grid(generated)
        save_png(self.output / "samples" / f"{images:010d}.png", sample_grid)
        self.tracker.log_image("samples", sample_grid, images)
        if images == self.total and isinstance(averaged, DiffusionModel):
            from diffusion.generation.explain import reverse_process_strip  # matplotlib is slow to load

            conditioning = task_of(setup.model).conditioning(self.validation.images[:1]) or None
            self.tracker.log_image("reverse", reverse_process_strip(averaged.on(CPU), conditioning), images)
        self.monitor.check_validation(metrics, images)
        self.monitor.check_weights(_under(NETWORK, tensors), _under(AVERAGED, tensors), images)
        if setup.config.ema_stds is not None:
            header = setup.header(images, self.total)
            save_snapshot(self.output / SNAPSHOTS, tensors, setup.config.ema_stds, header)
        for file in (self.history, self.losses):
            file.sync()
        self.tracker.sync()
        header = setup.checkpoint_header(counts, self.total)
        self.writer.save(tensors, header, setup.config.keep, self._spared(save_every))

    def _spared(self, save_every: int) -> set[int]:
        """Return the image counts of checkpoints that pruning must keep."""
        config = self.validation.setup.config
        rows = read_metrics(self.losses.path)
        finite = [row for row in rows if math.isfinite(row["held_out_loss_ema"])]
        best = sorted(finite, key=lambda row: row["held_out_loss_ema"])[: config.keep_best]
        spared = {int(row["images"]) for row in best}
        if config.keep_every is not None:
            spared.update(int(row["images"]) for row in rows if row["images"] % (config.keep_every * save_every) == 0)
        return spared


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}
