"""Time and peak memory of an ingest over the number of images.

    python benchmarks/scaling.py --counts 10000 100000 1000000 --image docs/images/ingest_scaling.png
    darkroom up && eval "$(darkroom env)" && python benchmarks/scaling.py --runners processes ray --servers

For each count, a tar of small random PNGs, all different, is written to a scratch folder and ingested by the command
``darkroom ingest --local``, started fresh. Memory is the most that the command and all its processes held at once: the
proportional set size (shared pages are split between those that share them), sampled each second, as are processor
seconds. With ``--servers`` the command publishes the version on the servers that the environment names, which are not
measured; Ray has a node of one core for each worker, whose processes are.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil

SIDE = 16
SHARD_BYTES = 3_200_000
"""So small that every count has shards of the same size: their size decides how much memory an ingest takes."""


def write_tar(path: Path, count: int, seed: int = 0) -> None:
    """Write a tar of ``count`` PNGs of random pixels, RGB, ``SIDE`` pixels wide and high."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = png(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            member = tarfile.TarInfo(f"{number:08d}.png")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def png(pixels: np.ndarray) -> bytes:
    """A PNG of ``pixels`` (H, W, 3) that is not compressed, so that a million of them are written in no time."""
    rows = np.pad(pixels.reshape(len(pixels), -1), ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@contextmanager
def ray_nodes(count: int) -> Iterator[None]:
    """``count`` Ray nodes of one core each, children of this process; inside, RAY_ADDRESS names them."""
    from ray.cluster_utils import Cluster

    os.environ |= {"PYTHONPATH": str(Path(__file__).parents[1]), "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray takes 127.0.0.1 for the machine's address to the outside.
    node: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def measure(count: int, runner: str, workers: int, scratch: Path, servers: bool) -> dict[str, Any]:
    """Ingest ``count`` images in a workspace under ``scratch``; returns seconds, MiB and the digest of the version."""
    folder = Path(tempfile.mkdtemp(prefix=f"scaling-{count}-", dir=scratch))
    try:
        write_tar(folder / "images.tar", count)
        dataset = f"images-{uuid4().hex[:8]}"
        (folder / "params.yaml").write_text(f"training:\n  dataset: {dataset}\n  images: 1\n")
        settings = {
            "source": folder / "images.tar",
            "size": SIDE,
            "runner": runner,
            "workers": workers,
            "shard_bytes": SHARD_BYTES,
        }
        overrides = [word for key, value in settings.items() for word in ("--set", f"ingest.{key}={value}")]
        local = [] if servers else ["--local"]
        command = [str(Path(sys.executable).with_name("darkroom")), "ingest", *local, "--json", *overrides]
        nodes = ray_nodes(workers) if runner == "ray" else nullcontext()
        with nodes, (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
            before = processor_seconds()
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=log)
            peak, used = follow(process)
            seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-2000:]}")
        result = json.loads((folder / "out").read_text())
        if result["kept"] != count:
            raise SystemExit(f"{result['kept']} of {count} images were kept")
        return {
            "runner": runner,
            "images": count,
            "seconds": round(seconds, 2),
            "processor_seconds": round(sum(used.values()) - sum(before.values()), 2),
            "peak_mib": round(peak / 2**20, 1),
            "content_digest": result["content_digest"],
        }
    finally:
        shutil.rmtree(folder)


def processor_seconds() -> dict[psutil.Process, float]:
    """Seconds that each process under this one has computed so far."""
    seconds = {}
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds[each] = sum(each.cpu_times()[:2])
    return seconds


def follow(process: subprocess.Popen[bytes]) -> tuple[int, dict[psutil.Process, float]]:
    """Wait for ``process`` to end.

    Returns the most bytes that all processes under this one held at once, and ``processor_seconds`` of all that were.
    """
    peak, used = 0, dict[psutil.Process, float]()
    while process.poll() is None:
        used |= (now := processor_seconds())
        memory_bytes = 0
        for each in now:
            with suppress(psutil.NoSuchProcess):
                memory = each.memory_full_info()
                memory_bytes += getattr(memory, "pss", memory.uss)
        peak = max(peak, memory_bytes)
        time.sleep(1)
    return peak, used


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over the number of images, with what is asked of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts, seconds, memory = ([row[key] for row in rows] for key in ("images", "seconds", "peak_mib"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    per_image = seconds[-1] / counts[-1]
    left.loglog(counts, [per_image * count for count in counts], ":", color="grey", label="in proportion")
    left.loglog(counts, seconds, "o-", label="ingest, start included")
    left.set(xlabel="images", ylabel="seconds")
    left.legend(frameon=False)
    right.semilogx(counts, memory, "o-")
    right.set(xlabel="images", ylabel="peak memory of all processes, MiB", ylim=(0, 1.25 * max(memory)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--runners", choices=("processes", "threads", "ray"), nargs="+", default=["processes"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", action="store_true", help="publish on servers, which Ray needs")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="about 4 KiB per image")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--image", type=Path, help="draw the curve here")
    args = parser.parse_args()

    rows = []
    for count, runner in product(sorted(args.counts), args.runners):
        rows.append(row := measure(count, runner, args.workers, args.scratch, args.servers))
        print(
            f"{count:10,} images {runner:9} {row['seconds']:9.1f} s {row['processor_seconds']:9.1f} processor seconds "
            f"{row['peak_mib']:8.1f} MiB",
            flush=True,
        )
    for before, after in pairwise([row for row in rows if row["runner"] == args.runners[0]]):
        more, longer, larger = (after[key] / before[key] for key in ("images", "seconds", "peak_mib"))
        print(f"{more:5.1f}× the images: {longer:5.1f}× the time, {larger:5.2f}× the memory")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    if args.image:
        plot_scaling(rows, args.image)


if __name__ == "__main__":
    main()
