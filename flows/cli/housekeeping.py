"""``darkroom gc``: what nothing needs any more goes."""

from typing import Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, Json, ParamsFile, Set, joined, load, show


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel="Housekeeping")(gc)


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, how much it is, and why the rest stays.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Take away old data versions, runs, prints and caches, as the section `retention` of params.yaml says.

    What registered versions, their ledgers and kept prints lead to stays. The rest goes in two steps: it is set aside,
    and its content goes when retention.grace_hours have passed and the command is given again.

    Example:  darkroom gc --dry-run --set retention.prints_days=180
    """
    config = load(params, overrides)
    if dry_run:
        with joined("mlflow", "s3"):
            from datetime import UTC, datetime

            from flows.gc import collect

            done = collect(config.retention, datetime.now(UTC), dry_run=True)
    else:
        with joined("prefect", "mlflow", "s3"):
            from flows.gc import gc

            done = gc(config)
    from flows.retention.items import table

    show(done.model_dump(mode="json"), as_json, list(table(done.items)))
