"""Tensors that took long to compute, kept in files that are either right or not used."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from diffusion.config import Config
from diffusion.files import digest_of, sha256_file, write_bytes
from diffusion.model import read_header, save_tensors


def recall(folder: Path, key: Config, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept in ``folder`` under ``key``, or else those that ``work`` makes of what the key names.

    They lie in ``<digest of the key>.safetensors``, which says the key itself inside, beside its own digest, written
    last. A file that is cut, damaged or another key's is made anew. Of several processes one works and the others wait.
    What comes back is mapped from the file: it takes memory as it is read.
    """
    named = key.model_dump(mode="json")
    path = folder / f"{digest_of(named)}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path) or read_header(path) != named:
            write_bytes(_seal(path), _said(save_tensors(path, work(), named)))
        return load_file(path)


def _is_whole(path: Path) -> bool:
    seal = _seal(path)
    return path.is_file() and seal.is_file() and seal.read_bytes() == _said(sha256_file(path))


def _said(digest: str) -> bytes:
    return f"{digest}\n".encode()


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")
