"""``darkroom data``: versions of a data set, their differences, checkout, and takedown of images."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.common.errors import UserError
from flows.cli.command import CommandOutput, command, connect

if TYPE_CHECKING:
    from diffusion.data.manifest import FileEntry
    from diffusion.data.versions.takedown_records import Chosen
    from diffusion.data.versions.versions import Difference
    from flows.config import Params
    from flows.datasets.dvc import StoredFiles

app = typer.Typer(
    name="data", help="Versions of a data set: list, show, compare, check out; take images down.", no_args_is_help=True
)
All = Annotated[bool, typer.Option("--all", help="Show complete lists instead of the first 20 entries.")]
FIRST = 20
"""Number of list entries shown by default."""


@command(app)
def log(config: "Params") -> CommandOutput:
    """List all versions known on this machine, newest first; the current one, in data/NAME, is marked with a star.

    Example:  darkroom data log --dataset faces
    """
    from diffusion.data.versions.versions import history

    folder = config.dataset_folder
    entries = history(folder, _in_cache(folder))
    head = f"  {'version':<12}  {'parent':<12}  {'added':>9} {'removed':>9} {'kept':>9} {'quarantined':>11}  change"
    rows = [
        f"{'*' if each.current else ' '} {each.digest[:12]}  {(each.parent or '')[:12]:<12}  "
        f"{each.added:>9,} {each.removed:>9,} {each.kept:>9,} "
        f"{_count(each.quarantined):>11}  {each.change}"
        for each in entries
    ]
    versions = [each.model_dump(mode="json") for each in entries]
    return CommandOutput({"dataset": folder.name, "versions": versions}, [head, *rows])


@command(app, "show")
def show_version(
    config: "Params",
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Prefix of a version's digest; default: the current one.")
    ] = None,
    everything: All = False,
) -> CommandOutput:
    """Show the contents of a version, and which sources were quarantined and why.

    Example:  darkroom data show 3f9c21d0 --dataset faces --all
    """
    from diffusion.data.versions.versions import resolve
    from diffusion.data.versions.versions import show as contents_of

    folder = config.dataset_folder
    limit = None if everything else FIRST
    found = contents_of(folder, resolve(folder, version), _in_cache(folder), limit)
    classes = [f"  {name}: {count:,}" for name, count in found.classes.items()][:limit]
    quarantined = [f"  {each.source}: {each.reason}" for each in found.quarantined or ()]
    lines = [
        f"version    {found.digest}, from {found.change}" + (f" of {found.parent[:12]}" if found.parent else ""),
        f"content    {found.content_digest}",
        f"images     {found.kept:,} of {found.storage.size}×{found.storage.size} in {found.channels} channel(s): "
        + ", ".join(f"{count:,} {split.replace('_', '-')}" for split, count in found.splits.items()),
        f"shards     {found.shards:,}, {found.shard_bytes:,} bytes",
        f"read       {', '.join(f'{count:,} {outcome}' for outcome, count in found.outcomes.items())}",
        *([f"classes    {len(found.classes):,}", *classes, *_more(len(found.classes), classes)] if classes else []),
        f"quarantine {_count(found.quarantined_count)}",
        *quarantined,
        *_more(found.quarantined_count or 0, quarantined),
    ]
    return CommandOutput(found, lines)


@command(app)
def diff(
    config: "Params",
    before: Annotated[
        str | None, typer.Argument(metavar="A", help="Old version; default: the parent of the new one.")
    ] = None,
    after: Annotated[str | None, typer.Argument(metavar="B", help="New version; default: the current one.")] = None,
    everything: All = False,
) -> CommandOutput:
    """Show the differences between two versions, image by image.

    Example:  darkroom data diff 3f9c21d0 --dataset faces
    """
    from diffusion.data.versions.versions import diff as difference_of
    from diffusion.data.versions.versions import resolve

    folder = config.dataset_folder
    new = resolve(folder, after)
    if before is None and new.parent is None:
        raise UserError(f"{new.digest[:12]} is the first version of data set {folder.name}: give two versions")
    old = resolve(folder, before or new.parent)
    found = difference_of(folder, old, new, None if everything else FIRST, _in_cache(folder))
    return CommandOutput({"dataset": folder.name, **found.model_dump(mode="json")}, _diff_lines(found))


@command(app)
def checkout(
    config: "Params",
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Prefix of the version's digest.")],
    with_removed: Annotated[
        bool, typer.Option("--with-removed", help="Allow a version with images that have since been taken down.")
    ] = False,
    without_shards: Annotated[
        bool,
        typer.Option("--without-shards", help="Only manifest and tables; training.stream_bytes fetches shards later."),
    ] = False,
) -> CommandOutput:
    """Restore a version into data/NAME, verify every file, and make it the base of the next ingest.

    Files come from the folder itself, DVC's cache, or S3. `darkroom data log` still lists all other versions.

    Example:  darkroom data checkout 3f9c21d0 --dataset faces
    """
    folder = config.dataset_folder
    from flows.datasets.checkout import checkout as make_current

    done = make_current(folder, version, _connect_remote, with_removed, without_shards, to_build_on=True)
    lines = [
        f"{done.kept:,} images in {done.folder}: version {done.digest[:12]}, {len(done.restored):,} files restored",
        f"content {done.content_digest}",
    ]
    return CommandOutput(done, lines)


@command(app)
def remove(
    config: "Params",
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY|PATTERN…", help="Image keys (8 or more hex digits) or source name patterns (* as wildcard)."
        ),
    ] = None,
    source: Annotated[list[str], typer.Option(metavar="PATTERN", help="Source name pattern.")] = [],  # noqa: B006
    label: Annotated[str | None, typer.Option(help="Only images of this class.")] = None,
    reason: Annotated[
        str, typer.Option(help="One-line reason, stored in the record; required except with --dry-run.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the images that would be removed, and their source names.")
    ] = False,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Also delete the affected versions' files from caches, the DVC remote, reports and MLflow runs, "
            "unless other versions need them. The affected versions can no longer be checked out.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")] = False,
) -> CommandOutput:
    """Take images down: create a version without them, and exclude them from every later ingest.

    Only the affected shards are rewritten. Runs, model versions and sampling batches that derive from the images are
    listed, and tagged in MLflow. Generated images are never deleted.

    Example:  darkroom data remove 'alice/*' --dataset faces --reason 'consent withdrawn' --purge
    """
    from diffusion.data.versions.takedown import choose
    from diffusion.data.versions.takedown_records import Selection, Selector, is_key

    keys = [each for each in images or [] if is_key(each)]
    patterns = [each for each in images or [] if not is_key(each)]
    selection = Selection(prefixes=keys, sources=[*patterns, *source], label=label)
    # Raises UserError if it is empty or malformed.
    Selector(selection)
    if dry_run and purge:
        raise UserError("--dry-run only says which images would be removed: leave --purge out")
    if dry_run:
        chosen, names = choose(config.dataset_folder, selection)
        about = {"dataset": config.training.dataset, "dry_run": True, "names": names}
        return CommandOutput(about | chosen.model_dump(mode="json"), _dry_run_lines(chosen, names))
    if not reason.strip():
        raise UserError("a removal needs a --reason: one line that is stored in the manifest")
    if not yes:
        what = f"take down {', '.join([*keys, *patterns, *source])} from data set {config.training.dataset}"
        if not sys.stdin.isatty():
            raise UserError(f"to {what}, give --yes (or --dry-run to list the images)")
        typer.confirm(f"Really {what}?", abort=True, err=True)
    with connect("prefect", "mlflow", "s3"):
        from flows.takedown import takedown

        done = takedown(config, selection, reason, purge)
    return CommandOutput({"dataset": config.training.dataset, **done.model_dump(mode="json")}, done.lines())


def _in_cache(folder: Path) -> "Callable[[FileEntry], Path | None]":
    """Lookup of files of older versions in DVC's cache, which is opened on first use."""

    @cache
    def kept() -> "StoredFiles":
        from flows.datasets.dvc import StoredFiles

        return StoredFiles(folder.name)

    return lambda entry: kept().find(entry)


def _connect_remote() -> str:
    """Connect to the S3 server; returns the URL of the DVC remote."""
    from flows.environment import data_source
    from flows.local_stack.stack import join_servers

    join_servers("s3")
    return data_source()


def _dry_run_lines(chosen: "Chosen", names: list[str]) -> list[str]:
    shown = [f"  {name}" for name in names[:FIRST]]
    near_duplicates = [f"  {key}" for key in chosen.near_copies[:FIRST]]
    return [
        f"{chosen.images:,} images would be removed under {len(names):,} names ({chosen.duplicates:,} copies, "
        f"{chosen.refused:,} quarantined); {len(chosen.parts):,} shards would be rewritten",
        *shown,
        *_more(len(names), shown, "--json"),
        *([f"{len(chosen.near_copies):,} near-duplicates would stay:", *near_duplicates] if near_duplicates else []),
        *_more(len(chosen.near_copies), near_duplicates, "--json"),
    ]


def _diff_lines(found: "Difference") -> list[str]:
    lines = [f"{found.before[:12]} → {found.after[:12]}: {found.kept[0]:,} → {found.kept[1]:,} images"]
    if found.same_content:
        lines.append("the same content")
    for what, group in (("added", found.added), ("removed", found.removed)):
        lines += _group(what, group, lambda each: f"{each.key[:16]} {each.source or ''} {each.label or ''}".rstrip())
    lines += _group("changed", found.changed, lambda each: f"{each.before.key[:16]} {_changes(each)}")
    for what, refusals in (("quarantined now", found.quarantined), ("no longer quarantined", found.cleared)):
        lines += _group(what, refusals, lambda each: f"{each.source}: {each.reason}")
    lines += [f"setting    {name}: {old} → {new}" for name, (old, new) in found.storage.items()]
    lines += [f"class      {name}: {old:,} → {new:,}" for name, (old, new) in found.classes.items()]
    return lines + [f"cannot be read any more: {name}" for name in found.unread]


def _group(what: str, group: Any, line: Callable[[Any], str]) -> list[str]:
    if group is None:
        return [f"{what:<10} unknown: a table that is needed is no longer here"]
    if not group.count:
        return []
    rows = [f"  {line(each)}" for each in group.samples]
    return [f"{what:<10} {group.count:,}", *rows, *_more(group.count, rows)]


def _changes(changed: Any) -> str:
    old, new = changed.before, changed.after
    names = ("split", "label", "caption")
    return ", ".join(f"{n}: {getattr(old, n)} → {getattr(new, n)}" for n in names if getattr(old, n) != getattr(new, n))


def _more(count: int, shown: list[str], option: str = "--all") -> list[str]:
    return [f"  … and {count - len(shown):,} more: {option} shows them"] if count > len(shown) else []


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
