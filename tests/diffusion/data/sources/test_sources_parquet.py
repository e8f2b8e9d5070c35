"""Parquet files as Hugging Face writes them, and others."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import open_source
from tests.builders.archives import peak
from tests.builders.reading_sources import access, png, read_all

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hugging_face(path: Path, images: list[bytes | None], labels: list[int], **settings: Any) -> None:
    """A file as ``Dataset.to_parquet`` of Hugging Face's ``datasets`` makes it."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)], IMAGE),
            "label": pa.array(labels, pa.int64()),
            "text": pa.array([f"number {n}" if n else "" for n in range(len(images))]),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, **settings)


def annotations_of(
    uri: str | Path, scratch: Path, **fields: object
) -> list[tuple[str, str | None, str | None, object]]:
    return [(each.name, each.label, each.caption, each.payload) for each in read_all(uri, access(scratch, **fields))]


def test_hugging_face_parquet_is_read_with_classes_and_captions(tmp_path: Path) -> None:
    hugging_face(tmp_path / "train.parquet", [b"0", b"1", b"2", None], [1, 0, -1, 0], row_group_size=3)
    assert annotations_of(tmp_path / "train.parquet", tmp_path / "scratch") == [
        ("train.parquet/0", "dog", None, b"0"),
        ("train.parquet/1", "cat", "number 1", b"1"),
        ("train.parquet/2", None, "number 2", b"2"),
        ("train.parquet/3", "cat", "number 3", "only its path is in the table, not its bytes: 3.png"),
    ]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4), pa.struct([("bytes", pa.binary())])]
)
def test_bytes_in_a_column_of_any_kind_are_images(tmp_path: Path, kind: pa.DataType) -> None:
    values: list[Any] = [b"1234", None, b"5678"]
    if pa.types.is_struct(kind):
        values = [{"bytes": value} for value in values]
    pq.write_table(pa.table({"id": [7, 8, 9], "Image": pa.array(values, kind)}), tmp_path / "a.parquet")
    assert annotations_of(tmp_path / "a.parquet", tmp_path / "scratch") == [
        ("a.parquet/0", None, None, b"1234"),
        ("a.parquet/1", None, None, "a row without an image"),
        ("a.parquet/2", None, None, b"5678"),
    ]


def test_options_name_the_columns_and_a_pattern_the_files(tmp_path: Path) -> None:
    for number in range(3):
        table = pa.table(
            {"left": [b"l"], "right": [b"r"], "label": ["no"], "style": [number], "text": ["no"], "de": ["x y"]}
        )
        (tmp_path / "set" / str(number)).mkdir(parents=True)
        pq.write_table(table, tmp_path / "set" / str(number) / "a.parquet")
    options, scratch = "?image=right&label=style&caption=de", tmp_path / "scratch"
    whole = [(f"{number}/a.parquet/0", str(number), "x y", b"r") for number in range(3)]
    assert annotations_of(f"parquet:{tmp_path}/set{options}", scratch) == whole
    assert annotations_of(f"parquet:{tmp_path}/set/*/a.parquet{options}", scratch) == whole
    assert annotations_of(f"parquet:{tmp_path}/set/{{0..1}}/?.parquet{options}", scratch) == whole[:2]
    assert annotations_of(f"parquet:{tmp_path}/set/1/a.parquet{options}", scratch) == [
        ("a.parquet/0", "1", "x y", b"r")
    ]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [b"1"], "b": [b"2"]}, "", "has more than one column of images .* among a, b: name it with"),
        ({"a": ["text"]}, "", "has no column of images"),
        ({"image": ["text"]}, "?image=image", "has no column of images"),
        ({"image": [b"1"]}, "?image=picture", "has no column picture for image: it has image"),
        ({"image": [b"1"]}, "?label=kind", "has no column kind for label"),
        ({"image": [b"1"], "label": [["a", "b"]]}, "", "neither text nor a number: choose other columns"),
    ],
)
def test_ambiguous_tables_are_errors_of_one_line(
    tmp_path: Path, columns: dict[str, list[Any]], options: str, message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as error:
        annotations_of(f"parquet:{tmp_path}/a.parquet{options}", tmp_path / "scratch")
    assert "\n" not in str(error.value)


def test_damaged_files_are_errors_and_damaged_pages_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [bytes([number]) * 3000 for number in range(40)]
    settings = {"row_group_size": 10, "compression": "none", "use_dictionary": False, "write_page_checksum": True}
    hugging_face(path, images, [0] * 40, **settings)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(images[15], b"X" * 3000))
    contents = [each.payload for each in read_all(path, access(tmp_path / "scratch"))]
    assert contents[:10] + contents[20:] == images[:10] + images[20:]
    assert "damaged in the Parquet file" in str(contents[15])
    path.write_bytes(whole[:3000] + b"\0" * 3000 + whole[6000:])
    contents = [each.payload for each in read_all(path, access(tmp_path / "scratch"))]
    assert contents[10:] == images[10:]
    assert "damaged in the Parquet file" in str(contents[2])
    for damaged_bytes in (whole[:-100], whole[100:], b"", b"PAR1" * 100):
        path.write_bytes(damaged_bytes)
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            read_all(path, access(tmp_path / "scratch"))


def test_rows_over_the_limit_are_quarantined(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", [b"x" * 1025, b"y" * 1024], [0, 0])
    _, first, second = (
        "",
        *[each.payload for each in read_all(tmp_path / "a.parquet", access(tmp_path / "s", max_bytes=1024))],
    )
    assert first == "1025 bytes are over the limit of 1024"
    assert second == b"y" * 1024


def test_any_rows_can_be_read_and_changed_files_are_errors(tmp_path: Path) -> None:
    path, source_access = tmp_path / "a.parquet", access(tmp_path / "scratch")
    images: list[bytes | None] = [bytes([number]) for number in range(100)]
    hugging_face(path, images, [0] * 100, row_group_size=37)
    entries = list(open_source(str(path), source_access).entries())
    rows = [3, 20, 36, 37, 60, 74, 99]
    assert list(open_source(str(path), source_access).read([entries[n] for n in rows])) == [bytes([n]) for n in rows]
    hugging_face(path, images[1:], [0] * 99)
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(open_source(str(path), source_access).read(entries))


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    def used(rows: int) -> int:
        hugging_face(tmp_path / "a.parquet", [number.to_bytes(5) * 1000 for number in range(rows)], [0] * rows)
        source, source_access = str(tmp_path / "a.parquet"), access(tmp_path / "scratch")
        pool = pa.proxy_memory_pool(pa.default_memory_pool())
        before = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            python = peak(lambda: sum(1 for _ in open_source(source, source_access).entries()))
            entries = list(open_source(source, source_access).entries())[:: rows // 50]
            assert sum(len(payload) for payload in open_source(source, source_access).read(entries)) == 250_000
            return python + pool.max_memory()
        finally:
            pa.set_memory_pool(before)

    used(100)
    assert used(16_000) < 1.5 * used(2_000)


def test_only_new_tables_of_a_grown_set_are_read(tmp_path: Path) -> None:
    config = IngestConfig(source=f"parquet:{tmp_path}/set", size=8, held_out=0.33)
    hugging_face(tmp_path / "set" / "1.parquet", [png(number) for number in range(12)], [0, 1] * 6)
    assert ingest(tmp_path / "data", config).kept == 12
    assert ingest(tmp_path / "data", config).read == 0
    hugging_face(tmp_path / "set" / "2.parquet", [png(number) for number in range(10, 16)], [0, 1] * 3)
    grown = ingest(tmp_path / "data", config)
    assert (grown.read, grown.added, grown.duplicates) == (6, 4, 2)
