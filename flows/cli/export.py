"""``darkroom export``: a model for other libraries."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.options import DEFAULT_PARAMS, Json, Model, ParamsFile, Set, joined, load, show
from flows.cli.requests import is_file


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel="From pictures to prints")(export)


def export(
    to: Annotated[Literal["diffusers"], typer.Option("--to", help="The library that is to load it.")],
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to; a folder that is not there yet.")],
    model: Model = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write a model as a folder that a pipeline of diffusers loads, to be drawn from as sampling.* says.

    Example:  darkroom export --to diffusers --model models:/faces@champion --out exports/faces

    Example:  darkroom export --to diffusers --model runs/faces/final.safetensors --out exports/faces
    """
    config = load(params, overrides)
    if model is not None and is_file(model):
        from diffusion.export import export_to_diffusers

        done = export_to_diffusers(Path(model), folder, config.sampling)
    else:
        with joined("prefect", "mlflow", "s3"):
            from flows.export import export as export_registered

            done = export_registered(config, model or f"models:/{config.model_name}@champion", folder)
    lines = [f"{done.folder}: {done.pipeline}, {len(done.files)} files", f"how to use it: {done.folder / 'README.md'}"]
    show(done.model_dump(mode="json") | {"to": to}, as_json, lines)
