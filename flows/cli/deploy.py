"""``darkroom deploy | watch``: what runs by itself."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, DatasetName, Json, ParamsFile, Set, joined, load, show

Pool = Annotated[str, typer.Option("--pool", metavar="NAME", help="The work pool of workers that draw and judge.")]
POOL = "darkroom"
"""That of the local stack's worker."""


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (deploy, watch):
        app.command(rich_help_panel="By itself")(verb)


def deploy(
    dataset: DatasetName = None,
    cron: Annotated[str, typer.Option("--cron", help="When to retrain, in UTC.")] = "0 2 * * *",
    watch_cron: Annotated[str, typer.Option("--watch-cron", help="When to look at the champion again.")] = "0 5 * * *",
    pool: Pool = POOL,
    training_pool: Annotated[
        str | None, typer.Option("--training-pool", metavar="NAME", help="That of those that train; default: --pool.")
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", metavar="FOLDER", help="Where workers keep data, runs and reports; default: here."),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option("--webhook-env", metavar="NAME", help="Notify the address that this variable holds."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Have Prefect retrain by itself: schedules, events, forms, limits, and what to do about dead runs.

    Applies what prefect.yaml declares, and again it changes nothing.

    Example:  darkroom deploy --dataset faces --cron "0 2 * * *" --webhook-env SLACK_WEBHOOK_URL
    """
    config = load(params, overrides, dataset)
    with joined("prefect"):
        from flows.deploy import deploy

        place = (workspace or Path.cwd()).absolute()
        done = deploy(config, place, pool, training_pool or pool, cron, watch_cron, webhook)
    limits = ", ".join(f"{name} {limit}" for name, limit in done.concurrency_limits.items())
    show(
        done.model_dump(mode="json"),
        as_json,
        [
            *(f"deployment   {name}" for name in done.deployments),
            f"work pools   {', '.join(done.work_pools)}",
            f"limits       {limits}",
            *(f"automation   {name}" for name in done.automations),
            f"declared in  {done.definitions}",
        ],
    )


def watch(
    dataset: DatasetName = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Judge the champion again, beside the pictures that the data set holds out now.

    Example:  darkroom watch --dataset faces
    """
    config = load(params, overrides, dataset)
    with joined("prefect", "mlflow", "s3"):
        from flows.watch import watch

        done = watch(config)
    show(done.model_dump(mode="json"), as_json, [done.told])
