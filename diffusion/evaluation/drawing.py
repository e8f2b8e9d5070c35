"""Pictures that are drawn to be judged, each piece kept when it is done, so that a kill loses no more than one."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.evaluation.sealed import Tensors, recall
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.lanes import cores
from diffusion.model import Model
from diffusion.progress import Progress
from diffusion.sampling import sample
from diffusion.upscaling import upscale

BATCHES = 2
"""Compute batches in a piece for each core: little is lost to a kill, and no core waits for long."""


class PieceKey(Config):
    """All that a piece depends on but for what its folder is of."""

    kind: Literal["piece"] = "piece"
    first: int
    """Number of its first picture."""
    count: int
    fingerprint: Fingerprint
    """Of the machine that drew it."""


def drawn(
    folder: Path,
    model: Model,
    count: int,
    seed: int,
    sampling: SamplingConfig,
    progress: Progress,
    asked: Asked = ANYTHING,
    small: Tensor | None = None,
) -> Tensor:
    """Pictures number 0 … ``count`` − 1 of ``seed``, (count, C, H, W) uint8, of which pieces are kept in ``folder``.

    They show what is ``asked``, or are as many ``small`` ones, (count, C, h, w) uint8, enlarged. ``folder`` must be of
    nothing but these pictures: see ``sealed.pieces_of``. A piece is of whole compute batches, but for the last, and so
    has the bits that it has in the whole. Raises UserError as ``sample`` and ``upscale`` do.
    """
    size = BATCHES * cores() * sampling.compute_batch
    machine = fingerprint(sampling.compute_batch, sampling.precision, sampling.device)

    def piece(numbers: range) -> Tensor:
        def counted(what: str, done: int, total: int | None, note: str = "") -> None:
            of_pictures = total == len(numbers)
            progress(what, numbers.start + done if of_pictures else done, count if of_pictures else total, note)

        def work() -> Tensors:
            if small is None:
                return {"pictures": sample(model, numbers, seed, sampling, counted, asked)}
            shown = small[numbers.start : numbers.stop]
            return {"pictures": upscale(model, shown, seed, sampling, counted, numbers.start)}

        key = PieceKey(first=numbers.start, count=len(numbers), fingerprint=machine)
        return recall(folder, key, work)["pictures"]

    return torch.cat([piece(range(start, min(start + size, count))) for start in range(0, count, size)])
