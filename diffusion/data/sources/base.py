"""Interfaces of image sources: entries, payloads, sources, object stores."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

from PIL import Image

from diffusion.common.files import sha256_bytes
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.caption_files import MAX_TEXT_BYTES, CaptionTally

MISSING = "named in the listing but missing"
"""Reason why a file that was listed, or named by metadata, is not read."""
NO_IMAGE = "a row without an image"
"""Reason why a row of a table is not read."""
MAX_CHARACTERS = {"name": 4096, "label": 1000, "caption": 10_000}
"""Maximum characters of the texts of an image."""


class Entry(NamedTuple):
    """A possible image, with its name, label and caption in the source."""

    source: str
    """Its name, unique within the source: a relative path, ARCHIVE/MEMBER, a URL."""
    locator: str
    """Locator for the source's own use, opaque to all others."""
    stamp: str
    """Differs when the bytes may have changed (size and time, ETag); empty: unknown, so they must be read."""
    label: str | None = None
    caption: str | None = None
    problem: str | None = None
    """Reason why it is not read, if any."""
    mask: str | None = None
    """JSON of locator and stamp of its mask, if it has one."""


Payload: TypeAlias = bytes | Image.Image | UnusableEntryError
"""An encoded image, a decoded one, or the reason why there is none."""


class Source(ABC):
    """A set of images, streamed: memory does not grow with the set. Every worker opens it again: that must be cheap.

    ``SOURCES`` and other packages name it by a scheme, as in ``SCHEME:PLACE?OPTION=VALUE``.
    """

    scheme: ClassVar[str]
    """Its name in ``SCHEME:PLACE``; another package's is the name of its entry point."""
    form: ClassVar[str]
    """How a configuration names it, for error messages."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Ends of file names, in lower case, by which a path without a scheme is taken for this source."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of its options; without any, question marks are part of the place."""
    in_order: ClassVar[bool] = False
    """Whether ``entries`` has an order that depends on the images alone; otherwise they are sorted by name."""

    def __init__(self, place: str, access: "Access", values: Mapping[str, str] = {}) -> None:
        """Take the place, without its scheme, and the values of its options; raises UserError for invalid ones."""
        self.place, self.access, self.values = place, access, values

    @property
    def path(self) -> Path:
        """Return the place as a path."""
        return Path(self.place)

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Yield every possible image; raises UserError for a source that is missing or invalid."""

    @abstractmethod
    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield the payload of each of ``entries`` in order, a few in memory at a time.

        Permanent failures of an entry are UnusableEntryError (a missing file, HTTP 404, too many bytes); transient
        errors (a full disk, a lost connection to S3) are raised, so that the whole chunk is retried.
        """

    def read_masks(self, entries: Sequence[Entry]) -> Iterator[Payload | None]:
        """Yield the mask of each of ``entries`` in order, as ``read`` does; None for an entry without one."""
        places = [None if entry.mask is None else json.loads(entry.mask) for entry in entries]
        masks = self.read([Entry("", place[0], place[1]) for place in places if place is not None])
        for place in places:
            mask = None if place is None else next(masks)
            yield None if isinstance(mask, UnusableEntryError) and str(mask) == NO_IMAGE else mask

    def read_texts(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Read files of text, of at most MAX_TEXT_BYTES, as ``read`` does."""
        config = self.access.config.model_copy(update={"max_bytes": MAX_TEXT_BYTES})
        return type(self)(self.place, replace(self.access, config=config), self.values).read(entries)


def limit_texts(entry: Entry) -> Entry:
    """Limit the length of the texts of an entry: a longer one is cut or left out, and becomes its ``problem``."""
    texts = {"name": entry.source, "label": entry.label, "caption": entry.caption}
    long_kinds = [kind for kind, text in texts.items() if len(text or "") > MAX_CHARACTERS[kind]]
    if not long_kinds:
        return entry
    source = shorten_name(entry.source) if "name" in long_kinds else entry.source
    # Without a stamp, as its texts may be fixed while its bytes stay the same.
    return Entry(source, entry.locator, stamp="", problem=too_long_reason(long_kinds[0]))


def too_long_reason(kind: str) -> str:
    """Return the reason for a name, label or caption longer than MAX_CHARACTERS."""
    return f"its {kind} has more than {MAX_CHARACTERS[kind]} characters"


def too_large_error(size: int, limit: int) -> UnusableEntryError:
    """Return the reason why a file of ``size`` bytes is not read."""
    return UnusableEntryError(f"{size} bytes are over the limit of {limit}")


def shorten_name(name: str) -> str:
    """Shorten a name that is too long to its two ends and a digest."""
    return f"{name[:100]}…{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:16]}…{name[-20:]}"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in an object store; its size in bytes."""

    uri: str
    size: int
    etag: str


class ObjectStore(Protocol):
    """Storage of objects that are not files. Must be picklable for use in other processes."""

    def find(self, uri: str) -> Iterator[StoredObject]:
        """Yield all objects whose URI begins with ``uri``, in the order of their names."""

    def read(self, uri: str) -> bytes:
        """Return the bytes of one object; raises FileNotFoundError if there is none."""

    def download(self, uri: str, path: Path) -> None:
        """Write one object to ``path``, atomically; raises FileNotFoundError if there is none."""


@dataclass(frozen=True)
class Access:
    """Resources of sources: limits, scratch folder, object store."""

    config: IngestConfig
    scratch: Path
    """Folder for unpacked or fetched files, kept until the end of the ingest and shared by all workers."""
    objects: ObjectStore | None = None
    """None: ``s3://`` sources are rejected."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files ignored by a listing because they are not images, by extension."""
    captions: CaptionTally = field(default_factory=CaptionTally)
    """What a listing found of captions."""
    listings: Path | None = None
    """Folder that outlasts the ingest, for what stands in remote files that cannot change; None: the scratch folder."""
    about: dict[Literal["source", "licence"], str] = field(default_factory=dict)
    """What a listing found out about a versioned source: its URI with the commit, and the licence of its card."""
