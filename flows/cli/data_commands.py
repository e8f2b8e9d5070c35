"""``darkroom data``: versions of a data set, their differences, checkout, and takedown of images."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import require_writable
from flows.cli.command import CommandOutput, Local, command, connect, display_progress

if TYPE_CHECKING:
    from diffusion.data.manifest import FileEntry, Manifest
    from diffusion.data.versions.versions import Difference
    from flows.config import Params
    from flows.datasets.dvc import StoredFiles

app = typer.Typer(
    name="data", help="Data sets: versions, differences, checkout, takedown of images.", no_args_is_help=True
)
All = Annotated[bool, Option("--all", help="Show complete lists instead of the first 20 entries.")]
FIRST = 20  # number of list entries shown by default


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
    limit = None if everything else FIRST
    contents = contents_of(folder, resolve(folder, version), _make_cache_lookup(folder), limit)
    classes = [f"{name}: {count:,}" for name, count in contents.classes.items()]
    buckets = [f"{name}: {count:,}" for name, count in (contents.buckets or {}).items()]
    quarantined_sources, dropped_images = (
        [f"{entry.source}: {entry.reason}" for entry in entries or ()]
        for entries in (contents.quarantined, contents.dropped)
    )
    rules = ", ".join(f"{entry.count:,} {entry.reason}" for entry in contents.rules or ())
    bits = contents.near_duplicate_bits
    lines = [
        f"version    {contents.digest}, from {contents.change}"
        + (f" of {contents.parent[:12]}" if contents.parent else ""),
        f"content    {contents.content_digest}",
        f"images     {contents.kept:,} of {'about ' if buckets else ''}{contents.storage.size}×{contents.storage.size} "
        f"in {contents.channels} channel(s): "
        + ", ".join(f"{count:,} {split.replace('_', '-')}" for split, count in contents.splits.items()),
        f"shards     {contents.shards:,}, {contents.shard_bytes:,} bytes",
        f"read       {', '.join(f'{count:,} {outcome}' for outcome, count in contents.outcomes.items())}",
        *(f"source     {source}" for source in contents.sources[:limit]),
        *(_section("buckets   ", len(buckets), buckets) if buckets else []),
        *([f"near       up to {bits} of 256 bits, for ingest.near_duplicates=auto"] if bits is not None else []),
        *(f"captions   {count:,} by {captioner}" for captioner, count in contents.captioners.items()),
        *(_section("classes   ", len(classes), classes[:limit]) if classes else []),
        *([f"rules      {rules}"] if rules else []),
        *(_section("dropped   ", contents.dropped_count, dropped_images) if contents.dropped_count else []),
        *_section("quarantine", contents.quarantined_count, quarantined_sources),
    ]
    return CommandOutput(contents, lines)


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
    from diffusion.data.versions.versions import diff as difference_of
    from diffusion.data.versions.versions import resolve

    folder = config.dataset_folder
    new = resolve(folder, after)
    if before is None and new.parent is None:
        raise UserError(f"{new.digest[:12]} is the first version of data set {folder.name}: give two versions")
    old = resolve(folder, before or new.parent)
    difference = difference_of(folder, old, new, None if everything else FIRST, _make_cache_lookup(folder))
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


@command(app)
def curate(
    config: "Params",
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what the rules would drop, and why.")] = False,
    report: Annotated[
        Path | None, Option(metavar="PAGE", help="Only write a page to choose thresholds on, an HTML file.")
    ] = None,
    local: Local = False,
) -> CommandOutput:
    """Apply the rules of the section curation: drop images that they do not allow, and bring others back.

    Makes a new version. Dropped images keep their bytes and their place in the records; ingest applies the same rules.

    Example:  darkroom data curate --dataset faces --report curation.html
    """
    folder, rules = config.dataset_folder, config.curation
    if report is not None:
        from diffusion.data.manifest import read_manifest

        if dry_run or local:
            raise UserError("--report only writes a page: leave --dry-run and --local out")
        if report.suffix != ".html" or report.is_dir():
            raise UserError(f"--report {report}: give the path of an .html file")
        read_manifest(folder)
        require_writable(report.parent, f"--report {report}")
        from diffusion.curation.report import write_curation_report

        with display_progress() as progress:
            page = write_curation_report(folder, report, rules, config.ingest, config.evaluation, progress)
        return CommandOutput(page, page.lines())
    if dry_run or local:
        from diffusion.curation.curate import curate as curate_dataset

        with display_progress() as progress:
            result = curate_dataset(folder, rules, config.ingest, config.evaluation, progress, dry_run=dry_run)
        return CommandOutput(result.model_dump(mode="json") | {"dry_run": dry_run}, result.lines(dry_run))
    with connect("prefect", "s3"):
        from flows.curate import curate as curate_flow

        outcome = curate_flow(config)
    value = outcome.result.model_dump(mode="json")
    value |= {"dvc_digest": outcome.version.digest, "report": str(outcome.report)}
    return CommandOutput(value, [*outcome.result.lines(), f"report: {outcome.report}"])


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
    from diffusion.data.manifest import read_manifest
    from diffusion.data.versions.takedown import choose_images, require_removable
    from diffusion.data.versions.takedown_records import Selection, Selector, is_key

    keys = list(filter(is_key, images or ()))
    sources = [*(pattern for pattern in images or () if not is_key(pattern)), *source]
    selection = Selection(prefixes=keys, sources=sources, label=label)
    # Raises UserError if it is empty or malformed.
    Selector(selection)
    if dry_run and purge:
        raise UserError("--dry-run only says which images would be removed: leave --purge out")
    if dry_run:
        preview, names = choose_images(config.dataset_folder, selection)
        fields = {"dataset": config.training.dataset, "dry_run": True, "names": names}
        copies, dropped_copies = preview.near_copies, preview.dropped_copies or []
        lines = [
            f"{pluralize(preview.images, 'image')} would be removed "
            f"({pluralize(preview.duplicates, 'copy', 'copies')}, {preview.refused:,} quarantined)"
            f" and {pluralize(len(preview.parts), 'shard')} rewritten",
            *_section("source names", len(names), names[:FIRST], "--json"),
            *(
                _section("dropped near-duplicates that go, too", len(dropped_copies), dropped_copies[:FIRST], "--json")
                if dropped_copies
                else []
            ),
            *(_section("near-duplicates that stay", len(copies), copies[:FIRST], "--json") if copies else []),
        ]
        return CommandOutput(fields | preview.model_dump(mode="json"), lines)
    if not reason.strip():
        raise UserError("a removal needs a --reason: one line that is stored in the manifest")
    if not yes:
        action = f"take down {', '.join([*keys, *sources])} from data set {config.training.dataset}"
        if not sys.stdin.isatty():
            raise UserError(f"to {action}, give --yes (or --dry-run to list the images)")
        typer.confirm(f"Really {action}?", abort=True, err=True)
    if (config.dataset_folder / "manifest.json").is_file():
        require_removable(config.dataset_folder, selection, reason)
    with connect("prefect", "mlflow", "s3"):
        if not (config.dataset_folder / "manifest.json").is_file():
            from flows.datasets.catalog import Catalog
            from flows.environment import data_source

            if not Catalog.of(config.training.dataset, data_source()).versions():
                read_manifest(config.dataset_folder)  # says what there is
        from flows.takedown import takedown

        result = takedown(config, selection, reason, purge)
    return CommandOutput({"dataset": config.training.dataset, **result.model_dump(mode="json")}, result.lines())


@command(app)
def compact(config: "Params", local: Local = False) -> CommandOutput:
    """Join the small shards that many small ingests left; a new version of the same content digest.

    Only neighbouring shards of less than half of ingest.shard_bytes are rewritten. `darkroom gc` frees old versions.

    Example:  darkroom data compact --dataset faces
    """
    if local:
        from diffusion.data.versions.compact import compact as join_shards

        with display_progress() as progress:
            result = join_shards(config.dataset_folder, config.ingest, progress)
    else:
        with connect("prefect", "s3"):
            from flows.compact_merge import compact as run

            result = run(config)
    return CommandOutput(result, result.lines())


@command(app)
def merge(
    config: "Params",
    others: Annotated[list[str], Argument(metavar="OTHER…", help="Data sets on this machine, as data/OTHER.")],
    local: Local = False,
) -> CommandOutput:
    """Add the images of other data sets, by their tables alone: for data sets that one ingest would not finish.

    Equal images are kept once. Shards without duplicates are taken over as they are, the others are rewritten.

    Example:  darkroom data merge faces-2 faces-3 --dataset faces
    """
    from diffusion.common.config import dataset_folder
    from diffusion.data.manifest import read_manifest

    folder = config.dataset_folder
    for name in others:
        if name == folder.name:
            raise UserError(f"data set {name} cannot be merged into itself: name another, or another --dataset")
        if "/" in name and Path(name).is_dir():
            raise UserError(f"{name} is a folder: give the name of a data set, such as {Path(name).name}")
    folders = [dataset_folder(name) for name in others]
    for other in folders:
        read_manifest(other)
    if local:
        from diffusion.data.versions.merge_datasets import merge_datasets

        with display_progress() as progress:
            result = merge_datasets(folder, folders, config.ingest, progress)
    else:
        with connect("prefect", "s3"):
            from flows.compact_merge import merge as run

            result = run(config, others)
    return CommandOutput(result, result.lines())


@command(app)
def simulate(
    context: typer.Context,
    config: "Params",
    images: Annotated[
        int | None, Option(min=1, help="Number of training images of a data set that need not exist.")
    ] = None,
    bytes_per_image: Annotated[int | None, Option(min=1, help="Bytes in a shard for each of these images.")] = None,
    nodes: Annotated[int | None, Option(help="Machines.")] = None,
    ranks: Annotated[int | None, Option(help="Processes on each node.")] = None,
    bandwidth: Annotated[float | None, Option(help="Bytes per second from the remote to a node.")] = None,
    latency: Annotated[float | None, Option(help="Seconds from the request of a shard to its first byte.")] = None,
    disk_bytes: Annotated[int | None, Option(help="Bytes for shards on each node's disk.")] = None,
    disk_bandwidth: Annotated[float | None, Option(help="Bytes per second of each node's disk.")] = None,
    decode_rate: Annotated[float | None, Option(help="Images per second that a loader thread decodes.")] = None,
    step_seconds: Annotated[float | None, Option(help="Seconds of a step whose batch is ready.")] = None,
    epochs: Annotated[int, Option(min=1, help="Epochs to simulate, from an empty cache.")] = 1,
) -> CommandOutput:
    """Say how long streamed training would wait for data, and the smallest settings with which it does not.

    The data set is that of --dataset, or one of --images. Batch size, window, cache, prefetch and workers are those of
    the section training; without training.window and training.stream_bytes the smallest that suffice.

    Example:  darkroom data simulate --images 1000000000 --bytes-per-image 20000 --nodes 8 --ranks 8 --step-seconds 0.2
    """
    from pydantic import ValidationError

    from diffusion.data import simulate as simulator
    from diffusion.data.manifest import read_manifest

    if (images is None) != (bytes_per_image is None):
        raise UserError("--images and --bytes-per-image describe a data set together: give both, or neither")
    if images is not None and context.params["dataset"] is not None:
        raise UserError("--images describes a data set that need not exist: leave it or --dataset out")
    fields = {
        **{"nodes": nodes, "ranks": ranks, "bandwidth": bandwidth, "latency": latency, "disk_bytes": disk_bytes},
        **{"disk_bandwidth": disk_bandwidth, "decode_rate": decode_rate, "step_seconds": step_seconds},
    }
    try:
        machines = simulator.Machines(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        detail = error.errors()[0]
        option = str(detail["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} {detail['input']}: {detail['msg']}: give another value") from error
    size = config.ingest.size
    if images is None or bytes_per_image is None:
        manifest = read_manifest(config.dataset_folder)
        shards, size = simulator.Shards.from_manifest(manifest), manifest.size
    else:
        shards = simulator.Shards.make_equal(images, bytes_per_image, config.ingest.shard_bytes)
    training = config.training.with_batch_size(config.model, size)
    report = simulator.simulate_training(shards, machines, training.model_dump(), epochs)
    return CommandOutput(report, report.lines())


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
            yield from _section(f"{title:<10}", group.count, map(line, group.samples))
    yield from (f"setting    {name}: {old} → {new}" for name, (old, new) in difference.storage.items())
    yield from (f"class      {name}: {old:,} → {new:,}" for name, (old, new) in difference.classes.items())
    yield from (f"cannot be read any more: {name}" for name in difference.unread)


def _image(sample: Any) -> str:
    return f"{sample.key[:16]} {sample.source or ''} {sample.label or ''}".rstrip()


def _changes(old: Any, new: Any) -> str:
    names = ("split", "label", "caption")
    return ", ".join(f"{n}: {getattr(old, n)} → {getattr(new, n)}" for n in names if getattr(old, n) != getattr(new, n))


def _section(title: str, count: int | None, rows: Iterable[str], option: str = "--all") -> list[str]:
    lines = [f"  {row}" for row in rows]
    more = (count or 0) - len(lines)
    return [f"{title} {_count(count)}", *lines, *([f"  … and {more:,} more: {option} shows them"] if more > 0 else [])]


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
