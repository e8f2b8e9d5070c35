"""S3 objects as sources of data sets, by URI."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion.data.sources.base import Found
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing


@dataclass(frozen=True)
class S3Objects:
    """Implementation of ``diffusion.data.sources.base.ObjectStore`` for the S3 server of the environment.

    After pickling it uses the environment of the process that it was sent to.
    """

    @cached_property
    def _store(self) -> Store:
        return Store()

    def __getstate__(self) -> None:
        """Leave the client out, as it cannot be pickled."""

    def find(self, uri: str) -> Iterator[Found]:
        """Yield all objects whose URI begins with ``uri``, in the server's order, a page at a time."""
        bucket, prefix = _split(uri)
        for found in self._store.list_objects(bucket, prefix):
            yield Found(f"s3://{bucket}/{found.key}", found.size, found.etag)

    def read(self, uri: str) -> bytes:
        """Read the bytes of one object; raises FileNotFoundError if there is none."""
        with _missing_as_file():
            return self._store.get(*_split(uri))

    def download(self, uri: str, path: Path) -> None:
        """Download one object to ``path`` atomically; raises FileNotFoundError if there is none."""
        with _missing_as_file():
            self._store.download(*_split(uri), path)


def _split(uri: str) -> tuple[str, str]:
    """Split ``uri`` into bucket and key, which may be any key that S3 allows."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return Location.parse(f"s3://{bucket}").bucket, key


@contextmanager
def _missing_as_file() -> Iterator[None]:
    try:
        yield
    except Missing as error:
        raise FileNotFoundError(str(error)) from error
