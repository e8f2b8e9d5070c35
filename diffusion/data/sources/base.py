"""What every source of images offers, and what it is given."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

from PIL import Image

from diffusion.common.files import sha256_bytes
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import Refused

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Names that may be images; what a file really is, its bytes decide."""
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
)
"""Names of images in formats that cannot be read: these are refused, and not passed over as a text would be."""


LONGEST = {"name": 4096, "label": 1000, "caption": 10_000}
"""Characters of what a source tells of an image."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that may be an image, and what its source says about it."""

    source: str
    """Its name, unique within the source: a relative path, ARCHIVE/MEMBER, a URL."""
    locator: str
    """What the source needs to read it: opaque to everybody else."""
    stamp: str
    """Differs when the bytes may have changed (size and time, ETag); empty: they must be read to be known."""
    label: str | None = None
    caption: str | None = None
    problem: str | None = None
    """Why it is not read at all, if it is not."""


Payload: TypeAlias = bytes | Image.Image | Refused
"""An encoded image, a decoded one, or why there is none."""


class Source(Protocol):
    """A set of images somewhere. Both methods stream: memory does not grow with the set.

    It is opened anew in every worker, so opening it must be cheap.
    """

    in_order: bool
    """Whether the order of ``entries`` depends on the images alone; otherwise that of their names is used."""

    def entries(self) -> Iterator[Entry]:
        """Everything that may be an image. Raises UserError for a source that is missing or cannot be understood."""

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """What lies behind each of ``entries``, in their order; a few are held at a time.

        What cannot be had although the source is there is Refused (a missing file, HTTP 404, too many bytes);
        errors that may pass (a full disk, a lost connection to S3) are raised, so that the whole chunk is retried.
        """


class Bounded:
    """``source`` with a bound on every text that it tells, whoever wrote it: what is longer is refused."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.in_order = source.in_order

    def entries(self) -> Iterator[Entry]:
        """Those of ``source``; what is too long is cut from them, and their ``problem``."""
        return map(_bounded, self.source.entries())

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """What ``source`` reads, and why the others are not read."""
        payloads = self.source.read([entry for entry in entries if entry.problem is None])
        for entry in entries:
            yield next(payloads) if entry.problem is None else Refused(entry.problem)


def _bounded(entry: Entry) -> Entry:
    texts = {"name": entry.source, "label": entry.label or "", "caption": entry.caption or ""}
    for kind, text in texts.items():
        if len(text) > LONGEST[kind]:
            entry = replace(
                entry,
                source=entry.source if len(entry.source) <= LONGEST["name"] else shortened(entry.source),
                stamp="",  # what is wrong with it may be mended while its bytes stay
                label=entry.label if len(texts["label"]) <= LONGEST["label"] else None,
                caption=entry.caption if len(texts["caption"]) <= LONGEST["caption"] else None,
                problem=too_long(kind),
            )
            break
    return entry


def too_long(kind: str) -> str:
    """Why something is refused whose name, label or caption is longer than LONGEST."""
    return f"its {kind} has more than {LONGEST[kind]} characters"


def shortened(name: str) -> str:
    """The two ends of a name that is too long, and what tells it from others that begin and end so."""
    return f"{name[:100]}…{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:16]}…{name[-20:]}"


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
    """How many files a listing has passed over as no images, by the ends of their names."""
