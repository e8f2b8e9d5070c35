"""Checkpoints: everything a run needs to go on, in one safetensors file, whole or absent."""

import logging
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion.checkpoints import read_header, save_tensors
from diffusion.files import sha256_file, sync_folder, write_bytes
from diffusion.training.ema import WeightAverage
from diffusion.training.post_hoc import averaged_tensors, prefix
from diffusion.training.sharding import share_of
from diffusion.training.uncertainty import Uncertainty

NETWORK = "network."
UNCERTAINTY = "uncertainty."
OPTIMIZER = "optimizer."
OPPONENT = "opponent."
OPPONENT_OPTIMIZER = "opponent_optimizer."
COUNTS = "counts"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opponent:
    """What is trained against a network, and is no part of the model."""

    network: nn.Module
    optimizer: torch.optim.AdamW
    """Of its parameters, in their order."""


@dataclass
class TrainingState:
    """What changes from step to step. There is no random state: draws are functions of ``images``."""

    network: nn.Module
    averages: list[WeightAverage]
    """The first is the model."""
    optimizer: torch.optim.AdamW
    """Of all ``parameters``, in their order."""
    uncertainty: Uncertainty | None = None
    """Where training learns one."""
    opponent: Opponent | None = None
    """Where the network learns against one."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """What is not trained, and without which the model is not whole: see ``diffusion.model.AUTOENCODER``."""
    images: int = 0
    """Pictures seen."""
    skipped: int = 0
    """Steps left out, as their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last without another between them."""

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.network.parameters(), *(self.uncertainty.parameters() if self.uncertainty else ())]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under names that say whose they are."""
        named = {NETWORK + name: value for name, value in self.network.state_dict().items()}
        named |= averaged_tensors(self.averages) | self.frozen
        if self.uncertainty:
            named |= {UNCERTAINTY + name: value for name, value in self.uncertainty.state_dict().items()}
        named |= _moments(OPTIMIZER, self.optimizer)
        if self.opponent:
            named |= {OPPONENT + name: value for name, value in self.opponent.network.state_dict().items()}
            named |= _moments(OPPONENT_OPTIMIZER, self.opponent.optimizer)
        return named

    def counts(self) -> dict[str, int]:
        """What is counted, for the header of a checkpoint."""
        return {"images": self.images, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Become the state that ``tensors`` and ``counts`` were taken from, or this process's share of it."""
        own = {name: share_of(tensors[name], like) for name, like in self.tensors().items() if name in tensors}
        self.network.load_state_dict(_under(NETWORK, own))
        for number, average in enumerate(self.averages):
            average.load_state_dict(_under(prefix(number), own))
        if self.uncertainty:
            self.uncertainty.load_state_dict(_under(UNCERTAINTY, own))
        for name, value in self.frozen.items():
            # In place: whoever computes with it holds the same tensors.
            value.copy_(own[name])
        _load_moments(self.optimizer, self.parameters(), _under(OPTIMIZER, tensors))
        if self.opponent:
            network = self.opponent.network
            network.load_state_dict(_under(OPPONENT, own))
            _load_moments(self.opponent.optimizer, list(network.parameters()), _under(OPPONENT_OPTIMIZER, tensors))
        self.images, self.skipped = counts["images"], counts["skipped"]
        self.skipped_in_a_row = counts["skipped_in_a_row"]


def _moments(prefix: str, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The moments of its parameters, by number and name."""
    of_each = optimizer.state_dict()["state"].items()
    return {f"{prefix}{index}.{name}": value for index, moments in of_each for name, value in moments.items()}


def _load_moments(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, moment = name.split(".", 1)
        if value.ndim:
            # Fused AdamW walks parameter and moments in step through memory: their strides must agree.
            like = parameters[int(index)]
            value = torch.empty_like(like).copy_(share_of(value, like))
        moments.setdefault(int(index), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder, each ``<images>.safetensors`` with its digest in ``….sha256``.

    The digest is written last: a checkpoint without one was never finished and does not count.
    """

    folder: Path

    def save(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Write a state's ``tensors`` under the number of its images, which ``header`` has under ``counts``."""
        path = self.folder / f"{header[COUNTS]['images']:010d}.safetensors"
        digest = save_tensors(path, tensors, header)
        write_bytes(_digest_of(path), f"{digest}\n".encode())

    def paths(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("*.safetensors") if _digest_of(path).is_file())

    def judged(self) -> list[Path]:
        """The checkpoints worth judging, oldest first: all but the one from before the first step."""
        return [path for path in self.paths() if int(path.stem) > 0]

    def newest_whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Checkpoints whose digest is right with their headers, newest first; damaged ones are named."""
        for path in reversed(self.paths()):
            if sha256_file(path) == _digest_of(path).read_text().strip():
                yield path, read_header(path)
            else:
                logger.warning("checkpoint %s is damaged: going on from the one before it", path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and header of the newest whole checkpoint, or None if there is none."""
        return next(((load_file(path), header) for path, header in self.newest_whole()), None)

    def prune(self, keep: int, spared: Container[int] = ()) -> None:
        """Remove all but the ``keep`` newest and those after ``spared`` images: digest first, so none is half there."""
        finished = self.paths()
        kept = {path for path in finished if int(path.stem) in spared} | set(finished[-keep:])
        # Also what is left of one whose removal a kill or a power cut ended half way.
        there = {path.with_name(path.name.removesuffix(".sha256")) for path in self.folder.glob("[0-9]*.safetensors*")}
        for path in there - kept:
            _digest_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        # A power cut would bring it back, and nobody removes anything after the last checkpoint.
        sync_folder(self.folder)


class Writer:
    """Writes checkpoints beside training, one at a time; leaving it waits for the last.

    Training stops only for as long as it takes to copy the state in memory.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def save(self, state: TrainingState, header: dict[str, Any], keep: int, spared: Container[int] = ()) -> None:
        """Begin to write ``state``, and then to prune; raises what went wrong with the one before."""
        self.wait()
        tensors = {name: value.clone() for name, value in state.tensors().items()}
        self._under_way = self._pool.submit(self._write, tensors, header | {COUNTS: state.counts()}, keep, spared)

    def _write(self, tensors: dict[str, Tensor], header: dict[str, Any], keep: int, spared: Container[int]) -> None:
        self.checkpoints.save(tensors, header)
        self.checkpoints.prune(keep, spared)

    def wait(self) -> None:
        """Until what is under way is on disk; raises what went wrong."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
