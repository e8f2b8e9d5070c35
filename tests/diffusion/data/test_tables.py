"""Queries over tables of records: within their memory, over the files that were named."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.common.errors import DarkroomError
from diffusion.data.tables import insert_records, open_database, read_rows
from tests.builders.tables import row_of, write_parts

ROW = np.dtype([("key", "S32"), ("number", "i8")])


def test_rows_beyond_the_memory_limit_are_sorted_on_disk(tmp_path: Path) -> None:
    batches, spilled = [], 0
    with open_database(tmp_path, "32MiB") as database:
        database.execute(
            "CREATE TABLE rows AS SELECT unhex(sha256(i::VARCHAR)) AS key, i AS number FROM range(500000) r(i)"
        )
        for rows in read_rows(database, "SELECT * FROM rows ORDER BY key", ROW):
            spilled = max(spilled, sum(path.stat().st_size for path in tmp_path.rglob("duckdb_temp*")))
            batches.append(rows)
    rows = np.concatenate(batches)
    assert spilled > 0
    assert (rows["key"][1:] > rows["key"][:-1]).all()
    np.testing.assert_array_equal(np.sort(rows["number"]), np.arange(500_000))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a[1]", "a*", "label=x", "it's"])
def test_names_of_folders_are_not_patterns(tmp_path: Path, name: str) -> None:
    for number, folder in enumerate((tmp_path / name, tmp_path / "a1")):
        (part,) = write_parts(folder, [[row_of(number), row_of(5, "quarantined")]])
        (folder / part.records.name).rename(folder / "table.parquet")
    with open_database(tmp_path) as database:
        database.execute('CREATE TABLE found (source VARCHAR, label VARCHAR, part INTEGER, "row" INTEGER)')
        insert_records(
            database, "found", [tmp_path / name / "table.parquet"] * 2, 'SELECT source, label, part, "row" FROM records'
        )
        found = database.execute('SELECT * FROM found ORDER BY part, "row"').fetchall()
    assert found == [(f"{source}.png", None, part, row) for part in (0, 1) for row, source in enumerate((0, 5))]


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    query = "CREATE TABLE rows AS SELECT sha256(range::VARCHAR) AS key FROM range(2000000) ORDER BY key"
    with pytest.raises(DarkroomError, match="full"), open_database(tmp_path, "40MiB") as database:
        database.execute(f"SET max_temp_directory_size = '1MiB'; {query}")
