"""Latents of a data set's images, encoded at the first training on them and cached until a takedown."""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.files import digest_of, sha256_file, write_bytes
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.manifest import read_manifest
from diffusion.families.model import to_float

AT_ONCE, PIXELS_AT_ONCE = 16, 2**18
"""Images encoded at once, and their pixels: autoencoders of today take 3.5 KiB for a pixel."""
VARIANTS = ("plain", "mirrored")


class LatentCache:
    """Latents of the images of ``dataset`` by ``encode``, which maps (N, C, H, W) in [−1, 1] to (N, c, h, w) float32.

    A file for each shard, named by its images, by ``digest``, which stands for all that latents depend on besides, and
    by whether the latents of the mirrored images are there as well (``mirrored``). Missing ones are made when this is,
    by the threads of ``pool``; a killed process leaves whole files. They are mapped into memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        digest: str,
        encode: Callable[[Tensor], Tensor],
        mirrored: bool,
        pool: Executor,
        progress: Progress = ignore_progress,
    ) -> None:
        rows = np.arange(len(dataset))
        self._shards = dataset.shards(rows)
        self._files: dict[int, Any] = {}
        self._places = np.empty(len(rows), np.int64)
        variants, folder = VARIANTS[: 1 + mirrored], encodings_folder(dataset.folder)
        folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for shard in np.unique(self._shards).tolist():
            shard_rows = rows[self._shards == shard]
            self._places[shard_rows] = np.arange(len(shard_rows))
            at_once = images_at_once(dataset.shapes[int(dataset.shard_buckets[shard])])
            key = [digest, variants, dataset.keys(shard_rows), *([at_once] if at_once < AT_ONCE else [])]
            path = folder / f"latents-{digest_of(key)[:32]}.safetensors"
            parts = [shard_rows[start : start + at_once] for start in range(0, len(shard_rows), at_once)]
            # Concurrent trainings wait for one another.
            with FileLock(folder.with_suffix(".lock")):
                if not _is_whole(path):
                    tensors = {
                        name: torch.cat([*pool.map(partial(_encode, dataset, encode, name), parts)])
                        for name in variants
                    }
                    file_digest = save_tensors(path, tensors, {"latents": digest})
                    write_bytes(path.with_suffix(".sha256"), f"{file_digest}\n".encode())
                self._files[shard] = safe_open(path, framework="pt")
            done += len(shard_rows)
            progress("images encoded", done, len(rows))
        if read_manifest(dataset.folder).content_digest != dataset.manifest.content_digest:
            # Images may have been taken down meanwhile: see ``encode_texts``.
            forget_encodings(dataset.folder)

    def select_rows(self, rows: Rows, mirrored: np.ndarray | None = None) -> Tensor:
        """Return the latents of the images in ``rows``, of their mirror images where ``mirrored``: (N, c, h, w)."""
        latents = []
        for number, row in enumerate(np.asarray(rows, np.int64)):
            variant = VARIANTS[int(mirrored is not None and bool(mirrored[number]))]
            place = int(self._places[row])
            latents.append(self._files[int(self._shards[row])].get_slice(variant)[place : place + 1])
        return torch.cat(latents)


def images_at_once(shape: tuple[int, int]) -> int:
    """Choose how many images of ``shape`` (H, W) are encoded at once: the last bits of each depend on the others."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // math.prod(shape)))


def _encode(dataset: Dataset, encode: Callable[[Tensor], Tensor], variant: str, rows: Rows) -> Tensor:
    images = to_float(dataset.images(rows))
    with torch.inference_mode():
        return encode(images.flip(-1) if variant == "mirrored" else images).float().cpu()


def _is_whole(path: Path) -> bool:
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and sha256_file(path) == digest.read_text().strip()
