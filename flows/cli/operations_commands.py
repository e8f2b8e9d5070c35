"""``darkroom deploy``, ``monitor`` and ``gc``: what keeps running without anybody."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.command import CommandOutput, command, connect

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer()
operations = command(app, panel="Operations")
Pool = Annotated[str, typer.Option("--pool", metavar="NAME", help="The work pool of workers that sample and evaluate.")]
POOL = "darkroom"
"""That of the local stack's worker."""


@operations
def deploy(
    config: "Params",
    cron: Annotated[str, typer.Option("--cron", help="When to retrain, in UTC.")] = "0 2 * * *",
    monitor_cron: Annotated[
        str, typer.Option("--monitor-cron", help="When to evaluate the champion again.")
    ] = "0 5 * * *",
    pool: Pool = POOL,
    training_pool: Annotated[
        str | None,
        typer.Option("--training-pool", metavar="NAME", help="The work pool of workers that train; default: --pool."),
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", metavar="FOLDER", help="Where workers keep data, runs and reports; default: here."),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option("--webhook-env", metavar="NAME", help="Notify the address that this variable holds."),
    ] = None,
) -> CommandOutput:
    """Have Prefect retrain by itself: schedules, events, forms, limits, and what to do about dead runs.

    Applies what prefect.yaml declares, and again it changes nothing.

    Example:  darkroom deploy --dataset faces --cron "0 2 * * *" --webhook-env SLACK_WEBHOOK_URL
    """
    with connect("prefect"):
        from flows.deployment.deploy import deploy

        place = (workspace or Path.cwd()).absolute()
        done = deploy(config, place, pool, training_pool or pool, cron, monitor_cron, webhook)
    limits = ", ".join(f"{name} {limit}" for name, limit in done.concurrency_limits.items())
    return CommandOutput(
        done,
        [
            *(f"deployment   {name}" for name in done.deployments),
            f"work pools   {', '.join(done.work_pools)}",
            f"limits       {limits}",
            *(f"automation   {name}" for name in done.automations),
            f"declared in  {done.definitions}",
        ],
    )


@operations
def monitor(config: "Params") -> CommandOutput:
    """Evaluate the champion again, on the images that the data set holds out now.

    Example:  darkroom monitor --dataset faces
    """
    with connect("prefect", "mlflow", "s3"):
        from flows.monitor import monitor

        done = monitor(config)
    return CommandOutput(done, [done.summary])


@command(app, panel="Operations", dataset=False)
def gc(
    config: "Params",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, how much it is, and why the rest stays.")
    ] = False,
) -> CommandOutput:
    """Take away old data versions, runs, sampling batches and caches, as the section `retention` of params.yaml says.

    What registered versions, their ledgers and kept sampling batches lead to stays. The rest goes in two steps: it is
    set aside, and its content goes when retention.grace_hours have passed and the command is given again.

    Example:  darkroom gc --dry-run --set retention.batch_days=180
    """
    if dry_run:
        with connect("mlflow", "s3"):
            from datetime import UTC, datetime

            from flows.gc import collect

            done = collect(config.retention, datetime.now(UTC), dry_run=True)
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.gc import gc

            done = gc(config)
    from flows.retention.policy import table

    return CommandOutput(done, table(done.items))
