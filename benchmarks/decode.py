"""Decoding throughput of one core: photographs to 64 px, and PNGs written and read, by Darkroom and Pillow.

    python benchmarks/decode.py /tmp/photographs

Seconds are those that the core computes, so that other work on the machine counts little; all take turns, and the
median of the rounds counts. Pillow is used plainly, and with its options for speed.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageOps

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import prepare
from diffusion.data.png import decode_many, encode

BATCH = 128
SMALL = ((32, "L"), (64, "RGB"))


@dataclass(frozen=True)
class Task:
    """What several contestants do; the first is Darkroom. Each returns how many bytes it made, for the table."""

    name: str
    images: int
    contestants: Mapping[str, Callable[[], int]]


def prepare_ours(files: list[bytes], size: int) -> int:
    config = IngestConfig(size=size)
    return sum(len(prepare(file, config).png) for file in files)


def prepare_pillow(files: list[bytes], size: int, draft: bool) -> int:
    byte_count = 0
    for file in files:
        image: Image.Image = Image.open(BytesIO(file))
        if draft:  # libjpeg decodes at a half, a quarter or an eighth, never below what is asked for
            image.draft("RGB", (size, size))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        byte_count += len(encode_png(image))
    return byte_count


def encode_png(image: Image.Image, **options: int) -> bytes:
    out = BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def encode_ours(images: Sequence[np.ndarray]) -> int:
    return sum(len(encode(pixels)) for pixels in images)


def encode_pillow(images: Sequence[np.ndarray], **options: int) -> int:
    return sum(len(encode_png(Image.fromarray(pixels), **options)) for pixels in images)


def decode_ours(pngs: list[bytes], shape: tuple[int, int, int]) -> int:
    return sum(decode_many(pngs[at : at + BATCH], shape).nbytes for at in range(0, len(pngs), BATCH))


def decode_pillow(pngs: list[bytes], shape: tuple[int, int, int]) -> int:
    byte_count = 0
    for at in range(0, len(pngs), BATCH):
        batch = [np.asarray(Image.open(BytesIO(png))) for png in pngs[at : at + BATCH]]
        byte_count += np.stack(batch).reshape(-1, *shape[1:], shape[0]).transpose(0, 3, 1, 2).copy().nbytes
    return byte_count


def tasks(files: list[bytes]) -> list[Task]:
    all_tasks = [
        Task(
            "JPEG of 500 px to PNG of 64",
            len(files),
            {
                "darkroom": partial(prepare_ours, files, 64),
                "pillow": partial(prepare_pillow, files, 64, draft=False),
                "pillow, draft": partial(prepare_pillow, files, 64, draft=True),
            },
        )
    ]
    for size, mode in SMALL:
        square = (size, size)
        images = [np.asarray(ImageOps.fit(Image.open(BytesIO(file)).convert(mode), square)) for file in files]
        pngs, shape = [encode(pixels) for pixels in images], (len(mode), *square)
        image_format = f"{size} px {mode}"
        encoders = {
            "darkroom": partial(encode_ours, images),
            "pillow": partial(encode_pillow, images),
            "pillow, level 1": partial(encode_pillow, images, compress_level=1),
        }
        decoders = {"darkroom": partial(decode_ours, pngs, shape), "pillow": partial(decode_pillow, pngs, shape)}
        all_tasks += [
            Task(f"encode PNG, {image_format}", len(files), encoders),
            Task(f"decode PNG, {image_format}", len(files), decoders),
        ]
    return all_tasks


def measure_rates(task: Task, rounds: int) -> dict[str, tuple[float, float]]:
    """Images per second of one core, and bytes made per image, of each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in task.contestants}
    image_bytes = {}
    for _ in range(rounds):
        for name, run in task.contestants.items():
            start = time.thread_time()
            image_bytes[name] = run() / task.images
            seconds[name].append(time.thread_time() - start)
    return {name: (task.images / median(times), image_bytes[name]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of JPEGs, as benchmarks/photographs.py makes it")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()

    files = [path.read_bytes() for path in sorted(args.photographs.glob("*.jpg"))[: args.count]]
    if not files:
        raise SystemExit(f"no *.jpg in {args.photographs}: make some with benchmarks/photographs.py {args.photographs}")
    print(f"{len(files)} photographs, one core, median of {args.rounds}\n")
    print(f"{'':30}{'':18}{'images/s':>12}{'bytes each':>12}{'darkroom is':>13}")
    table = {}
    for task in tasks(files):
        table[task.name] = rates = measure_rates(task, args.rounds)
        ours = rates["darkroom"][0]
        for name, (rate, image_bytes) in rates.items():
            title = task.name if name == "darkroom" else ""
            print(f"{title:30}{name:18}{rate:12,.0f}{image_bytes:12,.0f}{ours / rate:12.2f}×", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
