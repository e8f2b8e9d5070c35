"""Backups that are cut, damaged or overtaken, and restores that are killed: given again, both end whole."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

from diffusion.errors import UserError
from flows.backups import SMALL, Backup, Backups, SavedObject, stamped
from flows.environment import settings
from flows.s3 import Store
from flows.stack import restore as restoring
from flows.stack import up
from flows.stack.backup import DATABASES, _copy, save
from flows.stack.local import USER
from flows.stack.restore import AT_ONCE, _handfuls, restore


def database(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as made, made:
        made.execute("create table told (text)")
        made.execute("insert into told values (?)", (text,))


def told(path: Path) -> str:
    with closing(sqlite3.connect(path)) as found:
        return str(found.execute("select text from told").fetchone()[0])


def backed_up(store: Store, bucket: str, backups: Backups) -> Backup:
    saved = save(store, bucket, list(store.list_objects(bucket)), backups)
    done = Backup(made=stamped(datetime.now(UTC)), bucket=bucket, versions={}, databases={}, objects=saved)
    backups.write(done)
    return done


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(b"!" + path.read_bytes()[1:])


@pytest.mark.parametrize(("size", "harm"), [(100, cut), (100, flip), (SMALL + 1, cut)])
def test_another_backup_mends_what_is_cut_or_damaged(
    store: Store, bucket: str, tmp_path: Path, size: int, harm: Callable[[Path], None]
) -> None:
    store.put_once(bucket, "object", b"x" * size)
    backups = Backups(tmp_path / "backups")
    [saved] = backed_up(store, bucket, backups).objects
    harm(backups.path(saved.sha256))
    with pytest.raises(UserError, match="damaged or missing"):
        backups.whole(saved.sha256)
    assert backed_up(store, bucket, backups).objects == [saved]
    assert backups.whole(saved.sha256).read_bytes() == b"x" * size


def test_an_object_that_is_deleted_while_it_is_copied_is_left_out(store: Store, bucket: str, tmp_path: Path) -> None:
    for key in ("before", "between", "stays"):
        store.put_once(bucket, key, key.encode())
    listed = list(store.list_objects(bucket))
    store.delete_many(bucket, ["before"])

    class Deleting(Store):
        """Somebody else deletes an object as soon as its bytes have come."""

        def fetch(self, bucket: str, key: str, path: Path) -> None:
            super().fetch(bucket, key, path)
            self.delete_many(bucket, [key] if key == "between" else [])

    saved = save(Deleting(), bucket, listed, Backups(tmp_path / "backups"))
    assert [each.key for each in saved] == ["stays"]


def test_only_their_owner_reads_copies_of_databases(tmp_path: Path) -> None:
    database(tmp_path / "mlflow.db", "secret")
    backups = Backups(tmp_path / "backups")
    kept = backups.path(backups.keep(partial(_copy, tmp_path / "mlflow.db")))
    assert kept.stat().st_mode & 0o777 == 0o600
    assert told(kept) == "secret"


@pytest.fixture
def stored(no_servers: None, tmp_path: Path) -> Path:
    """A backup of the databases of a stack, without objects."""
    folder, backups = tmp_path / "old", Backups(tmp_path / "backups")
    for name in DATABASES:
        database(folder / name, f"{name} of the backup")
    auth = SqlAlchemyStore()
    auth.init_db(f"sqlite:///{folder}/mlflow/auth.db")  # type: ignore[no-untyped-call]
    auth.create_user(USER, "old-password-of-it")
    auth.engine.dispose()
    databases = {name: backups.keep(partial(_copy, folder / name)) for name in DATABASES}
    versions = {"mlflow": version("mlflow")}
    made = stamped(datetime.now(UTC))
    backups.write(Backup(made=made, bucket="darkroom", versions=versions, databases=databases, objects=[]))
    return backups.folder


def test_a_restore_that_was_killed_is_not_started_over_and_given_again_places_all_databases(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings().folder

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # A real kill cannot be had at exactly one moment, and a real stack takes half a minute to start.
    with monkeypatch.context() as killing:
        killing.setattr(restoring, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(stored, None, print)
    with pytest.raises(UserError, match=f"a restore into {folder} did not end: give `darkroom restore`"):
        up(print)
    assert not any((folder / name).exists() for name in DATABASES)

    # As an older Darkroom's `up` made it.
    database(folder / DATABASES[-1], "fresh")
    (folder / f"{DATABASES[-1]}-wal").write_bytes(b"fresh")
    monkeypatch.setattr(restoring, "up", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(stored, None, print)
    assert [told(folder / name) for name in DATABASES] == [f"{name} of the backup" for name in DATABASES]
    assert not (folder / f"{DATABASES[-1]}-wal").exists()

    with closing(sqlite3.connect(folder / DATABASES[-1])) as used, used:
        used.execute("update told set text = 'used since'")
    with pytest.raises(KeyboardInterrupt):
        restore(stored, None, print)
    assert told(folder / DATABASES[-1]) == "used since"
    with pytest.raises(UserError, match="did not end"):
        up(print)


def test_objects_are_restored_in_groups_that_fit_in_memory() -> None:
    sizes = [AT_ONCE // 2, AT_ONCE // 2, 1, AT_ONCE + 1, 0, 1, 1]
    objects = [
        SavedObject(key=str(n), size=size, etag="", sha256="", content_type="", metadata={})
        for n, size in enumerate(sizes)
    ]
    assert [[each.size for each in some] for some in _handfuls(objects)] == [sizes[:2], [1], [AT_ONCE + 1], [0, 1, 1]]
