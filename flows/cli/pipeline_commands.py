"""Top-level pipeline commands, from ``ingest`` to ``sample``; each runs the flow of its name."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import flows.cli.command as options
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import is_model_file
from flows.cli.arguments import check_model, check_requests
from flows.cli.command import CommandOutput, command, connect, display_progress, is_follower
from flows.cli.edit_commands import generate_images
from flows.cli.model_commands import describe_champion_change

if TYPE_CHECKING:
    from diffusion.data.ingest.ingest import IngestResult, Rebuild
    from diffusion.evaluation.results import Evaluation
    from diffusion.training.run_folder import Restart
    from diffusion.training.train import TrainResult
    from flows.config import Params
    from flows.promote import PromotionResult

app = typer.Typer()
pipeline = command(app, panel="Pipeline")
Source = Annotated[
    str | None,
    Argument(help="Folder, tar, zip, Parquet, s3:// prefix, hf://datasets/… …; default: ingest.source."),
]
RebuildIfDifferent = Annotated[bool, Option("--rebuild-if-different", help="Rebuild if the storage differs.")]
Preview = Annotated[
    bool, Option("--dry-run", help="Only look at the source: counts, sizes, classes, captions, what is new.")
]
RestartIfDifferent = Annotated[
    bool, Option("--restart-if-different", help="Start over only if the folder holds a run of other inputs.")
]
Evaluated = Annotated[
    str | None,
    Option(
        metavar="URI|FILE",
        callback=check_model,
        help="models:/NAME@ALIAS, models:/NAME/NUMBER or a .safetensors, instead of the run's checkpoints.",
    ),
]
Promoted = Annotated[
    str | None, Option(metavar="URI", callback=check_model, help="Registered version, instead of a run's best.")
]
Requests = Annotated[
    str | None,
    Option(
        metavar="TABLE",
        help="Labels, prompts or sizes in a .csv, .jsonl or .parquet, local or on s3://.",
        callback=check_requests,
    ),
]


@command(app, panel="Pipeline", sets_source=True)
def ingest(
    config: "Params",
    source: Source = None,
    requeue: Annotated[bool, Option("--requeue", help="Retry sources that were quarantined before.")] = False,
    rebuild: Annotated[bool, Option("--rebuild", help="Rebuild the data set from this source alone.")] = False,
    rebuild_if_different: RebuildIfDifferent = False,
    dry_run: Preview = False,
    local: options.Local = False,
) -> CommandOutput:
    """Add the new images of a source to a data set of WebDataset shards; record it in DVC and push it.

    Labels: one sub-folder per class. Captions: NAME.txt, NAME.caption or NAME.json beside NAME.png, or captions.csv.
    Both: metadata.csv or metadata.jsonl with file_name, text, label.

    Example:  darkroom ingest ~/faces --dataset faces --set ingest.size=32
    """
    from flows.checks import Request, check

    mode: Rebuild = "always" if rebuild else "if_different" if rebuild_if_different else "never"
    check("ingest", config)
    if dry_run:
        from flows.cli.dry_run import preview_ingest

        preview = preview_ingest(config, requeue, mode)
        return CommandOutput(preview, preview.lines())
    if local:
        from diffusion.api import engine

        with display_progress() as progress:
            result = engine.ingest(config, rebuild=mode, requeue=requeue, progress=progress)
        return CommandOutput(result, _describe_ingest(result, config))
    with connect("prefect", "s3"):
        check("ingest", config, Request(rebuild=mode), connected=True)
        from flows.ingest import ingest

        outcome = ingest(config, requeue, mode)
    value = outcome.result.model_dump(mode="json")
    value |= {"dvc_digest": outcome.version.digest, "report": str(outcome.report)}
    dvc_line = f"DVC {outcome.version.digest} in {outcome.version.pointer}"
    details = (f"content {outcome.result.content_digest}", dvc_line, f"report: {outcome.report}")
    return CommandOutput(value, [*_describe_ingest(outcome.result, config), *details])


def _describe_ingest(result: "IngestResult", config: "Params") -> Iterator[str]:
    from diffusion.data.sources.survey import describe_passed_over, describe_table, find_captions

    source, reads_masks = config.ingest.source, config.ingest.masks is not None
    yield (
        f"{pluralize(result.kept, 'image')} in {result.folder} ({result.added:,} new), "
        f"{pluralize(result.duplicates, 'duplicate')}, "
        f"{result.quarantined_count:,} quarantined"
    )
    if result.near_duplicates is not None:
        yield result.near_duplicates.line
    if result.dropped is not None:
        image_count = pluralize(result.dropped, "image")
        yield f"dropped by curation: {image_count}: darkroom data show --dataset {result.dataset}"
    if result.source is not None:
        yield f"source  {result.source}"
    examples = result.quarantined[:20]
    yield from (f"  quarantined: {entry.source}: {entry.reason}" for entry in examples)
    if (more := result.quarantined_count - len(examples)) > 0:
        yield f"  … and {more:,} more: darkroom data show --dataset {result.dataset} --all"
    found = result.captions_found
    if description := found.describe():
        yield f"captions {description}"
    if folders := found.describe_folders():
        yield f"folders {folders}; ingest.folders says what they are, and training.weights repeats their images"
    yield from (f"ignored: {line}" for line in found.ignored_lines())
    if reads_masks or result.masks is not None:
        changed = f", {result.remasked:,} of earlier ingests got another one" if result.remasked else ""
        yield f"masks {result.masks or 0:,} of {pluralize(result.kept, 'image')}{changed}; all others count in full"
    problems = list((result.mask_problems or {}).items())
    yield from (f"  keeps its old mask: {name}: {reason}" for name, reason in problems[:20])
    yield from (f"  … and {len(problems) - 20:,} more" for _ in problems[20:21])
    if captions := result.captions:
        counts = f"{captions.requests:,} requested, {captions.cached:,} cached, {captions.failed:,} failed"
        yield f"captions by {captions.captioner}: {counts}"
        yield from (f"  no caption: {count:,} × {reason}" for reason, count in captions.reasons.items())
    if result.removed:
        yield f"left out, as taken down before: {pluralize(result.removed, 'image')}"
    if result.relabelled:
        hint = "" if result.kept == result.added else "; --rebuild applies the new ones"
        texts = "label, caption or mask" if reads_masks else "label or caption"
        yield f"kept with their first {texts}: {result.relabelled:,} images that came with another one{hint}"
    if result.passed_over:
        if Path(source).is_dir() and (table := find_captions(Path(source))) is not None:
            yield describe_table(table)
        yield f"ignored: {describe_passed_over(result.passed_over)}"
        if result.passed_over.keys() & {".json", ".cls", ".txt"} and ".tar" in source and not source.startswith("wds:"):
            yield f"  if it is a WebDataset, wds:{source} reads labels and captions from them"


@pipeline
def train(
    config: "Params",
    restart: Annotated[bool, Option("--restart", help="Discard the run folder and start over.")] = False,
    restart_if_different: RestartIfDifferent = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show settings and the estimated time, without servers.")
    ] = False,
    local: options.Local = False,
) -> CommandOutput | None:
    """Train on a data set with live MLflow tracking; the same command resumes an interrupted run.

    Data parallel:  torchrun --standalone --nproc-per-node 2 --no-python -- darkroom train …

    Example:  darkroom train --dataset faces --set training.minutes=10
    """
    if dry_run and (restart or restart_if_different):
        raise UserError("--dry-run discards nothing: leave --restart out")
    if dry_run:
        from flows.cli.dry_run import preflight_training

        return preflight_training(config)
    mode: Restart = "if_different" if restart_if_different else "never"
    if local or is_follower():
        return _train_here(config, local, restart, mode)
    from flows.checks import Request, check

    request = Request(restart="always" if restart else mode)
    check("train", config)
    with connect("prefect", "mlflow", "s3"):
        check("train", config, request, connected=True)
        from flows.train import train

        training = train(config, request.restart)
    return CommandOutput(training, [f"{describe_training(training.result)}; MLflow run {training.run_id}"])


def _train_here(config: "Params", local: bool, restart: bool, mode: "Restart") -> CommandOutput | None:
    """Train in this process, without servers, or as one of torchrun's processes beside the main one's flow."""
    from diffusion.api import engine

    if local:
        with display_progress() as progress:
            result = engine.train(config, restart="always" if restart else mode, progress=progress)
        return None if is_follower() else CommandOutput(result, [describe_training(result)])
    from flows.cli.dry_run import prepare_inputs

    with prepare_inputs(config) as (config, store):
        engine.train(config, store=store)
    return None


def describe_training(result: "TrainResult") -> str:
    """Say how many images a training has seen, and where its model lies."""
    return f"{pluralize(result.images, 'image')} seen; {result.final}"


@pipeline
def evaluate(config: "Params", model: Evaluated = None, local: options.Local = False) -> CommandOutput:
    """Evaluate the checkpoints, or any model of the images' size, against the held-out images.

    The report is logged to the MLflow run, of the training or of the version. A model file needs no server.

    Example:  darkroom evaluate --dataset faces --set evaluation.samples=1000

    Example:  darkroom evaluate --dataset faces --model models:/faces/7
    """
    from flows.checks import Request, check

    request = Request(model=model)
    if local and not (model is None or is_model_file(model)):
        raise UserError(f"--local works without a server, and {model} is in the registry: leave --local out")
    check("evaluate", config, request)
    if local or is_model_file(model):
        from diffusion.api import engine
        from diffusion.checkpoints import read_model_header

        file = None if model is None else Path(model)
        if file is not None:
            config = config.adapt_to_model(read_model_header(file).model)
        with display_progress() as progress:
            evaluation = engine.evaluate(config, file, progress=progress)
    else:
        with connect("prefect", "mlflow", "s3"):
            check("evaluate", config, request, connected=True)
            from flows.evaluate import evaluate

            evaluation = evaluate(config, model=model)
    folder = config.report_folder if model is None else config.model_report_folder(evaluation.best.sha256)
    report = str(folder / "report.html")
    lines = [*_describe_evaluation(evaluation, model), f"report: {report}"]
    return CommandOutput(evaluation.model_dump(mode="json") | {"report": report}, lines)


def _describe_evaluation(evaluation: "Evaluation", model: str | None) -> Iterator[str]:
    count, sampling = len(evaluation.checkpoints) + len(evaluation.preliminary), evaluation.sampling
    yield f"best of {count} checkpoints:" if model is None else f"{model}:"
    yield from (f"  {name}: {value:.4g}" for name, value in evaluation.metrics().items())
    if model is None:
        options = f" ({sampling.guidance_options})" if sampling.is_guided else ""
        yield f"guidance: {sampling.guidance_text}{options}"


@pipeline
def promote(
    config: "Params",
    model: Promoted = None,
    version: Annotated[int | None, Option("--to", min=1, metavar="VERSION", help="Make this version champion.")] = None,
    reason: options.Reason = None,
    taken_down: Annotated[bool, Option("--taken-down", help="With --to: even if its images were taken down.")] = False,
) -> CommandOutput:
    """Register the best checkpoint and promote it if it beats the champion; else it is held or rejected (exit code 3).

    With --model, the gate compares a version that `darkroom evaluate --model` evaluated with the champion of its model.
    With --to, a registered version becomes champion by manual override, which the ledger records.

    Example:  darkroom promote --dataset faces

    Example:  darkroom promote --dataset faces --model models:/faces/7

    Example:  darkroom promote --dataset faces --to 3 --reason "the hands are better"
    """
    if version is not None:
        if model is not None:
            raise UserError("--to makes a version champion without the gate, and --model asks the gate: give one")
        return _promote_by_hand(config, version, reason, taken_down)
    if reason is not None or taken_down:
        raise UserError("--reason and --taken-down are for a manual override of the gate: give --to VERSION as well")
    if is_model_file(model):
        raise UserError(
            f"{model} is not a registered version: `darkroom model import {model} --name NAME` makes it one"
        )
    from flows.checks import Request, check

    check("promote", config, Request(model=model))
    with connect("prefect", "mlflow", "s3"):
        check("promote", config, Request(model=model), connected=True)
        from flows.promote import promote

        return describe_promotion(promote(config, model))


def _promote_by_hand(config: "Params", version: int, reason: str | None, taken_down: bool) -> CommandOutput:
    with connect("mlflow", "s3"):
        from flows.checks.models import require_version
        from flows.registry import champion

        require_version(f"models:/{config.model_name}/{version}")
        return describe_champion_change(champion.promote(config.model_name, version, reason, taken_down))


def describe_promotion(result: "PromotionResult") -> CommandOutput:
    """Output of a verdict, with exit code 3 unless it is a promotion."""
    lines = [f"{result.version.uri} is {result.title}: {result.reason}"]
    if result.promoted:
        return CommandOutput(result, lines)
    return CommandOutput(result, [*lines, describe_held(result.comparison_page)], typer.Exit(3))


def describe_held(page: Path | str | None) -> str:
    """Say where to look after a version was held or rejected: the ``page`` of the comparison, if there is one."""
    figures = "" if page is None else f"both sides and each rule: {page}; "
    return f"{figures}what each reason means, and what to do: docs/how-to/why-held.md"


@pipeline
def sample(
    config: "Params",
    model: options.Model = None,
    count: Annotated[int | None, Option(min=1, help="Number; default: 64, or one per row of --requests.")] = None,
    requests: Requests = None,
    seed: options.Seed = 0,
    to: options.To = None,
    output: options.OutFolder = None,
    label: options.Labels = [],  # noqa: B006
    prompt: options.Prompts = [],  # noqa: B006
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Generate images with a registered model to S3, with a manifest; the same command resumes an interrupted batch.

    A model file writes to a local folder (--out) and needs no server.

    Example:  darkroom sample --model models:/faces@champion --count 1000 --seed 7 --to s3://my-bucket

    Example:  darkroom sample --count 16 --prompt "a red bird" --set sampling.guidance=3

    Example:  darkroom sample --count 16 --size 96x64

    Example:  darkroom sample --requests birds.csv --set sampling_batch.format=tar --set sampling_batch.runner=processes

    Example:  darkroom sample --model runs/faces/final.safetensors --out faces
    """
    if is_model_file(model):
        _require_file_options(to, requests)
        fields: dict[str, Any] = {"count": 64 if count is None else count, "seed": seed, "size": size}
        fields |= {"label": _unwrap_single(label), "prompt": _unwrap_single(prompt), "negative_prompt": negative_prompt}
        return generate_images(config, settings, "sample", fields, model, output)
    if output is not None:
        raise UserError("--out is where images of a model file go, and this is a registered model: use --to S3_URI")
    conditions = options.conditions(label, prompt, negative_prompt, size)
    return _sample_to_s3(config, settings, model or config.champion, count, seed, to, conditions, requests)


def _require_file_options(to: str | None, requests: str | None) -> None:
    if to is not None:
        raise UserError("--to is where images of a registered model go, and this is a file: use --out FOLDER")
    if requests is not None:
        raise UserError(
            "--requests is for images of a registered model, and this is a file: give it --size, or --label or "
            "--prompt for a model with classes or captions, or register it by `darkroom model import`"
        )


def _sample_to_s3(config: "Params", settings: list[str], model: str, *batch: Any) -> CommandOutput:
    """Generate a sampling batch; ``batch`` has the other arguments of the flow ``sample``."""
    from flows.checks import Request, check

    names = ("count", "seed", "to", "conditions", "requests")
    request = Request(model=model, overrides=settings, **dict(zip(names, batch, strict=True)))
    with connect("prefect", "mlflow", "s3"):
        check("sample", config, request, connected=True)
        from flows.sample import sample

        result = sample(config, model, *batch)
    files = [f"manifest: {result.manifest}", f"contact sheet: {result.contact_sheet}"]
    images = f"{pluralize(result.count, 'image')} of {result.model} in {result.uri}"
    return CommandOutput(result, [images, *files, result.took.words])


def _unwrap_single(texts: list[str]) -> str | list[str] | None:
    return texts[0] if len(texts) == 1 else texts or None
