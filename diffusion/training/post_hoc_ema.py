"""Post-hoc EMA: averages of the weights computed after training from snapshots (arXiv 2312.02696, section 3.2)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffusion.checkpoints import AUTOENCODER, AVERAGED, read_header, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file, write_bytes
from diffusion.training.checkpointing import Checkpoints
from diffusion.training.ema import WeightAverage, mixture

SNAPSHOTS = "averages"
"""Subfolder of a run that holds the snapshots."""
STDS = "stds"


def average_prefix(number: int) -> str:
    """Return the prefix of the tensor names of average ``number``; number 0 is the model."""
    return AVERAGED if number == 0 else f"ema{number}."


def averaged_tensors(averages: Sequence[WeightAverage]) -> dict[str, Tensor]:
    """Return the tensors of all ``averages`` under their prefixed names."""
    return {
        average_prefix(number) + name: value
        for number, average in enumerate(averages)
        for name, value in average.state_dict().items()
    }


def save_snapshot(folder: Path, tensors: dict[str, Tensor], stds: Sequence[float], header: dict[str, Any]) -> None:
    """Save the averages of relative ``stds``, and the autoencoder, from a checkpoint's ``tensors`` to ``folder``."""
    path = folder / f"{header['model_header']['images']:010d}.safetensors"
    prefixes = (*(average_prefix(number) for number in range(len(stds))), AUTOENCODER)
    kept = {name: value for name, value in tensors.items() if name.startswith(prefixes)}
    digest = save_tensors(path, kept, header | {STDS: list(stds)})
    write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())


def models_to_evaluate(output: Path, report: Path, ema_stds: Iterable[float] = ()) -> list[Path]:
    """List the checkpoints in the run's folder ``output``, oldest first, and its averages of ``ema_stds``.

    The averages are written to the folder ``report``, so that a finished run does not change.
    """
    averages = [reconstruct_average(output / SNAPSHOTS, std, report / SNAPSHOTS) for std in ema_stds]
    return Checkpoints(output / "checkpoints").trained() + averages


def reconstruct_average(folder: Path, std: float, into: Path) -> Path:
    """Write the average of relative ``std`` at the last snapshot in ``folder`` as a model file in ``into``.

    Raises UserError if there are no snapshots, or one is damaged.
    """
    paths = sorted(path for path in folder.glob("[0-9]*.safetensors") if path.with_suffix(".sha256").is_file())
    if not paths:
        raise UserError(
            f"evaluation.ema_stds needs the snapshots of training.ema_stds, and {folder} has none: train with it"
        )
    for path in paths:
        if sha256_file(path) != path.with_suffix(".sha256").read_text().strip():
            raise UserError(f"{path} is damaged: train again with --restart, or leave evaluation.ema_stds out")
    header = read_header(paths[-1])
    seen = [(int(path.stem), number, each) for path in paths for number, each in enumerate(header[STDS])]
    shares = mixture([(images, each) for images, _, each in seen], int(paths[-1].stem), std)
    total: dict[str, Tensor] = {}
    for (images, number, _), share in zip(seen, shares, strict=True):
        for name, value in _tensors(folder / f"{images:010d}.safetensors", average_prefix(number)).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * value.double()
    path = into / f"std-{std:g}.safetensors"
    tensors = {AVERAGED + name: value.float() for name, value in total.items()}
    tensors |= {AUTOENCODER + name: value for name, value in _tensors(paths[-1], AUTOENCODER).items()}
    save_tensors(path, tensors, {name: value for name, value in header.items() if name != STDS})
    return path


def _tensors(path: Path, start: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name.removeprefix(start): file.get_tensor(name) for name in file.keys() if name.startswith(start)}  # noqa: SIM118
