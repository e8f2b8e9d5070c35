"""Time and memory of an ingest's decisions and of near-duplicates, on tables of images that do not exist.

    python benchmarks/near_duplicates.py --images 100000 1000000 --bits 24

``decisions`` merges prepared chunks without pixels, with and without near-duplicates, and builds the index again from
the tables; ``pairs`` groups random hashes, a tenth of them copies within ``--bits``. Each measurement runs in a process
of its own, on two threads.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.common.files import make_folder, sha256_bytes
from diffusion.curation.duplicates import leaders_by_hash
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.merge import Merge
from diffusion.data.ingest.staging import PREPARED, ChunkFolder, Digests, shard_name, table_name, write_table
from diffusion.data.manifest import Manifest, work_folder

EACH, BUCKET = 8192, "64x64"


def make_hashes(images: int, bits: int, seed: int = 0) -> np.ndarray:
    """Random hashes, (N, 32) uint8, the last tenth copies of others with up to ``bits`` bits flipped."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 256, (images, 32), np.uint8)
    copies = images // 10
    flips = np.zeros((copies, 256), bool)
    for place, column in enumerate(random.integers(0, 256, (bits, copies))):
        flips[np.arange(copies), column] |= random.random(copies) < 0.5 if place else True
    hashes[-copies:] = hashes[random.integers(0, images - copies, copies)] ^ np.packbits(flips, axis=1)
    return hashes[random.permutation(images)]


def make_chunks(store: ChunkFolder, hashes: np.ndarray) -> Iterator[str]:
    """Prepared chunks of new images; every hundredth is quarantined, another hundredth a copy within its chunk."""
    make_folder(store.path(""))
    digests = Digests(sha256_bytes(b""), 0)
    store.path(shard_name("chunk", BUCKET, digests.sha256)).write_bytes(b"")
    shards = {BUCKET: (digests, 0)}
    for first in range(0, len(hashes), EACH):
        rows = []
        for number in range(first, min(first + EACH, len(hashes))):
            digest = hashlib.sha256(number.to_bytes(8, "big")).hexdigest()
            row: dict[str, Any] = dict.fromkeys(PREPARED.names)
            row |= {"source": f"images/{number:010d}.jpg", "stamp": f"{number}", "label": "a", "source_sha256": digest}
            place = number - 1 if number % 100 == 1 else number
            if number % 100 == 50:
                row |= {"outcome": "quarantined", "reason": "not an image"}
            else:
                key = hashlib.sha256(place.to_bytes(9, "big")).hexdigest()
                row |= {"key": key, "mode": "RGB", "bucket": BUCKET, "width": 64, "height": 64, "size": 8000}
                row |= {"total": [1, 2, 3], "squares": [4, 5, 6], "phash": hashes[place].tobytes().hex()}
                row |= {"offset": 10_000 * (place - first), "outcome": None if place == number else "duplicate"}
            rows.append(row)
        write_table(store.path(table_name("chunk")), rows, shards)
        yield "chunk"


def measure_decisions(folder: Path, images: int, bits: int | None) -> dict[str, float]:
    """Seconds of the decisions on ``images``, and of the index built again."""
    store = ChunkFolder(work_folder(folder))
    config = IngestConfig.model_validate({"size": 64, "near_duplicates": bits, "held_out": 1e-9})
    figures, seconds = {}, 0.0
    with closing(Index(folder / "index.sqlite", folder, None, bits)) as index, index.transaction():
        merge = Merge(folder, config, index, "origin", [])
        for chunk in make_chunks(store, make_hashes(images, bits or 1)):
            start = time.process_time()
            merge.add(chunk)
            seconds += time.process_time() - start
        figures["seconds"] = seconds
    manifest = Manifest(
        name="set", parent=None, change="ingest", content_digest="", storage=config.storage(), parts=merge.parts
    )
    start = time.process_time()
    with closing(Index(folder / "again.sqlite", folder, manifest, bits)) as index:
        figures["seconds to rebuild"] = time.process_time() - start
        figures["MB of index"] = sum(path.stat().st_size for path in folder.glob("again.sqlite*")) / 1e6
    return figures


def measure_pairs(images: int, bits: int) -> dict[str, float]:
    """Seconds to group ``images`` by their hashes."""
    phashes = [row.tobytes().hex() for row in make_hashes(images, bits)]
    start = time.process_time()
    leaders = leaders_by_hash(phashes, np.arange(images), [None] * images, bits)
    return {"seconds": time.process_time() - start, "copies": int((leaders != np.arange(images)).sum())}


def measure(what: str, images: int, bits: int) -> dict[str, float]:
    """Measure in this process."""
    with tempfile.TemporaryDirectory() as root:
        if what == "pairs":
            figures = measure_pairs(images, bits)
        else:
            figures = measure_decisions(Path(root) / "set", images, bits if what == "near decisions" else None)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return figures | {"cpu seconds": time.process_time(), "MB peak": int(status["VmHWM"].split()[0]) // 1024}


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--bits", type=int, default=24)
    parser.add_argument("--what", nargs="+", default=["decisions", "near decisions", "pairs"])
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    for images in arguments.images:
        for what in arguments.what:
            if arguments.here:
                print(json.dumps(measure(what, images, arguments.bits)))
                continue
            options = ["--images", str(images), "--bits", str(arguments.bits), "--what", what, "--here"]
            process = subprocess.run(
                [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
            )
            figures = json.loads(process.stdout)
            print(f"{images:,}", what, {name: round(value, 2) for name, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
