"""Tables that outgrow memory: DuckDB in this process, over Parquet files and Arrow tables, within a memory limit.

A query whose order matters ends in ORDER BY over columns that leave no two rows equal: workers finish in any order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from diffusion.common.files import make_folder

MEMORY = "1GiB"
"""Memory of a query; what exceeds it goes to disk."""


@contextmanager
def open_database(scratch: Path, memory: str = MEMORY) -> Iterator[duckdb.DuckDBPyConnection]:
    """Context with an empty database in memory, which spills into a temporary folder in ``scratch``.

    It loads no extensions, as these are code from the network.
    """
    make_folder(scratch)
    with TemporaryDirectory(dir=scratch, prefix="tables-") as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory,
            "temp_directory": spill,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        }
        with duckdb.connect(config=settings) as database:
            yield database
