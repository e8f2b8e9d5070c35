"""Validation and logging of a run: metrics by images seen in CSV files, a tracker and on the screen; PNG samples."""

import csv
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.checkpoints import AUTOENCODER, AVERAGED, GUIDE
from diffusion.common.device import CPU, resolve_device
from diffusion.common.files import sync_file, write_bytes
from diffusion.common.fingerprint import autocast
from diffusion.common.image_grids import interleave_images, make_captioned_grid, make_grid, repeat_pixels, save_png
from diffusion.common.progress import Progress
from diffusion.common.shapes import Images, apportion, height_and_width, interleave, stack_images
from diffusion.data.dataset import SPLITS
from diffusion.data.loader import Batch
from diffusion.data.manifest import Split
from diffusion.families import family_of
from diffusion.families.model import Model, TrainingObjective, to_float
from diffusion.generation.config import is_conditional
from diffusion.generation.generate import describe_conditions
from diffusion.generation.super_resolution import generate
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import INTERRUPTED, Checkpoints, CheckpointWriter, WrittenTensors
from diffusion.training.ema import PREFIXES, SNAPSHOTS, STDS
from diffusion.training.setup import NETWORK, SAMPLE_GRID, TrainingSetup

METRICS = ("loss", "gradient_norm", "learning_rate", "images_per_second", "data_wait", "peak_memory", "skipped")
"""Columns of history.csv; ``data_wait`` is the share of time spent waiting for images, ``peak_memory`` the most bytes
so far, ``skipped`` the total number of steps skipped because of a non-finite loss or gradient."""
LOSSES = ("train_loss", "train_loss_ema", "held_out_loss", "held_out_loss_ema")
"""Columns of losses.csv."""
METRICS_BUFFER = "metrics_buffer"
"""Subfolder of a run in which a tracker keeps its files; deleted with the run."""
RESTARTED = "restarted"
"""Marker file in it: the previous run was discarded, and a tracker has not processed this yet."""
VALIDATION_IMAGES = 256
"""Number of images of each split on which losses are computed."""
SPIKE = 5.0
"""Factor above the median of recent losses from which a loss counts as a spike."""
REMEMBERED = 50
"""Number of recent losses that a spike is compared with; at least a tenth of them is needed."""
RISING = 3
"""Consecutive checkpoints with rising held-out loss and falling training loss that count as over-fitting."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Tracker of metrics and images during training; positions are counted in images seen."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Log ``metrics`` after ``images``."""

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Log ``image`` under ``name`` after ``images``."""

    def sync(self) -> None:
        """Make everything logged so far durable, as a checkpoint follows and earlier steps are not repeated."""


@dataclass(frozen=True)
class MetricsFile:
    """CSV file of metrics whose first column, ``images``, is increasing."""

    path: Path
    columns: tuple[str, ...]

    def rewind(self, images: int) -> None:
        """Drop the rows beyond ``images`` and an incomplete last line."""
        rows = []
        if self.path.is_file():
            # A power cut may leave zeros after the synced data.
            complete = self.path.read_text().split("\0")[0].split("\n")[1:-1]
            rows = [line for line in complete if int(line.split(",")[0]) <= images]
        write_bytes(self.path, "".join(f"{line}\n" for line in (",".join(("images", *self.columns)), *rows)).encode())

    def append(self, images: int, metrics: Mapping[str, float]) -> None:
        """Append a row."""
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([images, *(metrics[name] for name in self.columns)])


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all rows of a ``MetricsFile``, oldest first."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


class TrainingMonitor:
    """Monitor that warns of loss spikes, over-fitting and weights that do not change, given the losses so far."""

    def __init__(self, losses: Iterable[float] = (), validation_losses: Iterable[tuple[float, float]] = ()) -> None:
        self.losses = deque(losses, REMEMBERED)
        """Recent mean losses."""
        self.validation_losses = deque(validation_losses, RISING + 1)
        """Recent losses of the averaged weights on training and held-out images."""
        self.sums: dict[str, list[float]] = {}
        """Sums of the weights at the last check."""

    def check_loss(self, loss: float, images: int) -> None:
        """Warn of a spike of the mean loss since the last check."""
        if len(self.losses) >= REMEMBERED // 10 and loss > SPIKE * median(self.losses):
            logger.warning(
                "the loss leapt to %.3g after %d images, from about %.3g: if it does not come back, lower "
                "training.learning_rate or training.max_grad_norm",
                loss,
                images,
                median(self.losses),
            )
        if math.isfinite(loss):
            self.losses.append(loss)

    def check_validation(self, metrics: Mapping[str, float], images: int) -> None:
        """Warn of over-fitting, by the losses of the averaged weights on fixed images of both splits."""
        train, held_out = (metrics.get(f"{split}_loss_ema", math.nan) for split in ("train", "held_out"))
        self.validation_losses.append((train, held_out))
        steps = list(pairwise(self.validation_losses))
        if len(steps) == RISING and all(new[0] < old[0] and new[1] > old[1] for old, new in steps):
            logger.warning(
                "after %d images the loss on held-out images has risen %d checkpoints in a row, while that on others "
                "fell: the network memorizes its images. Ingest more, train for less, or make it smaller",
                images,
                RISING,
            )
            self.validation_losses.clear()

    def check_weights(self, network: Mapping[str, Tensor], average: Mapping[str, Tensor], images: int) -> None:
        """Warn if the network, or the average of its weights, has not changed since the last check."""
        for name, tensors in (("network", network), ("average of the weights", average)):
            sums = [float(tensor.detach().double().sum()) for tensor in tensors.values()]
            if self.sums.get(name) == sums:
                logger.warning(
                    "the %s has not moved since the checkpoint before image %d: look at training.learning_rate, "
                    "training.ema_decay and the metric skipped",
                    name,
                    images,
                )
            self.sums[name] = sums


class ValidationInterruptedError(Exception):
    """A validation ended at a signal."""


@dataclass(frozen=True)
class Validation:
    """Validation of a run on the same images, noise levels and noise at each checkpoint."""

    setup: TrainingSetup
    objective: TrainingObjective
    threads: Executor
    trained: nn.Module
    """The network that is trained, on its device."""

    @cached_property
    def batches(self) -> dict[Split, list[Batch]]:
        """Return the validation images of each split, a batch per bucket; cached: they may be on remote storage."""
        batches: dict[Split, list[Batch]] = {}
        dataset = self.setup.dataset
        for split in SPLITS:
            rows = dataset.rows(split)
            if self.setup.config.window is not None:  # from as few shards as possible
                rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
            bucket_batches, start = list[Batch](), 0
            for bucket in dataset.split_by_bucket(rows[:VALIDATION_IMAGES]):
                images = dataset.images(bucket) if self.setup.latents is None else self.setup.latents(bucket)
                masks = None if self.setup.config.mask is None else torch.from_numpy(dataset.masks(bucket))
                bucket_batches.append(Batch(range(start, start + len(bucket)), bucket, images, masks))
                start += len(bucket)
            if bucket_batches:
                batches[split] = bucket_batches
        return batches

    @property
    def images(self) -> Tensor:
        """Return the images that a super-resolution model upscales, of one bucket: (N, C, H, W) uint8."""
        batches = self.batches["held_out" if "held_out" in self.batches else "train"]
        return max(batches, key=lambda batch: len(batch.rows)).images[:SAMPLE_GRID]

    def evaluate(
        self, tensors: dict[str, Tensor], images: int, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Model, dict[str, float]]:
        """Build the model of a state's ``tensors``; returns it and the losses of raw and averaged weights.

        Once ``stop`` is true, their next evaluation raises ValidationInterruptedError, also in the model.
        """
        setup = self.setup

        def require_time(*_: object) -> None:
            if stop():
                raise ValidationInterruptedError

        networks = {
            suffix: setup.network_from(tensors, prefix, self.trained)
            for suffix, prefix in (("", NETWORK), ("_ema", AVERAGED))
        }
        for network in networks.values():
            network.register_forward_pre_hook(require_time)
        model: Model = family_of(setup.model).make_model(
            setup.model_header(images), networks["_ema"], setup.autoencoder
        )
        if setup.has_guide:
            model = replace(model, guide=setup.network_from(tensors, GUIDE))
        futures = [
            self.threads.submit(self._metrics, split, batches, suffix, network)
            for split, batches in (self.batches if self.objective.comparable else {}).items()
            for suffix, network in networks.items()
        ]
        return model, {name: value for future in futures for name, value in future.result().items()}

    def _metrics(self, split: Split, batches: list[Batch], suffix: str, network: nn.Module) -> dict[str, float]:
        device, losses, measurements = self.setup.device, list[Tensor](), list[tuple[dict[str, float], int]]()
        # Whatever the number of processes and threads, which must not change the losses.
        images_at_once = self.setup.config.micro_batch or self.setup.config.images_per_step
        with torch.inference_mode(), autocast(self.setup.config.precision, device):
            network = family_of(self.setup.model).place(network, device)
            for batch in batches:
                conditioning = self.setup.conditioning(batch)
                inputs = self.objective.make_batch(self.setup.x0(batch), batch.indices, conditioning, split)
                passes = self.setup.with_masks(inputs, batch).split(math.ceil(len(batch.rows) / images_at_once))
                losses.append(torch.cat([self.objective.losses(network, each.to(device)).cpu() for each in passes]))
                if (split, suffix) == ("held_out", "_ema"):
                    on_device = (each.to(device) for each in passes)
                    batch_metrics = self.objective.validation_metrics(network, on_device, losses[-1])
                    measurements.append((batch_metrics, len(batch.rows)))
        metrics = {f"{split}_loss{suffix}": torch.cat(losses).mean().item()}
        for name in sorted({name for batch_metrics, _ in measurements for name in batch_metrics}):
            # Metrics of a bucket with few images may be missing.
            pairs = [(batch_metrics[name], count) for batch_metrics, count in measurements if name in batch_metrics]
            images = sum(count for _, count in pairs)
            metrics[name] = sum(value * (count / images) for value, count in pairs)
        return metrics

    def generate(self, model: Model, sampling: SamplingConfig) -> Images:
        """Generate the images of a sample grid, uint8, in the shares of the training images' shapes.

        A super-resolution model upscales held-out ones.
        """
        inputs, conditions = self.setup.task.inputs(self.images), self.setup.sample_grid_conditions()
        sampling = model.header.sampling(sampling, is_conditional(model.classes, conditions))
        if inputs is not None:
            return generate(model, inputs, range(len(inputs)), 0, sampling, conditions=conditions)
        counts, encodings = apportion(model.header.trained_shapes, SAMPLE_GRID), self.setup.grid_encodings
        model = model.to(resolve_device(sampling.device))
        images = {
            shape: generate(
                model.with_size(shape), None, range(count), 0, sampling, conditions=conditions, encodings=encodings
            )
            for shape, count in counts.items()
        }
        return stack_images([images[shape][number] for shape, number in interleave(counts)])

    def sample_grid(self, model: Model, generated: Images) -> Image.Image:
        """Arrange images that ``model`` generated, by class or caption; upscaled ones beside small and real images."""
        if (inputs := self.setup.task.inputs(self.images)) is None:
            conditions = self.setup.sample_grid_conditions()
            texts = describe_conditions(model, range(SAMPLE_GRID), 0, conditions)
            numbers = [number for _, number in interleave(apportion(model.header.trained_shapes, SAMPLE_GRID))]
            return make_captioned_grid(generated, [texts[number] for number in numbers])
        return make_grid(interleave_images(repeat_pixels(inputs, self.setup.task.scale), generated, self.images), 12)

    def colour_drift(self, generated: Images) -> dict[str, float]:
        """Compute the deviation of each channel's mean from the data set's, in its standard deviations."""
        manifest = self.setup.dataset.manifest
        if isinstance(generated, list):
            means = torch.stack([to_float(image).mean((1, 2)) for image in generated]).mean(0).tolist()
        else:
            means = to_float(generated).mean((0, 2, 3)).tolist()
        return {
            f"sample_drift_{'grey' if len(means) == 1 else 'rgb'[channel]}": (mean - real) / max(spread, 1e-6)
            for channel, (mean, real, spread) in enumerate(zip(means, manifest.mean, manifest.std, strict=True))
        }


class TrainingLog:
    """Log of a run in the folder ``output``, with ``trackers`` and on the screen; also starts its checkpoints.

    Only the main process has one. Rows beyond ``images``, left by a killed process, are dropped. ``total`` is the
    number of images to see.
    """

    def __init__(
        self,
        validation: Validation,
        output: Path,
        sampling: SamplingConfig,
        writer: CheckpointWriter,
        trackers: Sequence[Tracker],
        progress: Progress,
        images: int,
        total: int,
    ) -> None:
        self.validation, self.output, self.sampling, self.writer = validation, output, sampling, writer
        self.trackers, self.progress, self.total = trackers, progress, total
        self.history = MetricsFile(output / "history.csv", METRICS)
        self.losses = MetricsFile(output / "losses.csv", LOSSES)
        for file in (self.history, self.losses):
            file.rewind(images)
        self.monitor = TrainingMonitor(
            (row["loss"] for row in read_metrics(self.history.path) if math.isfinite(row["loss"])),
            ((row["train_loss_ema"], row["held_out_loss_ema"]) for row in read_metrics(self.losses.path)),
        )

    def log_metrics(self, metrics: dict[str, float], images: int) -> None:
        """Log ``METRICS`` of the steps since the last call."""
        self.monitor.check_loss(metrics["loss"], images)
        self.history.append(images, metrics)
        for tracker in self.trackers:
            tracker.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, images)
        self.progress("images trained on", images, self.total, f"loss {metrics['loss']:.4f}")

    def checkpoint(
        self, tensors: dict[str, Tensor], header: dict[str, Any], save_every: int, stop: Callable[[], bool]
    ) -> bool:
        """Validate and log the averaged weights in ``tensors``, then start a checkpoint: a kill repeats the rest.

        Returns False, and has logged and written nothing, if ``stop`` was true before the end of the validation.
        """
        setup, images = self.validation.setup, int(header["model_header"]["images"])
        strip = None
        try:
            model, metrics = self.validation.evaluate(tensors, images, stop)
            generated = self.validation.generate(model, self.sampling)
            has_strip = images == self.total and "noise_levels" in setup.model.abilities and find_spec("matplotlib")
            if self.trackers and has_strip:
                from diffusion.generation.explain import reverse_process_strip  # matplotlib is slow to load

                conditioning = setup.task.conditioning(self.validation.images[:1]) or None
                if conditioning:
                    model = model.with_size(height_and_width(self.validation.images))
                strip = reverse_process_strip(model.to(CPU), conditioning)
        except ValidationInterruptedError:
            if isinstance(tensors, WrittenTensors):
                tensors.path.unlink()
            return False
        self.losses.append(images, {name: metrics.get(name, math.nan) for name in LOSSES})
        sample_grid = self.validation.sample_grid(model, generated)
        save_png(self.output / "samples" / f"{images:010d}.png", sample_grid)
        for tracker in self.trackers:
            tracker.log_metrics(metrics | self.validation.colour_drift(generated), images)
            tracker.log_image("samples", sample_grid, images)
            if strip is not None:
                tracker.log_image("reverse", strip, images)
        self.monitor.check_validation(metrics, images)
        self.monitor.check_weights(_select(NETWORK, tensors), _select(AVERAGED, tensors), images)
        if setup.config.ema_stds is not None:
            parts = {name: value for name, value in tensors.items() if name.startswith((*PREFIXES, GUIDE, AUTOENCODER))}
            snapshot_header = setup.header(images, self.total) | {STDS: list(setup.config.ema_stds)}
            Checkpoints(self.output / SNAPSHOTS).save(parts, snapshot_header)
        self._sync()
        self.writer.save(tensors, header, setup.config.keep, self._protected_images(save_every))
        return True

    def interrupt(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Write a checkpoint between two regular ones, after which the process ends."""
        self._sync()
        # The write in progress would remove this one as older.
        self.writer.wait()
        images, checkpoints = header["model_header"]["images"], Checkpoints(self.output / INTERRUPTED)
        checkpoints.save(tensors, header)
        checkpoints.prune(1, {images})
        logger.info("stopped after %d of %d images: the same command goes on from there", images, self.total)

    def _sync(self) -> None:
        for file in (self.history, self.losses):
            sync_file(file.path)
        for tracker in self.trackers:
            tracker.sync()

    def _protected_images(self, save_every: int) -> set[int]:
        """Return the image counts of checkpoints that pruning must keep."""
        config = self.validation.setup.config
        rows = read_metrics(self.losses.path)
        finite = [row for row in rows if math.isfinite(row["held_out_loss_ema"])]
        best = sorted(finite, key=lambda row: row["held_out_loss_ema"])[: config.keep_best]
        protected = {int(row["images"]) for row in best}
        if config.keep_every is not None:
            protected.update(
                int(row["images"]) for row in rows if row["images"] % (config.keep_every * save_every) == 0
            )
        return protected


def _select(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}
