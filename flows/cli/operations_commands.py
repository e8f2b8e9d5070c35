"""``darkroom deploy``, ``monitor`` and ``gc``: unattended operation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.command import CommandOutput, command, connect

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer()
operations = command(app, panel="Operations")
Pool = Annotated[str, typer.Option("--pool", metavar="NAME", help="Work pool for sampling and monitoring.")]
POOL = "darkroom"
"""Work pool of the local stack's worker."""


@operations
def deploy(
    config: "Params",
    cron: Annotated[str, typer.Option("--cron", help="Retraining schedule, in UTC.")] = "0 2 * * *",
    monitor_cron: Annotated[str, typer.Option("--monitor-cron", help="Monitoring schedule, in UTC.")] = "0 5 * * *",
    pool: Pool = POOL,
    training_pool: Annotated[
        str | None,
        typer.Option("--training-pool", metavar="NAME", help="Work pool for training; default: --pool."),
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace", metavar="FOLDER", help="Workers' folder of data, runs, reports; default: this one."
        ),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option("--webhook-env", metavar="NAME", help="Environment variable with the webhook URL to notify."),
    ] = None,
) -> CommandOutput:
    """Apply prefect.yaml: deployments with schedules and triggers, work pools, concurrency limits, automations.

    Idempotent: repeating it changes nothing.

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
    """Re-evaluate the champion on the current held-out images.

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
        bool, typer.Option("--dry-run", help="Only list what would be deleted, its size, and why the rest is kept.")
    ] = False,
) -> CommandOutput:
    """Delete old data versions, runs, sampling batches and caches according to `retention` in params.yaml.

    Everything that registered versions, ledgers and retained sampling batches need is kept. The rest is deleted in two
    steps: the first run sets it aside, a later run deletes it once retention.grace_hours have passed.

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
    from flows.retention.sweeps import table

    return CommandOutput(done, table(done.items))
