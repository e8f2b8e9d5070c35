"""Time and memory of what is done once for every image of a data set, on tables of images that do not exist.

    python benchmarks/tables.py --images 100000 1000000 10000000

Two versions of so many images each, in parts of 8,192, have half of them in common, with other labels for a tenth.
There are no pixels. Each measurement runs in a process of its own; peak memory is all of it, mapped files included,
and ``anonymous`` what is not given up when memory is short.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.files import sha256_file
from diffusion.data import dataset
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import (
    RECORDS,
    FileEntry,
    Manifest,
    Part,
    Totals,
    read_manifest,
    work_folder,
    write_manifest,
)
from diffusion.data.tables import content_digest
from diffusion.data.versions.difference import diff
from diffusion.data.versions.takedown import choose_images
from diffusion.data.versions.takedown_records import Removal, Selection, find_affected_versions

EACH = 8192
STEPS = ("digest", "table", "difference", "takedown")


def make_keys(part: int) -> pa.Array:
    """Return EACH random keys, the same for the same part."""
    digits = np.random.default_rng(part).bytes(32 * EACH).hex().encode()
    offsets = pa.py_buffer(np.arange(EACH + 1, dtype=np.int32) * 64)
    return pa.Array.from_buffers(pa.string(), EACH, [None, offsets, pa.py_buffer(digits)])


def make_version(folder: Path, first: int, parts: int, variant: int) -> None:
    """Write a data set of the images of ``parts`` parts from ``first``; a tenth is held out."""
    for name in ("records", "shards"):
        (folder / name).mkdir(parents=True)
    shard_path = folder / "shards" / "0.tar"
    shard_path.write_bytes(b"none")
    shard = FileEntry(name="shards/0.tar", sha256=sha256_file(shard_path), bytes=4)
    rows = np.arange(EACH)
    splits = pa.array(np.where(rows % 10, "train", "held_out"))
    entries = []
    for number in range(parts):
        keys = make_keys(first + number)
        classes = (rows + np.where(rows % 10, 0, variant)) % 100
        columns = {name: pa.nulls(EACH, RECORDS.field(name).type) for name in RECORDS.names} | {
            "source": pa.array([f"{variant}/{number:06d}/{row:04d}.jpg" for row in rows]),
            "source_sha256": keys.take(pa.array(np.roll(rows, 1))),
            "outcome": pa.array(["kept"] * EACH),
            "key": keys,
            "split": splits,
            "label": pa.array([f"class {name}" for name in classes]),
            "caption": pa.array([f"a photograph of number {row}, of class {name}" for row, name in enumerate(classes)]),
            "mode": pa.array(["RGB"] * EACH),
            "offset": pa.array(rows * 20_000),
            "size": pa.array(np.full(EACH, 20_000)),
        }
        path = folder / "records" / f"{variant}-{number:06d}.parquet"
        pq.write_table(pa.table(columns, RECORDS), path, compression="zstd")
        held_out = -(-EACH // 10)
        part = Part(
            number=number,
            records=FileEntry(name=f"records/{path.name}", sha256=sha256_file(path), bytes=path.stat().st_size),
            shard=shard,
            outcomes={"kept": EACH},
            splits={"train": EACH - held_out, "held_out": held_out},
            classes={f"class {name}": int(count) for name, count in enumerate(np.bincount(classes, minlength=100))},
            modes={"RGB": EACH},
            totals=Totals(),
        )
        entries.append(part)
    storage = StorageConfig()
    write_manifest(
        folder,
        Manifest(
            name=folder.name, parent=None, change="ingest", content_digest="0" * 64, storage=storage, parts=entries
        ),
    )


def run(step: str, root: Path) -> object:
    """Do one of STEPS, and return what must not change between versions of the code."""
    one, two = root / "one", root / "two"
    manifest, other = read_manifest(one), read_manifest(two)
    if step == "digest":
        return content_digest(one, manifest.parts, manifest.storage)
    if step == "table":
        dataset.IN_MEMORY = 0
        shutil.rmtree(work_folder(one) / "tables", ignore_errors=True)
        table = dataset.open_table(one, manifest)
        return [len(table.images), table.by_shard.samples[::1000].sum().item()]
    if step == "difference":
        result = diff(one, manifest, other, 10, lambda entry: two / entry.name)
        groups = (result.added, result.removed, result.changed)
        return [group.count for group in groups if group is not None]
    keys = [key.as_py() for key in make_keys(len(manifest.parts) - 1).slice(0, 5)]
    matches, _ = choose_images(one, Selection(prefixes=keys, sources=["*/000000/000?.jpg"]))
    fields: dict[str, Any] = {"dataset": "one", "request_digest": "0" * 16, "reason": "none", "parent": None}
    fields |= {"version": manifest.digest, "content_digest": "0" * 64, "tables": [], "already": False}
    removal = Removal.model_validate(matches.model_dump() | fields)
    affected = find_affected_versions(one, removal, [manifest, other], lambda entry: two / entry.name)
    return [matches.images, len(affected.held)]


def watch(work: Callable[[], object]) -> dict[str, object]:
    """Return the result of ``work``, its time in seconds, also of the processor, and its memory in MB."""
    done, anonymous = Event(), [0]

    def look() -> None:
        while not done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            anonymous.append(int(status.split("RssAnon:")[1].split()[0]) // 1024)

    watcher = Thread(target=look)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        result = work()
    finally:
        done.set()
    times = {"seconds": round(time.perf_counter() - start, 2), "cpu": round(time.process_time() - cpu, 2)}
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
    return times | {"peak": peak, "anonymous": max(anonymous), "result": result}


def main() -> None:
    """Make the tables, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--folder", type=Path, help="where the tables are made, or are already")
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(watch(lambda: run(arguments.steps[0], arguments.run))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for images in arguments.images:
            root, parts = (arguments.folder or Path(scratch)) / str(images), -(-images // EACH)
            if not root.exists():
                make_version(root / "one", 0, parts, 0)
                make_version(root / "two", parts // 2, parts, 1)
            for step in arguments.steps:
                command = [sys.executable, __file__, "--steps", step, "--run", str(root)]
                process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
                print(f"{parts * EACH:,}", step, process.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
