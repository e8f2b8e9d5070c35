"""``darkroom server restore``: restore a backup as a new local stack with new passwords.

Takedowns since the backup must survive it: their records are copied from newer backups and the replaced stack into the
restored bucket, where every ingest reads them.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import write_atomically, write_json
from diffusion.common.progress import Progress, silent
from diffusion.data.versions.takedown_records import Removal
from flows.environment import SERVERS, settings
from flows.local_stack.backup import Backup, Backups, SavedObject
from flows.local_stack.control import RESTORING, up
from flows.local_stack.stack import LocalStack, servers_in_environment
from flows.storage.s3 import Object, Store, client

AUTH = "mlflow/auth.db"
AT_ONCE = 2**26
"""Bytes of a batch of objects in memory; a larger object is a batch by itself."""
UPGRADES = {"mlflow/mlflow.db": ("mlflow", "db", "upgrade"), AUTH: ("mlflow.server.auth", "db", "upgrade", "--url")}
"""Commands that migrate the databases of an older MLflow; Prefect's server migrates its own."""
REMOVAL = re.compile(r"datasets/[^/]+/removals/[^/]+\.json")
"""Keys of takedown records in the catalogue."""


class LaterRemovals(Config):
    """Takedowns since a backup."""

    records: dict[str, str] = Field(default_factory=dict)
    known_until: AwareDatetime | None = None
    """Time until which the list is complete; None if it is complete."""

    def removals(self) -> Iterator[Removal]:
        """Parsed takedowns; raises UserError for a damaged record."""
        for key, text in self.records.items():
            try:
                yield Removal.model_validate_json(text)
            except ValidationError as error:
                raise UserError(
                    f"{key} is no record of a takedown that this Darkroom understands ({error.errors()[0]['msg']}): "
                    "update, or if it is damaged delete it and repeat that takedown"
                ) from error


class RestoreState(Config):
    """State of a restore in progress, kept in the stack's folder."""

    stamp: str
    later: LaterRemovals
    placed: bool = False
    """Whether all databases are in place; from then on they may be in use."""


def restore(
    target: Path, stamp: str | None, replaced: Path, report: Callable[[str], None], progress: Progress = silent
) -> tuple[Backup, LaterRemovals]:
    """Restore a backup into DARKROOM_HOME and start the stack; can be killed and resumed.

    ``target`` is the folder of the backups, ``stamp`` the name of one, by default the newest, and ``replaced`` the
    folder of a replaced stack, whose takedowns are taken over. Returns the backup and the takedowns since. Raises
    UserError, before the stack starts, if there is one already, ``replaced`` does not run, or the backup is damaged.
    """
    if elsewhere := servers_in_environment():
        raise UserError(f"{' and '.join(elsewhere.values())} name other servers: unset them to restore a local stack")
    folder, backups = settings().folder, Backups(target)
    backup = backups.read(stamp)
    state = _begin(folder, backup, backups, replaced.resolve())
    for each in {*backup.databases.values(), *(each.sha256 for each in backup.objects)}:
        backups.verified_path(each)
    stack = LocalStack.open(folder, backup.bucket)
    if not state.placed:
        if any(stack.runs(server) for server in SERVERS):
            raise UserError(f"a stack runs in {folder}, where no restore ended: run `darkroom down`, then this again")
        for name, sha256 in backup.databases.items():
            _place(folder / name, name, backups.path(sha256), backup, stack)
        write_json(folder / RESTORING, state.model_copy(update={"placed": True}).model_dump(mode="json"))
    up(report, restoring=True)
    stack = LocalStack.open(folder, backup.bucket)
    store = Store(client(variables=stack.variables("s3")))
    done = 0
    for batch in _batches(backup.objects):
        store.put_many(backup.bucket, [_object(saved, backups) for saved in batch])
        done += len(batch)
        progress("objects restored", done, len(backup.objects))
    for key, text in state.later.records.items():
        store.put_once(backup.bucket, key, text.encode())
    (folder / RESTORING).unlink()
    return backup, state.later


def _later_removals(backup: Backup, backups: Backups, replaced: Path) -> LaterRemovals:
    """Takedowns in newer backups or in the stack ``replaced`` that are not in ``backup``."""
    known = {each.key for each in backup.objects}
    texts: dict[str, str] = {}
    until: AwareDatetime | None = backup.made
    for newer in (backups.read(stamp) for stamp in backups.stamps() if stamp > backup.stamp):
        records = [each for each in newer.objects if REMOVAL.fullmatch(each.key)]
        texts |= {each.key: backups.verified_path(each.sha256).read_text() for each in records if each.key not in known}
        until = newer.made
    stack = None if replaced == settings().folder else LocalStack.read(replaced)
    if stack is not None and stack.serves("s3") and stack.bucket == backup.bucket:
        if not stack.runs("s3"):
            raise UserError(
                f"the stack in {replaced} does not run, and may have takedowns that the backup lacks: run "
                f"`DARKROOM_HOME={replaced} darkroom up`, or move the folder away if it cannot be started"
            )
        store = Store(client(variables=stack.variables("s3")))
        for key in store.list_keys(stack.bucket, "datasets/"):
            if REMOVAL.fullmatch(key) and key not in known:
                texts[key] = store.get(stack.bucket, key).decode()
        until = None
    later = LaterRemovals(records=texts, known_until=until)
    # Fail on an unreadable record before anything is written.
    list(later.removals())
    return later


def _object(saved: SavedObject, backups: Backups) -> Object:
    # The upload adds the digest.
    metadata = {name: text for name, text in saved.metadata.items() if name != "sha256"}
    return Object(saved.key, backups.path(saved.sha256).read_bytes(), saved.content_type, metadata)


def _batches(objects: Iterable[SavedObject]) -> Iterator[list[SavedObject]]:
    """Split ``objects`` into batches of at most ``AT_ONCE`` bytes."""
    batch: list[SavedObject] = []
    size = 0
    for each in objects:
        if batch and size + each.size > AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += each.size
    if batch:
        yield batch


def _begin(folder: Path, backup: Backup, backups: Backups, replaced: Path) -> RestoreState:
    """Read the state of an interrupted restore, or write a new one."""
    path = folder / RESTORING
    if path.is_file():
        state = RestoreState.model_validate_json(path.read_bytes())
        if state.stamp != backup.stamp:
            raise UserError(
                f"{folder} is being restored from another backup: give that one's name, or another DARKROOM_HOME"
            )
        return state
    if (folder / "stack.json").exists() or (folder / "credentials.json").exists():
        raise UserError(f"there is a stack in {folder}: set DARKROOM_HOME to a folder that is not there yet")
    state = RestoreState(stamp=backup.stamp, later=_later_removals(backup, backups, replaced))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path, state.model_dump(mode="json"))
    return state


def _place(path: Path, name: str, source: Path, backup: Backup, stack: LocalStack) -> None:
    """Put a database in place, migrated to the installed programs and with this stack's password."""

    def write(partial: Path) -> None:
        shutil.copyfile(source, partial)
        partial.chmod(0o600)
        if name in UPGRADES and backup.versions.get("mlflow") != version("mlflow"):
            _upgrade(name, partial)
        if name == AUTH:
            _set_password(partial, stack)

    # Journals of another database would be applied to this one.
    for journal in ("-wal", "-shm", "-journal"):
        path.with_name(f"{path.name}{journal}").unlink(missing_ok=True)
    write_atomically(path, write)


def _upgrade(name: str, database: Path) -> None:
    command = [sys.executable, "-m", *UPGRADES[name], f"sqlite:///{database}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DarkroomError(
            f"{name} cannot be migrated to this MLflow: {''.join(done.stderr.strip().splitlines()[-1:])}"
        )


def _set_password(database: Path, stack: LocalStack) -> None:
    """Replace the old password's hash in the backup with this stack's password."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    try:
        store.update_user(stack.credentials.mlflow_username, stack.credentials.mlflow_password)
    finally:
        store.engine.dispose()
