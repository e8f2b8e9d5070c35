"""The model files of a run that are worth judging."""

from collections.abc import Iterable
from pathlib import Path

from diffusion.training.checkpoint import Checkpoints
from diffusion.training.post_hoc import AVERAGES, make_average


def candidates(output: Path, report: Path, ema_lengths: Iterable[float] = ()) -> list[Path]:
    """The checkpoints kept in the run's folder ``output``, oldest first, and its averages over ``ema_lengths``.

    Those are made in the folder ``report``: a run that is done stays as it is.
    """
    averages = [make_average(output / AVERAGES, length, report / AVERAGES) for length in ema_lengths]
    return Checkpoints(output / "checkpoints").judged() + averages
