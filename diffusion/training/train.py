"""Train: the loop of DDPM (arXiv 2006.11239). Draw a picture, a time step and noise; mix; predict; compare."""

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Split
from diffusion.data.order import TrainingOrder
from diffusion.errors import DarkroomError, UserError
from diffusion.files import digest_of
from diffusion.fingerprint import autocast, resolve_precision
from diffusion.grids import grid, save_png
from diffusion.lanes import lanes
from diffusion.model import (
    AVERAGED,
    DiffusionModel,
    ModelHeader,
    classes_of,
    read_header,
    save_tensors,
    to_float,
)
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.objective import per_sample_loss
from diffusion.process import NoiseSchedule, make_schedule
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise, uniform
from diffusion.sampling import sample
from diffusion.training.checkpoint import Checkpoints, TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import ExponentialMovingAverage
from diffusion.training.history import History
from diffusion.training.tracker import NoTracker, Tracker

BETAS = (0.9, 0.99)
"""Of AdamW. Its own 0.999 remembers more steps than a run of minutes has to give: measured worse."""
LOGS_PER_CHECKPOINT = 20
PROBES = 256
GRID_PICTURES = 36
MEASURED_SECONDS = 4.0

Restart = Literal["never", "if_different"]
"""Whether to throw away a run of another configuration or data set that lies in the folder."""

logger = logging.getLogger(__name__)


class TrainResult(Config):
    """What training left in its folder."""

    output: Path
    final: Path
    images: int
    content_digest: str
    train_key: str
    """Digest of all that decides the weights, but for the fingerprint: configuration, data, seed."""


@dataclass
class Run:
    """A training run: its data, its configuration, and its state."""

    dataset: Dataset
    model: ModelConfig
    config: TrainingConfig
    state: TrainingState
    schedule: NoiseSchedule
    order: TrainingOrder
    rows: list[int]
    classes: list[str]
    """What the network is told of; empty: nothing."""
    pool: Executor
    """Lanes to compute in."""
    total: int = 0
    """Images to see in all, a whole number of batches."""

    @classmethod
    def new(cls, dataset: Dataset, model: ModelConfig, config: TrainingConfig, pool: Executor) -> "Run":
        """A run that has seen nothing yet; its initial weights are a function of the seed."""
        rows = dataset.rows("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classes = classes_of(model, dataset.manifest.class_histogram)
            network = UNet(model, dataset.manifest.channels, dataset.manifest.size, len(classes))
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(
            network.parameters(), config.learning_rate, BETAS, weight_decay=config.weight_decay, fused=True
        )
        average = ExponentialMovingAverage(network, config.ema_decay)
        order = TrainingOrder(dataset.manifest.content_digest, config.seed, len(rows))
        state = TrainingState(network, average, optimizer)
        return cls(dataset, model, config, state, make_schedule(model), order, rows, classes, pool)

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and gradient norm as 0-dimensional tensors."""
        config, state = self.config, self.state
        rows = [self.rows[row] for row in self.order.rows(state.images, config.batch_size)]
        indices = range(state.images, state.images + config.batch_size)
        x0 = self._pictures(rows, indices)
        t, noise = self._draws(indices)
        drawn = [x0, t, noise, *self._told(rows, indices)]
        parts = list(self.pool.map(self._gradients, *(each.tensor_split(config.lanes) for each in drawn)))
        loss = torch.stack([part_loss for part_loss, _ in parts]).sum()
        for parameter, *gradients in zip(state.network.parameters(), *(part for _, part in parts), strict=True):
            # In the parameter's own memory format, which autograd.grad does not promise and the optimizer relies on.
            parameter.grad = torch.zeros_like(parameter)
            for gradient in gradients:
                parameter.grad.add_(gradient)
        norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.images, self.total)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.images += config.batch_size
        state.average.update(state.network, state.images // config.batch_size)
        return loss, norm

    def _gradients(self, x0: Tensor, t: Tensor, noise: Tensor, *label: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part's share of the batch's loss, and its gradients."""
        with autocast(self.config.precision):
            loss = self._losses(self.state.network, x0, t, noise, *label).sum() / self.config.batch_size
        return loss.detach(), torch.autograd.grad(loss, list(self.state.network.parameters()))

    def _pictures(self, rows: list[int], indices: range) -> Tensor:
        pictures = to_float(self.dataset.pictures(rows))
        if self.config.flip:
            flips = uniform(self.config.seed, "flip", indices) < 0.5
            pictures = torch.where(flips[:, None, None, None], pictures.flip(-1), pictures)
        return pictures.contiguous(memory_format=torch.channels_last)

    def _told(self, rows: list[int], indices: range) -> list[Tensor]:
        """The classes, if the network is told any; some are kept from it (arXiv 2207.12598)."""
        if not self.classes:
            return []
        kept = uniform(self.config.seed, "class", indices) < self.config.class_dropout
        return [self.dataset.classes(rows, self.classes).masked_fill(kept, len(self.classes))]

    def _draws(self, indices: range) -> tuple[Tensor, Tensor]:
        """Time steps, stratified over the batch for a lower variance, and noise."""
        u = (torch.arange(len(indices)) + uniform(self.config.seed, "time", indices)) / len(indices)
        t = (u * self.schedule.steps).long().clamp(max=self.schedule.steps - 1)
        return t, GaussianNoise(self.config.seed, "noise", indices, self.dataset.shape)()

    def _losses(self, network: UNet, x0: Tensor, t: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        prediction, gamma = self.model.prediction, self.config.min_snr_gamma
        return per_sample_loss(partial(network, label=label), self.schedule, prediction, gamma, x0, t, noise)

    def averaged(self) -> DiffusionModel:
        """The averaged network as it is now."""
        network = copy.deepcopy(self.state.network)
        network.load_state_dict(self.state.average.state_dict())
        network.eval().requires_grad_(False)
        return DiffusionModel(self.model_header(), network, self.schedule)

    def probe(self, averaged: UNet) -> dict[str, float]:
        """Losses of raw and averaged weights on fixed pictures, times and noise of both splits."""
        networks = {"": self.state.network, "_ema": averaged}
        splits: list[Split] = [split for split in ("train", "held_out") if self.dataset.rows(split)]
        figures = {
            f"{split}_loss{suffix}": self.pool.submit(self._probe, split, network)
            for split in splits
            for suffix, network in networks.items()
        }
        return {name: figure.result() for name, figure in figures.items()}

    def _probe(self, split: Split, network: UNet) -> float:
        with torch.inference_mode(), autocast(self.config.precision):
            rows = self.dataset.rows(split)[:PROBES]
            x0 = to_float(self.dataset.pictures(rows))
            u = (torch.arange(len(rows)) + 0.5) / len(rows)
            t = (u * self.schedule.steps).long()
            noise = GaussianNoise(0, f"probe/{split}", range(len(rows)), self.dataset.shape)()
            label = self.dataset.classes(rows, self.classes) if self.classes else None
            return self._losses(network, x0, t, noise, label).mean().item()

    def model_header(self) -> ModelHeader:
        """What a model made of the present state says of itself."""
        manifest = self.dataset.manifest
        return ModelHeader(
            model=self.model,
            channels=manifest.channels,
            size=manifest.size,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            class_histogram=manifest.class_histogram,
            images=self.state.images,
            training=identity_fields(self.config),
        )

    def header(self) -> dict[str, Any]:
        """The header of a checkpoint or final model."""
        return {
            "model_header": self.model_header().model_dump(mode="json"),
            "train_key": train_key(self.dataset.manifest.content_digest, self.model, self.config),
            "total": self.total,
        }


def learning_rate(config: TrainingConfig, images: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero, as a function of ``images`` seen out of ``total``."""
    warmup = min(1.0, (images + config.batch_size) / max(config.warmup_images, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(images / total, 1.0)))


def identity_fields(config: TrainingConfig) -> dict[str, Any]:
    """The resolved configuration, without what cannot change the weights."""
    fields = config.model_dump(mode="json", exclude={"output", "keep", "checkpoints"})
    return fields | {"precision": resolve_precision(config.precision)}


def train_key(content_digest: str, model: ModelConfig, config: TrainingConfig) -> str:
    """Digest of all that decides the weights, but for the fingerprint."""
    return digest_of(
        {
            "content_digest": content_digest,
            "model": model.model_dump(mode="json"),
            "training": identity_fields(config),
        }
    )


def train(
    data: Path,
    output: Path,
    model: ModelConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    track: Callable[[bool], Tracker] = NoTracker,
    progress: Progress = silent,
    restart: Restart = "never",
) -> TrainResult:
    """Train on the data set in folder ``data`` until folder ``output`` holds ``final.safetensors``.

    The same call after a kill goes on from the last checkpoint to bit-identical weights. ``restart`` says when
    to throw away what is there instead. ``track`` is called once the folder is this run's alone, with whether the
    run begins from nothing, for the one who keeps its records. Raises UserError if the folder holds a run of
    another configuration or data set (and ``restart`` is ``never``), or another process trains in it.
    """
    dataset = Dataset.open(data)
    if not dataset.rows("train"):
        raise UserError(f"data set {data} has no training pictures: ingest more, or lower ingest.held_out")
    with _held(output), lanes(config.lanes) as pool:
        run = Run.new(dataset, model, config, pool)
        if restart == "if_different" and _differences(output, run):
            _discard(output)
        return _train(run, output, sampling, track, progress)


def discard(output: Path) -> None:
    """Throw away the run in folder ``output``, and nothing else that may lie there; UserError if it is in use."""
    with _held(output):
        _discard(output)


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """The run's folder for this process alone; raises UserError if another has it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process trains in {output}: wait for it, or set training.output to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _train(
    run: Run, output: Path, sampling: SamplingConfig, track: Callable[[bool], Tracker], progress: Progress
) -> TrainResult:
    checkpoints = Checkpoints(output / "checkpoints")
    final = output / "final.safetensors"
    key = run.header()["train_key"]
    if final.is_file():
        _require_same_run(output, run)
        run.state.images = read_header(final)["model_header"]["images"]
    else:
        tracker = track(_begin_or_resume(run, checkpoints, output, sampling) == "begun")
        _loop(run, output, checkpoints, sampling, tracker, progress)
        tensors = {AVERAGED + name: value for name, value in run.state.average.state_dict().items()}
        save_tensors(final, tensors, run.header())
    return TrainResult(
        output=output,
        final=final,
        images=run.state.images,
        content_digest=run.dataset.manifest.content_digest,
        train_key=key,
    )


def _discard(output: Path) -> None:
    # The checkpoints go last: what is left after a kill is still a run that can go on.
    for name in ("final.safetensors", "weights.safetensors", "history.csv", "losses.csv"):
        (output / name).unlink(missing_ok=True)
    for folder in (output / "samples", output / "checkpoints"):
        if folder.exists():
            shutil.rmtree(folder)


def _differences(output: Path, run: Run) -> list[str]:
    """In what the run that lies in ``output`` differs from ``run``: nothing if it is the same, or none lies there."""
    final = output / "final.safetensors"
    if final.is_file():
        theirs = read_header(final)
    else:
        newest = next(Checkpoints(output / "checkpoints").newest_whole(), None)
        if newest is None:
            return []
        _, theirs = newest
    ours = run.header()
    if theirs["train_key"] == ours["train_key"]:
        return []
    theirs, ours = theirs["model_header"], ours["model_header"]
    changed = ["the data set's content"] if theirs["content_digest"] != ours["content_digest"] else []
    for part in ("model", "training"):
        changed += [f"{part}.{name}" for name in ours[part] if ours[part][name] != theirs[part].get(name)]
    return changed or ["its format"]


def _require_same_run(output: Path, run: Run) -> None:
    if changed := _differences(output, run):
        raise UserError(
            f"{output} holds a run that differs in {', '.join(changed)}: "
            "give --restart to throw it away, or set training.output to another folder"
        )


def _begin_or_resume(
    run: Run, checkpoints: Checkpoints, output: Path, sampling: SamplingConfig
) -> Literal["begun", "resumed"]:
    _require_same_run(output, run)
    if header := checkpoints.restore(run.state):
        run.total = header["total"]
        logger.info("going on from %d of %d images", run.state.images, run.total)
        return "resumed"
    images = run.config.images or _images_in(run.config.minutes or 0, run, sampling)
    run.total = math.ceil(images / run.config.batch_size) * run.config.batch_size
    checkpoints.save(run.state, run.header())
    return "begun"


def _images_in(minutes: float, run: Run, sampling: SamplingConfig) -> int:
    """How many images fit into ``minutes`` here, by measuring steps and one checkpoint's work on a copy."""
    trial = Run.new(run.dataset, run.model, run.config, run.pool)
    trial.total = 2**40
    trial.step()
    start, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - start < MEASURED_SECONDS:
        trial.step()
        steps += 1
    per_image = (time.perf_counter() - start) / (steps * run.config.batch_size)
    start = time.perf_counter()
    averaged = trial.averaged()
    trial.probe(averaged.network)
    sample(averaged, range(GRID_PICTURES), 0, sampling)
    pauses = (time.perf_counter() - start) * run.config.checkpoints
    if pauses > minutes * 60 / 2:
        raise UserError(
            f"{pauses:.0f} s of training.minutes = {minutes:g} would go into {run.config.checkpoints} sample grids: "
            "raise it, or lower sampling.steps or training.checkpoints"
        )
    return max(run.config.batch_size, int((minutes * 60 - pauses) / per_image))


def _loop(
    run: Run,
    output: Path,
    checkpoints: Checkpoints,
    sampling: SamplingConfig,
    tracker: Tracker,
    progress: Progress,
) -> None:
    config, state = run.config, run.state
    steps = run.total // config.batch_size
    log_every = max(1, steps // (config.checkpoints * LOGS_PER_CHECKPOINT)) * config.batch_size
    save_every = math.ceil(run.total / config.checkpoints / log_every) * log_every
    history = History(output / "history.csv", ("loss", "gradient_norm", "learning_rate", "images_per_second"))
    probes = History(output / "losses.csv", ("train_loss", "train_loss_ema", "held_out_loss", "held_out_loss_ema"))
    for record in (history, probes):
        record.rewind(state.images)

    losses: list[Tensor] = []
    norms: list[Tensor] = []
    since = time.perf_counter()
    while state.images < run.total:
        loss, norm = run.step()
        losses.append(loss)
        norms.append(norm)
        at_end = state.images == run.total
        if state.images % log_every == 0 or at_end:
            seconds = time.perf_counter() - since
            figures = {
                "loss": torch.stack(losses).mean().item(),
                "gradient_norm": torch.stack(norms).mean().item(),
                "learning_rate": state.optimizer.param_groups[0]["lr"],
                "images_per_second": len(losses) * config.batch_size / seconds,
            }
            _require_finite(figures, state.images)
            history.append(state.images, figures)
            tracker.log_metrics(figures, state.images)
            progress("images trained on", state.images, run.total, f"loss {figures['loss']:.4f}")
            losses, norms, since = [], [], time.perf_counter()
        if state.images % save_every == 0 or at_end:
            _take_stock(run, output, probes, sampling, tracker)
            checkpoints.save(state, run.header())
            checkpoints.prune(config.keep)
            since = time.perf_counter()


def _take_stock(run: Run, output: Path, probes: History, sampling: SamplingConfig, tracker: Tracker) -> None:
    """Held-out losses and a grid of the same seeds each time: before the checkpoint, so a kill repeats them."""
    averaged = run.averaged()
    figures = run.probe(averaged.network)
    probes.append(run.state.images, {name: figures.get(name, math.nan) for name in probes.columns})
    tracker.log_metrics(figures, run.state.images)
    picture = grid(sample(averaged, range(GRID_PICTURES), 0, sampling))
    save_png(output / "samples" / f"{run.state.images:010d}.png", picture)
    tracker.log_picture("samples", picture, run.state.images)


def _require_finite(figures: dict[str, float], images: int) -> None:
    if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
        raise DarkroomError(
            f"loss or gradient is not finite after {images} images: lower training.learning_rate and give "
            "the same command again; it goes on from the last checkpoint only if the configuration is the same"
        )
