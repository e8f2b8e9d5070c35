"""``darkroom gc | backup | restore``: what nothing needs any more goes, and what there is comes back."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, Json, ParamsFile, Set, joined, load, show


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (gc, backup, restore):
        app.command(rich_help_panel="Housekeeping")(verb)


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
    from flows.retention.policy import table

    show(done.model_dump(mode="json"), as_json, list(table(done.items)))


Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where backups lie, better on another disk.")]


def backup(target: Target, as_json: Json = False) -> None:
    """Copy what the local stack holds while it runs: its databases and its bucket, without passwords and keys.

    What an earlier backup in the folder has is not copied again. For a team's servers see docs/operations.md.

    Example:  darkroom backup /mnt/backups/darkroom
    """
    from flows.console import console
    from flows.stack.backup import backup

    with console() as progress:
        done = backup(target, progress)
    size = sum(each.size for each in done.objects)
    result = {"stamp": done.stamp, "objects": len(done.objects), "bytes": size, "databases": list(done.databases)}
    lines = [f"backup {done.stamp} in {target}: {len(done.databases)} databases, {len(done.objects):,} objects"]
    show(result, as_json, lines)


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
    as_json: Json = False,
) -> None:
    """Make a local stack of a backup, in a DARKROOM_HOME that is not there yet, and start it; passwords are new.

    Takedowns done since the backup are kept as far as newer backups and the stack that is replaced know of them.

    Example:  DARKROOM_HOME=.restored darkroom restore /mnt/backups/darkroom
    """
    from flows.console import console
    from flows.stack.restore import restore

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
            f"darkroom: {removal.pictures} images of data set {removal.dataset} were taken down after this backup "
            f"({removal.reason}), and its versions hold them again: no ingest takes them in; to be rid of them run "
            f"`darkroom data remove {' '.join(key[:16] for key in removal.picture_keys[:3])}"
            f"{' …' if len(removal.picture_keys) > 3 else ''} --dataset {removal.dataset} --reason … --purge`",
            file=sys.stderr,
        )
    if until is not None:
        print(
            f"darkroom: takedowns done after {until:%Y-%m-%d %H:%M:%S} UTC are not known: give them again",
            file=sys.stderr,
        )
    show(result, as_json, [f"{folder} holds what backup {backup.stamp} has, and runs; its passwords are new"])
