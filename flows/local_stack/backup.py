"""``darkroom server backup`` and ``restore``: incremental online backups of the local stack, content-addressed.

A restored stack has new passwords. Takedowns since the backup must survive it: their records are copied from newer
backups and the replaced stack into the restored bucket, where every ingest reads them.
"""

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import AwareDatetime, Field, StringConstraints, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError, describe_validation_error
from diffusion.common.escaping import escape_controls
from diffusion.common.files import make_folder, sha256_file, sync_file, sync_folder, write_atomically, write_json
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.manifest import Sha256
from diffusion.data.versions.takedown_records import Removal, parse_removal
from flows.environment import SERVERS, settings
from flows.local_stack.control import RESTORING, up
from flows.local_stack.stack import LocalStack, servers_in_environment
from flows.storage.s3 import ListedObject, Store, client
from flows.storage.s3_errors import MissingObjectError

STAMP = "%Y%m%dT%H%M%SZ"
SMALL = 2**20  # size in bytes up to which a saved object is verified by its digest
MLFLOW, AUTH = "mlflow/mlflow.db", "mlflow/auth.db"
DATABASES = (MLFLOW, AUTH, "prefect/prefect.db")
UPGRADES = {MLFLOW: ("mlflow", "db", "upgrade"), AUTH: ("mlflow.server.auth", "db", "upgrade", "--url")}
"""Commands that migrate the databases of an older MLflow; Prefect's server migrates its own."""
REMOVAL = re.compile(r"datasets/[^/]+/removals/[^/]+\.json")
DatabasePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\.db$")]


class SavedObject(Config):
    """An object of the bucket."""

    key: str
    size: int
    etag: str
    sha256: Sha256
    content_type: str
    metadata: dict[str, str]


class Backup(Config):
    """Contents of a stack at one moment."""

    format_version: Literal[1] = 1
    made: AwareDatetime
    bucket: str
    versions: dict[str, str]
    databases: dict[DatabasePath, Sha256]
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
        return sorted(name for name in names if re.fullmatch(r"\d{8}T\d{6}Z", name))

    def read(self, stamp: str | None = None) -> Backup:
        """Read a backup, by default the newest; raises UserError if it is missing or damaged."""
        if not (stamps := self.stamps()) or (stamp is not None and stamp not in stamps):
            hint = f"there is {', '.join(stamps) or 'none: make one with `darkroom server backup`'}"
            raise UserError(f"no backup {stamp or ''} in {self.folder}: {hint}")
        path = self.folder / "backups" / f"{stamp or stamps[-1]}.json"
        try:
            return Backup.model_validate_json(path.read_bytes())
        except ValidationError as error:
            words = describe_validation_error(error.errors()[0])
            raise UserError(f"{path} is damaged, or of a newer Darkroom ({words})") from error

    def write(self, backup: Backup) -> None:
        """Write the index of ``backup``, after all of its content."""
        write_json(self.folder / "backups" / f"{backup.stamp}.json", backup.model_dump(mode="json"))

    def path(self, sha256: Sha256) -> Path:
        """Path of the content with this digest, which may not exist."""
        return self.folder / "objects" / sha256[:2] / sha256

    def verified_path(self, sha256: Sha256) -> Path:
        """Path of the verified content with this digest; raises UserError if it is damaged or missing."""
        path = self.path(sha256)
        if not path.is_file() or sha256_file(path) != sha256:
            raise UserError(
                f"{path} is damaged or missing: delete it and take another backup, or take another copy of this folder"
            )
        return path

    def has(self, entry: SavedObject) -> bool:
        """Whether the content of an object is present."""
        path = self.path(entry.sha256)
        if not path.is_file() or path.stat().st_size != entry.size:
            return False
        # A crash leaves another size. Hashing all large objects would take as long as a first backup.
        return entry.size > SMALL or sha256_file(path) == entry.sha256

    def keep(self, write: Callable[[Path], None]) -> Sha256:
        """Store the content that ``write`` writes to the path it gets; returns its SHA-256."""
        scratch = self.folder / "objects" / ".partial"
        make_folder(scratch.parent)
        scratch.unlink(missing_ok=True)
        # Databases hold password hashes, and objects hold people's images.
        scratch.touch(mode=0o600)
        write(scratch)
        sha256 = sha256_file(scratch)
        sync_file(scratch)
        path = self.path(sha256)
        make_folder(path.parent)
        scratch.replace(path)
        sync_folder(path.parent)
        return sha256


def backup(target: Path, progress: Progress = ignore_progress) -> Backup:
    """Copy databases and bucket of the local stack into the folder ``target``, except content that is there already.

    The backup is consistent: ledgers match the databases, and the models of all samples are in them. It can be killed
    and resumed. Raises UserError if no stack runs, or if the environment names other servers.
    """
    if external_servers := servers_in_environment():
        raise UserError(
            f"{' and '.join(external_servers.values())} name servers outside the local stack: back those up as "
            "docs/operations/backup.md says, or unset the variables"
        )
    stack = LocalStack.read(settings().folder)
    if stack is None or not all(stack.runs(server) for server in ("s3", "mlflow", "prefect")):
        raise UserError(f"no local stack runs in {settings().folder}: run `darkroom up`, so that it can be copied")
    backups, store = Backups(target), Store(client(variables=stack.variables("s3")))
    make_folder(target, 0o700)
    with FileLock(target / ".lock"):
        while True:
            ledgers = set(store.list_keys(stack.bucket, "ledger/"))
            databases = {name: backups.keep(partial(_copy, stack.folder / name)) for name in DATABASES}
            if set(store.list_keys(stack.bucket, "ledger/")) == ledgers:  # none changed meanwhile
                break
        moment = datetime.now(UTC)
        objects = [
            entry
            for entry in store.list_objects(stack.bucket)
            if not entry.key.startswith(("pushing/", "resumed/"))  # transient
            if entry.key in ledgers or not entry.key.startswith("ledger/")
            if entry.written <= moment or not entry.key.startswith("samples/")
        ]
        result = Backup(
            made=moment.replace(microsecond=0),
            bucket=stack.bucket,
            versions={name: version(name) for name in ("mlflow", "prefect")},
            databases=databases,
            objects=save(store, stack.bucket, objects, backups, progress),
        )
        backups.write(result)
    return result


def save(
    store: Store, bucket: str, objects: Sequence[ListedObject], backups: Backups, progress: Progress = ignore_progress
) -> list[SavedObject]:
    """Copy ``objects``, except those in the newest backup; objects deleted meanwhile are left out."""
    saved_objects = {
        (item.key, item.etag, item.size): item for item in (backups.read().objects if backups.stamps() else [])
    }
    entries = []
    for number, item in enumerate(objects, 1):
        if (entry := saved_objects.get((item.key, item.etag, item.size))) is None or not backups.has(entry):
            try:
                sha256 = backups.keep(partial(store.fetch, bucket, item.key))
                with store.explain_errors(bucket, item.key):
                    head = store.client.head_object(Bucket=bucket, Key=item.key)
                entry = SavedObject(
                    key=item.key,
                    size=item.size,
                    etag=item.etag,
                    sha256=sha256,
                    content_type=head["ContentType"],
                    metadata=head["Metadata"],
                )
            except MissingObjectError:
                entry = None
        if entry is not None:
            entries.append(entry)
        progress("objects saved", number, len(objects))
    return entries


def _copy(database: Path, target: Path) -> None:
    """Copy a consistent snapshot of a SQLite database in use."""
    with (
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


class LaterRemovals(Config):
    """Takedowns since a backup."""

    records: dict[str, str] = Field(default_factory=dict)
    known_until: AwareDatetime | None = None
    """Time until which the list is complete; None if it is complete."""

    def removals(self) -> list[Removal]:
        """Parsed takedowns; raises UserError for a damaged record."""
        return [parse_removal(text, key) for key, text in self.records.items()]


class RestoreState(Config):
    """State of a restore in progress, kept in the stack's folder."""

    stamp: str
    later: LaterRemovals
    placed: bool = False
    """Whether all databases are in place; from then on they may be in use."""


def restore(
    target: Path, stamp: str | None, replaced: Path, report: Callable[[str], None], progress: Progress = ignore_progress
) -> tuple[Backup, LaterRemovals]:
    """Restore a backup into DARKROOM_HOME and start the stack.

    ``target`` is the folder of the backups, ``stamp`` the name of one, by default the newest, and ``replaced`` the
    folder of a replaced stack, whose takedowns are taken over. Returns the backup and the takedowns since. Raises
    UserError, before the stack starts, if there is one already, ``replaced`` does not run, or the backup is damaged.
    """
    if external_servers := servers_in_environment():
        raise UserError(
            f"{' and '.join(external_servers.values())} name other servers: unset them to restore a local stack"
        )
    folder, backups = settings().folder, Backups(target)
    backup = backups.read(stamp)
    progress_file = folder / RESTORING
    if progress_file.is_file():
        state = RestoreState.model_validate_json(progress_file.read_bytes())
        if state.stamp != backup.stamp:
            raise UserError(
                f"{folder} is being restored from another backup: give that one's name, or another DARKROOM_HOME"
            )
    else:
        if (folder / "stack.json").exists() or (folder / "credentials.json").exists():
            raise UserError(f"there is a stack in {folder}: set DARKROOM_HOME to a folder that is not there yet")
        state = RestoreState(stamp=backup.stamp, later=_later_removals(backup, backups, replaced.resolve()))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(progress_file, state.model_dump(mode="json"))
    for digest in {*backup.databases.values(), *(entry.sha256 for entry in backup.objects)}:
        backups.verified_path(digest)
    stack = LocalStack.open(folder, backup.bucket)
    if not state.placed:
        if any(stack.runs(server) for server in SERVERS):
            raise UserError(f"a stack runs in {folder}, where no restore ended: run `darkroom down`, then this again")
        for name, sha256 in backup.databases.items():
            _place(folder / name, name, backups.path(sha256), backup, stack, report)
        write_json(progress_file, state.model_copy(update={"placed": True}).model_dump(mode="json"))
    up(report, restoring=True)
    stack = LocalStack.open(folder, backup.bucket)
    store = Store(client(variables=stack.variables("s3")))

    def put(entry: SavedObject) -> None:
        # The upload adds the digest.
        metadata = {name: text for name, text in entry.metadata.items() if name != "sha256"}
        with backups.path(entry.sha256).open("rb") as file:
            store.put_once(backup.bucket, entry.key, file, metadata, entry.content_type)

    with ThreadPoolExecutor(8) as pool:
        for number, _ in enumerate(pool.map(put, backup.objects), 1):
            progress("objects restored", number, len(backup.objects))
    for key, text in state.later.records.items():
        store.put_once(backup.bucket, key, text.encode())
    progress_file.unlink()
    return backup, state.later


def _later_removals(backup: Backup, backups: Backups, replaced_home: Path) -> LaterRemovals:
    keys = {entry.key for entry in backup.objects}
    texts: dict[str, str] = {}
    known_until: AwareDatetime | None = backup.made
    for newer_backup in (backups.read(stamp) for stamp in backups.stamps() if stamp > backup.stamp):
        for entry in newer_backup.objects:
            if REMOVAL.fullmatch(entry.key) and entry.key not in keys:
                texts[entry.key] = backups.verified_path(entry.sha256).read_text()
        known_until = newer_backup.made
    stack = None if replaced_home == settings().folder else LocalStack.read(replaced_home)
    if stack is not None and stack.serves("s3") and stack.bucket == backup.bucket:
        if not stack.runs("s3"):
            raise UserError(
                f"the stack in {replaced_home} does not run, and may have takedowns that the backup lacks: run "
                f"`DARKROOM_HOME={replaced_home} darkroom up`, or move the folder away if it cannot be started"
            )
        store = Store(client(variables=stack.variables("s3")))
        for key in store.list_keys(stack.bucket, "datasets/"):
            if REMOVAL.fullmatch(key) and key not in keys:
                texts[key] = store.get(stack.bucket, key).decode()
        known_until = None
    later_removals = LaterRemovals(records=texts, known_until=known_until)
    # Fail on an unreadable record before anything is written.
    later_removals.removals()
    return later_removals


def _place(
    path: Path, name: str, source: Path, backup: Backup, stack: LocalStack, report: Callable[[str], None]
) -> None:
    """Put a database in place, migrated to the installed programs, with this stack's password and webhooks disabled."""

    def write(partial: Path) -> None:
        shutil.copyfile(source, partial)
        partial.chmod(0o600)
        if name in UPGRADES and backup.versions.get("mlflow") != version("mlflow"):
            command = [sys.executable, "-m", *UPGRADES[name], f"sqlite:///{partial}"]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                message = "".join(process.stderr.strip().splitlines()[-1:])
                raise DarkroomError(f"{name} cannot be migrated to this MLflow: {message}")
        if name == MLFLOW:
            with closing(sqlite3.connect(partial)) as database, database:
                _disable_webhooks(database, report)
        if name == AUTH:
            from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

            # The backup has the hash of another stack's password.
            users = SqlAlchemyStore()
            users.init_db(f"sqlite:///{partial}")  # type: ignore[no-untyped-call]
            try:
                users.update_user(stack.credentials.mlflow_username, stack.credentials.mlflow_password)
            finally:
                users.engine.dispose()

    # Journals of another database would be applied to this one.
    for journal in ("-wal", "-shm", "-journal"):
        path.with_name(f"{path.name}{journal}").unlink(missing_ok=True)
    write_atomically(path, write)


def _disable_webhooks(database: sqlite3.Connection, report: Callable[[str], None]) -> None:
    """Disable MLflow's webhooks: no key reads their secrets any more, and one unreadable secret would stop them all."""
    if not database.execute("select 1 from sqlite_master where name = 'webhooks'").fetchone():
        return
    active = "status = 'ACTIVE' and deleted_timestamp is null"
    names = [name for (name,) in database.execute(f"select name from webhooks where {active}")]
    database.execute("update webhooks set status = 'DISABLED', secret = null")
    for name in names:
        report(
            f"MLflow: the webhook {escape_controls(name)} is disabled, as backups have no key to its secret: give it a "
            "new one (docs/how-to/notify.md)"
        )
