"""SQLite databases that another program has locked."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, nobody else can write to the database, nor read it where its journal is not a write-ahead log."""
    with closing(sqlite3.connect(path, 60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
