"""``darkroom compare``: what each family of models gives for the same minutes."""

from typing import Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, DatasetName, Json, ParamsFile, Set, joined, load, show

ALL = ["ddpm", "vae", "gan", "autoregressive"]
"""As in ``diffusion.families.config``, which loads too much for ``--help``."""
Families = Annotated[
    list[str],
    typer.Option("--family", metavar="NAME", help="ddpm, vae, gan or autoregressive; several times; default: all."),
]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel="From pictures to prints")(compare)


def compare(
    dataset: DatasetName = None,
    family: Families = ALL,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away runs of other settings that lie in the families' folders.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train each family for as long on the same pictures, and show side by side what they draw.

    Killed and given again, it goes on.

    Example:  darkroom compare --dataset faces --set training.minutes=10
    """
    config = load(params, overrides, dataset)
    with joined("prefect", "mlflow", "s3"):
        from diffusion.evaluation.comparison_page import findings
        from flows.compare import compare

        done = compare(config, family, restart)
    show(done.model_dump(mode="json"), as_json, [*findings(done.comparison), f"report: {done.report}"])
