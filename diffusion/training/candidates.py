"""The model files of a run that are worth judging."""

from collections.abc import Iterable
from pathlib import Path

from diffusion.training.checkpoint import Checkpoints
from diffusion.training.post_hoc import AVERAGES, make_average


def candidates(output: Path, ema_lengths: Iterable[float] = ()) -> list[Path]:
    """The checkpoints that are kept in the run's folder, oldest first, and its averages over ``ema_lengths``."""
    averages = [make_average(output / AVERAGES, length) for length in ema_lengths]
    return Checkpoints(output / "checkpoints").judged() + averages
