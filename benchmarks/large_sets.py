"""Time and memory of what is done once for every image of a data set, on tables of images that do not exist.

    python benchmarks/large_sets.py --images 2000000

The tables are those of an ingest, with random keys in parts of 8,192 images; there are no shards. Each measurement runs
in a process of its own. Anonymous memory is what each process has for itself: mapped files are shared, and their pages
are given up when memory is short.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.files import sha256_file
from diffusion.data import dataset
from diffusion.data.dataset import Dataset
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig, StorageConfig
from diffusion.data.ingest.key_resolution import resolve
from diffusion.data.loader import make_order
from diffusion.data.manifest import RECORDS, FileEntry, Manifest, Part, Totals, read_manifest, write_manifest
from diffusion.data.shards import LocalShards

EACH = 8192
BATCH = 256


def make_tables(folder: Path, images: int) -> None:
    """Write the manifest and the tables of a data set of ``images``, a tenth of them held out."""
    (folder / "records").mkdir(parents=True)
    parts = []
    for number, first in enumerate(range(0, images, EACH)):
        count = min(EACH, images - first)
        keys = [hashlib.sha256(row.to_bytes(8, "big")).hexdigest() for row in range(first, first + count)]
        splits = ["held_out" if row % 10 == 0 else "train" for row in range(count)]
        columns = {name: pa.nulls(count, RECORDS.field(name).type) for name in RECORDS.names} | {
            "source": pa.array([f"images/{row:010d}.jpg" for row in range(first, first + count)]),
            "source_sha256": pa.array(keys),
            "outcome": pa.array(["kept"] * count),
            "key": pa.array(keys),
            "split": pa.array(splits),
            "label": pa.array([f"class {row % 100}" for row in range(count)]),
            "mode": pa.array(["RGB"] * count),
            "offset": pa.array(np.arange(count) * 20_000),
            "size": pa.array(np.full(count, 20_000)),
        }
        path = folder / "records" / f"{number:05d}.parquet"
        pq.write_table(pa.table(columns, RECORDS), path, compression="zstd")
        parts.append(
            Part(
                number=number,
                records=FileEntry(name=f"records/{path.name}", sha256=sha256_file(path), bytes=path.stat().st_size),
                shard=FileEntry(name=f"shards/{number:05d}.tar", sha256=keys[0], bytes=count * 20_000),
                outcomes={"kept": count},
                splits={"train": splits.count("train"), "held_out": splits.count("held_out")},
                classes={},
                modes={"RGB": count},
                totals=Totals(),
            )
        )
    manifest = Manifest(
        name=folder.name, parent=None, change="ingest", content_digest="", storage=StorageConfig(), parts=parts
    )
    write_manifest(folder, manifest)


def memory() -> dict[str, int]:
    """Return the memory of this process in MB: anonymous now, and the most that it ever had."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"anonymous": int(lines["RssAnon"].split()[0]) // 1024, "peak": int(lines["VmHWM"].split()[0]) // 1024}


def measure(what: str, folder: Path) -> dict[str, float]:
    """Measure one of ``table``, ``open``, ``memory``, ``processes`` and ``threads`` in this process."""
    before, start = memory()["anonymous"], time.perf_counter()
    manifest = read_manifest(folder)
    figures: dict[str, float] = {}
    if what in ("processes", "threads"):
        scratch = folder.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        config = IngestConfig.model_validate({"runner": what, "workers": 2})
        resolve([(folder, part) for part in manifest.parts], manifest.storage, scratch, make_fan_out(config))
        figures["seconds to resolve"] = time.perf_counter() - start
        figures["bytes on disk"] = sum(path.stat().st_size for path in scratch.glob("run-*"))
    else:
        dataset.IN_MEMORY = 2**40 if what == "memory" else 0
        with_table = Dataset(folder, manifest, LocalShards(folder), cache_bytes=0)
        figures["seconds to open"] = time.perf_counter() - start
        orders = [make_order(with_table, 0, BATCH, window) for window in (None, 16)]
        start = time.perf_counter()
        for order in orders:
            for batch in range(100):
                with_table.labels(with_table.rows("train")[order.rows(batch * BATCH, BATCH)])
        figures["ms a batch"] = (time.perf_counter() - start) / 200 * 1000
    now = memory()
    return figures | {"MB anonymous": now["anonymous"] - before, "MB peak": now["peak"]}


def main() -> None:
    """Make the tables, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--measure", nargs=2)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "set"
        make_tables(folder, arguments.images)
        for what in ("table", "open", "memory", "processes", "threads"):
            command = [sys.executable, __file__, "--measure", what, str(folder)]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(process.stdout)
            print(what, {name: round(value, 2) for name, value in figures.items()}, flush=True)
        print("manifest", (folder / "manifest.json").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
