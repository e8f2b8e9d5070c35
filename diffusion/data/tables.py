"""Tables that outgrow memory: DuckDB in this process, over Parquet files and Arrow tables, within a memory limit.

A query whose order matters ends in ORDER BY over columns that leave no two rows equal: workers finish in any order.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.errors import DarkroomError
from diffusion.common.files import is_full_disk, make_folder
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import OPTIONAL, RECORDS, Part, digest_of_samples, find_intact_records, work_folder

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY = "1GiB"
"""Memory of a query; what exceeds it goes to disk."""
BATCH = 2**16
"""Rows of a result that are in memory at a time."""
MAX_THREADS = 8
"""Threads of a query, whose memory grows with them."""
FILES = 128
"""Files that a query reads; it has the footers of all of them in memory."""
_SAMPLES = """
SELECT
    unhex(key),
    unhex(sha256(
        '["' || key || '","' || split || '",' || quote(label) || ',' || quote(caption)
        || coalesce(',"' || mask || '"', '') || ']'
    ))
FROM records
WHERE outcome = 'kept'
"""


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Context with an empty ``folder``, which is deleted at its end, or at its next beginning if it was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def open_database(scratch: Path, memory: str | None = None) -> "Iterator[DuckDBPyConnection]":
    """Context with an empty database in memory, which spills into a temporary folder in ``scratch``.

    It loads no extensions, as these are code from the network. ``memory``: MEMORY unless given.
    """
    import duckdb  # takes as long as NumPy and Arrow together, and most processes open no database

    make_folder(scratch)
    with TemporaryDirectory(dir=scratch, prefix="tables-") as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory or MEMORY,
            "temp_directory": spill,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        }
        with explain_query_errors(scratch), duckdb.connect(config=settings) as database:
            ((threads,),) = database.execute("SELECT current_setting('threads')").fetchall()
            # Each thread has buffers of its own.
            database.execute(f"SET threads = {min(threads, MAX_THREADS)}")
            yield database


@contextmanager
def explain_query_errors(folder: Path) -> Iterator[None]:
    """Context that turns errors of databases that spill into ``folder`` into one-line errors."""
    try:
        yield
    except Exception as error:
        # Without a database nobody has loaded the library.
        library = sys.modules.get("duckdb")
        if library is None or not isinstance(error, library.Error):
            raise
        reason = " ".join(str(error).split())[:200]
        if is_full_disk(error):
            reason = f"the disk that holds {folder} is full"
        raise DarkroomError(
            f"a query over tables failed ({reason}): mend that, and give the same command again"
        ) from error


def insert_records(database: "DuckDBPyConnection", table: str, paths: Iterable[Path], query: str) -> None:
    """Insert into ``table`` the rows of ``query`` for each FILES of ``paths``, whose rows are ``records``.

    Columns of OPTIONAL that a table lacks are null. ``records`` also has the columns ``part``, the number of the file
    in ``paths``, and ``"row"``, the number in the file. Files are read as they are: check them first.
    """
    ((scratch,),) = database.execute("SELECT current_setting('temp_directory')").fetchall()
    # Its columns are those of the result, with nulls where a table has none.
    empty = Path(scratch) / "columns.parquet"
    make_folder(empty.parent)
    pq.write_table(pa.schema([*RECORDS, *OPTIONAL]).empty_table(), empty)
    numbered_paths = enumerate(paths)
    while group := list(islice(numbered_paths, FILES)):
        statement = f"""
            INSERT INTO {table}
            WITH records AS (
                SELECT *, file_index - 1 + ?::INTEGER AS part, file_row_number AS "row"
                FROM read_parquet(?, union_by_name = true, hive_partitioning = false)
            )
            {query}
        """
        files = [escape(str(path.absolute())) for path in (empty, *(path for _, path in group))]
        database.execute(statement, [group[0][0], files])


def read_rows(database: "DuckDBPyConnection", query: str, row: np.dtype) -> Iterator[np.ndarray]:
    """Yield the result of ``query``, whose columns are the fields of ``row`` and have no nulls, BATCH rows at a time.

    Columns for fields of bytes have exactly as many bytes.
    """
    for batch in database.sql(query).to_arrow_reader(BATCH):
        rows = np.empty(len(batch), row)
        for name in row.names or ():
            column, kind = batch.column(name), row[name]
            if kind.kind == "S":
                rows[name] = np.frombuffer(column.buffers()[2], kind)[column.offset :][: len(batch)]
            else:
                rows[name] = column.to_numpy(zero_copy_only=False)
        yield rows


def content_digest(folder: Path, parts: Iterable[Part], storage: StorageConfig) -> str:
    """Compute the content digest of the images of ``parts``; raises UserError if a table is missing or damaged.

    The caller holds the data set's lock.
    """
    paths = [find_intact_records(folder, part) for part in parts]
    with scratch_folder(work_folder(folder) / "digest") as scratch, open_database(scratch) as database:
        _define_quote(database)
        database.execute("CREATE TABLE samples (key BLOB, digest BLOB)")
        insert_records(database, "samples", paths, _SAMPLES)
        # Sorted by their bytes, keys are in the order of their hex digits.
        batches = read_rows(database, "SELECT digest FROM samples ORDER BY key", np.dtype([("digest", "S32")]))
        return digest_of_samples(storage, (batch["digest"].tobytes() for batch in batches))


def _define_quote(database: "DuckDBPyConnection") -> None:
    """Define ``quote``, a text or null as canonical JSON has it.

    DuckDB's own to_json writes some control characters in another way.
    """
    text = "value"
    for character in ("\\", '"', *map(chr, range(32))):
        text = f"replace({text}, chr({ord(character)}), '{json.dumps(character)[1:-1]}')"
    # Most texts need no escapes, and 34 replacements take longer than the digest.
    database.execute(
        "CREATE MACRO quote(value) AS CASE WHEN value IS NULL THEN 'null' "
        f"""WHEN regexp_matches(value, '["\\\\\\x00-\\x1f]') THEN '"' || {text} || '"' ELSE '"' || value || '"' END"""
    )
