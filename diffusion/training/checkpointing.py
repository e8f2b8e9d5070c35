"""The checkpoints of a run: everything needed to resume in one safetensors file, whole or absent."""

import logging
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import read_header, save_tensors
from diffusion.common.files import sha256_file, sync_folder, write_bytes

COUNTS = "counts"

logger = logging.getLogger(__name__)


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

    def trained(self) -> list[Path]:
        """The checkpoints that are worth evaluating, oldest first: all but the one from before the first step."""
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


class CheckpointWriter:
    """Writes checkpoints in a thread beside training, one at a time; leaving the context waits for the last.

    Training stops only for as long as it takes to copy the tensors in memory.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, tensors: dict[str, Tensor], header: dict[str, Any], keep: int, spared: Container[int] = ()) -> None:
        """Begin to write a checkpoint and then to prune; raises the error of the one before."""
        self.wait()
        copies = {name: value.clone() for name, value in tensors.items()}
        self._pending = self._pool.submit(self._write, copies, header, keep, spared)

    def _write(self, tensors: dict[str, Tensor], header: dict[str, Any], keep: int, spared: Container[int]) -> None:
        self.checkpoints.save(tensors, header)
        self.checkpoints.prune(keep, spared)

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk; raises its error."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
