"""Backups that are cut, damaged or overtaken, and restores that are killed: given again, both end whole."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from mlflow.entities.webhook import WebhookEvent, WebhookStatus
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyRegistry

from diffusion.common.errors import UserError
from flows.environment import settings
from flows.local_stack import backup as restoring
from flows.local_stack.backup import DATABASES, SMALL, Backup, Backups, _copy, _later_removals, restore, save
from flows.local_stack.control import down, up
from flows.local_stack.stack import USER, LocalStack
from flows.storage.s3 import Store, client
from tests.builders.removals import REMOVAL
from tests.chaos.power_drills import backup_drill


def database(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table notes (text)")
        connection.execute("insert into notes values (?)", (text,))


def read_text(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("select text from notes").fetchone()[0])


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def backed_up(store: Store, bucket: str, backups: Backups) -> Backup:
    saved = save(store, bucket, list(store.list_objects(bucket)), backups)
    backup = Backup(made=now(), bucket=bucket, versions={}, databases={}, objects=saved)
    backups.write(backup)
    return backup


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(b"!" + path.read_bytes()[1:])


@pytest.mark.parametrize(("size", "harm"), [(100, cut), (100, flip), (SMALL + 1, cut)])
def test_next_backup_repairs_damaged_copies(
    store: Store, bucket: str, tmp_path: Path, size: int, harm: Callable[[Path], None]
) -> None:
    store.put_once(bucket, "object", b"x" * size)
    backups = Backups(tmp_path / "backups")
    [saved] = backed_up(store, bucket, backups).objects
    harm(backups.path(saved.sha256))
    with pytest.raises(UserError, match="damaged or missing"):
        backups.verified_path(saved.sha256)
    assert backed_up(store, bucket, backups).objects == [saved]
    assert backups.verified_path(saved.sha256).read_bytes() == b"x" * size


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.drill
def test_a_power_cut_tears_no_copy_of_a_backup(store: Store, bucket: str, tmp_path: Path, kills: int) -> None:
    for number in range(12):
        store.put_once(bucket, f"object-{number}", bytes([number]) * (1000 + number))
    store.put_once(bucket, "large", b"x" * (SMALL + 1))
    assert backup_drill(tmp_path, bucket).run(tmp_path, 2 * kills, seed=2 * kills) >= 2 * kills


def test_an_object_deleted_meanwhile_is_left_out(store: Store, bucket: str, tmp_path: Path) -> None:
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
    copy = backups.path(backups.keep(partial(_copy, tmp_path / "mlflow.db")))
    assert copy.stat().st_mode & 0o777 == 0o600
    assert read_text(copy) == "secret"


@pytest.fixture
def backup_folder(no_servers: None, tmp_path: Path) -> Path:
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
    backups.write(Backup(made=now(), bucket="darkroom", versions=versions, databases=databases, objects=[]))
    return backups.folder


def test_a_killed_restore_goes_on_and_places_all_databases(
    backup_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings().folder

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # A real kill cannot be had at exactly one moment, and a real stack takes half a minute to start.
    with monkeypatch.context() as killing:
        killing.setattr(restoring, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(backup_folder, None, Path("nothing"), print)
    with pytest.raises(UserError, match=f"a restore into {folder} did not end: give `darkroom server restore`"):
        up(print)
    assert not any((folder / name).exists() for name in DATABASES)

    # As an older Darkroom's `up` made it.
    database(folder / DATABASES[-1], "fresh")
    (folder / f"{DATABASES[-1]}-wal").write_bytes(b"fresh")
    monkeypatch.setattr(restoring, "up", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(backup_folder, None, Path("nothing"), print)
    assert [read_text(folder / name) for name in DATABASES] == [f"{name} of the backup" for name in DATABASES]
    assert not (folder / f"{DATABASES[-1]}-wal").exists()

    with closing(sqlite3.connect(folder / DATABASES[-1])) as used, used:
        used.execute("update notes set text = 'used since'")
    with pytest.raises(KeyboardInterrupt):
        restore(backup_folder, None, Path("nothing"), print)
    assert read_text(folder / DATABASES[-1]) == "used since"
    with pytest.raises(UserError, match="did not end"):
        up(print)


def test_a_restored_mlflow_has_webhooks_disabled_and_named(
    backup_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_template: Path
) -> None:
    backups, source = Backups(backup_folder), tmp_path / "mlflow.db"
    shutil.copyfile(mlflow_template, source)
    with monkeypatch.context() as older:
        older.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
        older.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
        registry = SqlAlchemyRegistry(f"sqlite:///{source}")
        events = [WebhookEvent.from_str("model_version_alias.created")]
        registry.create_webhook("deployer", "https://127.0.0.1/x", events, secret="s" * 16)
        registry.engine.dispose()
    newest = backups.read()
    databases = newest.databases | {DATABASES[0]: backups.keep(partial(_copy, source))}
    backups.write(later(newest).model_copy(update={"databases": databases}))
    lines: list[str] = []

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restoring, "up", stop)
    with pytest.raises(KeyboardInterrupt):
        restore(backup_folder, None, Path("nothing"), lines.append)
    assert [line for line in lines if "deployer" in line]
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    restored = SqlAlchemyRegistry(f"sqlite:///{settings().folder / DATABASES[0]}")
    [webhook] = restored.list_webhooks()
    assert (webhook.name, webhook.status, webhook.secret) == ("deployer", WebhookStatus.DISABLED, None)
    restored.engine.dispose()


RECORD = f"datasets/{REMOVAL.dataset}/removals/{REMOVAL.name}.json"


def later(backup: Backup) -> Backup:
    return backup.model_copy(update={"made": backup.made + timedelta(hours=1)})


def test_restoring_an_older_backup_keeps_newer_takedowns(store: Store, bucket: str, tmp_path: Path) -> None:
    backups = Backups(tmp_path / "backups")
    store.put_once(bucket, "datasets/blobs/removals-of-others.json", b"no record")
    older = backed_up(store, bucket, backups)
    removals = _later_removals(older, backups, tmp_path / "nothing")
    assert (list(removals.removals()), removals.known_until) == ([], older.made)

    store.put_once(bucket, RECORD, REMOVAL.model_dump_json().encode())
    newer = later(backed_up(store, bucket, backups))
    backups.write(newer)
    backups.write(older)
    removals = _later_removals(older, backups, tmp_path / "nothing")
    assert (list(removals.removals()), removals.known_until) == ([REMOVAL], newer.made)
    assert list(removals.records) == [RECORD]
    assert _later_removals(newer, backups, tmp_path / "nothing").records == {}


def test_an_unreadable_takedown_stops_a_restore_early(
    store: Store, bucket: str, tmp_path: Path, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backups = Backups(tmp_path / "backups")
    older = backed_up(store, bucket, backups)
    store.put_once(bucket, RECORD, b"{}")
    backups.write(later(backed_up(store, bucket, backups)))
    backups.write(older)
    for name in s3_environment:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=RECORD):
        restore(backups.folder, older.stamp, tmp_path / "nothing", print)
    assert not settings().folder.exists()


@pytest.mark.slow
def test_a_restore_keeps_takedowns_of_the_replaced_stack(
    backup_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Of the stack, S3 is enough.
    old = tmp_path / ".darkroom"
    backups = Backups(backup_folder)
    up(print)
    try:
        running = LocalStack.read(old)
        Store(client(variables=running.variables("s3"))).put_once(
            "darkroom", RECORD, REMOVAL.model_dump_json().encode()
        )
        monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / ".restored"))
        removals = _later_removals(backups.read(), backups, old)
        assert (list(removals.removals()), removals.known_until) == ([REMOVAL], None)
    finally:
        monkeypatch.setenv("DARKROOM_HOME", str(old))
        down(print)
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / ".restored"))
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"DARKROOM_HOME={old} darkroom up"):
        restore(backup_folder, None, old, print)
    assert not settings().folder.exists()
