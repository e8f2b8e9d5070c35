"""Checkpoints of a run: everything needed to resume, in one safetensors file that is written atomically."""

import logging
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.files import sha256_file, sync_folder, write_bytes
from diffusion.common.model_files import read_header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder: ``<images>.safetensors`` files with their digests in ``….sha256``.

    The digest is written last: a checkpoint without one is incomplete and is ignored.
    """

    folder: Path

    def save(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Write ``tensors`` under the number of images of the model in ``header``."""
        path = self.folder / f"{header['model_header']['images']:010d}.safetensors"
        digest = save_tensors(path, tensors, header)
        write_bytes(_digest_of(path), f"{digest}\n".encode())

    def paths(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("*.safetensors") if _digest_of(path).is_file())

    def newest_whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the checkpoints with a valid digest and their headers, newest first; damaged ones are logged."""
        for path in reversed(self.paths()):
            if is_whole(path):
                yield path, read_header(path)
            else:
                logger.warning("checkpoint %s is damaged: going on from the one before it", path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and header of the newest valid checkpoint, or None if there is none."""
        return next(((load_file(path), header) for path, header in self.newest_whole()), None)

    def prune(self, keep: int, protected: Container[int] = ()) -> None:
        """Remove all but the ``keep`` newest and those after ``protected`` images; each digest goes first."""
        finished = self.paths()
        kept = {path for path in finished if int(path.stem) in protected} | set(finished[-keep:])
        # Includes leftovers of a removal that was interrupted.
        there = {path.with_name(path.name.removesuffix(".sha256")) for path in self.folder.glob("[0-9]*.safetensors*")}
        for path in there - kept:
            _digest_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        # Without a sync a power cut would restore the file, and nothing prunes after the last checkpoint.
        sync_folder(self.folder)


class CheckpointWriter:
    """Checkpoint writer in a thread, while training goes on; leaving the context waits for the last write."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(
        self, tensors: dict[str, Tensor], header: dict[str, Any], keep: int, protected: Container[int] = ()
    ) -> None:
        """Start writing a checkpoint, then pruning; raises the error of the previous write."""
        if self._pending is not None:
            self._pending.result()
        copies = {name: value.clone() for name, value in tensors.items()}

        def write() -> None:
            self.checkpoints.save(copies, header)
            self.checkpoints.prune(keep, protected)

        self._pending = self._pool.submit(write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None and self._pending is not None:
            self._pending.result()


def is_whole(path: Path) -> bool:
    """Whether the checkpoint at ``path`` has the digest that was written with it."""
    return sha256_file(path) == _digest_of(path).read_text().strip()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
