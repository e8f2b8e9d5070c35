"""An image of each of the twenty prompts in ``emoji_prompts.json``, and of ten that are unlike any caption.

    python benchmarks/emoji_grid.py examples/things.safetensors docs/images/things.png

Image *i* of seed 0 has prompt *i*: nothing is chosen.
"""

import argparse
import io
import json
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import diffusion

PROMPTS = Path(__file__).parent / "emoji_prompts.json"
COLUMNS = 10


def main() -> None:
    """Generate, and write the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path, help="a PNG")
    args = parser.parse_args()
    texts = json.loads(PROMPTS.read_text())
    prompts = [*texts["prompts"], *texts["unlike captions"]]
    images = diffusion.load(str(args.model)).generate(prompts, count=len(prompts), seed=0)
    figure = Figure(figsize=(11, 4.1), dpi=100)
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        axes = figure.add_subplot(-(-len(prompts) // COLUMNS), COLUMNS, number + 1)
        axes.imshow(image)
        axes.set_title(textwrap.fill(prompt, 20), fontsize=8, y=-0.05, verticalalignment="top")
        axes.set_axis_off()
    figure.subplots_adjust(0, 0.09, 1, 1, 0.05, 0.34)
    data = io.BytesIO()
    figure.savefig(data)
    few_colours = Image.open(data).convert("RGB").quantize(256)  # a third of the bytes
    few_colours.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
