"""Listing of the files of a source, kept on disk until it is complete."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Entry
from diffusion.data.sources.conventions import Described, extension, folder_label, is_hidden, is_image
from diffusion.data.sources.local_files import MISSING, refusal

RECORDS_PER_FILE = 10
"""Maximum average number of metadata records per existing file."""


class Listing:
    """Files of an archive or a prefix; labels and captions depend on all of them."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._folders: set[str] = set()
        self._any_in_root = False
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE TABLE files (number INTEGER PRIMARY KEY, name TEXT, locator TEXT, stamp TEXT)")

    def add(self, name: str, locator: str, stamp: str) -> None:
        """Add a file under its name relative to the root; a later one of the same name replaces it."""
        self._database.execute("INSERT INTO files (name, locator, stamp) VALUES (?, ?, ?)", (name, locator, stamp))
        if is_image(name):
            folder = name.rpartition("/")[0]
            self._any_in_root |= not folder
            if len(self._folders) < 2:
                self._folders.add(folder)

    def images(self, passed_over: Counter[str]) -> Iterator[Entry]:
        """Yield all images, labelled by their folders if there are several and none is in the root.

        Counts the extensions of other visible files in ``passed_over``.
        """
        labelled = len(self._folders) > 1 and not self._any_in_root
        for name, locator, stamp in self._database.execute("SELECT name, locator, stamp FROM files ORDER BY number"):
            if is_image(name):
                yield Entry(name, locator, stamp, folder_label(name) if labelled else None)
            elif not is_hidden(name):
                passed_over[extension(name)] += 1

    def described(self, found: Iterator[Described]) -> Iterator[Entry]:
        """Yield exactly the files that a metadata file names."""
        self._database.execute("CREATE INDEX names ON files (name, number)")
        (files,) = self._database.execute("SELECT count(*) FROM files").fetchone()
        most = RECORDS_PER_FILE * files + 1000
        query = "SELECT locator, stamp FROM files WHERE name = ? ORDER BY number DESC LIMIT 1"
        missing = (refusal(MISSING), "")
        for number, each in enumerate(found, start=1):
            if number > most:
                # They compress well.
                raise UserError(f"the metadata of {files} files has over {most} records: take those of others out")
            locator, stamp = self._database.execute(query, (each.name,)).fetchone() or missing
            yield Entry(each.name, locator, stamp, each.label, each.caption)


@contextmanager
def listing() -> Iterator[Listing]:
    """Yield an empty listing, deleted at the end."""
    # SQLite's name for a private temporary file.
    with closing(sqlite3.connect("", check_same_thread=False, isolation_level=None)) as database:
        database.execute("BEGIN")
        yield Listing(database)
