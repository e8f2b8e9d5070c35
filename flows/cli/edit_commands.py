"""``darkroom edit``: images from images, written to a folder of this machine."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.command import (
    LARGEST_SEED,
    CommandOutput,
    Count,
    Model,
    NegativePrompt,
    OutFolder,
    Seed,
    command,
    connect,
    is_file,
)

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer(
    name="edit",
    help="Images from images: fill a hole, change one, go from one to another, enlarge.",
    no_args_is_help=True,
)
Image = Annotated[Path, typer.Argument(help="Image file; cut to a square and scaled to the model's size.")]
Label = Annotated[str | None, typer.Option("--label", metavar="NAME", help="Class to show.")]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="What to show, for a model trained on captions (model.text)."),
]


class InpaintMethod(StrEnum):
    """How the hole is made to fit what lies around it."""

    REPLACE = "replace"
    PIGDM = "pigdm"
    REPAINT = "repaint"


@command(app)
def inpaint(
    config: "Params",
    image: Image,
    mask: Annotated[
        Path, typer.Option("--mask", help="Image file as large as the image: white is filled, black is kept.")
    ],
    method: Annotated[
        InpaintMethod,
        typer.Option(
            "--method",
            help="How the hole is made to fit: replace the known part at each step (fast); pigdm, guide each step by a "
            "gradient, for 2.5 times the work; repaint, repeat steps.",
        ),
    ] = InpaintMethod.REPLACE,
    resample_steps: Annotated[
        int | None,
        typer.Option(
            "--resample-steps",
            min=2,
            max=100,
            help="How often each stretch of steps is repeated; default: 5, with pigdm 1.",
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much the hole is changed, up to 1, all of it; default: 1.")
    ] = None,
    count: Count = 8,
    seed: Seed = 0,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    model: Model = None,
    output: OutFolder = None,
) -> CommandOutput:
    """Fill a hole in an image, in several ways; the rest keeps its pixels.

    Example:  darkroom edit inpaint face.png --mask hole.png --method pigdm --model models:/faces@champion
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "strength": strength}
    wanted |= {"method": method.value, "resample_steps": resample_steps}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    return generate_images(config, "inpaint", wanted, model, output, image, mask)


@command(app)
def img2img(
    config: "Params",
    image: Image,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much is changed, between 0 and 1; default: 0.6.")
    ] = None,
    count: Count = 8,
    seed: Seed = 0,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    model: Model = None,
    output: OutFolder = None,
) -> CommandOutput:
    """Generate images that are more or less like another one, and like a label or prompt.

    Example:  darkroom edit img2img face.png --strength 0.5 --prompt "red hair" --set sampling.guidance=3
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "strength": strength}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    return generate_images(config, "img2img", wanted, model, output, image)


@command(app)
def interpolate(
    config: "Params",
    to_seed: Annotated[int, typer.Argument(min=0, max=LARGEST_SEED, metavar="TO_SEED", help="Seed of the last image.")],
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the first image.")] = 0,
    count: Annotated[int, typer.Option("--count", min=2, help="Number of images, both ends included.")] = 8,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    model: Model = None,
    output: OutFolder = None,
) -> CommandOutput:
    """Generate images between image 0 of one seed and image 0 of another.

    Example:  darkroom edit interpolate 7 --seed 3 --count 10 --label cat
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "to_seed": to_seed}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    return generate_images(config, "interpolate", wanted, model, output)


@command(app)
def upscale(
    config: "Params",
    image: Annotated[
        Path, typer.Argument(help="Image file, at least as large as the small images that the model was trained on.")
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="Number of images.")] = 1,
    seed: Seed = 0,
    model: Model = None,
    output: OutFolder = None,
) -> CommandOutput:
    """Enlarge an image with a super-resolution model (model.low_resolution); large ones in overlapping tiles.

    Example:  darkroom edit upscale small.png --model models:/faces-16-to-64@champion
    """
    return generate_images(config, "upscale", {"count": count, "seed": seed}, model, output, image)


def generate_images(
    config: "Params",
    task: str,
    wanted: dict[str, Any],
    model: str | None,
    output: Path | None,
    image: Path | None = None,
    mask: Path | None = None,
) -> CommandOutput:
    """Generate images here with a model file, or by the flow with a registered model."""
    from diffusion.generation.config import read_request

    fields = {"task": task, **{name: value for name, value in wanted.items() if value is not None}}
    request = read_request(fields, image, mask)
    if is_file(model):
        from diffusion.generation.generation_result import generate_to_folder
        from flows.tracking.console import console

        with console() as progress:
            done = generate_to_folder(Path(model), request, config.sampling, output, progress=progress)
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.sample import generate

            uri = model or f"models:/{config.model_name}@champion"
            done = generate(config, uri, fields, image, mask, output)
    return CommandOutput(done, [f"{done.count} images of {done.model} in {done.folder}", f"look at {done.grid}"])
