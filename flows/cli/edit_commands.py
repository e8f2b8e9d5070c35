"""``darkroom edit``: inpainting, img2img, interpolation and super-resolution, written to a local folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import is_model_file
from flows.cli import command as options
from flows.cli.arguments import check_image, when_given
from flows.cli.command import MAX_SEED, CommandOutput, command, connect, display_progress

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer(name="edit", help="Inpainting, img2img, interpolation, super-resolution.", no_args_is_help=True)
Image = Annotated[
    Path, Argument(help="Image file; cropped and resized to the model's shape, or --size.", callback=check_image)
]
Label = Annotated[str | None, Option("--label", metavar="NAME", help="Class label.")]
Prompt = Annotated[str | None, Option("--prompt", help="Text prompt, for a model with model.text.")]


@when_given
def check_strength(strength: float) -> None:
    """Check that a strength is above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} is out of range: give a number above 0, and at most 1")


@when_given
def check_partial_strength(strength: float) -> None:
    """Check that a strength is above 0 and below 1."""
    if not 0 < strength < 1:
        raise UserError(f"--strength {strength:g} is out of range: give a number above 0 and below 1")


@command(app)
def inpaint(
    config: "Params",
    image: Image,
    mask: Annotated[
        Path, Option(help="Image file of the image's size: white is filled, black is kept.", callback=check_image)
    ],
    method: Annotated[
        Literal["replace", "pigdm", "repaint"],
        Option(help="replace: set known pixels each step. pigdm: gradient guidance, 2.5x the work. repaint: resample."),
    ] = "replace",
    resample_steps: Annotated[
        int | None, Option(min=2, max=100, help="How often each stretch of steps is resampled; default: 5, pigdm 1.")
    ] = None,
    strength: Annotated[
        float | None, Option(help="Noise added to the hole; default: 1, which replaces all.", callback=check_strength)
    ] = None,
    count: options.Count = 8,
    seed: options.Seed = 0,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    model: options.Model = None,
    output: options.OutFolder = None,
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Fill the masked part of an image; all other pixels are kept.

    Example:  darkroom edit inpaint face.png --mask hole.png --method pigdm --model models:/faces@champion
    """
    fields: dict[str, Any] = {"count": count, "seed": seed, "strength": strength, "method": method}
    fields |= {"resample_steps": resample_steps, "label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    fields |= {"size": size}
    return generate_images(config, settings, "inpaint", fields, model, output, image, mask)


@command(app)
def img2img(
    config: "Params",
    image: Image,
    strength: Annotated[
        float | None,
        Option(help="Noise added to the image, between 0 and 1; default: 0.6.", callback=check_partial_strength),
    ] = None,
    count: options.Count = 8,
    seed: options.Seed = 0,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    model: options.Model = None,
    output: options.OutFolder = None,
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Generate variations of an image, optionally conditioned on a label or prompt.

    Example:  darkroom edit img2img face.png --strength 0.5 --prompt "red hair" --set sampling.guidance=3
    """
    fields: dict[str, Any] = {"count": count, "seed": seed, "strength": strength}
    fields |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt, "size": size}
    return generate_images(config, settings, "img2img", fields, model, output, image)


@command(app)
def interpolate(
    config: "Params",
    to_seed: Annotated[int, Argument(min=0, max=MAX_SEED, metavar="TO_SEED", help="Seed of the last image.")],
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of the first image.")] = 0,
    count: Annotated[int, Option(min=2, help="Number of images, both ends included.")] = 8,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    model: options.Model = None,
    output: options.OutFolder = None,
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Interpolate between image 0 of one seed and image 0 of another.

    Example:  darkroom edit interpolate 7 --seed 3 --count 10 --label cat
    """
    fields: dict[str, Any] = {"count": count, "seed": seed, "to_seed": to_seed}
    fields |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt, "size": size}
    return generate_images(config, settings, "interpolate", fields, model, output)


@command(app)
def upscale(
    config: "Params",
    image: Annotated[
        Path, Argument(help="Image file, at least as large as the model's low-resolution input.", callback=check_image)
    ],
    count: Annotated[int, Option(min=1, help="Number of images.")] = 1,
    seed: options.Seed = 0,
    model: options.Model = None,
    output: options.OutFolder = None,
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Upscale an image with a super-resolution model (model.low_resolution); large images in overlapping tiles.

    Example:  darkroom edit upscale small.png --model models:/faces-16-to-64@champion
    """
    return generate_images(config, settings, "upscale", {"count": count, "seed": seed}, model, output, image)


def generate_images(
    config: "Params",
    settings: list[str],
    task: str,
    fields: dict[str, Any],
    model: str | None,
    output: Path | None,
    image: Path | None = None,
    mask: Path | None = None,
) -> CommandOutput:
    """Generate images with a model file in this process, or with a registered model in a flow.

    ``settings`` are the values of ``--set``: one without effect on the images is an error.
    """
    from diffusion.generation.config import read_request
    from flows.checks import Request, check

    fields = {"task": task} | {name: value for name, value in fields.items() if value is not None}
    generation = read_request(fields, image, mask)
    request = Request(model=model, generation=generation, overrides=settings)
    check("edit", config, request)
    if is_model_file(model):
        from diffusion.checkpoints import read_model_header
        from diffusion.generation.requests import generate_to_folder

        sampling = config.resolve_sampling(read_model_header(Path(model)).model)
        with display_progress() as progress:
            result = generate_to_folder(Path(model), generation, sampling, output, progress=progress)
    else:
        with connect("prefect", "mlflow", "s3"):
            check("edit", config, request, connected=True)
            from flows.sample import generate

            result = generate(config, model or config.champion, fields, image, mask, output)
    return CommandOutput(
        result, [f"{pluralize(result.count, 'image')} of {result.model} in {result.folder}", f"look at {result.grid}"]
    )
