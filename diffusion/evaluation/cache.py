"""Cache of expensive results in files that are verified before use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic_core import to_jsonable_python
from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.config import Config
from diffusion.common.files import digest_of, make_folder, sha256_file, write_bytes
from diffusion.common.model_files import read_header

Tensors = dict[str, Tensor]
Key = dict[str, Any]
"""Everything that a cached value depends on, configurations and other keys included, under names; among them a
``format_version``, which is incremented when the computation changes."""
Result = TypeVar("Result", bound=Config)


def load_or_compute(folder: Path, key: Key, work: Callable[[], Tensors]) -> Tensors:
    """Return the tensors cached in ``folder`` under ``key``, or compute them with ``work`` and cache them.

    The file is ``<digest of the key>.safetensors`` with the key in its header; its own digest is written last. A
    damaged or truncated file, or one of another key, is computed again. Concurrent processes wait for the one that
    computes. Tensors are memory-mapped from the file.
    """
    return _load_or_compute_json(folder, key, lambda: (None, work()))[1]


def load_or_compute_result(
    folder: Path, key: Key, kind: type[Result], work: Callable[[], tuple[Result, Tensors]]
) -> tuple[Result, Tensors]:
    """Return a cached result of this ``kind``, stored in the file's header beside the key, and its tensors."""
    result, tensors = _load_or_compute_json(folder, key, work)
    return kind.model_validate(result), tensors


def find_cached(folder: Path, key: Key) -> Tensors | None:
    """Return the tensors cached in ``folder`` under ``key``; None if there are none, or they are damaged."""
    path = pieces_folder(folder, key).with_suffix(".safetensors")
    return load_file(path) if _is_intact(path, to_jsonable_python(key)) else None


def pieces_folder(folder: Path, key: Key) -> Path:
    """Return the folder in which the work under ``key`` may cache pieces; it is deleted once the whole is cached."""
    return folder / f"{digest_of(to_jsonable_python(key))}.pieces"


def _load_or_compute_json(
    folder: Path, key: Key, work: Callable[[], tuple[Config | None, Tensors]]
) -> tuple[Any, Tensors]:
    """Return the result, as JSON, and the tensors."""
    key, pieces = to_jsonable_python(key), pieces_folder(folder, key)
    path = pieces.with_suffix(".safetensors")
    make_folder(folder)
    with FileLock(pieces.with_suffix(".lock")):
        if not _is_intact(path, key):
            result, tensors = work()
            digest = save_tensors(path, tensors, {"key": key, "result": to_jsonable_python(result)})
            write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())
        if pieces.exists():
            shutil.rmtree(pieces)
        return read_header(path)["result"], load_file(path)


def _is_intact(path: Path, key: Any) -> bool:
    seal = path.with_suffix(".sha256")
    is_whole = path.is_file() and seal.is_file() and seal.read_bytes() == f"{sha256_file(path)}\n".encode()
    return is_whole and read_header(path).get("key") == key
