"""A data set's captions as a text encoder encodes them, computed at the first training and cached until a takedown."""

import hashlib
import time
from collections.abc import Mapping, Sequence
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
from diffusion.families.text_encoder import MINI_LM, CaptionEncoder, CaptionMoments, stack_encodings

CHUNK = 256
"""Captions encoded between two progress reports."""
ENCODED = "encoded."
"""Start of the names of encoded texts' tensors in the cache."""


@dataclass(frozen=True)
class Captions:
    """The encoded captions of a data set's images."""

    encodings: Mapping[str, Tensor]
    """Of all T ``texts``, stacked: (T, …) each."""
    numbers: np.ndarray
    """(N,) int32, index of each row's caption; −1: none."""
    encoding: CaptionEncoder
    texts: CaptionTexts

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the encodings take."""
        return sum(value.nbytes for value in self.encodings.values())

    def select_rows(self, rows: Rows, u: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return a text of each row's caption, or none, encoded: (len(rows), …) each.

        The text is the caption's first, or sampled by ``u`` in [0, 1), (len(rows),).
        """
        captions = self.numbers[np.asarray(rows, np.int64)]
        numbers = torch.from_numpy(self.texts.select(np.maximum(captions, 0), u))
        missing = torch.from_numpy(captions < 0)
        encodings = self.encoding.standardize({name: self.encodings[name][numbers] for name in self.encoding.none})
        return {
            name: torch.where(missing.view(-1, *[1] * none.ndim), none, encodings[name])
            for name, none in self.encoding.none.items()
        }

    def measure(self, rows: Rows) -> CaptionMoments | None:
        """Measure the moments of the first texts of the different captions of ``rows``."""
        captions = np.unique(self.numbers[np.asarray(rows, np.int64)])
        texts = self.texts.select(captions[captions >= 0])
        return CaptionMoments.measure(self.encodings["text"][torch.from_numpy(texts)])


def encode_texts(
    dataset: Dataset,
    texts: Sequence[str],
    pool: Executor,
    progress: Progress = ignore_progress,
    encoding: CaptionEncoder = MINI_LM,
) -> dict[str, Tensor]:
    """Encode ``texts``, all the captions of ``dataset``, stacked in their order: (len(texts), …) each.

    Those in the cache are reused, and captions that the set no longer has leave it when others come.
    Concurrent trainings wait for one another. Raises UserError if the text encoder is unavailable.
    """
    # Required even if all are cached: each checkpoint encodes captions for its sample grid.
    encode = encoding.load()
    path = _cache_file(dataset, encoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent.with_suffix(".lock")):
        digests = [_digest(text) for text in texts]
        encodings, missing = _read_cached(path, digests, encoding)
        if not missing:
            return encodings
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            for name, values in stack_encodings(pool.map(encode, [texts[number] for number in chunk])).items():
                encodings[name][chunk] = values
            progress("captions read", start + len(chunk), len(missing))
        tensors = {"texts": torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, 32)}
        tensors |= {f"{ENCODED}{name}": value for name, value in encodings.items()}
        digest = save_tensors(path, tensors, {"encoder": encoding.digest})
        write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())
        mapped, absent = _read_cached(path, digests, encoding)
        if read_manifest(dataset.folder).content_digest != dataset.manifest.content_digest:
            # Images may have been taken down meanwhile. A takedown writes the manifest and then checks this folder; the
            # order here is reversed, so that one of the two finds the file.
            forget_encodings(dataset.folder)
    return encodings if absent else mapped


def seconds_to_read(dataset: Dataset, texts: Sequence[str], threads: int, encoding: CaptionEncoder = MINI_LM) -> float:
    """Estimate the seconds of ``encode_texts`` in ``threads`` threads from a few of the texts that it would encode."""
    _, missing = _read_cached(_cache_file(dataset, encoding), [_digest(text) for text in texts], encoding)
    sample = [texts[number] for number in missing[:8]]
    encode, start = encoding.load(), time.perf_counter()
    for text in sample:
        encode(text)
    return (time.perf_counter() - start) / max(len(sample), 1) * len(missing) / threads


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _cache_file(dataset: Dataset, encoding: CaptionEncoder) -> Path:
    return encodings_folder(dataset.folder) / f"{encoding.digest[:16]}.texts.safetensors"


def _read_cached(path: Path, digests: Sequence[bytes], encoding: CaptionEncoder) -> tuple[dict[str, Tensor], list[int]]:
    """Return the cached encodings of the texts with these ``digests``, and the indices of those not in the cache.

    If the cache has no others, they are mapped from the file: memory holds what is used, as FLUX.2 has 16 MB a prompt.
    """
    encodings = {name: none.new_empty(len(digests), *none.shape) for name, none in encoding.none.items()}
    missing = dict(zip(digests, range(len(digests)), strict=True))
    with suppress(FileNotFoundError):  # or deleted meanwhile
        if sha256_file(path) == path.with_suffix(".sha256").read_text().strip():
            tensors = load_file(path)
            if tensors["texts"].numpy().tobytes() == b"".join(digests):
                return {name: tensors[f"{ENCODED}{name}"] for name in encodings}, []
            for place, text in enumerate(tensors["texts"].numpy()):
                if (number := missing.pop(text.tobytes(), None)) is not None:
                    for name, values in encodings.items():
                        values[number] = tensors[f"{ENCODED}{name}"][place]
    return encodings, list(missing.values())
