"""Loading throughput from PNG shards in random order: Darkroom, WebDataset and LitData, on the same images.

    python benchmarks/loading.py --peers-python /tmp/peers/bin/python

Two sets of 60,000 images: Fashion-MNIST padded to 32×32 (grey), and 64×64 cuts of photographs (RGB). Both become
PNG shards by ``darkroom ingest --local``; WebDataset reads those shards, and LitData its own chunks with the same
PNGs. Counted are batches of 128 images, (128, C, H, W) uint8, with their labels, that arrive in the
training process; every contestant has two workers. Each runs in a process started fresh, all in turn, so that a slow
minute of the machine hits all of them; the median of the runs counts. The first epoch includes opening the set,
starting the workers and, for Darkroom, verifying the shards; not importing the libraries. A gigabyte of memory is
written to before each, as a virtual machine that has never used it yet waits for two seconds until its host lends it.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

BATCH = 128
WORKERS = 2
EPOCHS = 2
COUNT = 60_000
MEMORY = 2**30
FASHION = Path("/usr/share/datasets/fashion-mnist")
FLAT = 8.0
"""Cuts with a smaller deviation of brightness are sky or night, and many of them look the same: others are taken."""

Epochs = Callable[[], Iterable[tuple[Any, Any]]]
"""Called once for each epoch: its batches of images and labels."""


def fashion(folder: Path, size: int = 32) -> dict[str, Any]:
    """Write Fashion-MNIST's training images, padded to ``size``, into a tar; returns how to ingest them."""
    import numpy as np
    from PIL import Image

    if not FASHION.is_dir():
        raise SystemExit(f"no Fashion-MNIST in {FASHION}: apt-get install dataset-fashion-mnist")
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)[:COUNT]
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = file.read()[8:]
    margin = (size - 28) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    with tarfile.open(folder / "fashion.tar", "w") as tar:
        for number, pixels in enumerate(padded):
            data = BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            member = tarfile.TarInfo(f"{labels[number]}/{number:05d}.png")
            member.size = data.tell()
            tar.addfile(member, BytesIO(data.getvalue()))
    return {"source": "fashion.tar", "size": size}


def cuts(folder: Path) -> dict[str, Any]:
    """Write 64×64 cuts of large photographs, at three scales, into a tar; returns how to ingest them."""
    from photographs import default_folders, photographs
    from PIL import Image, ImageStat

    rng = random.Random(0)
    sources = photographs(default_folders())
    with tarfile.open(folder / "cuts.tar", "w") as tar:
        for index, path in enumerate(sources):
            whole = Image.open(path).convert("RGB")
            scales = [whole.reduce(factor) for factor in (1, 2, 4)]
            for number in range(index, COUNT, len(sources)):
                cut = None
                while cut is None or ImageStat.Stat(cut.convert("L")).stddev[0] < FLAT:
                    scale = rng.choice(scales)
                    left, top = rng.randrange(scale.width - 63), rng.randrange(scale.height - 63)
                    cut = scale.crop((left, top, left + 64, top + 64))
                cut.save(data := BytesIO(), "BMP")
                member = tarfile.TarInfo(f"{number:06d}.bmp")
                member.size = len(data.getbuffer())
                data.seek(0)
                tar.addfile(member, data)
    return {"source": "cuts.tar", "size": 64}


SETS = {"32 px grey": fashion, "64 px RGB": cuts}


def prepare(scratch: Path, name: str) -> Path:
    """The data set ``name``, ingested in a workspace of its own under ``scratch`` unless it is there already."""
    workspace = scratch / name.replace(" ", "-")
    data = workspace / "data" / "images"
    if not (data / "manifest.json").is_file():
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / "params.yaml").write_text("training:\n  dataset: images\n  images: 1\n")
        settings = SETS[name](workspace)
        overrides = [word for key, value in settings.items() for word in ("--set", f"ingest.{key}={value}")]
        run([str(Path(sys.executable).with_name("darkroom")), "ingest", "--local", "--json", *overrides], workspace)
    return data


def shards_of(data: Path) -> list[str]:
    return sorted(map(str, data.glob("shards/*.tar")))


def samples(shard: str) -> Iterator[dict[str, Any]]:
    """What LitData is to store of a shard: its PNGs as they are, and their labels."""
    with tarfile.open(shard) as tar:
        members = iter(tar)
        for png, about in zip(members, members, strict=True):
            image, record = (tar.extractfile(member) for member in (png, about))
            assert image is not None
            assert record is not None
            yield {"image": image.read(), "label": int(json.load(record)["label"] or 0)}


def optimize(data: Path) -> None:
    """Make LitData's chunks."""
    from litdata import optimize

    optimize(samples, shards_of(data), str(data.parent / "litdata"), chunk_bytes="64MB", num_workers=WORKERS)


def darkroom(data: Path) -> Callable[[], Epochs]:
    """Darkroom's own loader, as training uses it."""
    import numpy as np
    import pandas  # noqa: F401  # pyarrow imports it when it first compares
    import pyarrow.dataset  # noqa: F401

    from diffusion.data.dataset import Dataset
    from diffusion.data.loader import Loader, TrainingOrder

    def start() -> Epochs:
        dataset = Dataset.open(data)
        order = TrainingOrder(dataset.manifest.content_digest, 0, len(dataset))
        loader = Loader(dataset, np.arange(len(dataset)), order, BATCH, workers=WORKERS)
        classes = dataset.manifest.labels
        positions = iter(range(0, 2**62, BATCH))

        def epoch() -> Iterator[tuple[Any, Any]]:
            for _ in range(len(dataset) // BATCH):
                batch = loader.batch(next(positions))
                yield batch.images, dataset.classes(batch.rows, classes)

        return epoch

    return start


def webdataset(data: Path) -> Callable[[], Epochs]:
    """WebDataset's usual pipeline, with the decoder that served it best (Pillow, straight to uint8 tensors)."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    grey = "32" in data.parts[-3]

    def start() -> Epochs:
        shards = shards_of(data)
        pipeline = (
            wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
            .shuffle(1000)
            .decode("torchl8" if grey else "torchrgb8")
            .to_tuple("png", "json")
            .map_tuple(with_channel if grey else as_is, label_of)
            .batched(BATCH)
        )
        loader = DataLoader(pipeline, batch_size=None, num_workers=WORKERS, persistent_workers=True)
        return lambda: loader

    return start


def as_is(pixels: Any) -> Any:
    return pixels


def with_channel(pixels: Any) -> Any:
    return pixels[None]


def label_of(about: dict[str, Any]) -> int:
    return int(about["label"] or 0)


def litdata(data: Path) -> Callable[[], Epochs]:
    """LitData on its own chunks, with the decoder that served it best (torchvision's)."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.io import ImageReadMode, decode_image

    # Photographs without colour are stored in grey.
    mode = ImageReadMode.GRAY if "32" in data.parts[-3] else ImageReadMode.RGB

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return decode_image(torch.frombuffer(bytearray(sample["image"]), dtype=torch.uint8), mode), sample["label"]

    def start() -> Epochs:
        dataset = Images(str(data.parent / "litdata"), shuffle=True, seed=0)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
        return lambda: loader

    return start


CONTESTANTS = {"darkroom": darkroom, "webdataset": webdataset, "litdata": litdata}


def measure(start: Callable[[], Epochs]) -> list[float]:
    """Images per second of each epoch."""
    rates = []
    start_of_epoch = time.perf_counter()
    epoch = start()
    for _ in range(EPOCHS):
        count = 0
        for images, labels in epoch():
            assert len(images) == len(labels)
            assert images.ndim == 4
            count += len(images)
        now = time.perf_counter()
        rates.append(count / (now - start_of_epoch))
        start_of_epoch = now
    return rates


def run(command: list[str], folder: Path | None = None) -> bytes:
    process = subprocess.run(command, cwd=folder, capture_output=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{process.stderr.decode()[-2000:]}")
    return process.stdout


def measure_rates(data: Path, pythons: dict[str, str], runs: int) -> dict[str, list[float]]:
    """Images per second of each contestant by epoch: medians of ``runs`` rounds in which all take turns."""
    rates: dict[str, list[list[float]]] = {name: [] for name in pythons}
    for turn in range(runs):
        for name, python in pythons.items():
            run([sys.executable, "-c", f"import numpy; numpy.ones({MEMORY}, 'u1')"])
            rates[name].append(json.loads(run([python, __file__, "--contestant", name, str(data)])))
            print(
                f"run {turn + 1}/{runs}  {name:12}", *(f"{rate:11,.0f}/s" for rate in rates[name][-1]), file=sys.stderr
            )
    return {name: [median(epoch_rates) for epoch_rates in zip(*epochs, strict=True)] for name, epochs in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="Python of the peers' venv (see peers.txt); none: no LitData")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--scratch", type=Path, help="where the sets are made, and found the next time (2 GB)")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--optimize", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.optimize:
        optimize(args.optimize)
    elif args.contestant:
        name, data = args.contestant
        print(json.dumps(measure(CONTESTANTS[name](Path(data)))))
    elif args.scratch:
        report(args, args.scratch.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="loading-") as scratch:
            report(args, Path(scratch))


def report(args: argparse.Namespace, scratch: Path) -> None:
    pythons = {"darkroom": sys.executable, "webdataset": sys.executable}
    if args.peers_python:
        pythons["litdata"] = str(args.peers_python)
    table = {}
    for name in args.sets:
        data = prepare(scratch, name)
        if args.peers_python and not (data.parent / "litdata" / "index.json").is_file():
            run([pythons["litdata"], __file__, "--optimize", str(data)])
        table[name] = rates = measure_rates(data, pythons, args.runs)
        print(f"\n{name}, images/s, median of {args.runs}")
        print(f"{'':12}{'first epoch':>14}{'darkroom is':>14}{'second epoch':>14}{'darkroom is':>14}")
        for contestant, epochs in rates.items():
            columns = zip(epochs, rates["darkroom"], strict=True)
            cells = (f"{rate:14,.0f}{ours / rate:13.2f}×" for rate, ours in columns)
            print(f"{contestant:12}" + "".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"runs": args.runs, "per_second": table}, indent=2))


if __name__ == "__main__":
    main()
