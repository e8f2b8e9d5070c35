"""``darkroom data``: what makes versions of a data set (curation and takedown)."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.escaping import pluralize
from diffusion.common.files import require_writable
from flows.cli.command import CommandOutput, Local, command, connect
from flows.cli.data_commands import MAX_SHOWN, app, section
from flows.cli.dry_run import reach_shards

if TYPE_CHECKING:
    from diffusion.curation.lists import ListChange
    from diffusion.data.versions.takedown_records import Selection
    from flows.config import Params

Images = Annotated[
    list[str] | None,
    Argument(metavar="KEY|PATTERN…", help="Image keys (8 or more hex digits) or patterns (*) of source names."),
]
TABLE = ".csv, .jsonl or .parquet of FiftyOne, cleanvision, a spreadsheet …"
Purge = Annotated[
    bool,
    Option(
        "--purge",
        help="Also delete the affected versions' files from caches, the DVC remote, reports and MLflow runs, "
        "unless other versions need them. The affected versions can no longer be checked out.",
    ),
]


@command(app)
def curate(
    config: "Params",
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what the rules would drop, and why.")] = False,
    report: Annotated[
        Path | None, Option(metavar="PAGE", help="Only write a page to choose thresholds on, an HTML file.")
    ] = None,
    drop: Annotated[Path | None, Option(metavar="TABLE", help=f"Drop the images in this table, {TABLE}.")] = None,
    label: Annotated[Path | None, Option(metavar="TABLE", help=f"Label images as in this table, {TABLE}.")] = None,
    name: Annotated[str | None, Option(help="Name of the list; default: the table's, without its extension.")] = None,
    withdraw: Annotated[str | None, Option(metavar="NAME", help="Undo what this list changed.")] = None,
    local: Local = False,
) -> CommandOutput:
    """Apply the rules of the section curation and lists of images: drop what they say, and bring others back.

    Makes a new version. Dropped images keep their bytes and their place in the records; ingest applies the same rules
    and lists.

    Example:  darkroom data curate --dataset faces --report curation.html

    Example:  darkroom data curate --dataset faces --drop blurred.csv
    """
    change = _list_change(drop, label, name, withdraw)
    if report is not None:
        if dry_run or local or change:
            raise UserError("--report only writes a page: leave --dry-run, --local and lists out")
        return _write_curation_page(config, report)
    if dry_run or local:
        from diffusion.api import engine

        with reach_shards(config, dry_run) as (remote, progress):
            result = engine.curate(config, dry_run=dry_run, change=change, progress=progress, remote=remote)
        return CommandOutput(result.model_dump(mode="json") | {"dry_run": dry_run}, result.lines(dry_run))
    with connect("prefect", "s3"):
        from flows.curate import curate as curate_flow

        outcome = curate_flow(config, change)
    value = outcome.result.model_dump(mode="json")
    value |= {"dvc_digest": outcome.version.digest, "report": str(outcome.report)}
    return CommandOutput(value, [*outcome.result.lines(), f"report: {outcome.report}"])


def _list_change(drop: Path | None, label: Path | None, name: str | None, withdraw: str | None) -> "ListChange | None":
    """List that the options record or withdraw; None without any of them."""
    table = drop or label
    if sum(option is not None for option in (drop, label, withdraw)) > 1:
        raise UserError("--drop, --label and --withdraw change one list at a time: give one of them")
    if name is not None and table is None:
        raise UserError("--name names the list of --drop or --label: give one of them, or leave it out")
    if table is None and withdraw is None:
        return None
    from pydantic import ValidationError

    from diffusion.curation.lists import ListChange

    try:
        list_name = withdraw or name or (table.stem if table else "")
        return ListChange(name=list_name, kind="label" if label else "drop", table=table)
    except ValidationError as error:
        raise UserError(describe_validation_error(error.errors()[0], f"--name {list_name}")) from error


def _write_curation_page(config: "Params", report: Path) -> CommandOutput:
    from diffusion.data.manifest import read_manifest

    if report.suffix != ".html" or report.is_dir():
        raise UserError(f"--report {report}: give the path of an .html file")
    read_manifest(folder := config.dataset_folder)
    require_writable(report.parent, f"--report {report}")
    from diffusion.curation.report import write_curation_report

    sections = config.curation, config.ingest, config.evaluation
    with reach_shards(config) as (remote, progress):
        page = write_curation_report(folder, report, *sections, progress, remote=remote)
    return CommandOutput(page, page.lines())


@command(app)
def remove(
    config: "Params",
    images: Images = None,
    source: Annotated[list[str], Option(metavar="PATTERN", help="Source name pattern.")] = [],  # noqa: B006
    label: Annotated[str | None, Option(help="Only images of this class.")] = None,
    reason: Annotated[str, Option(help="One-line reason, stored in the record; required except with --dry-run.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be removed, with source names.")] = False,
    purge: Purge = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Skip the confirmation.")] = False,
) -> CommandOutput:
    """Take images down: create a version without them, and exclude them from every later ingest.

    Only the affected shards are rewritten. Runs, model versions and sampling batches that derive from the images are
    listed, and tagged in MLflow. Generated images are never deleted.

    Example:  darkroom data remove 'alice/*' --dataset faces --reason 'consent withdrawn' --purge
    """
    from diffusion.data.versions.takedown_records import Selection, Selector, is_key

    keys = list(filter(is_key, images or ()))
    sources = [*(pattern for pattern in images or () if not is_key(pattern)), *source]
    selection = Selection(prefixes=keys, sources=sources, label=label)
    # Raises UserError if it is empty or malformed.
    Selector(selection)
    if dry_run:
        if purge:
            raise UserError("--dry-run only says which images would be removed: leave --purge out")
        return _preview_removal(config, selection)
    if not reason.strip():
        raise UserError("a removal needs a --reason: one line that is stored in the manifest")
    if not yes:
        _confirm(f"take down {', '.join([*keys, *sources])} from data set {config.training.dataset}")
    _require_removable(config, selection, reason)
    with connect("prefect", "mlflow", "s3"):
        _require_published(config)
        from flows.takedown import takedown

        result = takedown(config, selection, reason, purge)
    return CommandOutput({"dataset": config.training.dataset, **result.model_dump(mode="json")}, result.lines())


def _preview_removal(config: "Params", selection: "Selection") -> CommandOutput:
    from diffusion.data.versions.takedown import choose_images

    preview, names = choose_images(config.dataset_folder, selection)
    fields = {"dataset": config.training.dataset, "dry_run": True, "names": names}
    lines = [
        f"{pluralize(preview.images, 'image')} would be removed "
        f"({pluralize(preview.duplicates, 'copy', 'copies')}, {preview.refused:,} quarantined)"
        f" and {pluralize(len(preview.parts), 'shard')} rewritten",
        *section("source names", len(names), names[:MAX_SHOWN], "--json"),
    ]
    sections = {
        "dropped near-duplicates that go, too": preview.dropped_copies or [],
        "near-duplicates that stay": preview.near_copies,
    }
    for title, copies in sections.items():
        lines += section(title, len(copies), copies[:MAX_SHOWN], "--json") if copies else []
    return CommandOutput(fields | preview.model_dump(mode="json"), lines)


def _confirm(action: str) -> None:
    if not sys.stdin.isatty():
        raise UserError(f"to {action}, give --yes (or --dry-run to list the images)")
    typer.confirm(f"Really {action}?", abort=True, err=True)


def _require_removable(config: "Params", selection: "Selection", reason: str) -> None:
    from diffusion.data.versions.takedown import require_removable

    if (config.dataset_folder / "manifest.json").is_file():
        require_removable(config.dataset_folder, selection, reason)


def _require_published(config: "Params") -> None:
    """Raise UserError, which says what there is, for a data set that is neither here nor in the bucket."""
    from diffusion.data.manifest import read_manifest
    from flows.datasets.catalog import Catalog
    from flows.environment import data_source

    is_here = (config.dataset_folder / "manifest.json").is_file()
    if not is_here and not Catalog.of(config.training.dataset, data_source()).versions():
        read_manifest(config.dataset_folder)
