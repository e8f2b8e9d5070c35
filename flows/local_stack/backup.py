"""``darkroom server backup``: incremental online backup of the local stack, content-addressed by SHA-256."""

import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import AwareDatetime, StringConstraints, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import make_folder, sha256_file, sync_file, sync_folder, write_json
from diffusion.common.progress import Progress, silent
from flows.environment import settings
from flows.local_stack.stack import LocalStack, servers_in_environment
from flows.storage.s3 import ListedObject, Missing, Store, client

DATABASES = ("mlflow/mlflow.db", "mlflow/auth.db", "prefect/prefect.db")
PASSING = ("pushing/", "resumed/")
"""Prefixes of transient objects, which are not backed up."""
STAMP = "%Y%m%dT%H%M%SZ"
SMALL = 2**20
"""Size in bytes up to which a saved object is verified by its digest."""
NAMED = re.compile(r"\d{8}T\d{6}Z")
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""Hex SHA-256."""
DatabasePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\.db$")]
"""Path of a database in the stack's folder."""


class SavedObject(Config):
    """An object of the bucket."""

    key: str
    size: int
    etag: str
    sha256: Digest
    content_type: str
    metadata: dict[str, str]


class Backup(Config):
    """Contents of a stack at one moment."""

    format_version: Literal[1] = 1
    made: AwareDatetime
    bucket: str
    versions: dict[str, str]
    """Versions of the programs that wrote the databases."""
    databases: dict[DatabasePath, Digest]
    """Digests by path in the stack's folder."""
    objects: list[SavedObject]

    @property
    def stamp(self) -> str:
        """Name of the backup."""
        return self.made.strftime(STAMP)


@dataclass(frozen=True)
class Backups:
    """Backups in one folder."""

    folder: Path

    def stamps(self) -> list[str]:
        """Names of all complete backups, oldest first."""
        names = (path.stem for path in (self.folder / "backups").glob("*.json"))
        return sorted(name for name in names if NAMED.fullmatch(name))

    def read(self, stamp: str | None = None) -> Backup:
        """Read a backup, by default the newest; raises UserError if it is missing or damaged."""
        stamps = self.stamps()
        if not stamps or (stamp is not None and stamp not in stamps):
            hint = f"there is {', '.join(stamps) or 'none: make one with `darkroom server backup`'}"
            raise UserError(f"no backup {stamp or ''} in {self.folder}: {hint}")
        path = self.folder / "backups" / f"{stamp or stamps[-1]}.json"
        try:
            return Backup.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path} is damaged, or of a newer Darkroom ({error.errors()[0]['msg']})") from error

    def write(self, backup: Backup) -> None:
        """Write the index of ``backup``, after all of its content."""
        write_json(self.folder / "backups" / f"{backup.stamp}.json", backup.model_dump(mode="json"))

    def path(self, sha256: Digest) -> Path:
        """Path of the content with this digest, which may not exist."""
        return self.folder / "objects" / sha256[:2] / sha256

    def verified_path(self, sha256: Digest) -> Path:
        """Path of the verified content with this digest; raises UserError if it is damaged or missing."""
        path = self.path(sha256)
        if not path.is_file() or sha256_file(path) != sha256:
            raise UserError(
                f"{path} is damaged or missing: delete it and take another backup, or take another copy of this folder"
            )
        return path

    def has(self, saved: SavedObject) -> bool:
        """Whether the content of an object is present."""
        path = self.path(saved.sha256)
        if not path.is_file() or path.stat().st_size != saved.size:
            return False
        # A crash leaves another size. Hashing all large objects would take as long as a first backup.
        return saved.size > SMALL or sha256_file(path) == saved.sha256

    def keep(self, write: Callable[[Path], None]) -> Digest:
        """Store the content that ``write`` writes to the path it gets; returns its SHA-256."""
        partial = self.folder / "objects" / ".partial"
        make_folder(partial.parent)
        partial.unlink(missing_ok=True)
        # Databases hold password hashes, and objects hold people's images.
        partial.touch(mode=0o600)
        write(partial)
        sha256 = sha256_file(partial)
        sync_file(partial)
        path = self.path(sha256)
        make_folder(path.parent)
        partial.replace(path)
        sync_folder(path.parent)
        return sha256


def backup(target: Path, progress: Progress = silent) -> Backup:
    """Copy databases and bucket of the local stack into the folder ``target``, except content that is there already.

    The backup is consistent: ledgers match the databases, and the models of all samples are in them. It can be killed
    and resumed. Raises UserError if no stack runs, or if the environment names other servers.
    """
    if elsewhere := servers_in_environment():
        raise UserError(
            f"{' and '.join(elsewhere.values())} name servers outside the local stack: back those up as "
            "docs/operations.md says, or unset the variables"
        )
    stack = LocalStack.read(settings().folder)
    if stack is None or not all(stack.runs(server) for server in ("s3", "mlflow", "prefect")):
        raise UserError(f"no local stack runs in {settings().folder}: run `darkroom up`, so that it can be copied")
    backups, store = Backups(target), Store(client(variables=stack.variables("s3")))
    make_folder(target, 0o700)
    with FileLock(target / ".lock"):
        ledgers, databases = _copy_databases(stack, store, backups)
        made = datetime.now(UTC)
        objects = [
            each
            for each in store.list_objects(stack.bucket)
            if not each.key.startswith(PASSING)
            if each.key in ledgers or not each.key.startswith("ledger/")
            if each.written <= made or not each.key.startswith("samples/")
        ]
        done = Backup(
            made=made.replace(microsecond=0),
            bucket=stack.bucket,
            versions={name: version(name) for name in ("mlflow", "prefect")},
            databases=databases,
            objects=save(store, stack.bucket, objects, backups, progress),
        )
        backups.write(done)
    return done


def save(
    store: Store, bucket: str, objects: Sequence[ListedObject], backups: Backups, progress: Progress = silent
) -> list[SavedObject]:
    """Copy ``objects``, except those in the newest backup; objects deleted meanwhile are left out."""
    before = backups.read().objects if backups.stamps() else []
    known = {(each.key, each.etag, each.size): each for each in before}
    saved = []
    for number, each in enumerate(objects, 1):
        entry = known.get((each.key, each.etag, each.size))
        if entry is None or not backups.has(entry):
            entry = _save(store, bucket, each, backups)
        if entry is not None:
            saved.append(entry)
        progress("objects saved", number, len(objects))
    return saved


def _copy_databases(stack: LocalStack, store: Store, backups: Backups) -> tuple[set[str], dict[str, Digest]]:
    """Copy the databases, repeated until no ledger changes meanwhile; returns the ledgers' keys and the digests."""
    while True:
        ledgers = set(store.list_keys(stack.bucket, "ledger/"))
        databases = {name: backups.keep(partial(_copy, stack.folder / name)) for name in DATABASES}
        if set(store.list_keys(stack.bucket, "ledger/")) == ledgers:
            return ledgers, databases


def _copy(database: Path, target: Path) -> None:
    """Copy a consistent snapshot of a SQLite database in use."""
    with (
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


def _save(store: Store, bucket: str, listed: ListedObject, backups: Backups) -> SavedObject | None:
    """Copy an object; None if it was deleted meanwhile."""
    try:
        sha256 = backups.keep(partial(store.fetch, bucket, listed.key))
        with store.in_words(bucket, listed.key):
            head = store.client.head_object(Bucket=bucket, Key=listed.key)
    except Missing:
        return None
    return SavedObject(
        key=listed.key,
        size=listed.size,
        etag=listed.etag,
        sha256=sha256,
        content_type=head["ContentType"],
        metadata=head["Metadata"],
    )
