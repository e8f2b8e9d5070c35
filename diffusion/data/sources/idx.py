"""IDX files of grey images: MNIST, Fashion-MNIST and others of their kind."""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import BinaryIO, Self

from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import Refused
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import sane
from diffusion.data.sources.local_files import MISSING, changed, stamp, stamp_of, uncompressed

SPLITS = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 8
HEADER = 16
"""Bytes before the images."""


@dataclass(frozen=True)
class Idx:
    """The images in the file ``images``, named ``FILE/NUMBER``, with the numbers of their classes as labels.

    Labels come from the file beside it that is named as in MNIST (``train-labels-idx1-ubyte`` beside
    ``train-images-idx3-ubyte``); without one there are none. Files may end in ``.gz``: they are unpacked, once, into
    the scratch folder.

    Format: http://yann.lecun.com/exdb/mnist (big-endian; two zero bytes, the type 8 for unsigned bytes, the number
    of dimensions, their sizes as 32-bit integers, then the values in C order).
    """

    images: Path
    access: Access
    in_order = True

    @classmethod
    def open(cls, place: Path, options: dict[str, str], access: Access) -> Self:
        """Open the file ``place``, or the one for ``split`` (train, test) in the folder ``place``."""
        if unknown := sorted(set(options) - {"split"}):
            raise UserError(f"idx:{place} has no option {unknown[0]}: the only one is split")
        split = options.get("split")
        if split not in (None, *SPLITS):
            raise UserError(f"idx:{place} has no split {split}: give train or test")
        if place.is_file():
            if split:
                raise UserError(f"idx:{place} is one file, so split={split} would have no effect: leave it out")
            return cls(place, access)
        found: dict[str, Path] = {}
        for path in sorted(place.glob(f"{SPLITS[split] if split else '*'}-images[-.]idx3-ubyte*")):
            # Unpacked files take precedence; other extensions (such as .bz2) are not supported.
            if path.name.endswith(("ubyte", "ubyte.gz")):
                found.setdefault(path.name.removesuffix(".gz"), path)
        if not found:
            raise UserError(f"idx:{place} is neither an IDX file nor a folder with {split or ''} ones: check the path")
        if len(found) > 1:
            raise UserError(f"idx:{place} holds {' and '.join(found)}: choose with ?split=train or test")
        return cls(next(iter(found.values())), access)

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the file's order; raises UserError if it is damaged, or its labels differ in number."""
        known, name = stamp_of(self.images), sane(self.images.name)
        with ExitStack() as stack:
            _, (count, height, width) = self._opened(stack, self.images, known, 3)
            labels = None
            if path := self._labels():
                labels, (length,) = self._opened(stack, path, stamp_of(path), 1)
                if length != count:
                    raise UserError(f"{path} has {length} labels for {count} images: give the files of one set")
            for number in range(count):
                label = str(labels.read(1)[0]) if labels else None
                yield Entry(f"{name}/{number}", json.dumps([number, height, width]), known, label)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield decoded grey images; raises UserError if the file has changed since it was listed."""
        for known, group in groupby(entries, key=lambda entry: entry.stamp):
            with ExitStack() as stack:
                try:
                    file, _ = self._opened(stack, self.images, known, 3)
                except FileNotFoundError:
                    yield from (Refused(MISSING) for _ in group)
                    continue
                for entry in group:
                    number, height, width = json.loads(entry.locator)
                    if width * height > (most := self.access.config.max_pixels):
                        yield Refused(f"{width}×{height} pixels are over the limit of {most}")
                        continue
                    file.seek(HEADER + number * height * width)
                    yield Image.frombytes("L", (width, height), file.read(height * width))

    def _opened(self, stack: ExitStack, path: Path, known: str, dimensions: int) -> tuple[BinaryIO, tuple[int, ...]]:
        """Open an IDX file whose stamp is ``known``; returns it, positioned behind its header, and its sizes."""
        plain = uncompressed(path, known, self.access)
        if plain == path and stamp(path.stat()) != known:
            raise changed(str(path))
        file = stack.enter_context(plain.open("rb"))
        magic, *sizes = struct.unpack(f">{dimensions + 1}I", file.read(4 * dimensions + 4).ljust(4 * dimensions + 4))
        if magic != (UNSIGNED_BYTE << 8) + dimensions:
            raise UserError(f"{path} is no IDX file of {dimensions} dimensions of unsigned bytes: check the path")
        if plain.stat().st_size != 4 * dimensions + 4 + prod(sizes) or 0 in sizes[1:]:
            raise UserError(f"{path} has not the length that its header says: it is damaged or was cut short")
        return file, tuple(sizes)

    def _labels(self) -> Path | None:
        name = self.images.name.replace("-images", "-labels").replace("idx3", "idx1").removesuffix(".gz")
        beside = (self.images.with_name(name), self.images.with_name(f"{name}.gz"))
        return next((path for path in beside if path.is_file() and path != self.images), None)
