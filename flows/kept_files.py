"""Files of any version of a data set, wherever they can be had: in DVC's cache on this machine, or on its remote."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from diffusion.data.manifest import FileEntry, Manifest, parse_manifest, version_path
from diffusion.errors import UserError
from diffusion.files import sha256_file, write_atomically, write_bytes
from flows.catalogue import Catalogue
from flows.dvc_files import Cache, Listing, Remote
from flows.s3_errors import Missing

logger = logging.getLogger(__name__)


class KeptFiles:
    """The files of data set ``name``: in the cache, and on the remote with the URL ``source`` if one is given.

    ``recorded`` is DVC's digest of a version that may not be in the catalogue.
    """

    def __init__(self, name: str, source: str | None = None, recorded: str | None = None) -> None:
        self.name = name
        self.cache = Cache.here()
        self.remote = Remote.at(source) if source else None
        self.catalogue = Catalogue.of(name, source, self.remote.store) if source and self.remote else None
        self.recorded = recorded
        self._pushed: dict[str, dict[str, Listing]] = {}

    def find(self, entry: FileEntry) -> Path | None:
        """Where a file lies whole in the cache; None if it does not."""
        return self._cached(entry.name, entry.sha256)

    def write(self, version: str, name: str, sha256: str, target: Path) -> bool:
        """Write the file ``name`` of the version with the digest ``version`` to ``target``, whole.

        Returns whether it could be had; raises UserError if it came damaged.
        """
        cached = self._cached(name, sha256)
        if cached is None:
            return any(self._download(md5, name, sha256, target) for md5 in self._places(version, name))

        def copy(partial: Path) -> None:
            shutil.copyfile(cached, partial)

        write_atomically(target, copy)
        return True

    def elsewhere(self, versions: Iterable[Manifest], scratch: Path) -> Callable[[FileEntry], Path | None]:
        """Finds files of ``versions``, fetched into the folder ``scratch`` if need be."""
        holder = {entry.sha256: version.digest for version in versions for entry in version.files}

        def find(entry: FileEntry) -> Path | None:
            target = scratch / entry.sha256
            if target.is_file() or self.write(holder[entry.sha256], entry.name, entry.sha256, target):
                return target
            return None

        return find

    def listings(self, version: str) -> dict[str, Listing]:
        """What the remote says the version with the digest ``version`` consists of, by DVC's digest of it."""
        if version not in self._pushed:
            self._pushed[version] = dict(self._ask(version))
        return self._pushed[version]

    def keep_listing(self, version: str) -> None:
        """Let DVC's cache know what the version with the digest ``version`` consists of, as far as the remote does."""
        for digest in self.listings(version):
            if self.cache is not None and self.remote is not None and not self.cache.path(digest).is_file():
                write_bytes(self.cache.path(digest), self.remote.read(digest))

    def _ask(self, version: str) -> Iterator[tuple[str, Listing]]:
        if self.remote is None or self.catalogue is None:
            return
        try:
            pointer = self.catalogue.pointer(version)
        except UserError as error:
            logger.warning("%s", error)
            pointer = None
        for digest in dict.fromkeys((pointer, self.recorded)):
            if digest is not None:
                try:
                    yield digest, self.remote.listing(digest)
                except Missing:
                    # Never pushed, or cleared away: then others may have the file.
                    continue

    def _cached(self, name: str, sha256: str) -> Path | None:
        if self.cache is None:
            return None
        paths = map(self.cache.path, self.cache.places.get(name, ()))
        return next((path for path in paths if is_whole(path, sha256)), None)

    def _places(self, version: str, name: str) -> list[str]:
        """The MD5s that the file may have on the remote."""
        pushed = [listing[name] for listing in self.listings(version).values() if name in listing]
        return list(dict.fromkeys([*pushed, *(self.cache.places.get(name, ()) if self.cache else ())]))

    def _download(self, md5: str, name: str, sha256: str, target: Path) -> bool:
        if self.remote is None:
            return False
        remote = self.remote

        def fetch(partial: Path) -> None:
            remote.fetch(md5, partial)
            if sha256_file(partial) != sha256:
                raise UserError(
                    f"{name} of data set {self.name} is damaged on the remote (its SHA-256 differs): delete "
                    f"{remote.uri(md5)}, and give `darkroom ingest SOURCE` where the data set is whole, or where its "
                    "pictures are: it pushes what is missing"
                )

        try:
            write_atomically(target, fetch)
        except Missing:
            return False
        return True


def needed_files(folder: Path, version: Manifest) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of all that belongs beside the manifest if ``version`` is the current one in ``folder``.

    The manifest of a parent is read after it was named, so that whoever asks can mend it in between; where it is not
    whole then, its own parents stay unnamed.
    """
    for entry in version.files:
        yield entry.name, entry.sha256
    while version.parent is not None:
        path = version_path(folder, version.parent)
        yield path.relative_to(folder).as_posix(), version.parent
        if not is_whole(path, version.parent):
            return
        version = parse_manifest(path.read_bytes(), str(path))


def is_whole(path: Path, sha256: str) -> bool:
    """Whether there is a file at ``path`` with these bytes."""
    return path.is_file() and sha256_file(path) == sha256
