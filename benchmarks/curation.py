"""Precision and recall of curation against planted defects, and its time per 1,000 images.

    python benchmarks/curation.py FOLDER [--images 1000] [--size 64] [--nsfw FILE.onnx] [--only semantic_duplicates]

takes images of FOLDER as they are, plants copies of some of them (resized, JPEG, cropped, mirrored) and spoils others
(blur, border, text), ingests all into a temporary data set, and compares what each rule drops with what was planted.
Defects that the images have themselves count as false alarms, which makes precision a lower bound.
"""

import argparse
import io
import random
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from diffusion.common.progress import ignore_progress
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import curate
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.evaluation.config import EvaluationConfig

WORDS = "The quick brown fox jumps over the lazy dog while ninety wizards vex my quartz box"


def resized(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)


def halved(image: Image.Image) -> Image.Image:
    # Images come at twice the stored size: half of the stored size, and enlarged again, as smaller ones are refused.
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BICUBIC)
    return small.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=60)
    return Image.open(data)


def cropped(image: Image.Image, share: float = 0.92) -> Image.Image:
    left, top = (round(side * (1 - share) / 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(image.width / 24))


def bordered(image: Image.Image) -> Image.Image:
    framed = Image.new("RGB", image.size, "#101010")
    framed.paste(image.resize((image.width, image.height * 5 // 8)), (0, image.height * 3 // 16))
    return framed


def texted(image: Image.Image, seed: int = 0) -> Image.Image:
    page, chance = image.copy(), random.Random(seed)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(max(8, image.height // 7))
    half = image.height // 2
    draw.rectangle((0, half, image.width, image.height), fill="white")
    for top in range(half + 1, image.height, image.height // 6):
        draw.text((1, top), " ".join(chance.choices(WORDS.split(), k=6)), fill="black", font=font)
    return page


PLANTED = {
    "resized": resized,
    "halved": halved,
    "recompressed": recompressed,
    "cropped": cropped,
    "mirrored": mirrored,
    "blurred": blurred,
    "bordered": bordered,
    "texted": texted,
}


KINDS = {
    "near_duplicates": ("resized", "halved", "recompressed", "cropped"),
    "semantic_duplicates": ("resized", "halved", "recompressed", "cropped", "mirrored"),
    "min_sharpness": ("blurred",),
    "max_border": ("bordered",),
    "max_text": ("texted",),
}
"""Planted defects that each rule is to find."""
OPEN_NSFW = {"layout": "NHWC", "channels": "BGR", "mean": (104, 117, 123), "std": (1, 1, 1)}


def plant(paths: list[Path], folder: Path, side: int) -> int:
    """Write images of ``paths``, ``side`` pixels high and wide, and planted ones; returns how many of each kind."""
    folder.mkdir()
    group_size = len(paths) // 20
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}-as-is.png")
        if (group := number // group_size) < len(PLANTED):
            name = list(PLANTED)[group]
            PLANTED[name](image).convert("RGB").save(folder / f"{number:05d}-{name}.png")
    return group_size


def describe_found(rule: str, sources: set[str], folder: Path, group_size: int, images: int) -> str:
    """Compare the dropped ``sources`` with what was planted in ``folder``."""
    hits, by_kind = 0, {}
    for kind in KINDS.get(rule, ()):
        pairs = [path.name.split("-")[0] for path in folder.glob(f"*-{kind}.png")]
        # Of a pair of equal size either may be dropped.
        files = [{f"{p}-{kind}.png", *([f"{p}-as-is.png"] if rule.endswith("duplicates") else ())} for p in pairs]
        count = sum(not names.isdisjoint(sources) for names in files)
        hits, by_kind[kind] = hits + count, f"{count}/{len(pairs)}"
    precision = hits / len(sources) if by_kind and sources else float("nan")
    untouched = sum(int(source[:5]) // group_size >= len(PLANTED) for source in sources)
    return (
        f"dropped {len(sources)}, precision {precision:.3f}, recall {by_kind}, "
        f"{untouched} of {images - len(PLANTED) * group_size} images without a copy"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--nsfw", type=Path)
    parser.add_argument("--rule", action="append", default=[])
    parser.add_argument("--only", help="the one rule to apply; default: all")
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".webp"))
    paths = random.Random(0).sample(paths, min(options.images, len(paths)))
    rules: dict[str, dict[str, object]] = {
        "near_duplicates": {"near_duplicates": "largest"},
        "semantic_duplicates": {"semantic_duplicates": "largest"},
        "min_sharpness": {"min_sharpness": 60},
        "max_border": {"max_border": 0.3},
        "max_text": {"max_text": 0.2},
        "max_outlier": {"max_outlier": 99},
        **({"max_nsfw": {"max_nsfw": 0.8, "nsfw": OPEN_NSFW | {"path": options.nsfw}}} if options.nsfw else {}),
    }
    overrides = dict(override.split("=") for override in options.rule)
    with tempfile.TemporaryDirectory() as temporary:
        images, folder = Path(temporary, "images"), Path(temporary, "data", "set")
        group_size = plant(paths, images, 2 * options.size)
        config = IngestConfig(source=str(images), size=options.size, workers=2)
        start = time.monotonic()
        count = ingest(folder, config).kept
        print(f"ingest: {1000 * (time.monotonic() - start) / count:.1f} s per 1,000 images; {count} images")
        for rule in [options.only] if options.only else rules:
            fields = rules[rule] | {name: float(value) for name, value in overrides.items() if name in rules[rule]}
            start = time.monotonic()
            rule_config = CurationConfig.model_validate(fields | {"max_dropped": 1})
            report = curate(folder, rule_config, config, EvaluationConfig(), ignore_progress, dry_run=True)
            seconds = 1000 * (time.monotonic() - start) / count
            found = describe_found(rule, {each.source for each in report.images}, images, group_size, len(paths))
            print(f"{rule}: {found}; {seconds:.2f} s per 1,000 images")
            if report.semantic is not None:
                print(f"    {report.semantic.line}")


if __name__ == "__main__":
    main()
