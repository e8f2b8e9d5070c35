"""Twenty prompts chosen at random, an image of ``examples/emoji.safetensors`` each, in ``docs/images/emoji.png``.

    python benchmarks/emoji_grid.py emoji/captions.csv

The captions are those of the model's last stage of training, without variants of skin tone. Image *i* of seed 0 has
prompt *i*: nothing is chosen.
"""

import argparse
import csv
import io
import random
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import diffusion

ROOT = Path(__file__).parents[1]
COUNT, COLUMNS = 20, 7


def main() -> None:
    """Draw prompts, generate, and write the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("captions", type=Path, help="CSV with the column caption")
    with parser.parse_args().captions.open(newline="") as file:
        captions = {row["caption"] for row in csv.DictReader(file) if "skin tone" not in row["caption"]}
    prompts = random.Random(0).sample(sorted(captions), COUNT)
    model = diffusion.load(str(ROOT / "examples" / "emoji.safetensors"))
    images = model.generate(prompts, count=COUNT, seed=0)
    figure = Figure(figsize=(9.6, 4.8), dpi=100)
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        axes = figure.add_subplot(-(-COUNT // COLUMNS), COLUMNS, number + 1)
        axes.imshow(image)
        axes.set_title(textwrap.fill(prompt, 20), fontsize=8, y=-0.05, verticalalignment="top")
        axes.set_axis_off()
        print(number, prompt)
    figure.subplots_adjust(0, 0.09, 1, 1, 0.05, 0.34)
    data = io.BytesIO()
    figure.savefig(data)
    few_colours = Image.open(data).convert("RGB").quantize(256)  # a third of the bytes
    few_colours.save(ROOT / "docs" / "images" / "emoji.png", optimize=True)


if __name__ == "__main__":
    main()
