"""``darkroom data``: versions of a data set, their differences, and checkout."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import pluralize
from flows.cli.command import CommandOutput, Local, command

if TYPE_CHECKING:
    from diffusion.data.manifest import FileEntry, Manifest
    from diffusion.data.versions.difference import Difference
    from diffusion.data.versions.versions import Contents
    from flows.config import Params
    from flows.datasets.dvc import StoredFiles

app = typer.Typer(
    name="data", help="Data sets: versions, differences, checkout, takedown of images.", no_args_is_help=True
)
All = Annotated[bool, Option("--all", help="Show complete lists instead of the first 20 entries.")]
MAX_SHOWN = 20
"""Maximum number of entries of a list that are shown, unless all are asked for."""


@command(app)
def log(config: "Params", local: Local = False) -> CommandOutput:
    """List all versions, here and in the bucket, newest first; the current one, in data/NAME, is marked with a star.

    Example:  darkroom data log --dataset faces
    """
    from diffusion.data.versions.versions import history

    folder = config.dataset_folder
    published: dict[str, Manifest] = {}
    problem: str | None = None
    try:
        published = {} if local else _published_versions(folder.name)
    except DarkroomError as error:
        problem = str(error)
    entries = history(folder, _make_cache_lookup(folder), published)
    has_dropped = any(entry.dropped for entry in entries)
    columns = f"{'added':>9} {'removed':>9} {'kept':>9}{'   dropped' if has_dropped else ''}"
    head = f"  {'version':<12}  {'parent':<12}  {columns} {'quarantined':>11}  change"
    rows = [
        f"{'*' if entry.current else ' '} {entry.digest[:12]}  {(entry.parent or '')[:12]:<12}  {entry.added:>9,} "
        f"{entry.removed:>9,} {entry.kept:>9,}{f' {entry.dropped:>9,}' if has_dropped else ''} "
        f"{_count(entry.quarantined):>11}  {entry.change}{'' if entry.local else ', in the bucket'}"
        for entry in entries
    ]
    if not any(entry.current for entry in entries):
        rows.append(f"none of them is in {folder}: darkroom data checkout --dataset {folder.name}")
    rows += [f"versions in the bucket are not listed: {problem}"] if problem else []
    value = {"dataset": folder.name, "versions": [entry.model_dump(mode="json") for entry in entries]}
    return CommandOutput(value | {"error": problem}, [head, *rows])


@command(app, "show")
def show_version(
    config: "Params",
    version: Annotated[str | None, Argument(help="Prefix of a version's digest; default: the current one.")] = None,
    everything: All = False,
    local: Local = False,
) -> CommandOutput:
    """Show the contents of a version, and which images were dropped, and which sources quarantined, and why.

    Example:  darkroom data show 3f9c21d0 --dataset faces --all
    """
    from diffusion.data.versions.versions import resolve
    from diffusion.data.versions.versions import show as contents_of

    folder = config.dataset_folder
    limit = None if everything else MAX_SHOWN
    contents = contents_of(folder, resolve(folder, version), _make_cache_lookup(folder), limit)
    return CommandOutput(contents, _describe_contents(contents, limit))


def _describe_contents(contents: "Contents", limit: int | None) -> list[str]:
    classes = [f"{name}: {count:,}" for name, count in contents.classes.items()]
    buckets = [f"{name}: {count:,}" for name, count in (contents.buckets or {}).items()]
    quarantined_sources, dropped_images = (
        [f"{entry.source}: {entry.reason}" for entry in entries or ()]
        for entries in (contents.quarantined, contents.dropped)
    )
    rules = ", ".join(f"{entry.count:,} {entry.reason}" for entry in contents.rules or ())
    bits = contents.near_duplicate_bits
    return [
        f"version    {contents.digest}, from {contents.change}"
        + (f" of {contents.parent[:12]}" if contents.parent else ""),
        f"content    {contents.content_digest}",
        f"images     {contents.kept:,} of {'about ' if buckets else ''}{contents.storage.size}×{contents.storage.size} "
        f"in {contents.channels} channel(s): "
        + ", ".join(f"{count:,} {split.replace('_', '-')}" for split, count in contents.splits.items()),
        f"shards     {contents.shards:,}, {contents.shard_bytes:,} bytes",
        f"read       {', '.join(f'{count:,} {outcome}' for outcome, count in contents.outcomes.items())}",
        *(f"source     {source}" for source in contents.sources[:limit]),
        *(section("buckets   ", len(buckets), buckets) if buckets else []),
        *([f"near       up to {bits} of 256 bits, for ingest.near_duplicates=auto"] if bits is not None else []),
        *(f"captions   {count:,} by {captioner}" for captioner, count in contents.captioners.items()),
        *([f"masks      {contents.masks:,} images with one"] if contents.masks else []),
        *(section("classes   ", len(classes), classes[:limit]) if classes else []),
        *(f"list       {each.line}" for each in contents.lists or ()),
        *([f"labels     {contents.relabelled:,} by lists"] if contents.relabelled else []),
        *([f"rules      {rules}"] if rules else []),
        *(section("dropped   ", contents.dropped_count, dropped_images) if contents.dropped_count else []),
        *section("quarantine", contents.quarantined_count, quarantined_sources),
    ]


@command(app)
def diff(
    config: "Params",
    before: Annotated[str | None, Argument(metavar="A", help="Old version; default: the new one's parent.")] = None,
    after: Annotated[str | None, Argument(metavar="B", help="New version; default: the current one.")] = None,
    everything: All = False,
    local: Local = False,
) -> CommandOutput:
    """Show the differences between two versions, image by image.

    Example:  darkroom data diff 3f9c21d0 --dataset faces
    """
    from diffusion.data.versions.difference import diff as difference_of
    from diffusion.data.versions.versions import resolve

    folder = config.dataset_folder
    new = resolve(folder, after)
    if before is None and new.parent is None:
        raise UserError(f"{new.digest[:12]} is the first version of data set {folder.name}: give two versions")
    old = resolve(folder, before or new.parent)
    difference = difference_of(folder, old, new, None if everything else MAX_SHOWN, _make_cache_lookup(folder))
    return CommandOutput({"dataset": folder.name, **difference.model_dump(mode="json")}, _diff_lines(difference))


@command(app)
def checkout(
    config: "Params",
    version: Annotated[
        str | None, Argument(help="Prefix of the version's digest; default: the newest in the bucket.")
    ] = None,
    with_removed: Annotated[bool, Option("--with-removed", help="Allow images that were taken down since.")] = False,
    without_shards: Annotated[
        bool, Option("--without-shards", help="Only manifest and tables; training.stream_bytes fetches shards later.")
    ] = False,
) -> CommandOutput:
    """Restore a version into data/NAME, verify every file, and make it the base of the next ingest.

    Files come from the folder itself, DVC's cache, or S3. `darkroom data log` still lists all other versions.

    Example:  darkroom data checkout --dataset faces

    Example:  darkroom data checkout 3f9c21d0 --dataset faces
    """
    folder = config.dataset_folder
    from flows.datasets.checkout import checkout as make_current

    result = make_current(folder, version, _connect_remote, with_removed, without_shards, to_build_on=True)
    summary = f"version {result.digest[:12]}, {pluralize(len(result.restored), 'file')} restored"
    return CommandOutput(
        result, [f"{pluralize(result.kept, 'image')} in {result.folder}: {summary}", f"content {result.content_digest}"]
    )


def _make_cache_lookup(folder: Path) -> "Callable[[FileEntry], Path | None]":
    """Lookup of files of older versions in DVC's cache, which is opened on first use."""

    @cache
    def open_stored_files() -> "StoredFiles":
        from flows.datasets.dvc import StoredFiles

        return StoredFiles(folder.name)

    return lambda entry: open_stored_files().find(entry)


def _connect_remote() -> str:
    from flows.environment import data_source
    from flows.local_stack.http_api import require
    from flows.local_stack.stack import join_servers

    join_servers("s3")
    require("s3")
    return data_source()


def _published_versions(name: str) -> dict[str, "Manifest"]:
    """Versions of data set ``name`` in the bucket, by digest; raises DarkroomError if it cannot be listed."""
    from flows.local_stack.stack import knows_server

    if not knows_server("s3"):
        return {}
    source = _connect_remote()
    from flows.datasets.catalog import Catalog
    from flows.storage.s3 import Store, client

    # The answer is about this machine as well, so a server that is down is not waited for.
    return Catalog.of(name, source, Store(client(attempts=1))).versions()


def _diff_lines(difference: "Difference") -> Iterator[str]:
    counts = f"{difference.kept[0]:,} → {pluralize(difference.kept[1], 'image')}"
    yield f"{difference.before[:12]} → {difference.after[:12]}: {counts}"
    if difference.same_content:
        yield "the same content"
    sections: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("added", difference.added, _image),
        ("removed", difference.removed, _image),
        (
            "changed",
            difference.changed,
            lambda change: f"{change.before.key[:16]} {_changes(change.before, change.after)}",
        ),
        ("dropped now", difference.dropped, lambda change: f"{_image(change)}: {change.reason}"),
        ("no longer dropped", difference.restored, lambda change: f"{_image(change)}: {change.reason}"),
        ("quarantined now", difference.quarantined, lambda change: f"{change.source}: {change.reason}"),
        ("no longer quarantined", difference.cleared, lambda change: f"{change.source}: {change.reason}"),
    ]
    for title, group, line in sections:
        if group is None:
            yield f"{title:<10} unknown: records of one version are neither here nor in DVC's cache"
        elif group.count:
            yield from section(f"{title:<10}", group.count, map(line, group.samples))
    yield from (f"setting    {name}: {old} → {new}" for name, (old, new) in difference.storage.items())
    yield from (f"class      {name}: {old:,} → {new:,}" for name, (old, new) in difference.classes.items())
    yield from (f"cannot be read any more: {name}" for name in difference.unread)


def _image(sample: Any) -> str:
    return f"{sample.key[:16]} {sample.source or ''} {sample.label or ''}".rstrip()


def _changes(old: Any, new: Any) -> str:
    names = ("split", "label", "caption", "mask")
    return ", ".join(f"{n}: {getattr(old, n)} → {getattr(new, n)}" for n in names if getattr(old, n) != getattr(new, n))


def section(title: str, count: int | None, rows: Iterable[str], option: str = "--all") -> list[str]:
    """Lines of a list of ``count`` entries, of which ``rows`` are the first; ``option`` shows the others."""
    lines = [f"  {row}" for row in rows]
    more = (count or 0) - len(lines)
    return [f"{title} {_count(count)}", *lines, *([f"  … and {more:,} more: {option} shows them"] if more > 0 else [])]


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
