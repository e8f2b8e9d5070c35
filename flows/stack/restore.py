"""``darkroom restore``: a local stack made anew of a backup, with passwords of its own."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from diffusion.config import Config
from diffusion.errors import DarkroomError, UserError
from diffusion.files import write_atomically, write_json
from diffusion.progress import Progress, silent
from flows.backups import Backup, Backups, SavedObject
from flows.environment import SERVERS, given, settings
from flows.s3 import Object, Store, client
from flows.stack.control import RESTORING, StackStatus, status, up
from flows.stack.local import LocalStack

AUTH = "mlflow/auth.db"
AT_ONCE = 2**26
"""Bytes of objects held in memory, if they are smaller than that."""
UPGRADES = {"mlflow/mlflow.db": ("mlflow", "db", "upgrade"), AUTH: ("mlflow.server.auth", "db", "upgrade", "--url")}
"""The programs by which databases of an older MLflow become ours; Prefect's server does that by itself."""


class Mark(Config):
    """What is written down while a stack is made of a backup."""

    stamp: str
    placed: bool = False
    """Whether all databases are there: then they may be in use, and before nothing can be."""


def restore(
    target: Path, stamp: str | None, report: Callable[[str], None], progress: Progress = silent
) -> tuple[Backup, StackStatus]:
    """Make the stack in DARKROOM_HOME of a backup in the folder ``target``, by default the newest, and start it.

    Killed and given again, it goes on. Raises UserError if there is a stack already, or anything of the backup is
    damaged, before the stack is started.
    """
    if elsewhere := given():
        raise UserError(f"{' and '.join(elsewhere.values())} name other servers: unset them to restore a local stack")
    folder, backups = settings().folder, Backups(target)
    backup = backups.read(stamp)
    mark = _begin(folder, backup)
    for each in {*backup.databases.values(), *(each.sha256 for each in backup.objects)}:
        backups.whole(each)
    stack = LocalStack.open(folder, backup.bucket)
    if not mark.placed:
        if any(stack.runs(server) for server in SERVERS):
            raise UserError(f"a stack runs in {folder}, where no restore ended: run `darkroom down`, then this again")
        for name, sha256 in backup.databases.items():
            _place(folder / name, name, backups.whole(sha256), backup, stack)
        write_json(folder / RESTORING, mark.model_copy(update={"placed": True}).model_dump())
    up(report, restoring=True)
    stack = LocalStack.open(folder, backup.bucket)
    store = Store(client(variables=stack.variables("s3")))
    done = 0
    for some in _handfuls(backup.objects):
        store.put_many(backup.bucket, [_object(saved, backups) for saved in some])
        done += len(some)
        progress("objects restored", done, len(backup.objects))
    (folder / RESTORING).unlink()
    return backup, status()


def _object(saved: SavedObject, backups: Backups) -> Object:
    # The digest is written by whoever puts it.
    metadata = {name: text for name, text in saved.metadata.items() if name != "sha256"}
    return Object(saved.key, backups.whole(saved.sha256).read_bytes(), saved.content_type, metadata)


def _handfuls(objects: Iterable[SavedObject]) -> Iterator[list[SavedObject]]:
    """``objects`` in groups that are held in memory together."""
    some: list[SavedObject] = []
    size = 0
    for each in objects:
        if some and size + each.size > AT_ONCE:
            yield some
            some, size = [], 0
        some.append(each)
        size += each.size
    if some:
        yield some


def _begin(folder: Path, backup: Backup) -> Mark:
    """What is written down, now at the latest."""
    path = folder / RESTORING
    if path.is_file():
        mark = Mark.model_validate_json(path.read_bytes())
        if mark.stamp != backup.stamp:
            raise UserError(f"{folder} is being made of another backup: give that one's name, or another DARKROOM_HOME")
        return mark
    if (folder / "stack.json").exists() or (folder / "credentials.json").exists():
        raise UserError(f"there is a stack in {folder}: set DARKROOM_HOME to a folder that is not there yet")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    mark = Mark(stamp=backup.stamp)
    write_json(path, mark.model_dump())
    return mark


def _place(path: Path, name: str, source: Path, backup: Backup, stack: LocalStack) -> None:
    """Put a database in place, as this installation's programs and this stack's password need it."""

    def write(partial: Path) -> None:
        shutil.copyfile(source, partial)
        partial.chmod(0o600)
        if name in UPGRADES and backup.versions.get("mlflow") != version("mlflow"):
            _upgrade(name, partial)
        if name == AUTH:
            _set_password(partial, stack)

    # Of one that was made anew meanwhile, and would be taken for this one's.
    for journal in ("-wal", "-shm", "-journal"):
        path.with_name(f"{path.name}{journal}").unlink(missing_ok=True)
    write_atomically(path, write)


def _upgrade(name: str, database: Path) -> None:
    command = [sys.executable, "-m", *UPGRADES[name], f"sqlite:///{database}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DarkroomError(
            f"{name} cannot be brought to this MLflow: {''.join(done.stderr.strip().splitlines()[-1:])}"
        )


def _set_password(database: Path, stack: LocalStack) -> None:
    """The backup has the old password's hash, and this stack a password of its own."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    try:
        store.update_user(stack.credentials.mlflow_username, stack.credentials.mlflow_password)
    finally:
        store.engine.dispose()
