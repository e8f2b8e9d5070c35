"""Sources as tests look at them: all that they list, with what lies behind it."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusion.common.files import sha256_bytes
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, ObjectStore, Payload, StoredObject
from tests.builders.shapes import blob


@dataclass(frozen=True)
class Seen:
    """An entry, its locator and stamp aside, and its payload: bytes, an image, or why there is none as text."""

    name: str
    label: str | None
    caption: str | None
    payload: bytes | Image.Image | str


@dataclass(frozen=True)
class Objects:
    """An object store in memory."""

    contents: dict[str, bytes]

    def find(self, uri: str) -> Iterator[StoredObject]:
        for name, data in sorted(self.contents.items()):
            if name.startswith(uri):
                yield StoredObject(name, len(data), sha256_bytes(data))

    def read(self, uri: str) -> bytes:
        return self.contents[uri]

    def download(self, uri: str, path: Path) -> None:
        path.write_bytes(self.contents[uri])


def access(scratch: Path, objects: ObjectStore | None = None, **fields: object) -> Access:
    scratch.mkdir(exist_ok=True)
    return Access(IngestConfig.model_validate({"size": 8} | fields), scratch, objects)


def read_all(uri: str | Path, source_access: Access) -> list[Seen]:
    """Everything in the source: listed by one opening of it, read by another, as workers do."""
    entries = list(open_source(str(uri), source_access).entries())
    payloads = open_source(str(uri), source_access).read(entries)
    return [Seen(e.source, e.label, e.caption, _plain(p)) for e, p in zip(entries, payloads, strict=True)]


def payloads(uri: str | Path, source_access: Access) -> dict[str, bytes | Image.Image | str]:
    return {each.name: each.payload for each in read_all(uri, source_access)}


def _plain(payload: Payload) -> bytes | Image.Image | str:
    return str(payload) if isinstance(payload, UnusableEntryError) else payload


def png(number: int, size: int = 12) -> bytes:
    """An image unlike all others."""
    buffer = io.BytesIO()
    blob(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root
