"""Checkpoints of a run: everything needed to resume, in one safetensors file that is written atomically.

``train`` resumes from the newest that is whole.

Processes that share a network write it together, each the bytes of its shards, so that none ever holds it whole.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from diffusion.checkpoints import CONTENT_SHA256, content_digest, save_tensors
from diffusion.common.device import CPU
from diffusion.common.files import canonical_json, make_folder, sha256_file, sync_folder, write_bytes
from diffusion.common.model_files import METADATA_KEY, read_header, tensor_bytes
from diffusion.training.distributed import Ranks, full_tensor, is_sharded

INTERRUPTED = "interrupted"
"""Folder of the checkpoint that was written at a signal, until there is a later regular one."""

logger = logging.getLogger(__name__)


class WrittenTensors(dict[str, Tensor]):
    """Tensors in a complete file of a temporary name, by which ``save`` finds it; mapped, they take no memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(load_file(path))
        self.path = path


def write_together(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Write ``tensors`` to a file of a temporary name in ``folder``, byte for byte as ``save_tensors`` does.

    Each process writes its shards, and some of the tensors that all have. Where one does not see the file of the main
    process, because they share no file system, that one gathers and writes one tensor after the other. All processes
    must call this together; returns WrittenTensors in the main process, and nothing in others.
    """
    no_digest = 2 * uuid4().hex  # its place in the head, until all tensors are there
    head, starts, end = _layout(tensors, {METADATA_KEY: canonical_json(header | {CONTENT_SHA256: no_digest})})
    path = folder / f".{uuid4().hex}.partial"
    if ranks.is_main:
        make_folder(folder)
        path.write_bytes(head)
        os.truncate(path, len(head) + end)
    # Headers may differ, as processes may run on different machines: the main one's counts.
    path, head_size = ranks.broadcast((path, len(head)))
    is_shared = ranks.all(path.is_file())
    with path.open("r+b") if is_shared or ranks.is_main else nullcontext() as file:
        for number, (name, start) in enumerate(starts.items()):
            value = tensors[name]
            offset, part = _own_rows(value, number, ranks) if is_shared else (0, full_tensor(value))
            if file is not None and part is not None:
                file.seek(head_size + start + offset)
                file.write(tensor_bytes(part.detach().cpu()))
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    ranks.barrier()
    if not ranks.is_main:
        return {}
    written_tensors = WrittenTensors(path)
    with path.open("r+b") as file:
        file.seek(head.index(no_digest.encode()))
        file.write(content_digest(written_tensors, header).encode())
        file.flush()
        os.fsync(file.fileno())
    return written_tensors


def _layout(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file: its head, at which byte behind it each tensor begins, and the last one ends."""
    # The library decides on the order.
    empty = serialize({name: torch.empty(0, dtype=value.dtype) for name, value in tensors.items()}, metadata)
    entries = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    starts, end = dict[str, int](), 0
    for name in list(entries)[1:]:  # behind __metadata__
        value, starts[name] = tensors[name], end
        end += value.numel() * value.element_size()
        entries[name] |= {"shape": list(value.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, end


def _own_rows(value: Tensor, number: int, ranks: Ranks) -> tuple[int, Tensor | None]:
    """Return the rows of ``value`` that this process writes, and at which byte of it they begin; None: no rows.

    Processes that have the same rows take turns, by the ``number`` of the tensor.
    """
    if not is_sharded(value):
        return 0, value if number % ranks.count == ranks.rank else None
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    *replica, shard = coordinate
    if replica and number % mesh.size(0) != replica[0]:
        return 0, None
    row = value.numel() // len(value) * value.element_size()
    return min(len(value), shard * math.ceil(len(value) / mesh.size(-1))) * row, value.to_local()


def read_everywhere(path: Path | None, ranks: Ranks) -> Mapping[str, Tensor]:
    """Map the tensors of the checkpoint at the main process' ``path`` in all processes.

    Where one does not see the file, the main process sends each tensor to all when it is read, which must be in the
    same order in all processes.
    """
    path, digest = ranks.broadcast(path and (path, _digest_of(path).read_text()))
    # One of the same name on a disk of its own may be another run's.
    digest_path = _digest_of(path)
    if ranks.all(digest_path.is_file() and path.is_file() and digest_path.read_text() == digest):
        return load_file(path)
    return _SentTensors(load_file(path) if ranks.is_main else {}, ranks)


class _SentTensors(Mapping[str, Tensor]):
    def __init__(self, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        self._tensors, self._ranks, self._names = tensors, ranks, ranks.broadcast(list(tensors))

    def __getitem__(self, name: str) -> Tensor:
        return self._ranks.broadcast_tensors({name: self._tensors[name]} if self._ranks.is_main else {})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Write ``tensors`` to ``path`` atomically, or rename their file if they are written; returns its SHA-256."""
    if not isinstance(tensors, WrittenTensors):
        return save_tensors(path, tensors, header)
    make_folder(path.parent)
    digest = sha256_file(tensors.path)
    tensors.path.replace(path)
    sync_folder(path.parent)
    return digest


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder: ``<images>.safetensors`` files with their digests in ``….sha256``.

    The digest is written last: a checkpoint without one is incomplete and is ignored.
    """

    folder: Path

    def save(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Write ``tensors`` under the number of images of the model in ``header``."""
        path = self.folder / f"{header['model_header']['images']:010d}.safetensors"
        digest = save(path, tensors, header)
        write_bytes(_digest_of(path), f"{digest}\n".encode())

    def paths(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("*.safetensors") if _digest_of(path).is_file())

    def iterate_whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the checkpoints with a valid digest and their headers, newest first; damaged ones are logged."""
        for path in reversed(self.paths()):
            if is_whole(path):
                yield path, read_header(path)
            else:
                logger.warning("checkpoint %s is damaged: going on from the one before it", path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and header of the newest valid checkpoint, or None if there is none."""
        return next(((load_file(path), header) for path, header in self.iterate_whole()), None)

    def prune(self, keep: int, protected: Container[int] = ()) -> None:
        """Remove all but the ``keep`` newest and those after ``protected`` images; each digest goes first."""
        checkpoints = self.paths()
        survivors = {path for path in checkpoints if int(path.stem) in protected} | set(checkpoints[-keep:])
        # Includes leftovers of a removal that was interrupted.
        paths = {path.with_name(path.name.removesuffix(".sha256")) for path in self.folder.glob("[0-9]*.safetensors*")}
        for path in paths - survivors:
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
        self.wait()
        copies = tensors
        if not isinstance(tensors, WrittenTensors):
            # Of a GPU's memory, which is scarcer than the seconds that this takes, a checkpoint gets none.
            copies = {name: value.to(CPU, copy=True) for name, value in tensors.items()}

        def write() -> None:
            self.checkpoints.save(copies, header)
            self.checkpoints.prune(keep, protected)
            shutil.rmtree(self.checkpoints.folder.parent / INTERRUPTED, ignore_errors=True)

        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Wait for the last write; raises its error."""
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


def is_whole(path: Path) -> bool:
    """Whether the checkpoint at ``path`` has the digest that was written with it."""
    return sha256_file(path) == _digest_of(path).read_text().strip()


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
