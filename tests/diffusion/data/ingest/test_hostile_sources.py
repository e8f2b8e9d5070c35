"""Sources that were made to fill the memory: none takes more than a gigabyte, and each is an error or a reason."""

import json
import os
import struct
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from diffusion.common.errors import UserError
from diffusion.common.progress import ignore_progress
from diffusion.data.ingest.chunks import TEXT_OF_A_CHUNK, chunks_of, make_plan
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import prepare
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.staging import ChunkFolder
from diffusion.data.sources import open_source
from diffusion.data.sources.base import MAX_CHARACTERS
from tests.builders.archives import peak
from tests.builders.hostile_files import HOSTILE, IMAGES, parquet
from tests.builders.reading_sources import access, read_all

GIGABYTE = 2**30
INGEST = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # the machine outlives a failure
from pathlib import Path
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.common.errors import UserError
for source in sys.argv[2:]:
    folder = Path(sys.argv[1], Path(source).name if Path(source).is_dir() else Path(source).parent.name)
    try:
        done = ingest(folder, IngestConfig(source=source, size=8, max_quarantined=1, workers=2))
        said = f"{done.kept} kept, {done.quarantined_count} quarantined"
    except UserError as error:
        said = str(error)
    # Not ru_maxrss, which begins with what the parent had.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(source, peak.split()[1], said.replace(chr(10), "<LINE>")[:300], sep="|")
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_ingest_takes_more_than_a_gigabyte(tmp_path: Path) -> None:
    sources = []
    for number, (kind, make) in enumerate(HOSTILE.items()):
        folder = tmp_path / f"{number:02d} {kind}"
        folder.mkdir()
        sources.append(str(make(folder)))
    command = [sys.executable, "-c", INGEST, str(tmp_path / "data"), *sources]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env={**os.environ})
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [line.split("|") for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == sources
    peaks = {place.removeprefix(str(tmp_path)): int(peak) for place, peak, _ in lines}
    assert max(peaks.values()) * 1024 <= GIGABYTE, peaks
    assert not any("<LINE>" in message for _, _, message in lines)


def test_images_with_too_long_texts_are_quarantined_individually(tmp_path: Path) -> None:
    rows = [
        {"file_name": "0.png", "label": "x" * MAX_CHARACTERS["label"], "text": "y" * MAX_CHARACTERS["caption"]},
        {"file_name": "1.png", "label": "x" * (MAX_CHARACTERS["label"] + 1), "text": "y"},
        {"file_name": "2.png", "label": "x", "text": "y" * (MAX_CHARACTERS["caption"] + 1)},
        {"file_name": f"{'z' * MAX_CHARACTERS['name']}.png"},
        *({"file_name": f"{number}.png", "label": "x"} for number in range(3, 20)),
    ]
    source = tmp_path / "set"
    source.mkdir()
    for number, data in enumerate(IMAGES[:20]):
        (source / f"{number}.png").write_bytes(data)
    (source / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = IngestConfig(source=str(source), size=8, held_out=0.33)
    result = ingest(tmp_path / "data", config)
    assert (result.kept, result.quarantined_count) == (18, 3)
    reasons = [each.reason for each in result.quarantined]
    assert reasons == [
        "its label has more than 1000 characters",
        "its caption has more than 10000 characters",
        "its name has more than 4096 characters",
    ]
    assert max(len(each.source) for each in result.quarantined) < 200
    # What is mended is taken without being asked for: its bytes are what they were.
    rows[1]["label"], rows[2]["text"] = "x", None  # type: ignore[assignment]
    (source / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = ingest(tmp_path / "data", config)
    assert (result.kept, result.quarantined_count) == (20, 1)


PARQUET = {
    "texts that share their beginning": ("UserError", "encoded in a way"),
    "lists for labels": ("UserError", "neither text nor a number"),
    "rows of nothing": ("UserError", "rows in .* bytes"),
    "wide rows": ("reason", "each row has 40000000 bytes"),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_columns_that_unpack_to_any_size_are_not_decoded(tmp_path: Path, kind: str) -> None:
    how, message = PARQUET[kind]
    source = HOSTILE[kind](tmp_path)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        if how == "UserError":
            with pytest.raises(UserError, match=message):
                read_all(source, access(tmp_path / "scratch"))
        else:
            items = {str(each.payload) for each in read_all(source, access(tmp_path / "scratch"))}
            assert len(items) == 1
            assert message in items.pop()
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 64 * 2**20  # type: ignore[operator]


def test_the_limit_on_pages_can_be_raised(tmp_path: Path) -> None:
    images = [bytes([number]) * 100_000 for number in range(20)]
    path = parquet(tmp_path / "a.parquet", {"image": images}, use_dictionary=False)
    items = {str(each.payload) for each in read_all(path, access(tmp_path / "scratch", max_page_bytes=2**20))}
    assert all("over ingest.max_page_bytes = 1048576" in each for each in items)
    assert [each.payload for each in read_all(path, access(tmp_path / "scratch", max_page_bytes=2**22))] == images


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_dictionary": False}, {"compression": "snappy"}, {"compression": "none"}]
)
def test_files_of_common_parquet_writers_are_read(tmp_path: Path, version: str, settings: dict[str, object]) -> None:
    images = [bytes([number % 256]) * (number % 3000) for number in range(1, 3000)]
    labels, texts = [number % 7 for number in range(1, 3000)], [f"text {number}" for number in range(1, 3000)]
    columns = {"image": images, "label": labels, "text": texts}
    path = parquet(tmp_path / "a.parquet", columns, data_page_version=version, row_group_size=700, **settings)
    items = read_all(path, access(tmp_path / "scratch"))
    assert [each.payload for each in items] == images
    assert [each.label for each in items] == [str(label) for label in labels]
    assert [each.caption for each in items] == texts


def test_images_of_sixteen_bits_take_little_more_memory_than_others(tmp_path: Path) -> None:
    rows = zlib.compress(bytes((1 + 2500 * 6) * 2500), 1)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 2500, 2500, 16, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert peak(lambda: prepare(data, IngestConfig(size=8))) < 100_000_000


def test_chunks_are_shorter_where_texts_are_long(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    rows = ({"file_name": f"{number}.png", "text": "x" * 10_000} for number in range(1000))
    (source / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with closing(Index(tmp_path / "index.sqlite", tmp_path / "data", None, None)) as index:
        listed = open_source(str(source), access(tmp_path / "scratch"))
        make_plan(tmp_path / "plan.sqlite", listed, "", index.path, False, True, ignore_progress)
    # As of a set so large that a chunk had a thousand.
    plan, config = tmp_path / "plan.sqlite", IngestConfig(source=str(source))
    first = next(chunks_of(plan, config, None, 8000, ChunkFolder(tmp_path)))
    assert TEXT_OF_A_CHUNK <= len(first.rows) * 10_000 < 1.01 * TEXT_OF_A_CHUNK
