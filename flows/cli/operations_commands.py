"""Provenance and operation: ``darkroom trace``, ``reproduce``, ``deploy``, ``monitor``, ``gc`` and ``ui``."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError, install_hint
from diffusion.common.escaping import pluralize
from diffusion.common.files import is_model_file
from flows.cli.arguments import check_cron, check_generated, check_output, require_free_port
from flows.cli.command import VERBOSITY, CommandOutput, Model, command, connect

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flows.config import Params
    from flows.provenance.reproduce import Reproduction
    from flows.provenance.trace import Trace, TracedData, TracedOrigin

app = typer.Typer()
provenance = command(app, panel="Provenance", servers=("mlflow", "s3"))
MINUTE = "%Y-%m-%d %H:%M UTC"


What = Annotated[
    str,
    Argument(
        metavar="IMAGE|BATCH",
        help="URI of an image (….png or ….tar/….png), a local copy, or URI of a batch.",
        callback=check_generated,
    ),
]


@provenance
def trace(what: What) -> CommandOutput:
    """Trace a generated image to its batch, model version, run, data set version and exact shards.

    Broken links (altered, deleted, lost) are listed at the end, with exit code 1. With -v also conditions, fingerprint,
    tags and every shard.

    Example:  darkroom trace s3://darkroom/samples/faces/3/seed7-count64-dpmpp_2m_sde16-af14cd24/00000007.png
    """
    from flows.provenance.trace import trace

    chain = trace(what)
    error = DarkroomError(f"the chain is broken: {'; '.join(chain.broken)}") if chain.broken else None
    return CommandOutput(chain, _describe_chain(chain, VERBOSITY.get() == "verbose"), error)


@provenance
def reproduce(
    what: What,
    count: Annotated[int | None, Option(min=1, help="Number of images of a batch; default: all.")] = None,
    out: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Folder to write the images to; default: none.", callback=check_output),
    ] = None,
    installed: Annotated[bool, Option("--installed", help="Use the code installed here, for newer batches.")] = False,
) -> CommandOutput:
    """Regenerate images in a process with the code of their model version, and compare every pixel.

    With an equal fingerprint (compute batch, number format, processor, torch) the images are identical bit for bit;
    otherwise the difference is shown with the largest pixel error. Code that differs from the registered code is never
    run: exit code 2.

    Example:  darkroom reproduce s3://darkroom/samples/faces/3/seed7-count64-dpmpp_2m_sde16-af14cd24/00000007.png
    """
    from flows.provenance.reproduce import reproduce

    result = reproduce(what, count, out, installed)
    return CommandOutput(
        result, _comparison(result), DarkroomError(f"{what}: {result.failure}") if result.failure else None
    )


def _describe_chain(chain: "Trace", verbose: bool) -> Iterator[str]:
    """A few lines for each link; ``verbose``: with digests, conditions, fingerprints, tags and every shard below."""

    def details(*lines: str) -> Iterator[str]:
        return (f"          {line}" for line in lines if verbose)

    if image := chain.image:
        state = {True: "as generated", False: "altered since it was generated", None: "generation is not on record"}
        conditions = "".join(f", {text!r}" for text in (image.label, image.prompt) if text)
        number = f"number {image.index} of seed {image.seed}"
        yield f"image     {image.where}: {number}{conditions}, {state[image.as_generated]}"
        yield from details(f"sha256 {image.sha256}")
    if batch := chain.batch:
        state_of_batch = "finished" if chain.finished else "not finished"
        yield f"batch     {chain.place}: {pluralize(batch.count, 'image')} of seed {batch.seed}, {state_of_batch}"
        yield from details(_fields(batch.sampling))
        if batch.conditions is not None:
            yield from details(f"conditions {_fields(batch.conditions)}")
        if batch.requests is not None:
            yield from details(f"conditions from {chain.place}requests.parquet, {_fields(batch.requests)}")
        yield from details(f"fingerprint {_fields(batch.fingerprint)}")
    elif request := chain.request:
        yield f"request   {_fields(request.request)}"
        yield from details(f"fingerprint {_fields(request.fingerprint)}")
    if model := chain.model:
        names = " ".join([model.uri, *(f"@{alias}" for alias in model.aliases)])
        yield f"model     {names}, registered {model.registered:{MINUTE}}"
        code = f"code {model.code_sha256}, as" if model.code_sha256 else "code: no digest of it, or not as"
        # The ledger's copies are for its repair: `darkroom model history` shows the entries.
        tags = {name: text for name, text in model.tags.items() if not name.startswith("darkroom.ledger.")}
        scores = {name: tags.pop(name) for name in [*tags] if not name.startswith("darkroom.")}
        yield from details(f"{code} registered", *(f"{name} {text}" for name, text in tags.items()))
        yield from details(*filter(None, [_fields(scores)]))
    if run := chain.run:
        commit = f", git commit {run.git_commit[:12]}" if run.git_commit else ""
        dirty = " with uncommitted changes" if run.git_dirty else ""
        yield f"run       {run.run_id} ({run.name}), started {run.started:{MINUTE}}{commit}{dirty}"
        clean = ", everything committed" if run.git_dirty is False else ""
        git = f"git commit {run.git_commit}{clean}" if run.git_commit else "outside of a git repository"
        yield from details(f"{run.status.lower()}, {git}")
    if chain.data:
        yield from _describe_data(chain.data, verbose)
    for origin in chain.origins:
        yield f"origin    {_origin(origin)}"
        yield from details(*(f"{digest}  {path}" for path, digest in origin.files.items()))
    takedowns = [
        takedown.name if takedown.images is None else f"{takedown.name} ({takedown.images:,} images)"
        for takedown in chain.takedowns
    ]
    if takedowns or chain.data:
        yield f"takedown  {', '.join(takedowns) or 'none of its images was taken down since'}"
    yield from details(*(f"{takedown.name}: {takedown.reason}" for takedown in chain.takedowns if takedown.reason))


def _describe_data(data: "TracedData", verbose: bool) -> Iterator[str]:
    lost_count = sum(shard.where is None for shard in data.shards)
    state = f"{lost_count} of them lost" if lost_count else "all found"
    counts = f"{pluralize(data.images, 'image')} in {pluralize(len(data.shards), 'shard')}"
    yield f"data set  {data.dataset}, version {data.version[:12]}: {counts}, {state}"
    if verbose:
        recorded = f"recorded {data.recorded:{MINUTE}}" if data.recorded else "not in the catalog"
        yield f"          version {data.version}, {recorded}"
        yield f"          content {data.content_digest}"
        yield f"          DVC {data.dvc_digest or 'has no record of it'}"
    yield from (f"source    {source}" for source in data.sources)
    yield from (f"captions  {count:,} by {captioner}" for captioner, count in data.captioners.items())
    for shard in data.shards if verbose else ():
        yield f"shard     {shard.sha256}  {shard.bytes:,} bytes  {shard.name}  {shard.where or 'lost'}"


def _origin(origin: "TracedOrigin") -> str:
    revision = f" at {origin.revision}" if origin.revision else ""
    files = f"{len(origin.files):,} file{'' if len(origin.files) == 1 else 's'}"
    return f"{origin.uri} was imported from {origin.source}{revision}, licence {origin.licence}, {files}"


def _comparison(result: "Reproduction") -> Iterator[str]:
    code = f"the code that {result.model} ships" if result.code == "shipped" else "the code installed here"
    yield f"{result.exact:,} of {result.images:,} identical bit for bit, regenerated with {code}"
    if result.differences:
        yield f"the fingerprint differs: {result.differences} (then → now)"
    if result.moved:
        yield f"libraries differ from those at registration: {', '.join(result.moved)}"
    if result.exact < result.images:
        note = " (within the numerical tolerance)" if result.differences and not result.failure else ""
        yield (
            f"largest pixel error {result.largest_error} of 255, {result.differing_pixels:,} pixels differ, "
            f"mean error of the worst image {result.mean_error:.3g} of 255{note}"
        )
    for image in result.other:
        error = "cannot be compared" if image.largest_error is None else f"off by {image.largest_error} of 255 at most"
        outcome = "identical to the generated image" if image.exact else error
        yield f"  {image.key}: {'altered or lost since generation; regenerated, ' if image.altered else ''}{outcome}"
    if result.folder:
        yield f"written to {result.folder}"


def _fields(fields: "BaseModel | Mapping[str, object]") -> str:
    if not isinstance(fields, Mapping):
        fields = fields.model_dump(mode="json")
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value not in (None, [], ""))


@command(app, panel="Operations", servers=("prefect",))
def deploy(
    config: "Params",
    cron: Annotated[str, Option(help="Retraining schedule, in UTC.", callback=check_cron)] = "0 2 * * *",
    monitor_cron: Annotated[str, Option(help="Monitoring schedule, in UTC.", callback=check_cron)] = "0 5 * * *",
    pool: Annotated[str, Option(metavar="NAME", help="Work pool for sampling and monitoring.")] = "darkroom",
    training_pool: Annotated[str | None, Option(metavar="NAME", help="That for training; default: --pool.")] = None,
    workspace: Annotated[Path, Option(metavar="FOLDER", help="Workers' folder of data, runs, reports.")] = Path(),
) -> CommandOutput:
    """Apply prefect.yaml: deployments with schedules and triggers, work pools, concurrency limits, automations.

    Idempotent: repeating it changes nothing.

    Example:  darkroom deploy --dataset faces --cron "0 2 * * *"
    """
    from flows.checks.images import deployment_notes

    notes = deployment_notes(config, workspace.absolute())
    from flows.deployment.deploy import deploy

    result = deploy(config, workspace.absolute(), pool, training_pool or pool, cron, monitor_cron)
    lines = [
        *(f"deployment   {name}" for name in result.deployments),
        f"work pools   {', '.join(result.work_pools)}",
        f"limits       {', '.join(f'{name} {limit}' for name, limit in result.concurrency_limits.items())}",
        *(f"automation   {name}" for name in result.automations),
        f"declared in  {result.definitions}",
        *(f"note         {note}" for note in notes),
    ]
    return CommandOutput(result, lines)


@command(app, panel="Operations", servers=("prefect", "mlflow", "s3"))
def monitor(config: "Params") -> CommandOutput:
    """Re-evaluate the champion on the current held-out images; request a retraining if the images surely drifted.

    Example:  darkroom monitor --dataset faces
    """
    from flows.checks import check

    check("monitor", config, connected=True)
    from flows.monitor import monitor

    result = monitor(config)
    return CommandOutput(result, [result.summary])


@command(app, panel="Operations", dataset=False)
def gc(
    config: "Params",
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be deleted, its size, and why.")] = False,
) -> CommandOutput:
    """Delete old data versions, runs, sampling batches and caches according to `retention` in params.yaml.

    Everything that registered versions, ledgers and retained sampling batches need is kept. The rest is deleted in two
    steps: the first run sets it aside, a later run deletes it once retention.grace_hours have passed.

    Example:  darkroom gc --dry-run --set retention.batch_days=180
    """
    with connect("mlflow", "s3") if dry_run else connect("prefect", "mlflow", "s3"):
        from flows.gc import collect, gc
        from flows.retention.sweeps import format_items

        result = collect(config.retention, datetime.now(UTC), dry_run=True) if dry_run else gc(config)
    return CommandOutput(result, format_items(result.items))


@command(app, panel="Operations")
def ui(
    config: "Params",
    model: Model = None,
    port: Annotated[int | None, Option(min=1, max=65535, help="Port; default: a free one from 7860 on.")] = None,
    no_browser: Annotated[bool, Option("--no-browser", help="Do not open a browser.")] = False,
) -> None:
    """Serve a studio in the browser: generate images, edit them, and vote blindly between two versions of a model.

    On the loopback address, for the user darkroom with the password in DARKROOM_UI_PASSWORD, or one shown at the start.
    A model file needs no server, and has no votes.

    Example:  darkroom ui --model examples/things.safetensors
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the studio needs Gradio: {install_hint('ui')}")
    if port is not None:
        require_free_port("127.0.0.1", port)
    if not is_model_file(model):
        from flows.local_stack.stack import join_servers

        with suppress(UserError):  # without Prefect there is no link to it
            join_servers("prefect")
    with nullcontext() if is_model_file(model) else connect("mlflow", "s3"):
        from flows.studio.app import serve

        serve(config, model, port, not no_browser)
