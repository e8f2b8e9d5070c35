"""``darkroom inpaint | vary | interpolate | upscale``: pictures from pictures, in a folder of this machine."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import (
    DEFAULT_PARAMS,
    LARGEST_SEED,
    Count,
    Json,
    Model,
    Output,
    ParamsFile,
    Seed,
    Set,
    joined,
    load,
    show,
)

if TYPE_CHECKING:
    from diffusion.made import GenerationResult

Image = Annotated[Path, typer.Argument(help="A picture; it is cut to a square and scaled to the model's size.")]
Label = Annotated[str | None, typer.Option("--label", metavar="NAME", help="The class to show.")]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="What to show, for a model told captions (model.text)."),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", metavar="TEXT", help="What not to show; needs sampling.guidance, say 3."),
]


class InpaintMethod(StrEnum):
    """How the hole is made to fit what lies around it."""

    REPLACE = "replace"
    PIGDM = "pigdm"
    REPAINT = "repaint"


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (inpaint, vary, interpolate, upscale):
        app.command(rich_help_panel="Pictures from pictures")(verb)


def inpaint(
    image: Image,
    mask: Annotated[
        Path, typer.Option("--mask", help="A picture as large as the image: white is painted anew, black is kept.")
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
    output: Output = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Paint a part of a picture anew, in several ways; the rest keeps its pixels.

    Example:  darkroom inpaint face.png --mask hole.png --method pigdm --model models:/faces@champion
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "strength": strength}
    wanted |= {"method": method.value, "resample_steps": resample_steps}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    done = generated("inpaint", wanted, model, output, params, overrides, image, mask)
    show_generated(done, as_json)


def vary(
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
    output: Output = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Make a picture anew, more or less like it, and like what is asked for.

    Example:  darkroom vary face.png --strength 0.5 --prompt "red hair" --set sampling.guidance=3
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "strength": strength}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    done = generated("img2img", wanted, model, output, params, overrides, image)
    show_generated(done, as_json)


def interpolate(
    to_seed: Annotated[int, typer.Argument(min=0, max=LARGEST_SEED, metavar="TO_SEED", help="Where the way leads.")],
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="The seed that it begins with.")] = 0,
    count: Annotated[int, typer.Option("--count", min=2, help="How many pictures, both ends included.")] = 8,
    label: Label = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    model: Model = None,
    output: Output = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Pictures on the way from picture 0 of one seed to picture 0 of another.

    Example:  darkroom interpolate 7 --seed 3 --count 10 --label cat
    """
    wanted: dict[str, Any] = {"count": count, "seed": seed, "to_seed": to_seed}
    wanted |= {"label": label, "prompt": prompt, "negative_prompt": negative_prompt}
    done = generated("interpolate", wanted, model, output, params, overrides)
    show_generated(done, as_json)


def upscale(
    image: Annotated[Path, typer.Argument(help="A picture, at least as large as those the model was shown.")],
    count: Annotated[int, typer.Option("--count", min=1, help="In how many ways.")] = 1,
    seed: Seed = 0,
    model: Model = None,
    output: Output = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Draw a small picture large, with a model trained to (model.low_resolution); larger ones in tiles that agree.

    Example:  darkroom upscale small.png --model models:/faces-16-to-64@champion
    """
    done = generated("upscale", {"count": count, "seed": seed}, model, output, params, overrides, image)
    show_generated(done, as_json)


def is_file(model: str) -> bool:
    """Whether ``model`` is a file, for which no server is needed, and not the name of a registered version."""
    return model.endswith(".safetensors")


def generated(
    task: str,
    wanted: dict[str, Any],
    model: str | None,
    output: Path | None,
    params: Path,
    overrides: list[str],
    image: Path | None = None,
    mask: Path | None = None,
) -> "GenerationResult":
    """The pictures, drawn here with a model file, or by the flow with a registered one."""
    from diffusion.config_sampling import read_request

    fields = {"task": task, **{name: value for name, value in wanted.items() if value is not None}}
    request = read_request(fields, image, mask)
    config = load(params, overrides)
    if model is not None and is_file(model):
        from diffusion.made import generate_to_folder
        from flows.console import console

        with console() as progress:
            return generate_to_folder(Path(model), request, config.sampling, output, progress=progress)
    with joined("prefect", "mlflow", "s3"):
        from flows.generate import generate

        uri = model or f"models:/{config.model_name}@champion"
        return generate(config, uri, fields, image, mask, output)


def show_generated(done: "GenerationResult", as_json: bool) -> None:
    """Print what was made, and where it lies."""
    show(
        done.model_dump(mode="json"),
        as_json,
        [f"{done.count} pictures of {done.model} in {done.folder}", f"look at {done.grid}"],
    )
