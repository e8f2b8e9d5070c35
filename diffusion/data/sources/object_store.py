"""Images under a prefix of an object store (``s3://``)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import TextIO
from uuid import uuid4

from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import MISSING, Access, Entry, ObjectStore, Payload, Source, too_large_error
from diffusion.data.sources.conventions import list_images, make_printable
from diffusion.data.sources.local_files import (
    TARS,
    WILD,
    changed_file_error,
    expand_braces,
    literal_prefix,
    open_text,
    write_once,
)

WORKERS = 16
IN_MEMORY = 2**20
"""Bytes from which objects fetched ahead are kept on disk."""


def require_object_store(uri: str, access: Access) -> ObjectStore:
    """Return the object store; raises UserError if there is none."""
    if access.objects is None:
        raise UserError(f"{uri} needs an S3 client, and there is none here: use `darkroom ingest`, or copy it to disk")
    return access.objects


def fetch_object(uri: str, etag: str, access: Access) -> Path:
    """Return a scratch copy of an object; raises FileNotFoundError if it is gone, UserError if it changed."""
    objects = require_object_store(uri, access)

    def download(partial: Path) -> None:
        item = next(objects.find(uri), None)
        if item is None or item.uri != uri:
            raise FileNotFoundError(uri)
        if item.etag != etag:
            raise changed_file_error(uri)
        objects.download(uri, partial)

    suffix = PurePosixPath(uri).suffix
    return write_once(access.scratch / f"fetched-{digest_of([uri, etag])[:32]}{suffix}", download)


def read_spooled(files: Iterable["SpooledTemporaryFile[bytes] | UnusableEntryError"]) -> Iterator[Payload]:
    """Yield what was fetched into ``files``, and close them."""
    for file in files:
        if isinstance(file, UnusableEntryError):
            yield file
            continue
        with file:
            file.seek(0)
            yield file.read()


def find_objects(pattern: str, access: Access) -> Iterator[tuple[str, str, str]]:
    """Yield name, URI and ETag of the objects that ``pattern`` matches, as ``find_files`` does for files."""
    objects = require_object_store(pattern, access)
    base = literal_prefix(pattern).rpartition("/")[0] + "/"
    matches: dict[str, str] = {}
    for piece in expand_braces(pattern):
        # Wildcards do not match slashes.
        parts = piece.split("/")
        etags = {
            item.uri: item.etag
            for item in objects.find(literal_prefix(piece, WILD))
            if len(names := item.uri.split("/")) == len(parts) and all(map(fnmatchcase, names, parts))
        }
        if not etags or "**" in piece:
            raise UserError(f"there is no object {piece}: check the name (** has no meaning here)")
        matches |= etags
    yield from ((make_printable(uri.removeprefix(base)), uri, etag) for uri, etag in sorted(matches.items()))


class Objects(Source):
    """The images under a prefix, as ``list_images`` finds them."""

    scheme = "s3"
    form = "s3://BUCKET/PREFIX"

    def __init__(self, place: str, access: Access, values: Mapping[str, str] = {}) -> None:
        """Connect to the object store; raises UserError if the place is not a prefix of images."""
        super().__init__(place, access, values)
        uri = f"s3:{place}"
        if not place.startswith("//"):
            raise UserError(f"{uri} is not an address: write s3://BUCKET/PREFIX")
        if uri.endswith((*TARS, ".zip", ".parquet", ".csv", ".jsonl")):
            raise UserError(
                f"{uri} is one file: write wds:{uri} for a tar of WebDataset, and copy others to disk first"
            )
        self.prefix = f"{uri.rstrip('/')}/"
        self.objects = require_object_store(uri, access)

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the store's order; raises UserError for unreadable metadata."""
        return list_images(self._files(), self.prefix, self._table, self.read_texts, self.access)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes, fetched concurrently; errors of the object store are passed on."""
        for payload in prefetch(self._fetch, entries, WORKERS):
            if isinstance(payload, Path):
                yield payload.read_bytes()
                payload.unlink()
            else:
                yield payload

    def _fetch(self, entry: Entry) -> Payload | Path:
        """Fetch small objects into memory and large ones to disk, so that waiting ones do not fill the memory."""
        place, limit = json.loads(entry.locator), self.access.config.max_bytes
        if isinstance(place, str):
            return UnusableEntryError(place)
        name, size = place
        if size > limit:
            return too_large_error(size, limit)
        try:
            if size <= IN_MEMORY:
                return self.objects.read(self.prefix + name)
            path = self.access.scratch / f"object-{uuid4().hex}"
            self.objects.download(self.prefix + name, path)
        except FileNotFoundError:
            return UnusableEntryError(MISSING)
        return path

    def _files(self) -> Iterator[tuple[str, str, str]]:
        for item in self.objects.find(self.prefix):
            name = item.uri.removeprefix(self.prefix)
            yield make_printable(name), json.dumps([name, item.size]), item.etag

    def _table(self, locator: str, etag: str) -> TextIO:
        return open_text(fetch_object(self.prefix + json.loads(locator)[0], etag, self.access))
