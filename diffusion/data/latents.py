"""Latents of a data set's images, encoded at the first training on them and cached until a takedown."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
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
from diffusion.data.fan_out import FanOut
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.manifest import read_manifest
from diffusion.data.shards import StoredImages
from diffusion.families.model import to_float

AT_ONCE, PIXELS_AT_ONCE = 16, 2**18
"""Images encoded at once, and their pixels: autoencoders of today take 3.5 KiB for a pixel."""
VARIANTS = ("plain", "mirrored")


class LatentCache:
    """Latents of the images of ``dataset`` by ``encode``, which maps (N, C, H, W) in [−1, 1] to (N, c, h, w) float32.

    A file for each shard, named by its images, by ``digest``, which stands for all that latents depend on besides, and
    by whether the latents of the mirrored images are there as well (``mirrored``). Missing ones are made when this is,
    by the workers of ``fan_out``; a killed process leaves whole files. They are mapped into memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        digest: str,
        encode: Callable[[Tensor], Tensor],
        mirrored: bool,
        fan_out: FanOut,
        progress: Progress = ignore_progress,
    ) -> None:
        rows = np.arange(len(dataset))
        self._shards = dataset.shards(rows)
        self._files: dict[int, Any] = {}
        self._places = np.empty(len(rows), np.int64)
        variants, folder = VARIANTS[: 1 + mirrored], encodings_folder(dataset.folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths, parts, done = dict[int, Path](), list[np.ndarray](), 0
        # Concurrent trainings wait for one another.
        with FileLock(folder.with_suffix(".lock")):
            for shard in np.unique(self._shards).tolist():
                shard_rows = rows[self._shards == shard]
                self._places[shard_rows] = np.arange(len(shard_rows))
                at_once = _images_at_once(dataset.shapes[int(dataset.shard_buckets[shard])])
                key = [digest, variants, at_once, dataset.keys(shard_rows)]
                paths[shard] = folder / f"latents-{digest_of(key)[:32]}.safetensors"
                if _is_whole(paths[shard]):
                    self._files[shard] = safe_open(paths[shard], framework="pt")
                    done += len(shard_rows)
                else:
                    parts += [shard_rows[start : start + at_once] for start in range(0, len(shard_rows), at_once)]
            encode_part = partial(_encode, encode, variants)
            encoded = fan_out(encode_part, map(dataset.stored, parts)) if parts else ()
            pairs = zip(parts, encoded, strict=True)
            for shard, group in groupby(pairs, lambda pair: int(self._shards[pair[0][0]])):
                latents = [tensors for part, tensors in group]
                tensors = {name: torch.cat([part[name] for part in latents]) for name in variants}
                file_digest = save_tensors(paths[shard], tensors, {"latents": digest})
                write_bytes(paths[shard].with_suffix(".sha256"), f"{file_digest}\n".encode())
                self._files[shard] = safe_open(paths[shard], framework="pt")  # before a takedown deletes it
                done += len(tensors["plain"])
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


def _images_at_once(shape: Sequence[int]) -> int:
    """Choose how many images of ``shape`` (H, W) are encoded at once: the last bits depend on how many."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // math.prod(shape)))


def _encode(encode: Callable[[Tensor], Tensor], variants: Sequence[str], stored: StoredImages) -> dict[str, Tensor]:
    images = to_float(torch.from_numpy(np.ascontiguousarray(stored.decode())))
    count = len(images)
    # Padded with the last image, so that the latents of one do not depend on which shard it is in.
    images = images[torch.arange(_images_at_once(images.shape[2:])).clamp(max=count - 1)]
    with torch.inference_mode():
        latents = {name: encode(images.flip(-1) if name == "mirrored" else images) for name in variants}
    return {name: value[:count].float().cpu() for name, value in latents.items()}


def _is_whole(path: Path) -> bool:
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and sha256_file(path) == digest.read_text().strip()
