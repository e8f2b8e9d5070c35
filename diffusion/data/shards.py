"""WebDataset tars: written so that equal samples give equal bytes, read by offset."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.data.manifest import ShardEntry
from diffusion.files import canonical_json, sha256_file, sync_folder, write_atomically

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """One picture on its way into a shard."""

    key: str
    png: bytes
    about: dict[str, Any]
    """What goes into ``<key>.json``."""


@dataclass(frozen=True)
class Place:
    """Where a sample's PNG lies."""

    shard: int
    offset: int
    size: int


@dataclass
class ShardWriter:
    """Collects samples and closes a shard whenever its members reach ``shard_bytes``.

    Shards are named ``NNNNN-<digest>.tar``: their number keeps the order, their digest keeps versions apart.
    """

    folder: Path
    shard_bytes: int
    shards: list[ShardEntry] = field(default_factory=list)
    _open: list[Sample] = field(default_factory=list)
    _open_bytes: int = 0

    def add(self, sample: Sample) -> Place:
        """Append ``sample``; returns where its PNG will lie."""
        place = Place(len(self.shards), self._open_bytes + BLOCK, len(sample.png))
        self._open.append(sample)
        self._open_bytes += sum(BLOCK + _padded(len(data)) for _, data in _members(sample))
        if self._open_bytes >= self.shard_bytes:
            self.close()
        return place

    def close(self) -> None:
        """Write the shard under construction, if it has any sample."""
        if not self._open:
            return
        staged = self.folder / f".{len(self.shards):05d}.tar"
        digest = write_atomically(staged, lambda partial: _write_tar(partial, self._open))
        path = self.folder / f"{len(self.shards):05d}-{digest[:16]}.tar"
        staged.replace(path)
        sync_folder(self.folder)
        entry = ShardEntry(
            name=f"{self.folder.name}/{path.name}",
            sha256=digest,
            bytes=path.stat().st_size,
            count=len(self._open),
        )
        self.shards.append(entry)
        self._open, self._open_bytes = [], 0


def damage(folder: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard, in words, or None if it is whole."""
    path = folder / entry.name
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.bytes:
        return f"{path.stat().st_size} bytes long instead of {entry.bytes}"
    return None if sha256_file(path) == entry.sha256 else "changed (its SHA-256 differs)"


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[io.BufferedReader]]:
    """All ``paths`` open for reading."""
    files = [path.open("rb") for path in paths]
    try:
        yield files
    finally:
        for file in files:
            file.close()


def _members(sample: Sample) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return (f"{sample.key}.png", sample.png), (f"{sample.key}.json", canonical_json(sample.about).encode())


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, data in _members(sample):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
