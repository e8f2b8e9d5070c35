"""Embeddings of a data set's captions, computed at the first training on them and cached until a takedown."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.files import sha256_file, write_bytes
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.caption_texts import CaptionTexts
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.manifest import read_manifest
from diffusion.families.text_encoder import MINI_LM, CaptionEncoder

CHUNK = 256
"""Captions embedded between two progress reports."""


@dataclass(frozen=True)
class Captions:
    """Embeddings of the captions of a data set's images."""

    embeddings: Tensor
    """(T, E), one for each of ``texts``."""
    numbers: np.ndarray
    """(N,) int32, index of each row's caption; −1: none."""
    encoding: CaptionEncoder
    texts: CaptionTexts

    def select_rows(self, rows: Rows, u: np.ndarray | None = None) -> Tensor:
        """Return the embedding of a text of each row's caption, or of none: (len(rows), E).

        The text is the caption's first, or sampled by ``u`` in [0, 1), (len(rows),).
        """
        captions = self.numbers[np.asarray(rows, np.int64)]
        numbers = torch.from_numpy(self.texts.select(np.maximum(captions, 0), u))
        missing = torch.from_numpy(captions < 0)
        return torch.where(missing[:, None], self.encoding.none, self.embeddings[numbers])


def embeddings_of(
    dataset: Dataset,
    texts: Sequence[str],
    pool: Executor,
    progress: Progress = ignore_progress,
    encoding: CaptionEncoder = MINI_LM,
) -> Tensor:
    """Compute the embeddings of ``texts``, all the captions of ``dataset`` in their order: (len(texts), E).

    Those in the cache are reused, and embeddings of captions that the set no longer has leave it when others come.
    Concurrent trainings wait for one another. Raises UserError if the text encoder is unavailable.
    """
    # Required even if all embeddings are cached: each checkpoint embeds captions for its sample grid.
    encode = encoding.load()
    path = _cache_file(dataset, encoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent.with_suffix(".lock")):
        digests = [_digest(text) for text in texts]
        embeddings, missing = _read_cached(path, digests, encoding)
        if not missing:
            return embeddings
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            embeddings[chunk] = torch.stack(list(pool.map(encode, [texts[number] for number in chunk])))
            progress("captions read", start + len(chunk), len(missing))
        tensors = {"texts": torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, 32)}
        digest = save_tensors(path, tensors | {"embeddings": embeddings}, {"encoder": encoding.digest})
        write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())
        if read_manifest(dataset.folder).content_digest != dataset.manifest.content_digest:
            # Images may have been taken down meanwhile. A takedown writes the manifest and then checks this folder; the
            # order here is reversed, so that one of the two finds the file.
            forget_encodings(dataset.folder)
    return embeddings


def seconds_to_read(dataset: Dataset, texts: Sequence[str], threads: int, encoding: CaptionEncoder = MINI_LM) -> float:
    """Estimate the seconds of ``embeddings_of`` in ``threads`` threads from a few of the texts that it would embed."""
    _, missing = _read_cached(_cache_file(dataset, encoding), [_digest(text) for text in texts], encoding)
    sample = [texts[number] for number in missing[:8]]
    encode, start = encoding.load(), time.perf_counter()
    for text in sample:
        encode(text)
    return (time.perf_counter() - start) / max(len(sample), 1) * len(missing) / threads


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _cache_file(dataset: Dataset, encoding: CaptionEncoder) -> Path:
    return encodings_folder(dataset.folder) / f"{encoding.digest[:16]}.safetensors"


def _read_cached(path: Path, digests: Sequence[bytes], encoding: CaptionEncoder) -> tuple[Tensor, list[int]]:
    """Return the cached embeddings of the texts with these ``digests``, and the indices of those not in the cache."""
    embeddings = torch.empty(len(digests), len(encoding.none), dtype=encoding.none.dtype)
    missing = dict(zip(digests, range(len(digests)), strict=True))
    with suppress(FileNotFoundError):  # or deleted meanwhile
        if sha256_file(path) == path.with_suffix(".sha256").read_text().strip():
            tensors = load_file(path)
            for text, embedding in zip(tensors["texts"].numpy(), tensors["embeddings"], strict=True):
                if (number := missing.pop(text.tobytes(), None)) is not None:
                    embeddings[number] = embedding
    return embeddings, list(missing.values())
