"""``darkroom server``: local MLflow, Prefect and S3 servers, health checks, and backups."""

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError
from diffusion.common.escaping import escape_controls
from flows.cli.arguments import check_existing, check_output
from flows.cli.command import CommandOutput, command, display_progress

if TYPE_CHECKING:
    from diffusion.data.versions.takedown_records import Removal
    from flows.local_stack.control import StackStatus

app = typer.Typer(name="server", help="Local servers and their backups; health.", no_args_is_help=True)
FOLDER = "Backup folder, preferably on another disk."
top = typer.Typer()
"""Commands that are also at the top level, as in docker compose."""
both = command(top, panel="Servers of this machine")


def _say(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


@both
@command(app)
def up() -> CommandOutput:
    """Start MLflow, Prefect with a worker, and an S3 server on the loopback address; running services are kept.

    Example:  darkroom up && eval "$(darkroom env)"
    """
    from flows.local_stack.control import up

    return _show(up(_say))


@both
@command(app)
def status() -> CommandOutput:
    """Show the local servers: URLs, state, and the locations of logs and passwords."""
    from flows.local_stack.control import status

    return _show(status())


@both
@command(app)
def down() -> CommandOutput:
    """Stop the local servers; their data is kept for the next `darkroom up`."""
    from flows.local_stack.control import down, status

    down(_say)
    return CommandOutput(status(), [])


@both
@command(app)
def env() -> CommandOutput:
    """Print shell exports that connect clients on this machine to the local stack.

    Example:  eval "$(darkroom env)"
    """
    from flows.local_stack.control import exports

    variables = exports()
    return CommandOutput(variables, [f"export {name}={shlex.quote(value)}" for name, value in variables.items()])


@command(app)
def health(servers: Annotated[list[str], Argument(help="mlflow, prefect, s3, or a http:// URL.")]) -> CommandOutput:
    """Check servers, of the environment or else local ones, with real requests; exit code 1 if one fails.

    What could not be tested of an S3 server is listed as well.

    Example:  darkroom server health mlflow prefect s3
    """
    from flows.environment import SERVERS
    from flows.local_stack.http_api import check
    from flows.local_stack.stack import join_servers

    gaps: dict[str, list[str]] = {}
    lines: list[str] = []
    error: DarkroomError | None = None
    for server in servers:
        try:
            join_servers(*(name for name in SERVERS if name == server))
            gaps[server] = check(server)
        except DarkroomError as failure:
            if len(servers) == 1:
                raise
            error = error or failure
            lines.append(f"{server:<8} fails: {failure}")
        else:
            lines += [f"{server:<8} works", *gaps[server]]
    return CommandOutput(gaps, lines, error)


@command(app)
def backup(target: Annotated[Path, Argument(metavar="FOLDER", help=FOLDER, callback=check_output)]) -> CommandOutput:
    """Back up databases and bucket of the running local stack, without passwords and keys.

    Backups are incremental. For a team's servers see docs/operations/backup.md.

    Example:  darkroom server backup /mnt/backups/darkroom
    """
    from flows.local_stack.backup import backup

    with display_progress() as progress:
        snapshot = backup(target, progress)
    size = sum(entry.size for entry in snapshot.objects)
    result = {
        "stamp": snapshot.stamp,
        "objects": len(snapshot.objects),
        "bytes": size,
        "databases": list(snapshot.databases),
    }
    lines = [
        f"backup {snapshot.stamp} in {target}: {len(snapshot.databases)} databases, {len(snapshot.objects):,} objects"
    ]
    return CommandOutput(result, lines)


@command(app)
def restore(
    target: Annotated[Path, Argument(metavar="FOLDER", help=FOLDER, callback=check_existing)],
    stamp: Annotated[str | None, Option("--backup", metavar="STAMP", help="Backup; default: the newest.")] = None,
    replaced: Annotated[
        Path,
        Option("--replaces", metavar="HOME", help="DARKROOM_HOME of the running stack, to take over its takedowns."),
    ] = Path(".darkroom"),
) -> CommandOutput:
    """Restore a backup into a new DARKROOM_HOME and start the local stack, with new passwords.

    Takedowns since the backup are taken over from newer backups and from the replaced stack.

    Example:  DARKROOM_HOME=.restored darkroom server restore /mnt/backups/darkroom
    """
    from flows.datasets.catalog import PUBLISHED
    from flows.environment import settings
    from flows.local_stack.backup import restore

    with display_progress() as progress:
        backup, later_removals = restore(target, stamp, replaced, _say, progress)
    folder, known_until, removals = settings().folder, later_removals.known_until, list(later_removals.removals())
    result = {
        "stamp": backup.stamp,
        "folder": str(folder),
        "objects": len(backup.objects),
        "later_removals": [removal.model_dump(mode="json") for removal in removals],
        "removals_known_until": known_until and known_until.isoformat(),
    }
    _warn_of_later_removals(removals, known_until)
    datasets = sorted({match[1] for entry in backup.objects if (match := PUBLISHED.fullmatch(entry.key))})
    lines = [f"{folder} is restored from backup {backup.stamp} and runs, with new passwords"]
    lines += [f"next  darkroom data checkout --dataset {name}" for name in datasets]
    return CommandOutput(result | {"datasets": datasets}, lines)


def _warn_of_later_removals(removals: "Sequence[Removal]", known_until: "datetime | None") -> None:
    for removal in removals:
        _say(
            f"darkroom: {removal.images} images of data set {removal.dataset} were taken down after this backup "
            f"({removal.reason}), and its versions hold them again: no ingest adds them; to delete them run "
            f"`darkroom data remove {' '.join(key[:16] for key in removal.image_keys[:3])}"
            f"{' …' if len(removal.image_keys) > 3 else ''} --dataset {removal.dataset} --reason … --purge`"
        )
    if known_until is not None:
        _say(f"darkroom: takedowns done after {known_until:%Y-%m-%d %H:%M:%S} UTC are unknown: repeat them")


def _show(status: "StackStatus") -> CommandOutput:
    lines = [f"{service.title:<16} {service.state:<8} {service.url}" for service in status.services]
    lines += [f"{server:<16} elsewhere, by {variable}" for server, variable in status.elsewhere.items()]
    if all(service.state == "stopped" for service in status.services):
        lines.append(f"no local server runs in {status.folder}: `darkroom up` starts MLflow, Prefect and S3")
    if status.services:
        lines += [f"logs and data     {status.folder}", f"passwords         {status.credentials}"]
    return CommandOutput(status, lines)
