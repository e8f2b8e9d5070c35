"""``darkroom server backup``: what the local stack holds, copied while it runs."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from diffusion.errors import UserError
from diffusion.files import make_folder
from diffusion.progress import Progress, silent
from flows.backups import Backup, Backups, Digest, SavedObject, stamped
from flows.environment import given, settings
from flows.s3 import Listed, Store, client
from flows.s3_errors import Missing, in_words
from flows.stack.local import LocalStack

DATABASES = ("mlflow/mlflow.db", "mlflow/auth.db", "prefect/prefect.db")
PROGRAMS = ("mlflow", "prefect")
PASSING = ("pushing/", "resumed/")
"""Prefixes of what means nothing later."""


def backup(target: Path, progress: Progress = silent) -> Backup:
    """Copy databases and bucket of the local stack into the folder ``target``; what is there already is not copied.

    The copy is of one moment: no entry of a ledger is in it that its databases do not know, nor the other way round,
    and no print whose model they do not know. Killed and given again, it goes on with what was copied. Raises UserError
    if no stack runs, or the environment names servers that are not its own.
    """
    if elsewhere := given():
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
        ledgers, databases = _at_rest(stack, store, backups)
        made = datetime.now(UTC)
        objects = [
            each
            for each in store.list_objects(stack.bucket)
            if not each.key.startswith(PASSING)
            if each.key in ledgers or not each.key.startswith("ledger/")
            if each.written <= made or not each.key.startswith("prints/")
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


def _at_rest(stack: LocalStack, store: Store, backups: Backups) -> tuple[set[str], dict[str, Digest]]:
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
