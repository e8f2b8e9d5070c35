"""What one process of a run writes down while it trains: figures, grids of pictures, checkpoints."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffusion.data.manifest import Manifest
from diffusion.families import family_of
from diffusion.fingerprint import CPU
from diffusion.grids import beside, blocks, grid, save_png
from diffusion.model import Model, to_float
from diffusion.progress import Progress
from diffusion.samplers import SamplingConfig
from diffusion.training.checkpoint import Writer
from diffusion.training.config import TrainingConfig
from diffusion.training.guards import Guards
from diffusion.training.history import History, read_rows
from diffusion.training.post_hoc import AVERAGES, keep_snapshot
from diffusion.training.run import Run
from diffusion.training.tracker import Tracker
from diffusion.upscaling import task_of

GRID_PICTURES = 36
FIGURES = ("loss", "gradient_norm", "learning_rate", "images_per_second", "data_wait", "skipped")
"""Columns of history.csv; ``data_wait`` is the share of the time in which training waited for pictures,
``skipped`` counts all steps left out so far, as their loss or gradient was not finite."""
PROBES = ("train_loss", "train_loss_ema", "held_out_loss", "held_out_loss_ema")
"""Columns of losses.csv."""


@dataclass
class Record:
    """Keeps the record of ``run`` in the folder ``output``, with ``tracker``, and on the screen."""

    run: Run
    output: Path
    sampling: SamplingConfig
    writer: Writer
    tracker: Tracker
    progress: Progress
    guards: Guards = field(default_factory=Guards)

    def __post_init__(self) -> None:
        """What a kill left beyond the last checkpoint is forgotten: it comes again."""
        for history in (self.history, self.probes):
            history.rewind(self.run.state.images)
        # What the guards had seen before a kill, they have seen.
        self.guards.losses.extend(row["loss"] for row in read_rows(self.history.path) if math.isfinite(row["loss"]))
        self.guards.probes.extend(
            (row["train_loss_ema"], row["held_out_loss_ema"]) for row in read_rows(self.probes.path)
        )

    @cached_property
    def history(self) -> History:
        """Figures of the steps."""
        return History(self.output / "history.csv", FIGURES)

    @cached_property
    def probes(self) -> History:
        """Losses on fixed pictures."""
        return History(self.output / "losses.csv", PROBES)

    def figures(self, figures: dict[str, float]) -> None:
        """Write down ``FIGURES`` of the steps since the last time."""
        images = self.run.state.images
        self.guards.loss(figures["loss"], images)
        self.history.append(images, figures)
        self.tracker.log_metrics({name: value for name, value in figures.items() if math.isfinite(value)}, images)
        self.progress("images trained on", images, self.run.total, f"loss {figures['loss']:.4f}")

    def stock(self, run: Run, save_every: int) -> None:
        """Look at how the averaged weights of ``run`` do, all of which is in this process, and begin a checkpoint.

        That comes last, so that a kill repeats the rest.
        """
        config = run.config
        state, images = run.state, run.state.images
        averaged = run.averaged()
        figures = run.probe(averaged.network)
        self.probes.append(images, {name: figures.get(name, math.nan) for name in PROBES})
        drawn = drawn_by(averaged, run, self.sampling)
        self.tracker.log_metrics(figures | drift(drawn, run.dataset.manifest), images)
        picture = sheet(drawn, run)
        save_png(self.output / "samples" / f"{images:010d}.png", picture)
        self.tracker.log_picture("samples", picture, images)
        if images == run.total:
            told = task_of(run.model).conditioning(real(run)[:1]) or None
            for name, shown in family_of(run.model).illustrations(averaged.on(CPU), told).items():
                self.tracker.log_picture(name, shown, images)
        self.guards.probe(figures, images)
        self.guards.weights(state.network, state.averages[0].state_dict(), images)
        if config.ema_lengths is not None:
            keep_snapshot(
                self.output / AVERAGES, state.averages, config.ema_lengths, images, run.header(), state.frozen
            )
        for history in (self.history, self.probes):
            history.sync()
        self.tracker.sync()
        self.writer.save(state, run.checkpoint_header(), config.keep, spared(config, self.probes, save_every))


def drawn_by(model: Model, run: Run, sampling: SamplingConfig) -> Tensor:
    """The pictures of a grid by ``model``, the present one of ``run``: drawn, or held-out ones enlarged."""
    task = task_of(run.model)
    inputs, conditions = task.inputs(real(run)), run.shown(GRID_PICTURES)
    indices = range(GRID_PICTURES if inputs is None else len(inputs))
    return task.generate(model, inputs, indices, 0, sampling, conditions=conditions)


def sheet(drawn: Tensor, run: Run) -> Image.Image:
    """The grid of ``drawn`` pictures; of enlarged ones between the small picture and the real one, each time."""
    images = real(run)
    inputs = task_of(run.model).inputs(images)
    return grid(drawn) if inputs is None else grid(beside(blocks(inputs, drawn.shape[-1]), drawn, images), 12)


def real(run: Run) -> Tensor:
    """The pictures that are shown small to a model which enlarges: held-out ones, or of training if there are none."""
    probed = run.probed()
    return probed["held_out" if "held_out" in probed else "train"].pictures[:GRID_PICTURES]


def drift(drawn: Tensor, manifest: Manifest) -> dict[str, float]:
    """How far each channel of ``drawn`` pictures is from the data set's, in standard deviations of it."""
    means = to_float(drawn).mean((0, 2, 3)).tolist()
    return {
        f"sample_drift_{'grey' if len(means) == 1 else 'rgb'[channel]}": (mean - real) / max(spread, 1e-6)
        for channel, (mean, real, spread) in enumerate(zip(means, manifest.mean, manifest.std, strict=True))
    }


def spared(config: TrainingConfig, probes: History, save_every: int) -> set[int]:
    """After how many images the checkpoints were taken that stay, though newer ones come."""
    rows = read_rows(probes.path)
    judged = [row for row in rows if math.isfinite(row["held_out_loss_ema"])]
    best = sorted(judged, key=lambda row: row["held_out_loss_ema"])[: config.keep_best]
    kept = {int(row["images"]) for row in best}
    if config.keep_every is not None:
        kept.update(int(row["images"]) for row in rows if row["images"] % (config.keep_every * save_every) == 0)
    return kept
