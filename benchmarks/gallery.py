"""The gallery, docs/gallery.md: each task with its command and its image, by models trained here.

    python benchmarks/gallery.py --faces faces --emoji emoji

Both sources have captions, such as a folder with a ``metadata.csv``. The models are trained in ``--scratch`` by
``darkroom`` commands unless they are there, about two hours in all; after a kill it resumes.
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from quality import darkroom
from torch import Tensor

from diffusion.common.image_grids import image_of
from diffusion.data.dataset import Dataset
from diffusion.generation.super_resolution import shrunk

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
IMAGES = PAGE.parent / "images" / "gallery"


@dataclass(frozen=True)
class Training:
    """A model of the gallery."""

    name: str
    source: str
    """Which of the sources."""
    size: int
    images: int
    """Images to see."""
    settings: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Its file in the workspace."""
        return f"runs/{self.name}/final.safetensors"

    def words(self) -> list[str]:
        """Its settings."""
        chosen = [
            f"training.dataset={self.source}",
            f"training.images={self.images}",
            f"training.output=runs/{self.name}",
        ]
        return [*chosen, "training.minutes=null", *self.settings]


@dataclass(frozen=True)
class Plate:
    """An image of the gallery."""

    title: str
    words: str
    """What one sees, and which model made it."""
    command: Sequence[str]
    """After ``darkroom``; its grid is the image."""

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join(self.title.lower().split())


FACES = Training("faces", "faces", 32, 100_000, ("model.text=true",))
LARGE = Training("emoji-16-to-64", "emoji", 64, 150_000, ("model.low_resolution=16", "training.cpu_threads=1"))
FIRST_FROM_32 = Training("emoji-32-to-64", "emoji", 64, 100_000, ("model.low_resolution=32", "training.cpu_threads=1"))
LARGE_FROM_32 = Training(
    "emoji-32-to-64-longer",
    "emoji",
    64,
    200_000,
    ("model.low_resolution=32", f"training.init_from={FIRST_FROM_32.model}", "training.learning_rate=0.002"),
)
TRAININGS = (FACES, LARGE, FIRST_FROM_32, LARGE_FROM_32)
GUIDED = ("--set", "sampling.guidance=3")
SMALL = ("--count", "8")
PLATES = (
    Plate(
        "Faces that never were",
        "A model conditioned on captions, sampled without a prompt.",
        ("sample", "--count", "32", "--model", FACES.model),
    ),
    Plate(
        "Text to image",
        "The same model with a prompt.",
        ("sample", *SMALL, "--prompt", "red hair, purple background", *GUIDED, "--model", FACES.model),
    ),
    Plate(
        "A red heart",
        "The model that comes with the repository, of emoji and their names, with the guidance that evaluation chose.",
        ("sample", *SMALL, "--prompt", "a red heart", "--model", "examples/emoji.safetensors"),
    ),
    Plate(
        "A grinning face",
        "The same model.",
        ("sample", *SMALL, "--prompt", "grinning face", "--model", "examples/emoji.safetensors"),
    ),
    Plate(
        "A police officer",
        "The same model.",
        ("sample", *SMALL, "--prompt", "woman police officer", "--model", "examples/emoji.safetensors"),
    ),
    Plate(
        "Inpainting",
        "First the image with its hole, then eight ways to fill it; the rest keeps its pixels.",
        (
            "edit",
            "inpaint",
            "face.png",
            "--mask",
            "hole.png",
            "--method",
            "pigdm",
            "--resample-steps",
            "3",
            *SMALL,
            "--model",
            FACES.model,
        ),
    ),
    Plate(
        "Variations",
        "First the image, then eight that are like it: noise is added to the image and removed again.",
        ("edit", "img2img", "face.png", "--strength", "0.6", *SMALL, "--model", FACES.model),
    ),
    Plate(
        "Text-guided image to image",
        "First the image, then the same face as the prompt describes it.",
        (
            "edit",
            "img2img",
            "face.png",
            "--strength",
            "0.75",
            "--prompt",
            "blonde hair",
            *GUIDED,
            *SMALL,
            "--model",
            FACES.model,
        ),
    ),
    Plate(
        "The way between two seeds",
        "From image 0 of seed 3 to image 0 of seed 7, on the great circle between their noise.",
        (
            "edit",
            "interpolate",
            "7",
            "--seed",
            "3",
            "--count",
            "9",
            "--prompt",
            "brown hair",
            *GUIDED,
            "--model",
            FACES.model,
        ),
    ),
    Plate(
        "Super-resolution",
        "First the small image, 16 by 16, then four enlarged ones: a super-resolution model trained on the same emoji.",
        ("edit", "upscale", "16.png", "--count", "4", "--set", "model.low_resolution=16", "--model", LARGE.model),
    ),
    Plate(
        "Super-resolution from 32 by 32",
        "The same with a model for small images of 32 by 32.",
        (
            "edit",
            "upscale",
            "32.png",
            "--count",
            "4",
            "--set",
            "model.low_resolution=32",
            "--model",
            LARGE_FROM_32.model,
        ),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="a source of images with captions, 32 px or more")
    parser.add_argument("--emoji", type=Path, required=True, help="another, 64 px or more")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/gallery"))
    args = parser.parse_args()

    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / "params.yaml").write_text("{}\n")
    for training in TRAININGS:
        source: Path = getattr(args, training.source)
        words = [f"ingest.source={source.resolve()}", f"ingest.size={training.size}"]
        darkroom(args.scratch, "ingest", "--local", words=[*words, f"training.dataset={training.source}"])
        print(json.dumps(darkroom(args.scratch, "train", "--local", words=training.words())), flush=True)
    _beginnings(args.scratch)
    shutil.copytree(PAGE.parents[1] / "examples", args.scratch / "examples", dirs_exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for plate in PLATES:
        done = darkroom(args.scratch, *plate.command)
        shutil.copyfile(args.scratch / done["grid"], IMAGES / f"{plate.name}.png")
    PAGE.write_text(page())


def _beginnings(workspace: Path) -> None:
    """What the plates begin with: a held-out face, a hole in its middle, and a held-out emoji made small."""
    face, emoji = (_held_out(workspace / "data" / source) for source in (FACES.source, LARGE.source))
    image_of(face).save(workspace / "face.png")
    for side in (16, 32):
        image_of(shrunk(emoji[None], side)[0]).save(workspace / f"{side}.png")
    hole = np.zeros(face.shape[1:], np.uint8)
    quarter = hole.shape[0] // 4
    hole[quarter:-quarter, quarter:-quarter] = 255
    Image.fromarray(hole).save(workspace / "hole.png")


def _held_out(data: Path) -> Tensor:
    dataset = Dataset.open(data)
    [image] = dataset.images(dataset.rows("held_out")[:1])
    return image


def page() -> str:
    """The gallery in Markdown."""
    head = (
        "# Gallery\n\n"
        "Every task with its command and its result, on two CPU cores. `python benchmarks/gallery.py --faces … "
        "--emoji …` trains the models and writes this page.\n\n"
        "| model | images seen | settings |\n|---|---:|---|\n"
    )
    models = "".join(
        f"| `{training.name}` | {training.images:,} of {training.size}×{training.size} | "
        f"{', '.join(f'`{setting}`' for setting in training.settings)} |\n"
        for training in TRAININGS
    )
    plates = (
        f"\n## {plate.title}\n\n{plate.words}\n\n```sh\ndarkroom {shlex.join(plate.command)}\n```\n\n"
        f"![{plate.title}](images/gallery/{plate.name}.png)\n"
        for plate in PLATES
    )
    return head + models + "".join(plates)


if __name__ == "__main__":
    main()
