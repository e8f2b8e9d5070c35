"""The gallery, docs/gallery.md: each task with its command and its image, by models trained here.

    node benchmarks/drawn_faces.mjs faces 5000 256
    apt-get install mate-backgrounds budgie-backgrounds opencv-doc dataset-fashion-mnist
    python benchmarks/gallery.py --faces faces

Faces have captions. The models are trained in ``--scratch`` by ``darkroom`` commands unless they are there; after a
kill it resumes. Images are the first ones of seed 0: none is chosen.
"""

import argparse
import json
import random
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from loading import fashion
from photographs import cut, default_folders, photographs
from PIL import Image, ImageOps
from quality import darkroom

from diffusion.common.files import write_json
from diffusion.common.image_grids import to_pil_image
from diffusion.data.dataset import Dataset
from diffusion.generation.super_resolution import shrink_images

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
    def dataset(self) -> str:
        """The source at this size."""
        return f"{self.source}-{self.size}"

    @property
    def model(self) -> str:
        """Its file in the workspace."""
        return f"runs/{self.name}/final.safetensors"

    def words(self) -> list[str]:
        """Its settings."""
        settings = [
            f"training.dataset={self.dataset}",
            f"training.images={self.images}",
            f"training.output=runs/{self.name}",
        ]
        return [*settings, "training.minutes=null", *self.settings]


@dataclass(frozen=True)
class Plate:
    """An image of the gallery."""

    title: str
    words: str
    """What one sees, and which model made it."""
    command: str
    """After ``darkroom``; its grid is the image."""
    first: str | None = None
    """File in the workspace that its first image is copied to, for another plate; None: it is not."""

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join(self.title.lower().split())


FACES = Training("faces", "faces", 64, 240_000, ("model.text=true", "model.width=64"))
CLOTHES = Training("clothes", "clothes", 32, 150_000)
ENLARGING = Training("faces-16-to-64", "faces", 64, 60_000, ("model.low_resolution=16",))
PIECES = Training("faces-64-to-256", "face-pieces", 64, 80_000, ENLARGING.settings)
PHOTOGRAPHS = Training(
    "photographs-64-to-256", "photograph-pieces", 64, 80_000, (*ENLARGING.settings, "training.flip=true")
)
AUTOENCODER = Training("photographs-vae", "photograph-parts", 64, 100_000, ("model.family=vae", "training.flip=true"))
LATENT = Training(
    "photographs",
    "photographs",
    128,
    450_000,
    (
        f"model.autoencoder={AUTOENCODER.model}",
        "model.width=64",
        "model.channel_mult=[1,2]",
        "training.flip=true",
        "sampling.autoguidance=2",
        "sampling.steps=32",
    ),
)
PORTRAITS_AUTOENCODER = Training(
    "portraits-vae",
    "portrait-pieces",
    64,
    100_000,
    ("model.family=vae", "model.channel_mult=[1,2,2]", "model.latent_channels=8"),
)
PORTRAITS = Training(
    "portraits",
    "portraits",
    256,
    240_000,
    (
        f"model.autoencoder={PORTRAITS_AUTOENCODER.model}",
        "model.text=true",
        "model.width=64",
        "model.channel_mult=[1,2]",
    ),
)
TRAININGS = (
    *(FACES, CLOTHES, ENLARGING, PIECES, PHOTOGRAPHS),
    *(AUTOENCODER, LATENT, PORTRAITS_AUTOENCODER, PORTRAITS),
)
THINGS, EMOJI = "examples/things.safetensors", "examples/emoji.safetensors"
SUBJECTS = (
    *("lake-sherburne", "blue-periwinkle", "ocean-waves", "dune"),
    *("extreme-desert-hike", "tea-gardens", "singaporean-cityscape", "elephants"),
)
"""Photographs that the plate of latents shows."""
ENLARGED = "perched-osprey.jpg"
"""Photograph that is enlarged, of the package budgie-backgrounds."""
PLATES = (
    Plate(
        "Faces that never were",
        "A model conditioned on captions, sampled without a prompt, by autoguidance.",
        f"sample --count 32 --set sampling.autoguidance=2 --model {FACES.model}",
    ),
    Plate(
        "Text to image",
        "The same model with three prompts, which take turns.",
        "sample --count 9 --prompt 'red hair, bun, smile face, dark skin, yellow clothes, sunglasses, mint background' "
        "--prompt 'dreads, loving grin face, very dark skin, pink clothes, glasses, lavender background' "
        "--prompt 'hat beanie, awe face, light skin, green clothes, moustache, peach background' "
        f"--set sampling.guidance=2 --model {FACES.model}",
    ),
    Plate(
        "Things",
        "A model that comes with the repository, of emoji in latents, with the guidance in its file: of each prompt "
        "three images. It has seen few designs of a thing, so that images of one prompt are alike.",
        "sample --count 24 --prompt car --prompt house --prompt fish --prompt 'red apple' --prompt guitar "
        f"--prompt butterfly --prompt rocket --prompt 'blue heart' --model {THINGS}",
    ),
    Plate(
        "A red heart",
        "A smaller model that comes along, of emoji and their names on pixels, with the guidance in its file. "
        "No emoji of its training set is called red heart.",
        f"sample --count 8 --prompt 'a red heart' --model {EMOJI}",
    ),
    Plate("A grinning face", "The same model.", f"sample --count 8 --prompt 'grinning face' --model {EMOJI}"),
    Plate("A police officer", "The same model.", f"sample --count 8 --prompt 'woman police officer' --model {EMOJI}"),
    Plate(
        "By class",
        "Fashion-MNIST, its class 7: sneakers.",
        f"sample --count 24 --label 7 --set sampling.steps=32 --set sampling.autoguidance=2 --model {CLOTHES.model}",
    ),
    Plate(
        "Photographs in latents",
        "Images of 128×128 by diffusion in the latents of an autoencoder, `photographs-vae`, which learnt from pieces "
        "of 64×64; both from 20,000 cuts of 44 photographs (mate-backgrounds, budgie-backgrounds, opencv-doc), whose "
        "42 subjects are the classes, here eight. The KID is 0.217 without guidance, with `sampling.guidance=2` "
        "0.136. Skies, water, flowers and hills convince, buildings and animals not yet.",
        "sample --count 32 " + "".join(f"--label {subject} " for subject in SUBJECTS) + "--set sampling.autoguidance=2 "
        f"--set sampling.steps=32 --model {LATENT.model}",
    ),
    Plate(
        "Portraits in latents",
        "Images of 256×256 of the prompts on the left, in the latents of an autoencoder, `portraits-vae`, which learnt "
        "from pieces of 64×64 of the faces and has 8×8 pixels to a position. By autoguidance the KID is 0.041 ± 0.016.",
        "sample --count 16 "
        "--prompt 'red hair, bun, smile face, dark skin, yellow clothes, sunglasses, mint background' "
        "--prompt 'dreads, loving grin face, very dark skin, pink clothes, glasses, lavender background' "
        "--prompt 'hat beanie, awe face, light skin, green clothes, moustache, peach background' "
        "--prompt 'long afro, smile big face, light skin, red clothes, sunglasses, mint background' "
        f"--set sampling.autoguidance=2 --model {PORTRAITS.model}",
    ),
    Plate(
        "Inpainting",
        "First the image with its hole, then eight ways to fill it; the rest keeps its pixels.",
        f"edit inpaint face.png --mask hole.png --method pigdm --resample-steps 3 --count 8 --model {FACES.model}",
    ),
    Plate(
        "Variations",
        "First the image, then eight that are like it: noise is added to the image and removed again.",
        f"edit img2img face.png --strength 0.6 --count 8 --model {FACES.model}",
    ),
    Plate(
        "Text-guided image to image",
        "First the image, then the same face as the prompt describes it.",
        "edit img2img face.png --strength 0.75 --prompt 'long afro, smile big face, light skin, red clothes, "
        f"sunglasses, mint background' --set sampling.guidance=1.5 --count 8 --model {FACES.model}",
    ),
    Plate(
        "The way between two seeds",
        "From image 0 of seed 3 to image 0 of seed 7, on the great circle between their noise.",
        f"edit interpolate 7 --seed 3 --count 9 --set sampling.autoguidance=2 --model {FACES.model}",
    ),
    Plate(
        "Super-resolution from 16 to 64",
        "First a held-out face of 16×16, then four enlarged ones.",
        f"edit upscale 16.png --count 4 --model {ENLARGING.model}",
        first="64.png",
    ),
    Plate(
        "Super-resolution from 64 to 256",
        "The first of the four, enlarged once more, in overlapping tiles. This model learnt from pieces of 64×64 of "
        "faces of 256×256, and enlarges images of any size by four.",
        f"edit upscale 64.png --count 2 --model {PIECES.model}",
    ),
    Plate(
        "A photograph from 64 to 256",
        "Of a photograph (budgie-backgrounds, CC0) of which the model saw no piece. The distances above are of "
        "held-out pieces of the photographs, and of the faces, that models learnt from.",
        f"edit upscale photograph.png --count 2 --model {PHOTOGRAPHS.model}",
    ),
)


ANOTHER_STYLE = """
## Another style, from 300 images

Twemoji (© Twitter and other contributors, CC-BY 4.0) that no model saw; below, what their names give with
`examples/emoji.safetensors` as it was before its last stage of training, with a model trained on 295 Twemoji from
scratch, and with a low-rank adapter on top of the first, after equal minutes: KID 0.46, 1.39 and 0.65. [Fine-tune a
model](how-to/fine-tune.md) shows the commands; an earlier form of [a benchmark](../benchmarks/README.md) made it.

![Another style: Twemoji, base, from scratch, LoRA](images/gallery/another-style.png)
"""
"""A plate by fine_tuning.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="a folder of images with captions, 256×256")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/gallery"))
    args = parser.parse_args()

    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / "params.yaml").write_text("{}\n")
    faces = args.faces.resolve()
    sources: dict[str, Callable[[Path], Path]] = {
        "faces": lambda _: faces,
        "clothes": lambda workspace: workspace / fashion(workspace)["source"],
        PIECES.source: partial(pieces_of_faces, faces),
        PHOTOGRAPHS.source: pieces_of_photographs,
        AUTOENCODER.source: parts_of_photographs,
        LATENT.source: small_photographs,
        PORTRAITS_AUTOENCODER.source: partial(pieces_of_portraits, faces),
        PORTRAITS.source: lambda _: faces,
    }
    evaluations = {training.name: evaluate_model(args.scratch, training, sources) for training in TRAININGS}
    shutil.copytree(PAGE.parents[1] / "examples", args.scratch / "examples", dirs_exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    write_first_inputs(args.scratch)
    for plate in PLATES:
        summary = darkroom(args.scratch, *shlex.split(plate.command))
        shutil.copyfile(args.scratch / summary["grid"], IMAGES / f"{plate.name}.png")
        if plate.first is not None:
            shutil.copyfile(args.scratch / summary["folder"] / "00000000.png", args.scratch / plate.first)
    PAGE.write_text(page(evaluations))


def evaluate_model(
    workspace: Path, training: Training, sources: Mapping[str, Callable[[Path], Path]]
) -> dict[str, Any]:
    """Ingest, train and evaluate, or find what was done; returns the evaluation, with the CPU time of training.

    ``sources`` make the folders of images. After a kill the time is that of what was left of the training.
    """
    cache_file = workspace / "evaluations" / f"{training.name}.json"
    if not cache_file.is_file():
        if not (workspace / "data" / training.dataset / "manifest.json").is_file():
            folder = sources[training.source](workspace)
            words = [f"ingest.source={folder}", f"ingest.size={training.size}", f"training.dataset={training.dataset}"]
            darkroom(workspace, "ingest", "--local", words=words)
        before = cpu_seconds()
        darkroom(workspace, "train", "--local", words=training.words())
        seconds = cpu_seconds() - before
        evaluation = darkroom(workspace, "evaluate", "--local", "--model", training.model, words=training.words())
        write_json(cache_file, evaluation | {"cpu_seconds": seconds})
    result: dict[str, Any] = json.loads(cache_file.read_text())
    return result


def pieces_of_faces(faces: Path, workspace: Path) -> Path:
    """Cut two pieces of 64×64 out of each face of 256×256, but the held-out ones, which are enlarged on the page."""
    folder = workspace / PIECES.source
    tables = [pq.read_table(path) for path in (workspace / "data" / FACES.dataset / "records").glob("*.parquet")]
    rows = [row for table in tables for row in table.select(["source", "split"]).to_pylist()]
    rng = random.Random(0)
    for source in sorted(row["source"] for row in rows if row["split"] == "train"):
        write_pieces(Image.open(faces / source).convert("RGB"), 2, folder, Path(source).stem, rng)
    return folder


def pieces_of_portraits(faces: Path, workspace: Path) -> Path:
    """Cut four pieces of 64×64 out of each face of 256×256, also of those that its models hold out."""
    folder, rng = workspace / PORTRAITS_AUTOENCODER.source, random.Random(0)
    for path in sorted(faces.glob("*.png")):
        write_pieces(Image.open(path).convert("RGB"), 4, folder, path.stem, rng)
    return folder


def pieces_of_photographs(workspace: Path) -> Path:
    """Cut 10,000 pieces of 64×64 out of photographs of about 320 pixels."""
    folder, rng = workspace / PHOTOGRAPHS.source, random.Random(0)
    for _, name, image in cuts_of_photographs(2_500, 320, rng):
        write_pieces(image, 4, folder, name, rng)
    return folder


def small_photographs(workspace: Path) -> Path:
    """Cut 20,000 photographs of 128×128, in a folder, which becomes their class, for each subject."""
    folder = workspace / LATENT.source
    # Cuts whose longer side is about 280 pixels have a shorter one of 128 and more, with few exceptions.
    for path, name, image in cuts_of_photographs(20_000, 280, random.Random(0)):
        subject = folder / path.stem.partition("_")[0].lower()  # one photograph comes in three sizes
        subject.mkdir(parents=True, exist_ok=True)
        ImageOps.fit(image, (LATENT.size, LATENT.size)).save(subject / f"{name}.jpg", quality=92)
    return folder


def parts_of_photographs(workspace: Path) -> Path:
    """Cut two pieces of 64×64 out of each of the small photographs: a network of convolutions needs no whole ones."""
    folder, rng = workspace / AUTOENCODER.source, random.Random(0)
    for path in sorted(small_photographs(workspace).rglob("*.jpg")):
        write_pieces(Image.open(path), 2, folder, path.stem, rng)
    return folder


def cuts_of_photographs(count: int, side: int, rng: random.Random) -> Iterator[tuple[Path, str, Image.Image]]:
    """Cut about ``count`` images of ``side`` pixels, but none of what is enlarged on the page.

    Yields photographs, and their cuts with names.
    """
    paths = [path for path in photographs(default_folders()) if path.name != ENLARGED]
    for number, path in enumerate(paths):
        photograph = Image.open(path).convert("RGB")
        for part in range(count // len(paths)):
            yield path, f"{number}-{part}", cut(photograph, side, rng)


def write_pieces(image: Image.Image, count: int, folder: Path, name: str, rng: random.Random) -> None:
    """Write ``count`` random pieces of ``image``, 64×64 each."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        left, top = (rng.randrange(side - PIECES.size) for side in image.size)
        image.crop((left, top, left + PIECES.size, top + PIECES.size)).save(folder / f"{name}-{number}.png")


def cpu_seconds() -> float:
    """CPU time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_first_inputs(workspace: Path) -> None:
    """Write what plates begin with: a held-out face, a hole in its middle, and the face made small."""
    dataset = Dataset.open(workspace / "data" / FACES.dataset)
    [face] = dataset.images(dataset.rows("held_out")[:1])
    to_pil_image(face).save(workspace / "face.png")
    [photograph] = [path for path in photographs(default_folders()) if path.name == ENLARGED]
    whole = ImageOps.fit(Image.open(photograph).convert("RGB"), (256, 256))
    small = shrink_images(torch.from_numpy(np.array(whole)).permute(2, 0, 1)[None], 4)
    to_pil_image(small[0]).save(workspace / "photograph.png")
    to_pil_image(shrink_images(face[None], FACES.size // 16)[0]).save(workspace / "16.png")
    hole = np.zeros(face.shape[1:], np.uint8)
    quarter = hole.shape[0] // 4
    hole[quarter:-quarter, quarter:-quarter] = 255
    Image.fromarray(hole).save(workspace / "hole.png")


def page(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The gallery in Markdown."""
    head = (
        "# Gallery\n\n"
        "Every task with its command and its result, on two CPU cores. `python benchmarks/gallery.py --faces …` "
        "trains the models and writes this page. The faces are cartoons of random parts in the style Open Peeps (CC0). "
        "No image was chosen: they are the first ones of seed 0. The model of faces is evaluated by the captions of "
        "held-out faces, so that its images may come nearer to these than other real ones.\n\n"
        "| model | images seen | CPU minutes | settings | figures |\n|---|---:|---:|---|---|\n"
    )
    models = "".join(
        f"| `{training.name}` | {training.images:,} of {training.size}×{training.size} | "
        f"{evaluations[training.name]['cpu_seconds'] / 60:.0f} | "
        f"{', '.join(f'`{setting}`' for setting in training.settings) or 'the defaults'} |"
        f" {figures(evaluations[training.name])} |\n"
        for training in TRAININGS
    )
    plates = (
        f"\n## {plate.title}\n\n{plate.words}\n\n```sh\ndarkroom {plate.command}\n```\n\n"
        f"![{plate.title}](images/gallery/{plate.name}.png)\n"
        for plate in PLATES
    )
    return head + models + "".join(plates) + ANOTHER_STYLE


def figures(evaluation: Mapping[str, Any]) -> str:
    """The most telling figure of a model, beside that of real images or of bicubic interpolation."""
    [model] = evaluation["checkpoints"]
    if model.get("reconstruction") and model.get("family") == "vae":
        return f"reconstructs held-out images with a PSNR of {model['reconstruction']['psnr']:.1f} dB"
    scores, real = model["scores"], evaluation["real_baseline"]["scores"]
    if model.get("similarity"):
        bicubic = evaluation["baselines"]["bicubic"]["scores"]["fd"]
        return f"Fréchet distance {scores['fd']:.0f}, bicubic interpolation {bicubic:.0f}, real images {real['fd']:.0f}"
    return (
        f"KID {scores['kid']:.3f} ± {scores['kid_se']:.3f}, Fréchet distance {scores['fd']:.0f} ({real['fd']:.0f} real)"
    )


if __name__ == "__main__":
    main()
