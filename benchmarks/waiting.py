"""Share of the time that training waits for images, kept in memory or decoded again each time.

    python benchmarks/waiting.py

The two sets of ``loading.py``, and ``darkroom train --local`` on them as configured by default, started fresh. The
share is of the seconds in the loop, from the first step on, as ``data_wait`` in ``history.csv`` has it.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

from loading import SETS, prepare, run

CACHES = {"in memory": 2**31, "decoded each time": 0}


def waited(data: Path, images: int, cache_bytes: int) -> tuple[float, float]:
    """Train; returns images per second, and the share of the time in which training waited for them."""
    output = f"runs/{cache_bytes}"
    settings = {"images": images, "checkpoints": 1, "cache_bytes": cache_bytes, "output": output}
    overrides = [word for key, value in settings.items() for word in ("--set", f"training.{key}={value}")]
    workspace = data.parents[1]
    command = [str(Path(sys.executable).with_name("darkroom")), "train", "--local", "--restart-if-different", "--json"]
    run([*command, *overrides], workspace)
    with (workspace / output / "history.csv").open() as file:
        rows = [(float(row["images_per_second"]), float(row["data_wait"])) for row in csv.DictReader(file)]
    # Each row stands for as many images, and so for as many seconds as its rate says.
    seconds = [1 / rate for rate, _ in rows]
    return len(rows) / sum(seconds), sum(s * wait for s, (_, wait) in zip(seconds, rows, strict=True)) / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30_000, help="how many images to train on")
    parser.add_argument("--scratch", type=Path, help="where sets lie or are made; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="waiting-") as temporary:
        for name in SETS:
            data = prepare((args.scratch or Path(temporary)).resolve(), name)
            for how, cache_bytes in CACHES.items():
                rate, share = waited(data, args.images, cache_bytes)
                print(f"{name:12} {how:18} {rate:8.0f} images/s  waits {share:8.3%}", flush=True)


if __name__ == "__main__":
    main()
