"""What every source of pictures offers, and what it is given."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from PIL import Image

from diffusion.data.config import IngestConfig
from diffusion.data.pictures import Refused

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Names that may be pictures; what a file really is, its bytes decide."""
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
)
"""Names of pictures in formats that cannot be read: these are refused, and not passed over as a text would be."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that may be a picture, and what its source says about it."""

    source: str
    """Its name, unique within the source: a relative path, ARCHIVE/MEMBER, a URL."""
    locator: str
    """What the source needs to read it: opaque to everybody else."""
    stamp: str
    """Differs when the bytes may have changed (size and time, ETag); empty: they must be read to be known."""
    label: str | None = None
    caption: str | None = None


Payload: TypeAlias = bytes | Image.Image | Refused
"""An encoded picture, a decoded one, or why there is none."""


class Source(Protocol):
    """A set of pictures somewhere. Both methods stream: memory does not grow with the set.

    It is opened anew in every worker, so opening it must be cheap.
    """

    in_order: bool
    """Whether the order of ``entries`` depends on the pictures alone; otherwise that of their names is used."""

    def entries(self) -> Iterator[Entry]:
        """Everything that may be a picture. Raises UserError for a source that is missing or cannot be understood."""

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """What lies behind each of ``entries``, in their order; a few are held at a time.

        What cannot be had although the source is there is Refused (a missing file, HTTP 404, too many bytes);
        errors that may pass (a full disk, a lost connection to S3) are raised, so that the whole chunk is retried.
        """


@dataclass(frozen=True, slots=True)
class Found:
    """An object in an object store."""

    uri: str
    size: int
    """In bytes."""
    etag: str


class ObjectStore(Protocol):
    """Where objects lie that are not files. Can be pickled, to be used in other processes."""

    def find(self, uri: str) -> Iterator[Found]:
        """All objects whose URI begins with ``uri``, in the order of their names."""

    def read(self, uri: str) -> bytes:
        """The bytes of one object; raises FileNotFoundError if there is none."""

    def download(self, uri: str, path: Path) -> None:
        """Write one object to ``path``, whole or not at all; raises FileNotFoundError if there is none."""


@dataclass(frozen=True)
class Access:
    """What sources may use."""

    config: IngestConfig
    """For its limits: ``max_bytes``, ``download_seconds``, ``download_tries``."""
    scratch: Path
    """A folder for what must be unpacked or fetched first; kept until the ingest is over, shared by all workers."""
    objects: ObjectStore | None = None
    """None: ``s3://`` sources are refused."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files a listing has passed over as no pictures, by the ends of their names."""
