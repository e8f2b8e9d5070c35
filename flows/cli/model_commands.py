"""``darkroom model``: history, rollback, release, model card, explanation and export of registered models."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from flows.cli.command import (
    VERBOSITY,
    CommandOutput,
    Model,
    ModelUri,
    Reason,
    Seed,
    check_model_uri,
    command,
    connect,
    is_file,
)

if TYPE_CHECKING:
    from flows.config import Params
    from flows.registry.champion import ChampionChange
    from flows.registry.ledger import History
    from flows.registry.release import Released

LONGEST_REASON = 80  # characters of a reason in the table of a history, unless -v is given
app = typer.Typer(
    name="model", help="Models: history, rollback, release, card, explanation, export.", no_args_is_help=True
)
registry_command = command(app, dataset_argument=True, servers=("mlflow", "s3"))


@registry_command
def history(
    config: "Params",
    restore: Annotated[bool, Option("--restore", help="First restore missing entries from MLflow's copies.")] = False,
) -> CommandOutput:
    """Show the ledger of champions with dates, authors and reasons; verify its hash chain and repair aliases.

    Example:  darkroom model history --dataset faces
    """
    from flows.cli.checks import require_model

    require_model(config)
    from mlflow.client import MlflowClient

    from flows.registry.aliases import project
    from flows.registry.aliases import restore as restore_ledger
    from flows.registry.champion import champion_problem
    from flows.registry.ledger import Ledger

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
        "foreign": [{"name": name, "reason": reason} for name, reason in found.foreign.items()],
        "entries": [each.model_dump(mode="json") | {"why": each.why, "sha256": each.digest} for each in found.entries],
    }
    return CommandOutput(result, [*_table(found), *filter(None, [problem])])


@registry_command
def rollback(config: "Params", reason: Reason = None) -> CommandOutput:
    """Make the previous champion champion again; repeat to go back further. Needs no Prefect server.

    The gate never promotes a rolled-back version again; `darkroom promote --to` does.

    Example:  darkroom model rollback --dataset faces --reason "draws three eyes"
    """
    from flows.cli.checks import require_model

    require_model(config)
    from flows.registry.champion import roll_back

    return new_champion(roll_back(config.model_name, reason))


@command(app)
def release(
    model: Annotated[
        str,
        Argument(metavar="URI", help="Model in staging: models:/NAME@champion or /NUMBER.", callback=check_model_uri),
    ],
    reason: Reason = None,
) -> CommandOutput:
    """Copy a version from the staging registry, with run, evaluation and card, and make it champion here.

    DARKROOM_STAGING_* locate staging: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and _PASSWORD, BUCKET, AWS_*, or
    HOME, the folder of a local stack. A version that is not champion there needs --reason. Needs no Prefect server.

    Example:  darkroom model release models:/faces@champion
    """
    from flows.environment import staging

    staging()
    with connect("mlflow", "s3"):
        from flows.registry.release import release

        return new_champion(release(model, reason))


@registry_command
def card(config: "Params", model: ModelUri = None) -> CommandOutput:
    """Print the model card of a registered version, in Markdown.

    Example:  darkroom model card --model models:/faces@champion
    """
    from flows.cli.checks import require_version

    require_version(model or config.champion)
    from mlflow.client import MlflowClient

    from flows.registry.model_versions import resolve

    client = MlflowClient()
    version = resolve(client, model or config.champion)
    text = client.get_model_version(version.model, str(version.number)).description or ""
    return CommandOutput({"model": version.uri, "card": text}, text.splitlines())


@command(app, servers=("prefect", "mlflow", "s3"))
def explain(
    config: "Params",
    model: ModelUri = None,
    output: Annotated[Path | None, Option("--out", help="Output folder; default: reports/DATASET/explain.")] = None,
    seed: Seed = 0,
) -> CommandOutput:
    """Plot the forward process, one training step and the reverse process of a registered model.

    Example:  darkroom model explain --model models:/faces@champion --dataset faces
    """
    from flows.cli.checks import require_version

    require_version(model or config.champion)
    from flows.sample import explain

    done = explain(config, model or config.champion, output or config.report_folder / "explain", seed)
    return CommandOutput(done, map(str, done.files))


@command(app)
def export(
    config: "Params",
    to: Annotated[Literal["diffusers"], Option(help="Target library.")],
    folder: Annotated[Path, Option("--out", metavar="FOLDER", help="Output folder, which must not exist yet.")],
    model: Model = None,
) -> CommandOutput:
    """Export a model as a diffusers pipeline folder, with the sampler settings of sampling.*.

    Example:  darkroom model export --to diffusers --model models:/faces@champion --out exports/faces

    Example:  darkroom model export --to diffusers --model runs/faces/final.safetensors --out exports/faces
    """
    if is_file(model):
        from diffusion.common.model_files import read_header

        read_header(Path(model))
        from diffusion.diffusers_format.export import export_to_diffusers

        done = export_to_diffusers(Path(model), folder, config.sampling)
    else:
        with connect("mlflow", "s3"):
            from flows.cli.checks import require_version

            require_version(model or config.champion)
            from diffusion.diffusers_format.export import export_to_diffusers
            from flows.sample import fetch

            # The plain function, outside of Prefect.
            version, weights = fetch.fn(model or config.champion)
            done = export_to_diffusers(weights, folder, config.sampling, version.uri, version.run_id)
    lines = [f"{done.folder}: {done.pipeline}, {len(done.files)} files", f"how to use it: {done.folder / 'README.md'}"]
    return CommandOutput(done.model_dump(mode="json") | {"to": to}, lines)


def new_champion(done: "ChampionChange | Released") -> CommandOutput:
    """Output of a command that changed the champion."""
    already = ", which was done already" if done.already else ""
    return CommandOutput(done, [f"{done.version.uri} is champion{already}: {done.entry}"])


def _table(found: "History") -> Iterator[str]:
    for name, reason in found.foreign.items():
        yield f"foreign object among the entries, ignored (docs/operations/runbook/ledger-broken.md): {name!a} {reason}"
    if found.head is None:
        yield f"the ledger of {found.model} is empty: the first verdict of `darkroom promote` starts it"
        return
    rows = [
        (
            str(entry.number),
            f"{entry.when:%Y-%m-%d %H:%M}",
            entry.who,
            entry.what,
            f"{entry.from_version or '–'} → {entry.to_version}" if entry.moves else f"({entry.version})",
            why
            if VERBOSITY.get() == "verbose" or len(why := " ".join(entry.why.split())) <= LONGEST_REASON
            else f"{why[:LONGEST_REASON]}…",
        )
        for entry in found.entries
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ", ".join(f"{title} {number or 'none'}" for title, number in found.standing.model_dump().items())
    yield f"{len(found.entries)} entries, each verified against the one before; the last is sha256 {found.head.digest}"
