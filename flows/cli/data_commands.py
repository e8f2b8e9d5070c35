"""``darkroom data``: versions of a data set, their differences, checkout, and takedown of images."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from flows.cli.command import CommandOutput, command, connect

if TYPE_CHECKING:
    from diffusion.data.manifest import FileEntry
    from diffusion.data.versions.versions import Difference
    from flows.config import Params
    from flows.datasets.dvc import StoredFiles

app = typer.Typer(
    name="data", help="Data sets: versions, differences, checkout, takedown of images.", no_args_is_help=True
)
All = Annotated[bool, Option("--all", help="Show complete lists instead of the first 20 entries.")]
FIRST = 20  # number of list entries shown by default


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
        f"{'*' if each.current else ' '} {each.digest[:12]}  {(each.parent or '')[:12]:<12}  {each.added:>9,} "
        f"{each.removed:>9,} {each.kept:>9,} {_count(each.quarantined):>11}  {each.change}"
        for each in entries
    ]
    value = {"dataset": folder.name, "versions": [each.model_dump(mode="json") for each in entries]}
    return CommandOutput(value, [head, *rows])


@command(app, "show")
def show_version(
    config: "Params",
    version: Annotated[str | None, Argument(help="Prefix of a version's digest; default: the current one.")] = None,
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
    classes = [f"{name}: {count:,}" for name, count in found.classes.items()]
    quarantined = [f"{each.source}: {each.reason}" for each in found.quarantined or ()]
    lines = [
        f"version    {found.digest}, from {found.change}" + (f" of {found.parent[:12]}" if found.parent else ""),
        f"content    {found.content_digest}",
        f"images     {found.kept:,} of {found.storage.size}×{found.storage.size} in {found.channels} channel(s): "
        + ", ".join(f"{count:,} {split.replace('_', '-')}" for split, count in found.splits.items()),
        f"shards     {found.shards:,}, {found.shard_bytes:,} bytes",
        f"read       {', '.join(f'{count:,} {outcome}' for outcome, count in found.outcomes.items())}",
        *(_section("classes   ", len(classes), classes[:limit]) if classes else []),
        *_section("quarantine", found.quarantined_count, quarantined),
    ]
    return CommandOutput(found, lines)


@command(app)
def diff(
    config: "Params",
    before: Annotated[str | None, Argument(metavar="A", help="Old version; default: the new one's parent.")] = None,
    after: Annotated[str | None, Argument(metavar="B", help="New version; default: the current one.")] = None,
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
    version: Annotated[str, Argument(metavar="VERSION", help="Prefix of the version's digest.")],
    with_removed: Annotated[bool, Option("--with-removed", help="Allow images that were taken down since.")] = False,
    without_shards: Annotated[
        bool, Option("--without-shards", help="Only manifest and tables; training.stream_bytes fetches shards later.")
    ] = False,
) -> CommandOutput:
    """Restore a version into data/NAME, verify every file, and make it the base of the next ingest.

    Files come from the folder itself, DVC's cache, or S3. `darkroom data log` still lists all other versions.

    Example:  darkroom data checkout 3f9c21d0 --dataset faces
    """
    folder = config.dataset_folder
    from flows.datasets.checkout import checkout as make_current

    done = make_current(folder, version, _connect_remote, with_removed, without_shards, to_build_on=True)
    about = f"version {done.digest[:12]}, {len(done.restored):,} files restored"
    return CommandOutput(done, [f"{done.kept:,} images in {done.folder}: {about}", f"content {done.content_digest}"])


@command(app)
def remove(
    config: "Params",
    images: Annotated[
        list[str] | None,
        Argument(metavar="KEY|PATTERN…", help="Image keys (8 or more hex digits) or patterns (*) of source names."),
    ] = None,
    source: Annotated[list[str], Option(metavar="PATTERN", help="Source name pattern.")] = [],  # noqa: B006
    label: Annotated[str | None, Option(help="Only images of this class.")] = None,
    reason: Annotated[str, Option(help="One-line reason, stored in the record; required except with --dry-run.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be removed, with source names.")] = False,
    purge: Annotated[
        bool,
        Option(
            "--purge",
            help="Also delete the affected versions' files from caches, the DVC remote, reports and MLflow runs, "
            "unless other versions need them. The affected versions can no longer be checked out.",
        ),
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Skip the confirmation.")] = False,
) -> CommandOutput:
    """Take images down: create a version without them, and exclude them from every later ingest.

    Only the affected shards are rewritten. Runs, model versions and sampling batches that derive from the images are
    listed, and tagged in MLflow. Generated images are never deleted.

    Example:  darkroom data remove 'alice/*' --dataset faces --reason 'consent withdrawn' --purge
    """
    from diffusion.data.manifest import read_manifest, work_folder
    from diffusion.data.versions.takedown import choose
    from diffusion.data.versions.takedown_records import Selection, Selector, is_key, removals

    keys = list(filter(is_key, images or ()))
    sources = [*(each for each in images or () if not is_key(each)), *source]
    selection = Selection(prefixes=keys, sources=sources, label=label)
    # Raises UserError if it is empty or malformed.
    Selector(selection)
    if dry_run and purge:
        raise UserError("--dry-run only says which images would be removed: leave --purge out")
    if dry_run:
        chosen, names = choose(config.dataset_folder, selection)
        about = {"dataset": config.training.dataset, "dry_run": True, "names": names}
        copies = chosen.near_copies
        lines = [
            f"{chosen.images:,} images would be removed ({chosen.duplicates:,} copies, {chosen.refused:,} quarantined) "
            f"and {len(chosen.parts):,} shards rewritten",
            *_section("source names", len(names), names[:FIRST], "--json"),
            *(_section("near-duplicates that stay", len(copies), copies[:FIRST], "--json") if copies else []),
        ]
        return CommandOutput(about | chosen.model_dump(mode="json"), lines)
    if not reason.strip():
        raise UserError("a removal needs a --reason: one line that is stored in the manifest")
    if not yes:
        what = f"take down {', '.join([*keys, *sources])} from data set {config.training.dataset}"
        if not sys.stdin.isatty():
            raise UserError(f"to {what}, give --yes (or --dry-run to list the images)")
        typer.confirm(f"Really {what}?", abort=True, err=True)
    if (config.dataset_folder / "manifest.json").is_file() and not any(removals(work_folder(config.dataset_folder))):
        # An earlier takedown may have removed them already, which its repetition reports.
        choose(config.dataset_folder, selection)
    with connect("prefect", "mlflow", "s3"):
        if not (config.dataset_folder / "manifest.json").is_file():
            from flows.datasets.catalog import Catalog
            from flows.environment import data_source

            if not Catalog.of(config.training.dataset, data_source()).versions():
                read_manifest(config.dataset_folder)  # says what there is
        from flows.takedown import takedown

        done = takedown(config, selection, reason, purge)
    return CommandOutput({"dataset": config.training.dataset, **done.model_dump(mode="json")}, done.lines())


def _in_cache(folder: Path) -> "Callable[[FileEntry], Path | None]":
    """Lookup of files of older versions in DVC's cache, which is opened on first use."""

    @cache
    def stored() -> "StoredFiles":
        from flows.datasets.dvc import StoredFiles

        return StoredFiles(folder.name)

    return lambda entry: stored().find(entry)


def _connect_remote() -> str:
    from flows.environment import data_source
    from flows.local_stack.stack import join_servers

    join_servers("s3")
    return data_source()


def _diff_lines(found: "Difference") -> Iterator[str]:
    yield f"{found.before[:12]} → {found.after[:12]}: {found.kept[0]:,} → {found.kept[1]:,} images"
    if found.same_content:
        yield "the same content"
    sections: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("added", found.added, _image),
        ("removed", found.removed, _image),
        ("changed", found.changed, lambda each: f"{each.before.key[:16]} {_changes(each.before, each.after)}"),
        ("quarantined now", found.quarantined, lambda each: f"{each.source}: {each.reason}"),
        ("no longer quarantined", found.cleared, lambda each: f"{each.source}: {each.reason}"),
    ]
    for what, group, line in sections:
        if group is None:
            yield f"{what:<10} unknown: a table that is needed is no longer here"
        elif group.count:
            yield from _section(f"{what:<10}", group.count, map(line, group.samples))
    yield from (f"setting    {name}: {old} → {new}" for name, (old, new) in found.storage.items())
    yield from (f"class      {name}: {old:,} → {new:,}" for name, (old, new) in found.classes.items())
    yield from (f"cannot be read any more: {name}" for name in found.unread)


def _image(sample: Any) -> str:
    return f"{sample.key[:16]} {sample.source or ''} {sample.label or ''}".rstrip()


def _changes(old: Any, new: Any) -> str:
    names = ("split", "label", "caption")
    return ", ".join(f"{n}: {getattr(old, n)} → {getattr(new, n)}" for n in names if getattr(old, n) != getattr(new, n))


def _section(title: str, count: int | None, rows: Iterable[str], option: str = "--all") -> list[str]:
    shown = [f"  {row}" for row in rows]
    more = (count or 0) - len(shown)
    return [f"{title} {_count(count)}", *shown, *([f"  … and {more:,} more: {option} shows them"] if more > 0 else [])]


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
