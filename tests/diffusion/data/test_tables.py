"""Queries over tables of records: within their memory, over the files that were named."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.common.errors import DarkroomError, UserError
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import digest_of_samples, sample_digest
from diffusion.data.tables import content_digest, insert_records, open_database, read_rows
from tests.builders.tables import Row, row_of, rows, write_parts

STORAGE = StorageConfig(size=8)
ROW = np.dtype([("key", "S32"), ("number", "i8")])


def test_rows_beyond_the_memory_limit_are_sorted_on_disk(tmp_path: Path) -> None:
    batches, spilled = [], 0
    with open_database(tmp_path, "32MiB") as database:
        database.execute(
            "CREATE TABLE rows AS SELECT unhex(sha256(i::VARCHAR)) AS key, i AS number FROM range(500000) r(i)"
        )
        for batch in read_rows(database, "SELECT * FROM rows ORDER BY key", ROW):
            spilled = max(spilled, sum(path.stat().st_size for path in tmp_path.rglob("duckdb_temp*")))
            batches.append(batch)
    found = np.concatenate(batches)
    assert spilled > 0
    assert (found["key"][1:] > found["key"][:-1]).all()
    np.testing.assert_array_equal(np.sort(found["number"]), np.arange(500_000))
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


def digest_of(records: list[Row]) -> str:
    """The content digest of records, from its definition."""
    kept = sorted((row for row in records if row["outcome"] == "kept"), key=lambda row: str(row["key"]))
    fields = ("key", "split", "label", "caption", "mask")
    return digest_of_samples(STORAGE, (sample_digest(*(row.get(name) for name in fields)) for row in kept))


@settings(max_examples=8, deadline=None)
@given(st.lists(rows(), max_size=12, unique_by=lambda row: row["key"]))
def test_the_content_digest_is_that_of_a_loop(records: list[Row]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as small:
        small.setattr("diffusion.data.tables.FILES", 2)
        small.setattr("diffusion.data.tables.BATCH", 3)
        folder = Path(root) / "it's {}"
        parts = write_parts(folder, filter(None, (records[part::4] for part in range(4))))
        assert content_digest(folder, parts, STORAGE) == digest_of(records)


def test_every_character_is_digested_as_canonical_json_has_it(tmp_path: Path) -> None:
    characters = [chr(code) for code in (*range(0x250), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F600, 0x10FFFF)]
    records = [row_of(number, label=text, caption=f"a{text}{text}b") for number, text in enumerate(characters)]
    assert content_digest(tmp_path / "set", write_parts(tmp_path / "set", [records]), STORAGE) == digest_of(records)


def test_no_digest_is_made_of_damaged_or_missing_tables(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "set", [[row_of(1)], [row_of(2)]])
    (tmp_path / "set" / "manifest.json").touch()
    path = tmp_path / "set" / parts[1].records.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(UserError):
            content_digest(tmp_path / "set", parts, STORAGE)
        path.unlink(missing_ok=True)
