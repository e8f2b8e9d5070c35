"""Images with planted copies and defects, so that a test knows what curation is to find."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 64
WORDS = "five boxing wizards jump quickly while the lazy dog sleeps under a quilt"


def scene(seed: int, size: int = SIZE) -> Image.Image:
    """A colourful image like no other: smooth light, and some sharp shapes."""
    random = np.random.default_rng(seed)
    light = Image.fromarray(random.integers(40, 216, (5, 5, 3), np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(light)
    for _ in range(12):
        x, y, w, h = (random.random(4) * size).tolist()
        draw.ellipse((x, y, x + w / 3, y + h / 3), fill=tuple(random.integers(0, 256, 3).tolist()))
    return light


def bordered(image: Image.Image) -> Image.Image:
    """The image between two black bars, which are 3/8 of its height."""
    framed = Image.new("RGB", image.size)
    framed.paste(image.resize((image.width, image.height * 5 // 8)), (0, image.height * 3 // 16))
    return framed


def texted(image: Image.Image) -> Image.Image:
    """The image with lines of text over its lower half."""
    page = image.copy()
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, page.height // 2, *page.size), fill="white")
    for line in range(3):
        draw.text((-7 * line, page.height // 2 + 10 * line), WORDS, fill="black", font=ImageFont.load_default(10))
    return page


def plant(root: Path, count: int = 48) -> dict[str, set[str]]:
    """Save ``count`` scenes, with copies of some and defects of others; returns the names of the planted, by kind."""
    root.mkdir(parents=True, exist_ok=True)
    scenes = [scene(seed) for seed in range(count)]
    for number, image in enumerate(scenes):
        image.save(root / f"{number:03d}.png")
    planted: dict[str, set[str]] = {}

    def save(kind: str, number: int, image: Image.Image, suffix: str = "png") -> None:
        name = f"{number:03d}-{kind}.{suffix}"
        image.save(root / name)
        planted.setdefault(kind, set()).add(name)

    for number in range(4):
        save("larger", number, scenes[number].resize((96, 96), Image.Resampling.BICUBIC))
        save("jpeg", number + 4, scenes[number + 4], "jpg")
        save("crop", number + 8, scenes[number + 8].resize((96, 96), Image.Resampling.BICUBIC).crop((1, 1, 95, 95)))
        save("blurred", number + 12, scene(1000 + number).filter(ImageFilter.GaussianBlur(4)))
        save("bordered", number + 16, bordered(scene(2000 + number)))
        save("text", number + 20, texted(scene(3000 + number)))
        save("flat", number + 24, Image.new("RGB", (SIZE, SIZE), (40 * number, 90, 10)))
        save("skin", number + 28, Image.blend(scene(4000 + number), Image.new("RGB", (SIZE, SIZE), "#ff3010"), 0.6))
        save("wide", number + 32, scene(5000 + number).resize((256, 64)))
    return planted
