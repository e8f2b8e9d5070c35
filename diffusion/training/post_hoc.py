"""Averages of the weights over lengths that nobody thought of in training (arXiv 2312.02696, section 3.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffusion.checkpoints import AUTOENCODER, AVERAGED, read_header, save_tensors
from diffusion.errors import UserError
from diffusion.files import sha256_file, write_bytes
from diffusion.training.ema import WeightAverage, mixture

AVERAGES = "averages"
"""The folder of a run in which they are kept."""
LENGTHS = "lengths"


def prefix(number: int) -> str:
    """What the names of average ``number`` begin with in a file: the first is the model."""
    return AVERAGED if number == 0 else f"ema{number}."


def averaged_tensors(averages: Sequence[WeightAverage]) -> dict[str, Tensor]:
    """All ``averages`` under names that say which they are."""
    return {
        prefix(number) + name: value
        for number, average in enumerate(averages)
        for name, value in average.state_dict().items()
    }


def keep_snapshot(
    folder: Path,
    averages: Sequence[WeightAverage],
    lengths: Sequence[float],
    images: int,
    header: dict[str, Any],
    frozen: dict[str, Tensor],
) -> None:
    """Keep ``averages`` as they are after ``images`` in ``folder``, and what is ``frozen`` besides."""
    path = folder / f"{images:010d}.safetensors"
    digest = save_tensors(path, averaged_tensors(averages) | frozen, header | {LENGTHS: list(lengths)})
    write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())


def make_average(folder: Path, length: float, into: Path) -> Path:
    """Write the average of ``length`` at the last of the snapshots in ``folder`` into a model file ``into`` a folder.

    Raises UserError if there are none, or one is damaged.
    """
    paths = sorted(path for path in folder.glob("[0-9]*.safetensors") if path.with_suffix(".sha256").is_file())
    if not paths:
        raise UserError(
            f"evaluation.ema_lengths needs what training.ema_lengths keeps, and {folder} holds nothing: train with it"
        )
    for path in paths:
        if sha256_file(path) != path.with_suffix(".sha256").read_text().strip():
            raise UserError(f"{path} is damaged: train again with --restart, or leave evaluation.ema_lengths out")
    header = read_header(paths[-1])
    seen = [(int(path.stem), number, each) for path in paths for number, each in enumerate(header[LENGTHS])]
    shares = mixture([(images, each) for images, _, each in seen], int(paths[-1].stem), length)
    total: dict[str, Tensor] = {}
    for (images, number, _), share in zip(seen, shares, strict=True):
        for name, value in _tensors(folder / f"{images:010d}.safetensors", prefix(number)).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * value.double()
    path = into / f"length-{length:g}.safetensors"
    tensors = {AVERAGED + name: value.float() for name, value in total.items()}
    tensors |= {AUTOENCODER + name: value for name, value in _tensors(paths[-1], AUTOENCODER).items()}
    save_tensors(path, tensors, {name: value for name, value in header.items() if name != LENGTHS})
    return path


def _tensors(path: Path, start: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name.removeprefix(start): file.get_tensor(name) for name in file.keys() if name.startswith(start)}  # noqa: SIM118
