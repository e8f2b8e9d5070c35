"""Lineage of runs, git commit and DVC digest, and recording, restoring and streaming of data set versions by DVC."""

import subprocess
from functools import cached_property
from hashlib import md5
from pathlib import Path
from threading import Lock

from botocore.exceptions import BotoCoreError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.data.manifest import FileEntry, read_manifest, work_folder
from flows.datasets.catalog import Catalogue
from flows.datasets.dvc import Cache, KeptFiles, Listing, Remote, is_whole, needed_files
from flows.storage.s3 import Missing

INGEST_STAGE = "ingest"


class CodeVersion(Config):
    """State of the git repository that the flows run in."""

    commit: str | None
    """Commit hash; None outside a repository or before its first commit."""
    dirty: bool
    """Whether tracked files differ from the commit."""


class DataVersion(Config):
    """Version of a data set in DVC."""

    digest: str
    """DVC's digest of the data set's folder, ``….dir``."""
    pointer: str
    """File with the digest: dvc.lock, or the data set's .dvc file."""
    pushed: bool
    """Whether it was pushed to the remote."""


def code_version() -> CodeVersion:
    """Git commit of the working folder, and whether tracked files differ from it."""
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return CodeVersion(commit=head or None, dirty=bool(changes))


def _git(*arguments: str) -> str:
    try:
        finished = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine, so no commit to name either
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def record_data(folder: Path, push_to: str | None) -> DataVersion:
    """Record the data set in ``folder`` in DVC, and push it to the S3 address ``push_to`` if one is given.

    The output of dvc.yaml's ingest stage is committed to dvc.lock, so that ``dvc repro`` sees it as done;
    any other data set gets its own .dvc file. Outside a DVC repository one is created.
    Raises DarkroomError with DVC's message if that fails.
    """
    try:
        root = Repo.find_root()
    except NotDvcRepoError:
        root = str(Path.cwd())
        Repo.init(root, no_scm=not (Path(root) / ".git").exists()).close()
    try:
        with Repo(root, _wait_for_lock=True) as repo:
            outputs = [output for output in repo.index.outs if Path(output.fs_path) == folder.resolve()]
            if any(output.stage.addressing == INGEST_STAGE for output in outputs):
                repo.commit(INGEST_STAGE, force=True)
                pointer = "dvc.lock"
                output = repo.find_outs_by_path(str(folder))[0]
            else:
                stage = repo.add(str(folder))[0]
                pointer = Path(stage.path).relative_to(root).as_posix()
                output = stage.outs[0]
            if push_to:
                Remote.at(push_to).push(output.hash_info.value, Cache(Path(repo.cache.local.path)))
            return DataVersion(digest=output.hash_info.value, pointer=pointer, pushed=push_to is not None)
    except (DvcException, BotoCoreError, OSError) as error:
        raise DarkroomError(f"DVC could not record or push {folder}: {error}") from error


def data_version(folder: Path) -> DataVersion | None:
    """DVC's record of the current version of the data set in ``folder``; None if DVC has not recorded it."""
    try:
        with Repo() as repo:
            recorded = _recorded(repo, folder)
            cache = Cache(Path(repo.cache.local.path))
    except NotDvcRepoError:
        return None
    path = folder / "manifest.json"
    manifest = md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None
    if recorded is not None:
        listing = cache.listing(recorded.digest)
        # An emptied cache does not contradict the record.
        if listing is None or listing.get(path.name) == manifest:
            return recorded
    # A checkout of the tables alone leaves DVC's record of the folder as it was.
    found = (name for name, listing in cache.listings() if manifest and listing.get(path.name) == manifest)
    for name in found:
        return DataVersion(digest=name, pointer=f"datasets/{folder.name}", pushed=False)
    return None


def restore_data(folder: Path, source: str) -> list[str]:
    """Repair the current version of the data set in ``folder`` from DVC's cache or its remote ``source``.

    Returns the names of restored files. Files that neither has are left for ingest to report. Locks out ingests. Raises
    UserError if the manifest is damaged, or a file is damaged on the remote as well.
    """
    if not (folder / "manifest.json").is_file():
        return []
    with FileLock(work_folder(folder) / "lock"):
        version = read_manifest(folder)
        recorded = data_version(folder)
        kept = KeptFiles(folder.name, source, recorded.digest if recorded else None)
        return [
            name
            for name, sha256 in needed_files(folder, version)
            if _doubtful(folder, name) and not is_whole(folder / name, sha256)
            if kept.write(version.digest, name, sha256, folder / name)
        ]


def _doubtful(folder: Path, name: str) -> bool:
    """Whether a file has to be verified: the manifest is written last, so intact files are older.

    A shard that decayed without a new modification time is found when it is read, as shards are verified then.
    """
    path = folder / name
    return not path.is_file() or path.stat().st_mtime_ns >= (folder / "manifest.json").stat().st_mtime_ns


def _recorded(repo: Repo, folder: Path) -> DataVersion | None:
    for output in repo.index.outs:
        if Path(output.fs_path) == folder.resolve() and output.hash_info:
            pointer = Path(output.stage.path).name
            name = "dvc.lock" if pointer == "dvc.yaml" else Path(output.stage.relpath).as_posix()
            return DataVersion(digest=output.hash_info.value, pointer=name, pushed=False)
    return None


class RemoteShards:
    """Implements ``diffusion.data.shard_cache.ShardStore`` for the data set in ``folder``, pushed to ``source``.

    The listing of its version is fetched once, with the first shard.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self.source = source
        self.remote = Remote.at(source)
        self._lock = Lock()

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Fetch a shard to ``path``, overwriting it; raises UserError if the remote does not have it."""
        with self._lock:
            listing = self._listing
        try:
            self.remote.fetch(listing[entry.name], path)
        except (KeyError, Missing) as error:
            raise UserError(
                f"shard {entry.name} of data set {self.folder.name} is not on {self.source}: run `darkroom ingest` "
                "where the data set is whole, which pushes it"
            ) from error

    @cached_property
    def _listing(self) -> Listing:
        name = self.folder.name
        digest = read_manifest(self.folder).digest
        recorded = Catalogue.of(name, self.source, self.remote.store).pointer(digest)
        if recorded is None and (version := data_version(self.folder)) is not None:
            recorded = version.digest
        if recorded is None:
            raise UserError(f"version {digest[:12]} of data set {name} was never pushed: run `darkroom ingest` first")
        try:
            return self.remote.listing(recorded)
        except Missing as error:
            raise UserError(
                f"version {digest[:12]} of data set {name} is not on {self.source} (any more): run `darkroom ingest`, "
                "or check out another one with `darkroom data checkout`"
            ) from error
