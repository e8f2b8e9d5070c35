"""``darkroom release``: a version that staging found good becomes champion here."""

from typing import Annotated

import typer

from flows.cli.champion import Reason
from flows.cli.options import Json, joined, show


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel="From pictures to prints")(release)


def release(
    model: Annotated[
        str, typer.Argument(metavar="URI", help="In staging: models:/NAME@champion or models:/NAME/NUMBER.")
    ],
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """Make a version of the staging registry champion in this one, with its run, its evidence and its card.

    DARKROOM_STAGING_* say where staging is: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and _PASSWORD, BUCKET, AWS_*,
    or HOME, the folder of a local stack. What is not champion there needs a reason. It needs no Prefect.

    Example:  darkroom release models:/faces@champion
    """
    with joined("mlflow", "s3"):
        from flows.release import release

        done = release(model, reason)
    already = ", which was done already" if done.already else ""
    show(done.model_dump(mode="json"), as_json, [f"{done.version.uri} is champion{already}: {done.entry}"])
