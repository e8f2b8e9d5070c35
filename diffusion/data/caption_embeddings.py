"""A data set's captions as a text encoder encodes them, computed at the first training and cached until a takedown."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.checkpoints import CONTENT_SHA256, content_digest
from diffusion.common.files import (
    canonical_json,
    remove_partials,
    sha256_bytes,
    sha256_file,
    write_atomically,
    write_bytes,
)
from diffusion.common.model_files import METADATA_KEY, tensor_bytes
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.caption_texts import CaptionTexts
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.encoding import NetworkWork
from diffusion.data.fan_out import FanOut
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.manifest import read_manifest
from diffusion.families.text_encoder import MINI_LM, CaptionEncoder, CaptionMoments, Encoding, stack_encodings

MAX_CHUNK, MIN_CHUNKS = 32, 64
"""Most captions that are encoded between two progress reports, fewer where there would be fewer chunks than these."""
PART_BYTES, PART = 2**28, ".part-"
"""Encodings in a file of their own until all are there: the most that a killed process has to encode again."""
ENCODED = "encoded."
"""Start of the names of encoded texts' tensors in the cache."""


@dataclass(frozen=True)
class Captions:
    """The encoded captions of a data set's images."""

    encodings: Mapping[str, Tensor]
    """Of P texts, all ``texts`` among them, stacked: (P, …) each; mapped where the cache is read."""
    places: np.ndarray
    """(T,) int64, place of each of the T ``texts`` in ``encodings``."""
    numbers: np.ndarray
    """(N,) int32, index of each row's caption; −1: none."""
    encoding: CaptionEncoder
    texts: CaptionTexts

    def select_rows(self, rows: Rows, u: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return a text of each row's caption, or none, encoded: (len(rows), …) each.

        The text is the caption's first, or sampled by ``u`` in [0, 1), (len(rows),).
        """
        captions = self.numbers[np.asarray(rows, np.int64)]
        places = torch.from_numpy(self.places[self.texts.select(np.maximum(captions, 0), u)])
        missing = torch.from_numpy(captions < 0)
        encodings = self.encoding.standardize({name: self.encodings[name][places] for name in self.encoding.none})
        return {
            name: torch.where(missing.view(-1, *[1] * none.ndim), none, encodings[name])
            for name, none in self.encoding.none.items()
        }

    def measure(self, rows: Rows) -> CaptionMoments | None:
        """Measure the moments of the first texts of the different captions of ``rows``."""
        captions = np.unique(self.numbers[np.asarray(rows, np.int64)])
        places = self.places[self.texts.select(captions[captions >= 0])]
        return CaptionMoments.measure(self.encodings["text"], torch.from_numpy(places))


def encode_texts(
    dataset: Dataset,
    texts: Sequence[str],
    fan_out: FanOut,
    progress: Progress = ignore_progress,
    encoding: CaptionEncoder = MINI_LM,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Encode ``texts``, all the captions of ``dataset``, into the cache, and map it: memory holds what is used.

    FLUX.2 has 16 MB a prompt. Texts in the cache are reused, those in the parts that a killed process left as well, and
    those that the set no longer has leave it when others come. Concurrent trainings wait for one another. Raises
    UserError if the text encoder is unavailable.

    Returns the encodings in the cache, (P, …) each, and the place of each of the ``texts`` there, (len(texts),).
    """
    # Required even if all are cached: each checkpoint encodes captions for its sample grid.
    encoding.load()
    path = _cache_file(dataset, encoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent.with_suffix(".lock")):
        remove_partials(path.parent)
        digests = [_digest(text) for text in texts]
        cached = [_read_cached(file, digests) for file in (path, *_parts_of(path))]
        tensors, places = cached[0]
        if (places < 0).any():
            missing = np.flatnonzero(np.all([places < 0 for _, places in cached], axis=0))
            encoded = _encode_missing(texts, missing.tolist(), fan_out, progress, encoding)
            at_once = max(PART_BYTES // sum(none.nbytes for none in encoding.none.values()), 1)
            starts = range(0, len(missing), at_once) if len(missing) > at_once else ()
            for numbers in (missing[start : start + at_once] for start in starts):
                part = [digests[number] for number in numbers.tolist()]
                file = path.with_suffix(f"{PART}{sha256_bytes(b''.join(part))[:16]}.safetensors")
                rows = enumerate(values for _, values in islice(encoded, len(part)))
                places = np.full(len(texts), -1, np.int64)
                places[numbers] = np.arange(len(part))
                cached.append((_write_cache(dataset, file, encoding, part, rows), places))
            tensors = _write_cache(dataset, path, encoding, digests, chain(_rows_of(cached), encoded))
            places = np.arange(len(texts))
        for file in _parts_of(path):
            file.unlink(missing_ok=True)
            file.with_suffix(".sha256").unlink(missing_ok=True)
    return {name: tensors[f"{ENCODED}{name}"] for name in encoding.none}, places


def seconds_to_read(dataset: Dataset, texts: Sequence[str], threads: int, encoding: CaptionEncoder = MINI_LM) -> float:
    """Estimate the seconds of ``encode_texts`` in ``threads`` threads from a few of the texts that it would encode."""
    _, places = _read_cached(_cache_file(dataset, encoding), [_digest(text) for text in texts])
    missing = np.flatnonzero(places < 0)
    sample = [texts[number] for number in missing[:8].tolist()]
    encode, start = encoding.load(), time.perf_counter()
    for text in sample:
        encode(text)
    return (time.perf_counter() - start) / max(len(sample), 1) * len(missing) / threads


def _encode_missing(
    texts: Sequence[str], missing: Sequence[int], fan_out: FanOut, progress: Progress, encoding: CaptionEncoder
) -> Iterator[tuple[int, Encoding]]:
    """Encode the ``texts`` with the numbers ``missing``, a chunk at a time."""
    step, done = min(MAX_CHUNK, max(len(missing) // MIN_CHUNKS, 1)), 0
    chunks = [missing[start : start + step] for start in range(0, len(missing), step)]
    encode = partial(_encode, NetworkWork.here(encoding.load, encoding.device))
    encoded = fan_out(encode, ([texts[number] for number in chunk] for chunk in chunks)) if chunks else ()
    for chunk, encodings in zip(chunks, encoded, strict=True):
        for place, number in enumerate(chunk):
            yield number, {name: values[place] for name, values in encodings.items()}
        done += len(chunk)
        progress("captions read", done, len(missing))


def _encode(encode: Callable[[str], Encoding], texts: Sequence[str]) -> dict[str, Tensor]:
    return stack_encodings(map(encode, texts))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _cache_file(dataset: Dataset, encoding: CaptionEncoder) -> Path:
    return encodings_folder(dataset.folder) / f"{encoding.digest[:16]}.texts.safetensors"


def _parts_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}{PART}*.safetensors"))


def _read_cached(path: Path, digests: Sequence[bytes]) -> tuple[dict[str, Tensor], np.ndarray]:
    """Map the cache, and find the places there of the texts with these ``digests``, (len(digests),); −1: not there."""
    with suppress(FileNotFoundError):  # or deleted meanwhile
        if sha256_file(path) == path.with_suffix(".sha256").read_text().strip():
            tensors = load_file(path)
            places = {text.tobytes(): place for place, text in enumerate(tensors["texts"].numpy())}
            return tensors, np.array([places.get(digest, -1) for digest in digests], np.int64)
    return {}, np.full(len(digests), -1, np.int64)


def _rows_of(cached: Iterable[tuple[Mapping[str, Tensor], np.ndarray]]) -> Iterator[tuple[int, Encoding]]:
    """Yield number and encoding of each text in one of the ``cached`` files, which have places of their own."""
    for tensors, places in cached:
        names = [name for name in tensors if name.startswith(ENCODED)]
        for number in np.flatnonzero(places >= 0).tolist():
            yield number, {name.removeprefix(ENCODED): tensors[name][places[number]] for name in names}


def _write_cache(
    dataset: Dataset,
    path: Path,
    encoding: CaptionEncoder,
    digests: Sequence[bytes],
    rows: Iterable[tuple[int, Encoding]],
) -> dict[str, Tensor]:
    """Write the file of ``save_tensors``, holding one of the numbered ``rows`` at a time, and its digest; map it."""
    row = {"texts": torch.empty(32, dtype=torch.uint8)}
    row |= {f"{ENCODED}{name}": none for name, none in encoding.none.items()}
    header = {"encoder": encoding.digest, CONTENT_SHA256: "0" * 64}
    # A file without rows has the order of the tensors, and the names of their types.
    empty = {name: value.new_empty(0, *value.shape) for name, value in row.items()}
    layout = json.loads(save(empty, {METADATA_KEY: canonical_json(header)})[8:])
    end = 0
    for name in [name for name in layout if name in row]:
        start, end = end, end + len(digests) * row[name].nbytes
        layout[name] |= {"shape": [len(digests), *row[name].shape], "data_offsets": [start, end]}

    def head() -> bytes:
        content = json.dumps(layout, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        return len(content).to_bytes(8, "little") + content

    mapped: dict[str, Tensor] = {}

    def write(partial: Path) -> None:
        first = len(head())
        with partial.open("w+b") as file:
            for number, tensors in rows:
                for name, value in tensors.items():
                    target = row[f"{ENCODED}{name}"]
                    file.seek(first + layout[f"{ENCODED}{name}"]["data_offsets"][0] + number * target.nbytes)
                    file.write(tensor_bytes(torch.empty_like(target).copy_(value)))
            file.seek(first + layout["texts"]["data_offsets"][0])
            file.writelines(digests)
            file.flush()
            # By the open file, whose name a takedown may have deleted.
            data = np.memmap(file, np.uint8, "c", first)
            for name, value in row.items():
                start, end = layout[name]["data_offsets"]
                mapped[name] = torch.from_numpy(data[start:end]).view(value.dtype).view(-1, *value.shape)
            content = content_digest(mapped, header)
            layout["__metadata__"][METADATA_KEY] = canonical_json(header | {CONTENT_SHA256: content})
            file.seek(0)
            file.write(head())

    try:
        digest = write_atomically(path, write)
        write_bytes(path.with_suffix(".sha256"), f"{digest}\n".encode())
    except FileNotFoundError:
        if not mapped:
            raise
        # Deleted by a takedown: this training goes on with what is mapped.
    if read_manifest(dataset.folder).content_digest != dataset.manifest.content_digest:
        # Images may have been taken down meanwhile. A takedown writes the manifest and then checks this folder; the
        # order here is reversed, so that one of the two finds the file.
        forget_encodings(dataset.folder)
    return mapped
