"""``darkroom rollback | history``: who is champion, who was, and back to the one before."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, DatasetName, Json, ParamsFile, Set, joined, load, show

if TYPE_CHECKING:
    from flows.champion import Changed
    from flows.history import Entry, History

Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why: it goes into the ledger.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (rollback, history):
        app.command(rich_help_panel="From pictures to prints")(verb)


def rollback(
    dataset: DatasetName = None,
    reason: Reason = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Make the champion before this one champion again; given twice, it goes back twice. It needs no Prefect.

    A version that lost the title so is not promoted by the gate any more: `darkroom promote --to` brings it back.

    Example:  darkroom rollback --dataset faces --reason "draws three eyes"
    """
    config = load(params, overrides, dataset)
    with joined("mlflow", "s3"):
        from flows import champion

        done = champion.roll_back(config.model_name, reason)
    show_changed(done, as_json)


def history(
    dataset: DatasetName = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="First write entries that are missing on S3 back from MLflow's copies.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Show the ledger: when, who, from which champion to which, and why; its chain is verified, and aliases are mended.

    Example:  darkroom history --dataset faces
    """
    config = load(params, overrides, dataset)
    with joined("mlflow", "s3"):
        from mlflow.client import MlflowClient

        from flows.aliases import project
        from flows.aliases import restore as restore_ledger
        from flows.champion import champion_problem
        from flows.ledger import Ledger

        client, ledger = MlflowClient(), Ledger.of(config.model_name)
        restored = restore_ledger(client, ledger) if restore else []
        found = project(client, ledger)
        problem = champion_problem(client, found)
    result = {
        "model": found.model,
        **found.standing.model_dump(),
        "verified": len(found.entries),
        "restored": restored,
        "problem": problem,
        "foreign": [{"name": each.name, "reason": each.reason} for each in found.foreign],
        "entries": [each.model_dump(mode="json") | {"why": each.why, "sha256": each.digest} for each in found.entries],
    }
    show(result, as_json, [*_table(found), *([problem] if problem else [])])


def show_changed(done: "Changed", as_json: bool) -> None:
    """Print who is champion now."""
    already = ", which was done already" if done.already else ""
    show(done.model_dump(mode="json"), as_json, [f"{done.version.uri} is champion{already}: {done.entry}"])


def _table(found: "History") -> Iterator[str]:
    """The ledger for people."""
    for each in found.foreign:
        yield f"foreign object among the entries, which decides nothing (docs/runbook/ledger-broken.md): {each}"
    if found.head is None:
        yield f"the ledger of {found.model} is empty: the first verdict of `darkroom promote` begins it"
        return
    rows = [_row(entry) for entry in found.entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ", ".join(f"{title} {number or 'none'}" for title, number in found.standing.model_dump().items())
    yield f"{len(found.entries)} entries, each verified against the one before; the last is sha256 {found.head.digest}"


def _row(entry: "Entry") -> tuple[str, ...]:
    move = f"{entry.from_version or '–'} → {entry.to_version}" if entry.moves else f"({entry.version})"
    return str(entry.number), f"{entry.when:%Y-%m-%d %H:%M}", entry.who, entry.what, move, " ".join(entry.why.split())
