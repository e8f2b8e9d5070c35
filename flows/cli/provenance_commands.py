"""``darkroom trace`` and ``reproduce``: where an image comes from, and the same image again."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion.common.errors import DarkroomError
from flows.cli.command import CommandOutput, command, connect

if TYPE_CHECKING:
    from datetime import datetime

    from diffusion.generation.generation_result import RequestRecord
    from flows.provenance.reproduce import Reproduction
    from flows.provenance.trace import Trace, TracedData, TracedImage, TracedModel, TracedRun
    from flows.sampling.sampling_batch import Batch

What = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE|BATCH",
        help="Address of an image, s3://…/00000007.png or s3://…/samples-00000.tar/00000007.png, a copy of it, or its "
        "batch's address.",
    ),
]
app = typer.Typer()


@command(app, panel="Provenance")
def trace(what: What) -> CommandOutput:
    """Say where a printed image comes from: batch, model version, run, data set version, and its exact shards.

    What does not hold (altered, deleted, lost) is named at the end, and the exit code is 1.

    Example:  darkroom trace s3://darkroom/samples/faces/3/seed7-count64-dpmpp_2m_sde16-af14cd24/00000007.png
    """
    with connect("mlflow", "s3"):
        from flows.provenance.trace import trace

        found = trace(what)
    error = DarkroomError(f"the chain is broken: {'; '.join(found.broken)}") if found.broken else None
    return CommandOutput(found, _chain(found), error)


@command(app, panel="Provenance")
def reproduce(
    what: What,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Of a batch, only as many; default: all.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to write the images; default: nowhere.")
    ] = None,
    installed: Annotated[
        bool,
        typer.Option(
            "--installed",
            help="Draw with the code installed here, for batches that newer code than the model's printed.",
        ),
    ] = False,
) -> CommandOutput:
    """Draw printed images again, in a process with the code that their model version ships, and compare every pixel.

    Under an equal fingerprint (compute batch, number format, processor, torch) they are the same bit for bit; under
    another one the difference is named, with the largest error of a pixel. Code that is not what was registered is not
    run: exit code 2.

    Example:  darkroom reproduce s3://darkroom/samples/faces/3/seed7-count64-dpmpp_2m_sde16-af14cd24/00000007.png
    """
    with connect("mlflow", "s3"):
        from flows.provenance.reproduce import reproduce

        done = reproduce(what, count, out, installed)
    return CommandOutput(done, _comparison(done), DarkroomError(f"{what}: {done.failure}") if done.failure else None)


def _chain(found: "Trace") -> Iterator[str]:
    """A trace for people, a few lines to each link."""
    for name, lines in (
        ("image", found.image and _image(found.image)),
        ("batch", found.batch and _batch(found.batch, f"{found.place}", bool(found.finished))),
        ("request", found.request and _request(found.request)),
        ("model", found.model and _model(found.model)),
        ("run", found.run and _run(found.run)),
        ("data set", found.data and _data(found.data)),
    ):
        for number, line in enumerate(lines or ()):
            yield f"{name if number == 0 else '':<9} {line}"
    for shard in found.data.shards if found.data else ():
        yield f"shard     {shard.sha256}  {shard.bytes:,} bytes  {shard.name}  {shard.where or 'lost'}"
    for each in found.takedowns:
        why = "" if each.reason is None else f": {each.images:,} images, {each.reason}"
        yield f"takedown  {each.name}{why}"
    if found.data and not found.takedowns:
        yield "takedown  none of its images was taken down since"


def _image(image: "TracedImage") -> Iterator[str]:
    state = {True: "as it was printed", False: "no longer what was printed", None: "its printing is not on record"}
    yield f"{image.where}, {state[image.as_generated]}"
    yield f"number {image.index} of seed {image.seed}, sha256 {image.sha256}"
    shows = [f"{name} {text!r}" for name, text in (("class", image.label), ("prompt", image.prompt)) if text]
    if shows:
        yield f"to show {', '.join(shows)}"


def _batch(batch: "Batch", place: str, finished: bool) -> Iterator[str]:
    yield f"{place}, {'finished' if finished else 'not finished'}"
    yield f"{batch.count:,} images of seed {batch.seed}: {_fields(batch.sampling.model_dump(exclude_none=True))}"
    if batch.conditions is not None:
        yield f"asked for {_fields(batch.conditions.model_dump(exclude_defaults=True))}"
    if batch.requests is not None:
        yield f"asked for by {place}requests.parquet, {_fields(batch.requests.model_dump())}"
    yield f"fingerprint {_fields(batch.fingerprint.model_dump())}"


def _request(request: "RequestRecord") -> Iterator[str]:
    yield f"asked for {_fields(request.request)}"
    yield f"fingerprint {_fields(request.fingerprint.model_dump())}"


def _model(model: "TracedModel") -> Iterator[str]:
    yield " ".join([model.uri, *(f"@{alias}" for alias in model.aliases)]) + f", registered {_minute(model.registered)}"
    yield (
        f"code {model.code_sha256}, as registered"
        if model.code_sha256
        else "code: not as registered, or no digest of it"
    )
    ours = {name: value for name, value in model.tags.items() if name.startswith("darkroom.")}
    for name, value in ours.items():
        yield f"  {name} {value}"
    if scores := {name: value for name, value in model.tags.items() if name not in ours}:
        yield f"  {_fields(scores)}"


def _run(run: "TracedRun") -> Iterator[str]:
    yield f"{run.run_id} ({run.name}), {run.status.lower()}, begun {_minute(run.started)}"
    dirty = {True: ", with changes that were not committed", False: ", everything committed", None: ""}[run.git_dirty]
    yield f"git commit {run.git_commit}{dirty}" if run.git_commit else "git: outside of a repository"


def _data(data: "TracedData") -> Iterator[str]:
    recorded = f"recorded {_minute(data.recorded)}" if data.recorded else "not in the catalogue"
    yield f"{data.dataset}, version {data.version}, {recorded}"
    yield f"content {data.content_digest}"
    yield f"DVC {data.dvc_digest or 'knows nothing of it'}"
    yield f"{data.images:,} images in {len(data.shards):,} shards"


def _comparison(done: "Reproduction") -> Iterator[str]:
    """How images drawn again compare, for people."""
    code = f"the code that {done.model} ships" if done.code == "shipped" else "the code installed here"
    yield f"{done.exact:,} of {done.images:,} the same bit for bit, drawn again with {code}"
    if done.differences:
        yield f"the fingerprint differs: {done.differences} (printed → now)"
    if done.moved:
        yield f"libraries differ from those of its registration: {', '.join(done.moved)}"
    if done.exact < done.images:
        within = " (within what other arithmetic explains)" if done.differences and not done.failure else ""
        yield (
            f"largest error of a pixel {done.largest_error} of 255, {done.differing_pixels:,} pixels differ, "
            f"mean error of the image that is off most {done.mean_error:.3g} of 255{within}"
        )
    for each in done.other:
        error = "cannot be compared" if each.largest_error is None else f"off by {each.largest_error} of 255 at most"
        words = "the same as printed" if each.exact else error
        yield f"  {each.key}: {'altered or lost since printing; drawn again, ' if each.altered else ''}{words}"
    if done.folder:
        yield f"written to {done.folder}"


def _fields(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _minute(moment: "datetime") -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
