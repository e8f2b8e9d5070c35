"""Data set versions in DVC, which names files by MD5: recorded, restored and streamed, with the lineage of runs."""

import hashlib
import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from botocore.exceptions import BotoCoreError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import sha256_file, write_atomically, write_bytes
from diffusion.data.manifest import FileEntry, Manifest, parse_manifest, read_manifest, version_path, work_folder
from diffusion.data.shards import missing_shards
from flows.datasets.catalog import Catalog
from flows.datasets.published import find_strays, read_published
from flows.storage.s3 import ListedObject, Location, Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import DvcDigest

logger = logging.getLogger(__name__)
logging.getLogger("dvc").setLevel(logging.WARNING)  # it would tell of each dvc.lock that it writes

INGEST_STAGE = "ingest"
FOLDER = ".dir"  # suffix of the name of a folder's listing
Listing = dict[str, str]  # folder in DVC: the MD5 of each file by its path in the folder


class ListedFile(Config):
    """Entry of a folder's listing."""

    md5: DvcDigest
    relpath: str


LISTING = TypeAdapter(list[ListedFile])


@contextmanager
def open_repository(root: str | None = None) -> Iterator[Repo]:
    """Open the DVC repository at ``root``, by default that around the working folder.

    Raises NotDvcRepoError if there is none, and UserError if one of its files is damaged.
    """
    with ExitStack() as stack:
        try:
            repo = stack.enter_context(Repo(root, _wait_for_lock=True))
            _remove_torn_locks(Path(str(repo.tmp_dir)))
            _ = repo.index.outs  # reads dvc.yaml, dvc.lock and all .dvc files
        except NotDvcRepoError:
            raise
        except (DvcException, ValueError, RecursionError) as error:
            raise UserError(
                f"DVC cannot read its files in {root or Path.cwd()} ({' '.join(str(error).split())}): mend dvc.yaml, "
                "dvc.lock or the .dvc file, or take it from git"
            ) from error
        yield repo


def _remove_torn_locks(folder: Path) -> None:
    """Remove DVC's table of locks if a kill tore it: DVC writes it in place, and refuses to read half of one."""
    table = folder / RWLOCK_FILE
    if _is_torn(table):
        # Another process may be writing it.
        with make_lock(str(folder / RWLOCK_LOCK), wait=True):
            if _is_torn(table):
                table.unlink()


def _is_torn(table: Path) -> bool:
    with suppress(FileNotFoundError):
        try:
            json.loads(table.read_bytes())
        except ValueError:
            return True
    return False


@dataclass(frozen=True)
class Cache:
    """DVC's cache on this machine."""

    folder: Path

    @classmethod
    def from_working_folder(cls) -> "Cache | None":
        """Cache of the DVC repository around the working folder; None outside of one."""
        try:
            with open_repository() as repo:
                return cls(Path(repo.cache.local.path))
        except NotDvcRepoError:
            return None

    def path(self, name: str) -> Path:
        """Path of an object, which may not exist."""
        return self.folder / name[:2] / name[2:]

    def listing(self, name: str) -> Listing | None:
        """Listing of this name; None if it is not in the cache."""
        path = self.path(name)
        return _parse_listing(path.read_bytes(), str(path)) if path.is_file() else None

    def listings(self) -> Iterator[tuple[str, Listing]]:
        """Yield the name and content of each folder listing."""
        for path in sorted(self.folder.glob(f"??/*{FOLDER}")):
            yield path.parent.name + path.name, _parse_listing(path.read_bytes(), str(path))

    @cached_property
    def places(self) -> dict[str, dict[str, None]]:
        """MD5s of each file in all listings, as an ordered set, by its path."""
        places: dict[str, dict[str, None]] = {}
        for _, listing in self.listings():
            for path, md5 in listing.items():
                places.setdefault(path, {})[md5] = None
        return places

    def add(self, path: Path) -> str:
        """Copy a file into the cache; returns its MD5."""
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if not self.path(md5).is_file():
            write_atomically(self.path(md5), partial(shutil.copyfile, path))
        return md5

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, if they exist."""
        for name in names:
            self.path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Remote:
    """DVC's remote on S3."""

    place: Location
    store: Store

    @classmethod
    def from_url(cls, source: str) -> "Remote":
        """Remote with the URL ``source``."""
        return cls(Location.parse(source), Store())

    def fetch(self, name: str, path: Path) -> None:
        """Fetch an object to ``path``, overwriting it; raises MissingObjectError."""
        self.store.fetch(self.place.bucket, self.key(name), path)

    def read(self, name: str) -> bytes:
        """Read the bytes of an object; raises MissingObjectError."""
        return self.store.get(self.place.bucket, self.key(name))

    def stat(self, name: str) -> ListedObject | None:
        """Size and time of an object; None if it does not exist."""
        return self.store.stat(self.place.bucket, self.key(name))

    def uri(self, name: str) -> str:
        """URI of an object, which may not exist."""
        return f"s3://{self.place.bucket}/{self.key(name)}"

    def listing(self, name: str) -> Listing:
        """Listing of this name; raises MissingObjectError."""
        return _parse_listing(self.read(name), f"{self.place}/{self.key(name)}")

    def listings(self) -> Iterator[tuple[str, Listing]]:
        """Yield the name and content of each folder listing."""
        for name in sorted(self.names()):
            if name.endswith(FOLDER):
                yield name, self.listing(name)

    def names(self) -> set[str]:
        """Names of all objects; takes one listing of the bucket."""
        prefix = self.key("")
        return {key.removeprefix(prefix).replace("/", "") for key in self.store.list_keys(self.place.bucket, prefix)}

    def push(self, name: str, cache: Cache) -> None:
        """Upload the missing files of the folder ``name`` from ``cache``, and its listing last.

        DVC's own push overwrites, and takes all files as pushed once it finds the listing. Raises UserError if a file
        of the cache is missing or damaged, and ConflictError if an object of its name holds other bytes.
        """
        if (listing := cache.listing(name)) is None:
            raise UserError(f"{cache.path(name)} is missing: ingest the data set again")

        def upload(name: str) -> None:
            path = cache.path(name)
            if not path.is_file():
                raise UserError(f"{path} is missing: ingest the data set again")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != name.removesuffix(FOLDER):
                    raise UserError(f"{path} is damaged: delete it, and ingest the data set again")
                self.store.put_once(self.place.bucket, self.key(name), file)

        remote_names = self.names()
        with ThreadPoolExecutor(4) as pool:
            # An error cancels the uploads that have not begun.
            list(pool.map(upload, sorted(set(listing.values()) - remote_names)))
        if name not in remote_names:
            upload(name)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, if they exist."""
        self.store.delete_many(self.place.bucket, map(self.key, names))

    def key(self, name: str) -> str:
        """Key of an object in the bucket; of all objects if ``name`` is empty."""
        return self.place.key(f"files/md5/{name[:2]}/{name[2:]}" if name else "files/md5/")


def _parse_listing(data: bytes, place: str) -> Listing:
    try:
        return {entry.relpath: entry.md5 for entry in LISTING.validate_json(data)}
    except ValidationError as error:
        raise UserError(f"{place} is not a listing of DVC: delete it, and push the data set again") from error


class StoredFiles:
    """Files of data set ``name`` in DVC's cache, and on the remote with the URL ``source`` if one is given.

    ``digest`` is DVC's of a version that may not be in the catalog, and ``published`` the MD5s of shards on the remote
    that DVC may not have recorded.
    """

    def __init__(
        self, name: str, source: str | None = None, digest: str | None = None, published: Listing | None = None
    ) -> None:
        self.name = name
        self.cache = Cache.from_working_folder()
        self.remote = Remote.from_url(source) if source else None
        self.catalog = Catalog.of(name, source, self.remote.store) if source and self.remote else None
        self.recorded, self.published = digest, published or {}
        self._listings: dict[str, dict[str, Listing]] = {}

    def find(self, entry: FileEntry) -> Path | None:
        """Path of an intact copy of a file in the cache; None without one."""
        return self._find_cached(entry.name, entry.sha256)

    def write(self, version: str, name: str, sha256: str, target: Path) -> bool:
        """Write a file of ``version`` to ``target`` if it is found; raises UserError if it is damaged on the remote."""
        if (path := self._find_cached(name, sha256)) is not None:
            write_atomically(target, partial(shutil.copyfile, path))
            return True
        listings = [self.published, *self.listings(version).values()]
        md5s = [listing[name] for listing in listings if name in listing]
        places = dict.fromkeys([*md5s, *(self.cache.places.get(name, ()) if self.cache else ())])
        return any(self._download(md5, name, sha256, target) for md5 in places)

    def remote_lookup(self, versions: Iterable[Manifest], scratch: Path) -> Callable[[FileEntry], Path | None]:
        """Return a function that finds files of ``versions``, fetching them into the folder ``scratch``."""
        holder = {entry.sha256: version.digest for version in versions for entry in version.files}

        def find(entry: FileEntry) -> Path | None:
            target = scratch / entry.sha256
            if target.is_file() or self.write(holder[entry.sha256], entry.name, entry.sha256, target):
                return target
            return None

        return find

    def listings(self, version: str) -> dict[str, Listing]:
        """Listings on the remote of the version with the digest ``version``, by DVC's digest."""
        if self.remote is None or self.catalog is None or version in self._listings:
            return self._listings.get(version, {})
        try:
            pointer = self.catalog.pointer(version)
        except UserError as error:
            logger.warning("%s", error)
            pointer = None
        listings = self._listings[version] = {}
        for digest in filter(None, dict.fromkeys((pointer, self.recorded))):
            # It may have been never pushed, or deleted: another listing may have the file.
            with suppress(MissingObjectError):
                listings[digest] = self.remote.listing(digest)
        return listings

    def keep_listing(self, version: str) -> None:
        """Copy the remote's listings of the version with the digest ``version`` into DVC's cache."""
        for digest in self.listings(version):
            if self.cache is not None and self.remote is not None and not self.cache.path(digest).is_file():
                write_bytes(self.cache.path(digest), self.remote.read(digest))

    def _find_cached(self, name: str, sha256: str) -> Path | None:
        paths = map(self.cache.path, self.cache.places.get(name, ())) if self.cache else ()
        return next((path for path in paths if is_whole(path, sha256)), None)

    def _download(self, md5: str, name: str, sha256: str, target: Path) -> bool:
        if self.remote is None:
            return False
        remote = self.remote

        def fetch(path: Path) -> None:
            remote.fetch(md5, path)
            if sha256_file(path) != sha256:
                raise UserError(
                    f"{name} of data set {self.name} is damaged on the remote (its SHA-256 differs): delete "
                    f"{remote.uri(md5)}, and give `darkroom ingest SOURCE` where the data set is whole, or where its "
                    "images are: it pushes what is missing"
                )

        try:
            write_atomically(target, fetch)
        except MissingObjectError:
            return False
        return True


def needed_files(folder: Path, version: Manifest) -> Iterator[tuple[str, str]]:
    """Yield name and SHA-256 of all files that belong beside the manifest if ``version`` is current in ``folder``.

    A parent's manifest is read after it was yielded, so that the caller can repair it; a damaged one is the last.
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
    """Whether the file at ``path`` exists and has this SHA-256."""
    return path.is_file() and sha256_file(path) == sha256


class CodeVersion(Config):
    """State of the git repository that the flows run in."""

    commit: str | None
    """Commit hash; None outside a repository or before its first commit."""
    dirty: bool


class DataVersion(Config):
    """Version of a data set in DVC."""

    digest: str
    """DVC's digest of the data set's folder, ``….dir``."""
    pointer: str
    """File with the digest: dvc.lock, or the data set's .dvc file."""
    pushed: bool


def code_version() -> CodeVersion:
    """Git commit of the working folder, and whether tracked files differ from it."""
    head = _git("rev-parse", "HEAD")
    return CodeVersion(commit=head or None, dirty=bool(_git("status", "--porcelain", "--untracked-files=no")))


def _git(*arguments: str) -> str:
    try:
        process = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine, so no commit to name either
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def record_data(folder: Path, push_to: str | None) -> DataVersion:
    """Record the data set in ``folder`` in DVC, and push it to the S3 address ``push_to`` if one is given.

    The output of dvc.yaml's ingest stage is committed to dvc.lock, so that ``dvc repro`` sees it as done; any other
    data set gets its own .dvc file. Outside a DVC repository one is created. A data set whose shards are on the remote
    alone is put into DVC's cache without them, and DVC's own files stay as they are. Raises DarkroomError if that
    fails.
    """
    try:
        root = Repo.find_root()
    except NotDvcRepoError:
        root = str(Path.cwd())
        _create_repository(Path(root))
    try:
        with open_repository(root) as repo:
            cache = Cache(Path(repo.cache.local.path))
            manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else None
            if manifest and missing_shards(folder, manifest):
                digest = _add_without_shards(folder, manifest, cache)
                if push_to:
                    Remote.from_url(push_to).push(digest, cache)
                    find_strays(folder, cache.listings())  # one of which was pushed
                return DataVersion(digest=digest, pointer=f"datasets/{folder.name}", pushed=push_to is not None)
            if any(output.stage.addressing == INGEST_STAGE for output in _outputs(repo, folder)):
                repo.commit(INGEST_STAGE, force=True)
                output = repo.find_outs_by_path(str(folder))[0]
            else:
                output = repo.add(str(folder))[0].outs[0]
            if push_to:
                Remote.from_url(push_to).push(output.hash_info.value, cache)
                find_strays(folder, cache.listings())  # one of which was pushed
            return _make_data_version(output, push_to is not None)
    except (DvcException, BotoCoreError, OSError) as error:
        raise DarkroomError(f"DVC could not record or push {folder}: {error}") from error


def _create_repository(root: Path) -> None:
    """Create a DVC repository, which appears whole: DVC says in a second write that there is no git."""
    if (root / ".git").exists():
        Repo.init(str(root)).close()  # of which DVC adds what is missing whenever it is opened
        return
    with TemporaryDirectory(dir=root, prefix=".dvc-") as scratch:
        Repo.init(scratch, no_scm=True).close()
        try:
            (Path(scratch) / ".dvc").rename(root / ".dvc")
        except OSError:
            if not (root / ".dvc").is_dir():  # by a process that was faster
                raise


def _add_without_shards(folder: Path, manifest: Manifest, cache: Cache) -> str:
    """Put the data set's files that are here, and a listing of all, into the cache; returns the listing's name."""
    published, listing = read_published(folder), Listing()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names | {entry.name for entry in manifest.shards}):
        # The name of a shard has a part of its digest.
        md5 = published.get(name) or next(iter(cache.places.get(name, ())), None)
        if name in names and not (name.startswith("shards/") and md5 and cache.path(md5).is_file()):
            md5 = cache.add(folder / name)
        if md5 is None:
            raise UserError(f"{folder / name} is missing: `darkroom data checkout` brings its version back")
        listing[name] = md5
    data = json.dumps([{"md5": md5, "relpath": name} for name, md5 in listing.items()]).encode()
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest() + FOLDER
    write_bytes(cache.path(digest), data)
    return digest


def data_version(folder: Path) -> DataVersion | None:
    """DVC's record of the current version of the data set in ``folder``; None if DVC has not recorded it."""
    try:
        with open_repository() as repo:
            version = next((_make_data_version(output) for output in _outputs(repo, folder) if output.hash_info), None)
            cache = Cache(Path(repo.cache.local.path))
    except NotDvcRepoError:
        return None
    path = folder / "manifest.json"
    manifest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None
    if version is not None:
        listing = cache.listing(version.digest)
        # An emptied cache does not contradict the record.
        if listing is None or listing.get(path.name) == manifest:
            return version
    # A checkout of the tables alone leaves DVC's record of the folder as it was.
    names = (name for name, listing in cache.listings() if manifest and listing.get(path.name) == manifest)
    for name in names:
        return DataVersion(digest=name, pointer=f"datasets/{folder.name}", pushed=False)
    return None


def restore_data(folder: Path, source: str, without_shards: bool = False) -> list[str]:
    """Repair the current version of the data set in ``folder`` from DVC's cache or its remote ``source``.

    Returns the names of restored files. Files that neither has are left for ingest to report, and ``without_shards``
    missing shards as well. Locks out ingests. Raises UserError if the manifest is damaged, or a file is damaged on the
    remote as well.
    """
    if not (folder / "manifest.json").is_file():
        return []
    with FileLock(work_folder(folder) / "lock"):
        version, mtime = read_manifest(folder), (folder / "manifest.json").stat().st_mtime_ns
        record = data_version(folder)
        files = StoredFiles(folder.name, source, record.digest if record else None, read_published(folder))
        return [
            name
            for name, sha256 in needed_files(folder, version)
            # The manifest is written last, so intact files are older. A shard that decayed without a new modification
            # time is found when it is read, as shards are verified then.
            if not (without_shards and name.startswith("shards/") and not (folder / name).is_file())
            if not (path := folder / name).is_file() or path.stat().st_mtime_ns >= mtime
            if not is_whole(path, sha256) and files.write(version.digest, name, sha256, path)
        ]


def _outputs(repo: Repo, folder: Path) -> list[Any]:
    return [output for output in repo.index.outs if Path(output.fs_path) == folder.resolve()]


def _make_data_version(output: Any, pushed: bool = False) -> DataVersion:
    stage = output.stage
    pointer = "dvc.lock" if Path(stage.path).name == "dvc.yaml" else Path(stage.relpath).as_posix()
    return DataVersion(digest=output.hash_info.value, pointer=pointer, pushed=pushed)
