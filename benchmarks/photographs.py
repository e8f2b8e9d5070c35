"""Cut many images of about 500 pixels out of the large photographs that Debian packages.

    python benchmarks/photographs.py /tmp/photographs --count 4000 --side 500

Equal arguments and equal Pillow versions give equal files. Every cut has its own place, scale and aspect, so none is
a copy of another, and their order is mixed, so that any part of them is like the whole.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageStat

FOLDERS = (Path("/usr/share/backgrounds"), Path("/usr/share/doc/opencv-doc/examples"))
PACKAGES = "mate-backgrounds budgie-backgrounds opencv-doc"
SMALLEST = 800
ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9)
QUALITY = 88
FLAT = 8.0
"""Cuts with a smaller deviation of brightness are sky or night, and some of them look the same: another is made."""


def photographs(folders: list[Path]) -> list[Path]:
    """JPEGs in ``folders`` large enough to be cut up: PNGs there are drawings and renderings."""
    paths = sorted(path for folder in folders for path in folder.rglob("*.jp*g") if path.is_file())
    large = [path for path in paths if min(Image.open(path).size) >= SMALLEST]
    if not large:
        places = ", ".join(map(str, folders))
        raise SystemExit(
            f"no large photographs in {places}: apt-get install {PACKAGES} (or name a folder of your own with --from)"
        )
    return large


def default_folders() -> list[Path]:
    """Those of the Debian packages, and scikit-image's own images if it is installed."""
    skimage = find_spec("skimage")
    bundled = [Path(skimage.origin).parent / "data"] if skimage and skimage.origin else []
    return [*FOLDERS, *bundled]


def cut(photograph: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """A random part of ``photograph`` with something in it, its longer side scaled to 0.8–1.28 times ``side``."""
    longer, aspect = round(side * rng.uniform(0.8, 1.28)), rng.choice(ASPECTS)
    size = (longer, round(longer / aspect)) if aspect >= 1 else (round(longer * aspect), longer)
    most = min(photograph.width / size[0], photograph.height / size[1])
    scale = rng.uniform(min(1.0, most), most)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    part = photograph.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return part if ImageStat.Stat(part.convert("L")).stddev[0] >= FLAT else cut(photograph, side, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--side", type=int, default=500, help="about how long the longer side is, in pixels")
    parser.add_argument("--from", dest="folders", type=Path, nargs="+", help="folders of large photographs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    sources = photographs(args.folders or default_folders())
    numbers = rng.sample(range(args.count), args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(sources):
        photograph = Image.open(path).convert("RGB")
        for number in numbers[index :: len(sources)]:
            cut(photograph, args.side, rng).save(args.out / f"{number:06d}.jpg", quality=QUALITY)
    size = sum(path.stat().st_size for path in args.out.glob("*.jpg"))
    print(f"{args.count} images, {size / 2**20:.0f} MiB, of {len(sources)} photographs in {args.out}")


if __name__ == "__main__":
    main()
