"""Sources that somebody made to fill the memory or the time of whoever reads them; each is small itself."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders.reading_sources import png

LARGE = 10_000_000
IMAGES = [png(number) for number in range(40)]


def repeated(value: Any, rows: int) -> pa.Array:
    """A column of the same value, which is stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def parquet(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **({"compression": "zstd"} | settings))
    return path


def with_repeated_text(column: str) -> Callable[[Path], Path]:
    return lambda folder: parquet(
        folder / "a.parquet", {"image": IMAGES * 50, column: repeated("x" * LARGE, 50 * len(IMAGES))}
    )


def with_repeated_image(folder: Path) -> Path:
    schema = pa.table({"image": pa.array([b""])}).schema
    writer = pq.ParquetWriter(folder / "a.parquet", schema, compression="zstd")
    # Arrow's own type says dictionary, which would be passed over as no image.
    table = pa.table({"image": pa.array([bytes(LARGE)] * 20)})
    writer.write_table(table, row_group_size=20)
    writer.close()
    return folder / "a.parquet"


def with_one_large_page(folder: Path) -> Path:
    return parquet(folder / "a.parquet", {"image": [bytes(200_000_000)]}, use_dictionary=False, write_statistics=False)


def with_shared_prefixes(folder: Path) -> Path:
    columns = {"image": IMAGES * 10, "text": ["x" * 100_000] * 400}
    encoding = {"text": "DELTA_BYTE_ARRAY", "image": "PLAIN"}
    return parquet(folder / "a.parquet", columns, use_dictionary=False, column_encoding=encoding)


def with_lists(folder: Path) -> Path:
    labels = pa.array([[None] * 5_000_000], pa.list_(pa.int8()))
    return parquet(folder / "a.parquet", {"image": IMAGES[:1], "label": labels})


def with_a_list_beside_the_bytes(folder: Path) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("more", pa.list_(pa.int8()))])
    rows = pa.array([{"bytes": IMAGES[0], "more": [None] * 5_000_000}], kind)
    return parquet(folder / "a.parquet", {"image": rows})


def with_wide_rows(folder: Path) -> Path:
    return parquet(folder / "a.parquet", {"image": pa.array([None] * 4, pa.binary(40_000_000))})


def with_rows_of_nothing(folder: Path) -> Path:
    return parquet(folder / "a.parquet", {"image": pa.array([None] * 3_000_000, pa.binary())})


def folder_of(folder: Path, metadata: str, text: str | Iterable[str]) -> Path:
    for number, data in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(data)
    with (folder / metadata).open("w") as file:
        file.writelines([text] if isinstance(text, str) else text)
    return folder


def with_a_record_that_never_ends(folder: Path) -> Path:
    lines = (f'"{"x" * 1000}\n",' for _ in range(50_000))
    return folder_of(folder, "metadata.csv", ("file_name,text\n0.png,", *lines))


def with_a_field_that_never_ends(folder: Path) -> Path:
    return folder_of(
        folder, "metadata.csv", ("file_name,text\n", '0.png,"', *("x" * 1000 + "\n" for _ in range(50_000)))
    )


def with_columns_without_end(folder: Path) -> Path:
    columns = ",".join(f"c{number}" for number in range(100_000))
    return folder_of(folder, "metadata.csv", (f"file_name,{columns}\n", *("0.png\n" for _ in range(10_000))))


def with_a_line_that_never_ends(folder: Path) -> Path:
    return folder_of(folder, "metadata.jsonl", ('{"file_name": "0.png", "text": "', *("x" * 10**6 for _ in range(50))))


def zipped(folder: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / "set.zip"


def with_records_of_nothing(folder: Path) -> Path:
    return zipped(folder, {"a.png": IMAGES[0], "metadata.csv": b"file_name\n" + b"a.png\n" * 5_000_000})


def packed(folder: Path, name: str, write: Callable[[tarfile.TarFile, Any], None]) -> Path:
    """A compressed tar; ``write`` gets it, and the stream behind it."""
    with gzip.open(folder / name, "wb", 1) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        write(tar, tar.fileobj)
    return folder / name


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def record(key: str, value: str) -> bytes:
    """An attribute in a header of pax."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    length += len(str(length)) > len(str(len(rest)))
    return str(length).encode() + rest


def with_attributes_of_all(folder: Path) -> Path:
    def write(tar: tarfile.TarFile, stream: Any) -> None:
        for number in range(200):
            data = record(f"k{number}", "x" * 2**19 + "\U0001f600")
            stream.write(header("g", tarfile.XGLTYPE, len(data)) + data + bytes(-len(data) % 512))
            stream.write(header(f"{number}.png", tarfile.REGTYPE, 0))

    return packed(folder, "set.tar.gz", write)


def with_a_map_of_holes(folder: Path) -> Path:
    def write(tar: tarfile.TarFile, stream: Any) -> None:
        data = b"".join(
            record(*each)
            for each in (("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1"))
        )
        stream.write(header("x", tarfile.XHDTYPE, len(data)) + data + bytes(-len(data) % 512))
        holes = b"50000000\n" + b"0\n" * 100_000_000
        stream.write(header("a.png", tarfile.REGTYPE, len(holes)) + holes + bytes(-len(holes) % 512))

    return packed(folder, "set.tar.gz", write)


def with_long_names(folder: Path) -> Path:
    def write(tar: tarfile.TarFile, stream: Any) -> None:
        for number in range(100):
            data = record("path", f"a.{number}{'x' * 900_000}\U0001f600.png")
            stream.write(header("x", tarfile.XHDTYPE, len(data)) + data + bytes(-len(data) % 512))
            stream.write(header("a.png", tarfile.REGTYPE, 0))

    return Path(f"wds:{packed(folder, 'set.tar.gz', write)}")


def with_a_large_text_beside_an_image(folder: Path) -> Path:
    def write(tar: tarfile.TarFile, stream: Any) -> None:
        for name, data in (("a.png", IMAGES[0]), ("a.json", b'{"x": [' + b"[]," * 10_000_000 + b"1]}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    return Path(f"wds:{packed(folder, 'set.tar.gz', write)}")


def with_one_large_array(folder: Path) -> Path:
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(struct.pack(">4I", 0x803, 1, 30_000, 20_000))
        for _ in range(600):
            file.write(bytes(1_000_000))
    return folder / "train-images-idx3-ubyte.gz"


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "a label that is repeated": with_repeated_text("label"),
    "a caption that is repeated": with_repeated_text("text"),
    "an image that is repeated": with_repeated_image,
    "a large page": with_one_large_page,
    "texts that share their beginning": with_shared_prefixes,
    "lists for labels": with_lists,
    "lists beside images": with_a_list_beside_the_bytes,
    "wide rows": with_wide_rows,
    "rows of nothing": with_rows_of_nothing,
    "an endless record": with_a_record_that_never_ends,
    "an endless field": with_a_field_that_never_ends,
    "an endless line": with_a_line_that_never_ends,
    "endless columns": with_columns_without_end,
    "records of nothing": with_records_of_nothing,
    "attributes of all members": with_attributes_of_all,
    "a map of holes": with_a_map_of_holes,
    "long names": with_long_names,
    "a large text beside an image": with_a_large_text_beside_an_image,
    "a large array": with_one_large_array,
}
"""What makes each in an empty folder; returns the source."""
