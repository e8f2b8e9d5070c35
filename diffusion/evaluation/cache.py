"""Cache of expensive results in files that are verified before use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import read_header, save_tensors
from diffusion.common.config import Config
from diffusion.common.files import digest_of, make_folder, sha256_file, write_bytes

Tensors = dict[str, Tensor]
Result = TypeVar("Result", bound=Config)
RESULT = "found"
"""Header field that holds the cached result, beside the fields of the key."""


def cached(folder: Path, key: Config, work: Callable[[], Tensors]) -> Tensors:
    """Return the tensors cached in ``folder`` under ``key``, or compute them with ``work`` and cache them.

    The file is ``<digest of the key>.safetensors`` with the key in its header; its own digest is written last. A
    damaged or truncated file, or one of another key, is computed again. Concurrent processes wait for the one that
    computes. Tensors are memory-mapped from the file.
    """
    return _recalled(folder, key, lambda: ({}, work()))[1]


def cached_result(
    folder: Path, key: Config, kind: type[Result], work: Callable[[], tuple[Result, Tensors]]
) -> tuple[Result, Tensors]:
    """Return a cached result of this ``kind``, stored in the file's header beside the key, and its tensors."""

    def both() -> tuple[dict[str, Any], Tensors]:
        found, tensors = work()
        return {RESULT: found.model_dump(mode="json")}, tensors

    header, tensors = _recalled(folder, key, both)
    return kind.model_validate(header[RESULT]), tensors


def pieces_folder(folder: Path, key: Config) -> Path:
    """Return the folder in which the work under ``key`` may cache pieces; it is deleted once the whole is cached."""
    return _path(folder, key).with_suffix(".pieces")


def _recalled(
    folder: Path, key: Config, work: Callable[[], tuple[dict[str, Any], Tensors]]
) -> tuple[dict[str, Any], Tensors]:
    """Return the header and the tensors."""
    named, path, pieces = key.model_dump(mode="json"), _path(folder, key), pieces_folder(folder, key)
    make_folder(folder)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path) or not _is_of(read_header(path), named):
            found, tensors = work()
            write_bytes(_seal(path), _said(save_tensors(path, tensors, named | found)))
        if pieces.exists():
            shutil.rmtree(pieces)
        return read_header(path), load_file(path)


def _path(folder: Path, key: Config) -> Path:
    return folder / f"{digest_of(key.model_dump(mode='json'))}.safetensors"


def _is_of(header: dict[str, Any], named: dict[str, Any]) -> bool:
    return {name: value for name, value in header.items() if name != RESULT} == named


def _is_whole(path: Path) -> bool:
    seal = _seal(path)
    return path.is_file() and seal.is_file() and seal.read_bytes() == _said(sha256_file(path))


def _said(digest: str) -> bytes:
    return f"{digest}\n".encode()


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")
