"""``darkroom server backup``: the local stack copied while it runs, into a folder of bytes by SHA-256 and a list."""

import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
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
from flows.local_stack.discovery import servers_in_environment
from flows.local_stack.stack_files import LocalStack
from flows.storage.s3 import Listed, Store, client
from flows.storage.s3_errors import Missing, in_words

DATABASES = ("mlflow/mlflow.db", "mlflow/auth.db", "prefect/prefect.db")
PROGRAMS = ("mlflow", "prefect")
PASSING = ("pushing/", "resumed/")
"""Prefixes of what means nothing later."""
STAMP = "%Y%m%dT%H%M%SZ"
SMALL = 2**20
"""Bytes of an object that is read as fast as it is found."""
NAMED = re.compile(r"\d{8}T\d{6}Z")
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""Hex SHA-256."""
DatabasePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\.db$")]
"""Where a database lies in the stack's folder."""


class SavedObject(Config):
    """An object of the bucket."""

    key: str
    size: int
    etag: str
    sha256: Digest
    content_type: str
    metadata: dict[str, str]


class Backup(Config):
    """All that a stack held at one moment."""

    format_version: Literal[1] = 1
    made: AwareDatetime
    bucket: str
    versions: dict[str, str]
    """Of the programs whose databases these are."""
    databases: dict[DatabasePath, Digest]
    """By their path in the stack's folder."""
    objects: list[SavedObject]

    @property
    def stamp(self) -> str:
        """What it is called."""
        return self.made.strftime(STAMP)


@dataclass(frozen=True)
class Backups:
    """Those in one folder."""

    folder: Path

    def stamps(self) -> list[str]:
        """Of all that are whole, oldest first."""
        found = (path.stem for path in (self.folder / "backups").glob("*.json"))
        return sorted(stamp for stamp in found if NAMED.fullmatch(stamp))

    def read(self, stamp: str | None = None) -> Backup:
        """One of them, by default the newest; raises UserError if there is none, or it cannot be read."""
        stamps = self.stamps()
        if not stamps or (stamp is not None and stamp not in stamps):
            there = (
                f"there is {', '.join(stamps)}" if stamps else "there is none: make one with `darkroom server backup`"
            )
            raise UserError(f"no backup {stamp or ''} in {self.folder}: {there}")
        path = self.folder / "backups" / f"{stamp or stamps[-1]}.json"
        try:
            return Backup.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path} is damaged, or of a newer Darkroom ({error.errors()[0]['msg']})") from error

    def write(self, backup: Backup) -> Path:
        """Keep ``backup``, all of whose bytes are here."""
        path = self.folder / "backups" / f"{backup.stamp}.json"
        write_json(path, backup.model_dump(mode="json"))
        return path

    def path(self, sha256: Digest) -> Path:
        """Where bytes lie, if they are here."""
        return self.folder / "objects" / sha256[:2] / sha256

    def whole(self, sha256: Digest) -> Path:
        """Where bytes lie; raises UserError if they are damaged or missing."""
        path = self.path(sha256)
        if not path.is_file() or sha256_file(path) != sha256:
            raise UserError(
                f"{path} is damaged or missing: delete it and take another backup, or take another copy of this folder"
            )
        return path

    def has(self, saved: SavedObject) -> bool:
        """Whether the bytes of an object need not be copied again."""
        path = self.path(saved.sha256)
        if not path.is_file() or path.stat().st_size != saved.size:
            return False
        # What a crash cuts has another size. To read all large ones each time would take as long as a first backup.
        return saved.size > SMALL or sha256_file(path) == saved.sha256

    def keep(self, write: Callable[[Path], None]) -> Digest:
        """Keep the bytes that ``write`` writes to the path that it is given; returns their SHA-256."""
        partial = self.folder / "objects" / ".partial"
        make_folder(partial.parent)
        partial.unlink(missing_ok=True)
        # Databases hold hashes of passwords, and objects people's images.
        partial.touch(mode=0o600)
        write(partial)
        sha256 = sha256_file(partial)
        sync_file(partial)
        path = self.path(sha256)
        make_folder(path.parent)
        partial.replace(path)
        sync_folder(path.parent)
        return sha256


def stamped(moment: datetime) -> datetime:
    """``moment`` to the second, as backups are called by it."""
    return moment.replace(microsecond=0)


def backup(target: Path, progress: Progress = silent) -> Backup:
    """Copy databases and bucket of the local stack into the folder ``target``; what is there already is not copied.

    The copy is of one moment: no entry of a ledger is in it that its databases do not know, nor the other way round,
    and no print whose model they do not know. Killed and given again, it goes on with what was copied. Raises UserError
    if no stack runs, or the environment names servers that are not its own.
    """
    if elsewhere := servers_in_environment():
        raise UserError(
            f"{' and '.join(elsewhere.values())} name servers that are none of the local stack: back those up as "
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
            made=stamped(made),
            bucket=stack.bucket,
            versions={name: version(name) for name in PROGRAMS},
            databases=databases,
            objects=save(store, stack.bucket, objects, backups, progress),
        )
        backups.write(done)
    return done


def save(
    store: Store, bucket: str, objects: Sequence[Listed], backups: Backups, progress: Progress = silent
) -> list[SavedObject]:
    """Copy ``objects`` but for those that the newest backup has whole; those deleted meanwhile are left out."""
    known = {(each.key, each.etag, each.size): each for each in _saved(backups)}
    saved = []
    for number, each in enumerate(objects, 1):
        found = known.get((each.key, each.etag, each.size))
        if found is None or not backups.has(found):
            found = _save(store, bucket, each, backups)
        saved += [found] if found else []
        progress("objects saved", number, len(objects))
    return saved


def _copy_databases(stack: LocalStack, store: Store, backups: Backups) -> tuple[set[str], dict[str, Digest]]:
    """The keys of all ledgers, and the databases copied while none was added to."""
    while True:
        ledgers = set(store.list_keys(stack.bucket, "ledger/"))
        databases = {name: backups.keep(partial(_copy, stack.folder / name)) for name in DATABASES}
        if set(store.list_keys(stack.bucket, "ledger/")) == ledgers:
            return ledgers, databases


def _copy(database: Path, target: Path) -> None:
    """Copy a SQLite database that is written to, as it is at one moment."""
    with (
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


def _saved(backups: Backups) -> Iterator[SavedObject]:
    """The objects of the newest backup that is whole."""
    if backups.stamps():
        yield from backups.read().objects


def _save(store: Store, bucket: str, listed: Listed, backups: Backups) -> SavedObject | None:
    """Copy an object; None if it was deleted meanwhile."""
    try:
        sha256 = backups.keep(partial(store.fetch, bucket, listed.key))
        with in_words(store.client.meta.endpoint_url, bucket, listed.key):
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
