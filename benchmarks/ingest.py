"""Ingest throughput at 64 px: Darkroom, img2dataset, and decoding alone, on the same images.

    python benchmarks/ingest.py /tmp/photographs --peers-python /tmp/peers/bin/python

Each contestant is a whole command, started fresh, on two processes (or threads). They run in turn, so that a slow
minute of the machine hits all of them; the median of the runs counts. The bare ones decode, crop, resize and encode
PNG, and do nothing else: no shards, no digests, no deduplication, no manifest. They are the upper limit.
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
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import Pool
from pathlib import Path
from statistics import median

from PIL import Image, ImageOps

SIZE = 64
WORKERS = 2
BARE = ("pillow", "draft", "ours")


@dataclass(frozen=True)
class Contestant:
    """A command to be timed: ``start`` runs it in an empty folder and returns how many images came out."""

    name: str
    start: Callable[[Path], int]


def darkroom(runner: str, photographs: Path, folder: Path) -> int:
    """``darkroom ingest --local`` in a workspace of its own."""
    (folder / "params.yaml").write_text("training:\n  dataset: photographs\n  images: 1\n")
    settings = {"source": photographs, "size": SIZE, "runner": runner, "workers": WORKERS}
    overrides = [word for key, value in settings.items() for word in ("--set", f"ingest.{key}={value}")]
    command = [str(Path(sys.executable).with_name("darkroom")), "ingest", "--local", "--json", *overrides]
    result = json.loads(_run(command, folder))
    return int(result["kept"]) + int(result["duplicates"])


def img2dataset(python: Path, photographs: Path, folder: Path) -> int:
    """img2dataset on ``file://`` URLs, with the settings that served it best.

    They are: as many shards as keep both processes busy to the end, 16 threads each instead of 256 (nothing is
    downloaded), and the fastest level of PNG compression.
    """
    paths = sorted(photographs.resolve().glob("*.jpg"))
    (folder / "urls.txt").write_text("".join(f"{path.as_uri()}\n" for path in paths))
    settings = {
        "url_list": "urls.txt",
        "output_folder": "shards",
        "output_format": "webdataset",
        "image_size": SIZE,
        "resize_mode": "center_crop",
        "encode_format": "png",
        "encode_quality": 1,
        "processes_count": WORKERS,
        "thread_count": 16,
        "number_sample_per_shard": max(len(paths) // (2 * WORKERS), 1),
    }
    command = [str(python.with_name("img2dataset")), *(f"--{key}={value}" for key, value in settings.items())]
    _run(command, folder)
    return sum(json.loads(path.read_text())["successes"] for path in folder.glob("shards/*_stats.json"))


def bare(how: str, photographs: Path, folder: Path) -> int:
    """This script, as a command that only decodes, resizes and encodes."""
    return int(_run([sys.executable, str(Path(__file__).resolve()), str(photographs.resolve()), "--bare", how], folder))


def _run(command: list[str], folder: Path) -> bytes:
    # Otherwise albumentations, which img2dataset stands on, asks the network for a newer version first.
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{process.stderr.decode()[-2000:]}")
    return process.stdout


def decode_all(how: str, photographs: Path) -> int:
    """Decode, crop, resize and encode all ``photographs`` on two processes; returns how many."""
    with Pool(WORKERS) as pool:
        work = _ours if how == "ours" else partial(_pillow, draft=how == "draft")
        paths = sorted(photographs.glob("*.jpg"))
        return sum(size > 0 for size in pool.imap_unordered(work, paths, chunksize=64))


def _pillow(path: Path, draft: bool) -> int:
    image = Image.open(BytesIO(path.read_bytes()))
    if draft:  # lets libjpeg decode at a half, a quarter or an eighth, never below what is asked for
        image.draft("RGB", (SIZE, SIZE))
    out = BytesIO()
    ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC).save(out, "PNG")
    return len(out.getbuffer())


def _ours(path: Path) -> int:
    from diffusion.data.ingest.config import IngestConfig
    from diffusion.data.ingest.decode import prepare

    return len(prepare(path.read_bytes(), IngestConfig(size=SIZE)).png)


def measure_rates(contestants: list[Contestant], count: int, runs: int) -> dict[str, float]:
    """Images per second of each: ``count`` over the median of ``runs`` rounds in which all take turns."""
    seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for turn in range(runs):
        for each in contestants:
            folder = Path(tempfile.mkdtemp(prefix="ingest-"))
            start = time.perf_counter()
            image_count = each.start(folder)
            seconds[each.name].append(time.perf_counter() - start)
            shutil.rmtree(folder)
            if image_count != count:
                raise SystemExit(f"{each.name} made {image_count} of {count} images")
            print(f"run {turn + 1}/{runs}  {each.name:24} {count / seconds[each.name][-1]:7.0f}/s", file=sys.stderr)
    return {name: count / median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of JPEGs, as benchmarks/photographs.py makes it")
    parser.add_argument("--peers-python", type=Path, help="Python of the peers' venv (see peers.txt); none: no peers")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--bare", choices=BARE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        print(decode_all(args.bare, args.photographs))
        return

    source = args.photographs.resolve()
    count = len(list(source.glob("*.jpg")))
    if not count:
        raise SystemExit(f"no *.jpg in {source}: make some with benchmarks/photographs.py {source}")
    contestants = [Contestant(f"darkroom, {r}", partial(darkroom, r, source)) for r in ("processes", "threads")]
    if args.peers_python:
        contestants.append(Contestant("img2dataset", partial(img2dataset, args.peers_python, source)))
    contestants += [Contestant(f"bare, {how}", partial(bare, how, source)) for how in BARE]
    rates = measure_rates(contestants, count, args.runs)

    fastest = max(rate for name, rate in rates.items() if name.startswith("darkroom"))
    print(f"{count} images to {SIZE} px, median of {args.runs}, start included\n")
    print(f"{'':24}{'images/s':>12}{'darkroom is':>14}")
    for name, rate in rates.items():
        print(f"{name:24}{rate:12.0f}{fastest / rate:13.2f}×")
    if args.json:
        table = {"images": count, "size": SIZE, "runs": args.runs, "per_second": rates}
        args.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
