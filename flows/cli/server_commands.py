"""``darkroom server``: MLflow, Prefect and S3 on this machine, health and metrics of any, backups."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion.common.escaping import escape_controls
from flows.cli.command import CommandOutput, command

if TYPE_CHECKING:
    from flows.local_stack import StackStatus

app = typer.Typer(
    name="server",
    help="Servers: start and stop those of this machine, back them up; health and metrics of any.",
    no_args_is_help=True,
)

top = typer.Typer()
"""What stands at the top level as well, as in docker compose."""
both = command(top, panel="Servers of this machine")


def _say(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


@both
@command(app)
def up() -> CommandOutput:
    """Start MLflow, Prefect with a worker, and an S3 server, on loopback; what runs already is left alone.

    Example:  darkroom up && eval "$(darkroom env)"
    """
    from flows.local_stack import up

    return _show(up(_say))


@both
@command(app)
def status() -> CommandOutput:
    """Show the local servers: where they are, whether they answer, where their logs and passwords lie."""
    from flows.local_stack import status

    return _show(status())


@both
@command(app)
def down() -> CommandOutput:
    """Stop the local servers; everything they hold is kept for the next `darkroom up`."""
    from flows.local_stack import down, status

    down(_say)
    return CommandOutput(status(), [])


@both
@command(app)
def env() -> CommandOutput:
    """Print the exports with which any client on this machine joins the stack.

    Example:  eval "$(darkroom env)"
    """
    from flows.local_stack import exports

    variables = exports()
    return CommandOutput(variables, [f"export {name}={shlex.quote(value)}" for name, value in variables.items()])


@command(app)
def health(
    servers: Annotated[list[str], typer.Argument(help="mlflow, prefect, s3, or a http:// address that has to answer.")],
) -> CommandOutput:
    """Ask servers that the environment names as a client would; exit code 1 and a line that says what is wrong.

    What an S3 server lacks that not everything needs is a line, too.

    Example:  darkroom server health mlflow prefect s3
    """
    from flows.monitoring.health import check

    lacks = {server: check(server) for server in servers}
    return CommandOutput(lacks, [line for lines in lacks.values() for line in lines])


@command(app)
def metrics(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9464,
) -> None:
    """Serve what Prefect, MLflow and the ledger know of queues, failures, champions and rates, for Prometheus to fetch.

    Example:  darkroom server metrics & curl localhost:9464/metrics
    """
    from flows.local_stack.discovery import join_servers

    join_servers("prefect", "mlflow", "s3")
    from flows.monitoring.prometheus import serve

    serve(host, port)


Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where backups lie, better on another disk.")]


@command(app)
def backup(target: Target) -> CommandOutput:
    """Copy what the local stack holds while it runs: its databases and its bucket, without passwords and keys.

    What an earlier backup in the folder has is not copied again. For a team's servers see docs/operations.md.

    Example:  darkroom server backup /mnt/backups/darkroom
    """
    from flows.local_stack.backup import backup
    from flows.tracking.console import console

    with console() as progress:
        done = backup(target, progress)
    size = sum(each.size for each in done.objects)
    result = {"stamp": done.stamp, "objects": len(done.objects), "bytes": size, "databases": list(done.databases)}
    lines = [f"backup {done.stamp} in {target}: {len(done.databases)} databases, {len(done.objects):,} objects"]
    return CommandOutput(result, lines)


@command(app)
def restore(
    target: Target,
    stamp: Annotated[
        str | None, typer.Option("--backup", metavar="STAMP", help="Which one, by its name; default: the newest.")
    ] = None,
    replaced: Annotated[
        Path,
        typer.Option(
            "--replaces",
            metavar="HOME",
            help="DARKROOM_HOME of the stack that this one replaces, which runs if it is there: takedowns done since "
            "the backup are kept.",
        ),
    ] = Path(".darkroom"),
) -> CommandOutput:
    """Make a local stack of a backup, in a DARKROOM_HOME that is not there yet, and start it; passwords are new.

    Takedowns done since the backup are kept as far as newer backups and the stack that is replaced know of them.

    Example:  DARKROOM_HOME=.restored darkroom server restore /mnt/backups/darkroom
    """
    from flows.local_stack.restore import restore
    from flows.tracking.console import console

    with console() as progress:
        done = restore(target, stamp, replaced, lambda line: print(line, file=sys.stderr, flush=True), progress)
    backup, folder, until = done.backup, done.status.folder, done.later.known_until
    removals = list(done.later.removals())
    result = {
        "stamp": backup.stamp,
        "folder": str(folder),
        "objects": len(backup.objects),
        "later_removals": [removal.model_dump(mode="json") for removal in removals],
        "removals_known_until": until and until.isoformat(),
    }
    for removal in removals:
        print(
            f"darkroom: {removal.images} images of data set {removal.dataset} were taken down after this backup "
            f"({removal.reason}), and its versions hold them again: no ingest takes them in; to be rid of them run "
            f"`darkroom data remove {' '.join(key[:16] for key in removal.image_keys[:3])}"
            f"{' …' if len(removal.image_keys) > 3 else ''} --dataset {removal.dataset} --reason … --purge`",
            file=sys.stderr,
        )
    if until is not None:
        print(
            f"darkroom: takedowns done after {until:%Y-%m-%d %H:%M:%S} UTC are not known: give them again",
            file=sys.stderr,
        )
    return CommandOutput(result, [f"{folder} holds what backup {backup.stamp} has, and runs; its passwords are new"])


def _show(status: "StackStatus") -> CommandOutput:
    lines = [f"{each.title:<16} {each.state:<8} {each.url}" for each in status.services]
    lines += [f"{server:<16} elsewhere, by {variable}" for server, variable in status.elsewhere.items()]
    if status.services:
        lines += [f"logs and data     {status.folder}", f"passwords         {status.credentials}"]
    return CommandOutput(status, lines)
