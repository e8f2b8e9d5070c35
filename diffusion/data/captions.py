"""What the captions of a data set mean: read once, at the first training that is told of them, and kept beside it.

Not at ingest: most data sets are never trained on their captions, and where they are brought together there need be no
encoder. What is kept lies in the work folder, as all that was made from a data set and is no part of it. It holds one
embedding for each different caption, by the SHA-256 of its text, and goes as soon as pictures are taken down.
"""

import hashlib
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

from diffusion.config_sampling import Asked
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.ingest import captions_folder, forget_captions
from diffusion.data.manifest import read_manifest
from diffusion.files import sha256_file, write_bytes
from diffusion.model import save_tensors
from diffusion.progress import Progress, silent
from diffusion.text import ENCODER, WIDTH, encoder

CHUNK = 256
"""Captions read between two words on how far it is."""


@dataclass(frozen=True)
class Captions:
    """The captions of a data set's pictures as a network is told them."""

    embeddings: Tensor
    """(K, 384) float32, of each different caption."""
    numbers: np.ndarray
    """(N,) int32, for each row of the data set which of them it has; −1: none."""

    def of(self, rows: Rows) -> Tensor:
        """The embedding of each row's caption, zeros where there is none: (len(rows), 384)."""
        numbers = torch.from_numpy(self.numbers[np.asarray(rows, np.int64)]).long()
        return self.embeddings[numbers].masked_fill((numbers < 0)[:, None], 0)


def like(dataset: Dataset, rows: Rows, classes: Sequence[str]) -> Asked:
    """To show what the pictures in ``rows`` do: their captions, and their labels if the model knows ``classes``."""
    return Asked(labels=tuple(dataset.labels(rows)) if classes else (), prompts=tuple(dataset.captions(rows)))


def embeddings_of(dataset: Dataset, texts: Sequence[str], pool: Executor, progress: Progress = silent) -> Tensor:
    """The embeddings of ``texts``, all the captions of ``dataset`` in their order: (len(texts), 384) float32.

    Kept under its content digest and the encoder's, whole or not at all. A damaged file is made anew, and what one of
    an earlier version knows is taken over from it before it goes. Trainings that begin together take turns.

    Raises UserError if the encoder is needed and cannot be had.
    """
    folder = captions_folder(dataset.folder)
    path = folder / f"{dataset.manifest.content_digest[:16]}-{ENCODER.digest[:16]}.safetensors"
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        kept = _recalled(path)
        if kept is not None and kept[0] == digests:
            return kept[1]
        embeddings = _made(folder, texts, digests, pool, progress)
        forget_captions(dataset.folder)
        _keep(path, digests, embeddings)
        if read_manifest(dataset.folder).content_digest != dataset.manifest.content_digest:
            # Pictures may have been taken down meanwhile. A takedown puts the manifest in place and then looks here;
            # we look in the other order, so that one of the two finds the file.
            forget_captions(dataset.folder)
    return embeddings


def _made(folder: Path, texts: Sequence[str], digests: Sequence[bytes], pool: Executor, progress: Progress) -> Tensor:
    """The embeddings of ``texts`` with these ``digests``, as far as they are not known in ``folder`` read anew."""
    embeddings = torch.empty(len(texts), WIDTH)
    missing = dict(zip(digests, range(len(texts)), strict=True))
    for earlier in folder.glob(f"*-{ENCODER.digest[:16]}.safetensors"):
        for digest, embedding in zip(*(_recalled(earlier) or ((), ())), strict=True):
            if (number := missing.pop(digest, None)) is not None:
                embeddings[number] = embedding
    numbers = list(missing.values())
    if numbers:
        read = encoder()  # loaded here, once, before the lanes want it
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            embeddings[chunk] = torch.stack(list(pool.map(read, [texts[number] for number in chunk])))
            progress("captions read", start + len(chunk), len(numbers))
    return embeddings


def _keep(path: Path, digests: Sequence[bytes], embeddings: Tensor) -> None:
    texts = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, 32)
    header = {"encoder": ENCODER.model_dump()}
    digest = save_tensors(path, {"texts": texts, "embeddings": embeddings}, header)
    write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())


def _recalled(path: Path) -> tuple[list[bytes], Tensor] | None:
    """What a file keeps: SHA-256 and embedding of each text; None if it is not whole, or went meanwhile."""
    with suppress(FileNotFoundError):
        if sha256_file(path) == path.with_suffix(".sha256").read_text().strip():
            tensors = load_file(path)
            return [row.tobytes() for row in tensors["texts"].numpy()], tensors["embeddings"]
    return None
