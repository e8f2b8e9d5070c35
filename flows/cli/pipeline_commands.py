"""Top-level pipeline commands, from ``ingest`` to ``retrain``; each runs the flow of its name."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from flows.cli import command as options
from flows.cli.arguments import check_model, check_requests, is_file, require_known_key, require_writable
from flows.cli.command import CommandOutput, command, connect, display_progress, is_follower
from flows.cli.edit_commands import generate_images
from flows.cli.model_commands import describe_champion_change

if TYPE_CHECKING:
    from diffusion.data.ingest.ingest import IngestResult
    from diffusion.data.ingest.preview import IngestPreview
    from diffusion.training.run_folder import Restart
    from diffusion.training.train import TrainResult
    from flows.config import Params
    from flows.datasets.dvc import RemoteShards
    from flows.environment import Server
    from flows.promote import PromotionResult

logger = logging.getLogger(__name__)
app = typer.Typer()
Labels = Annotated[list[str], Option("--label", metavar="NAME", help="Class label; several are used in turn.")]
Prompts = Annotated[list[str], Option("--prompt", help="Text prompt; several are used in turn.")]
EVALUATED = "models:/NAME@ALIAS, models:/NAME/NUMBER or a .safetensors, instead of the run's checkpoints."
ALL_FAMILIES = ["ddpm", "vae", "gan", "autoregressive"]
"""Families of ``diffusion.families.config``, which is too slow to import for ``--help``."""
OTHER_RUN = "give --restart to throw it away, or the settings of that run by --set, or move its folder away"
DryRun = Annotated[bool, Option("--dry-run", help="Only show what would be done, and the estimated time.")]
pipeline = command(app, panel="Pipeline")


@command(app, panel="Pipeline", sets_source=True)
def ingest(
    config: "Params",
    source: Annotated[
        str | None,
        Argument(
            help="Folder, tar, zip, Parquet, table of URLs, s3:// prefix, hf://datasets/… …; default: ingest.source."
        ),
    ] = None,
    requeue: Annotated[bool, Option("--requeue", help="Retry sources that were quarantined before.")] = False,
    rebuild: Annotated[bool, Option("--rebuild", help="Rebuild the data set from this source alone.")] = False,
    rebuild_if_different: Annotated[
        bool, Option("--rebuild-if-different", help="Rebuild if the storage differs.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only look at the source: counts, sizes, classes, captions, what is new.")
    ] = False,
    local: options.Local = False,
) -> CommandOutput:
    """Add the new images of a source to a data set of WebDataset shards; record it in DVC and push it.

    Labels and captions: one sub-folder per class, or metadata.csv / metadata.jsonl with file_name, text, label.

    Example:  darkroom ingest ~/faces --dataset faces --set ingest.size=32
    """
    from flows.cli.checks import require_ingestable, require_source

    require_source(config.ingest)
    rebuild_mode: Any = "always" if rebuild else "if_different" if rebuild_if_different else "never"
    if dry_run:
        preview = _preview(config, requeue, rebuild_mode)
        return CommandOutput(preview, preview.lines())
    if local:
        from diffusion.data.prefetch import local_fan_out

        fan_out = local_fan_out(config.ingest)
        # The worker processes start during this slow import.
        from diffusion.data.ingest.ingest import ingest as ingest_images
        from diffusion.data.manifest import read_manifest

        data = config.dataset_folder
        with display_progress() as progress:
            result = ingest_images(
                data, config.ingest, progress, requeue=requeue, rebuild=rebuild_mode, fan_out=fan_out
            )
            if config.curation.drops or read_manifest(data).dropped:
                from diffusion.curation.curate import curate_ingested

                result = curate_ingested(
                    result, config.curation, config.ingest, config.evaluation, progress, fan_out=fan_out
                )
            _warn_of_few_images(config)
        return CommandOutput(result, _describe_ingest(result, config.ingest.source))
    with connect("prefect", "s3"):
        require_ingestable(config, rebuild_mode)
        from flows.ingest import ingest

        outcome = ingest(config, requeue, rebuild_mode)
        _warn_of_few_images(config)
    value = outcome.result.model_dump(mode="json") | {
        "dvc_digest": outcome.version.digest,
        "report": str(outcome.report),
    }
    dvc_line = f"DVC {outcome.version.digest} in {outcome.version.pointer}"
    details = (f"content {outcome.result.content_digest}", dvc_line, f"report: {outcome.report}")
    return CommandOutput(value, [*_describe_ingest(outcome.result, config.ingest.source), *details])


def _preview(config: "Params", requeue: bool = False, rebuild: Any = "never") -> "IngestPreview":
    from diffusion.data.ingest.preview import preview

    if not config.ingest.source.startswith("s3://"):
        return preview(config.dataset_folder, config.ingest, requeue=requeue, rebuild=rebuild)
    with connect("s3"):
        from flows.storage.s3 import S3Objects

        return preview(config.dataset_folder, config.ingest, requeue=requeue, rebuild=rebuild, objects=S3Objects())


def _preflight(variants: "Mapping[str, Params]") -> CommandOutput:
    """What the trainings of several configurations, by name, would do; measured one after the other."""
    from humanize import precisedelta

    from diffusion.training.train import preflight

    estimates = {}
    for name, variant in variants.items():
        with _prepare_inputs(variant, dry_run=True) as (config, store):
            estimates[name] = preflight(config.dataset_folder, config.model, config.training, config.sampling, store)
    lines = []
    for name, estimate in estimates.items():
        rows = dict(estimate.lines())
        is_single = len(estimates) == 1
        lines += [f"{key:10} {text}" for key, text in rows.items()] if is_single else [f"{name}: {rows['time']}"]
    seconds = sum(estimate.seconds or 0 for estimate in estimates.values())
    if len(estimates) > 1:
        unit = "seconds" if seconds < 60 else "minutes"
        lines.append(f"{len(estimates)} trainings, {precisedelta(seconds, minimum_unit=unit, format='%d')} in all")
    value = {name: estimate.model_dump(mode="json") for name, estimate in estimates.items()}
    return CommandOutput({"dry_run": True, "seconds": seconds, "trainings": value}, lines)


def _describe_ingest(result: "IngestResult", source: str) -> Iterator[str]:
    from diffusion.data.sources.survey import describe_table, find_captions

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
    if captions := result.captions:
        counts = f"{captions.requests:,} requested, {captions.cached:,} cached, {captions.failed:,} failed"
        yield f"captions by {captions.captioner}: {counts}"
        yield from (f"  no caption: {count:,} × {reason}" for reason, count in captions.reasons.items())
    if result.removed:
        yield f"left out, as taken down before: {pluralize(result.removed, 'image')}"
    if result.relabelled:
        hint = "" if result.kept == result.added else "; --rebuild applies the new ones"
        yield f"kept with their first label or caption: {result.relabelled:,} images that came with another one{hint}"
    if result.passed_over:
        if Path(source).is_dir() and (table := find_captions(Path(source))) is not None:
            yield describe_table(table)
        extensions = [f"{count:,} {end or 'without extension'}" for end, count in result.passed_over.items()]
        yield f"ignored, no image extension: {', '.join(extensions[:5])}{' …' if len(extensions) > 5 else ''}"
        if result.passed_over.keys() & {".json", ".cls", ".txt"} and ".tar" in source and not source.startswith("wds:"):
            yield f"  if it is a WebDataset, wds:{source} reads labels and captions from them"


@pipeline
def train(
    config: "Params",
    restart: Annotated[bool, Option("--restart", help="Discard the run folder and start over.")] = False,
    restart_if_different: Annotated[
        bool, Option("--restart-if-different", help="Start over only if the folder holds a run of other inputs.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show settings and the estimated time, without servers.")
    ] = False,
    world_size: Annotated[
        int | None,
        Option(
            min=1,
            max=4096,
            metavar="N",
            help="With --dry-run: memory and messages of each of N ranks, and of fewer.",
        ),
    ] = None,
    local: options.Local = False,
) -> CommandOutput | None:
    """Train on a data set with live MLflow tracking; the same command resumes an interrupted run.

    Data parallel:  torchrun --standalone --nproc-per-node 2 --no-python -- darkroom train …

    Example:  darkroom train --dataset faces --set training.minutes=10
    """
    if dry_run and (restart or restart_if_different):
        raise UserError("--dry-run discards nothing: leave --restart out")
    if world_size is not None and not dry_run:
        raise UserError("--world-size computes what N processes would need: give --dry-run, or start them by torchrun")
    from flows.cli.checks import require_training_inputs

    if dry_run or local:
        from diffusion.data.manifest import read_manifest

        read_manifest(config.dataset_folder)
    if dry_run:
        from diffusion.training.train import estimate_ranks, preflight

        with _prepare_inputs(config, dry_run=True) as (config, store):
            sections = config.dataset_folder, config.model, config.training, config.sampling
            if world_size is not None:
                costs = estimate_ranks(*sections, world_size, store)
                return CommandOutput(costs, costs.lines())
            estimate = preflight(*sections, store)
        return CommandOutput(estimate, [f"{name:10} {text}" for name, text in estimate.lines()])
    restart_mode: Restart = "if_different" if restart_if_different else "never"
    if local:
        from diffusion.training.run_folder import discard

        if restart and not is_follower():
            discard(config.run_folder)
        with display_progress() as progress:
            _warn_of_few_images(config)
            result = _train(config, progress=progress, restart=restart_mode)
        return None if is_follower() else CommandOutput(result, [_describe_training(result)])
    if is_follower():
        with _prepare_inputs(config) as (config, store):
            _train(config, store=store)
        return None
    from diffusion.data.manifest import read_manifest

    read_manifest(config.dataset_folder)
    require_writable(config.run_folder, "training.output")
    with connect("prefect", "mlflow", "s3"):
        require_training_inputs(config)
        _warn_of_few_images(config)
        _check_training(config, "always" if restart else restart_mode)
        from flows.train import train

        training = train(config, "always" if restart else restart_mode)
    return CommandOutput(
        training,
        [f"{_describe_training(training.result)}; MLflow run {training.run_id}"],
    )


def _warn_of_few_images(config: "Params") -> None:
    """Warn if models of the data set cannot be evaluated."""
    from diffusion.data.manifest import read_manifest
    from diffusion.evaluation.config import SMALL_SET, shortage

    if not is_follower() and (words := shortage(read_manifest(config.dataset_folder))) is not None:
        logger.warning("%s: %s", words, SMALL_SET)


def _check_training(config: "Params", restart: "Restart | Literal['always']", *advice: str) -> None:
    """Raise UserError as a training would before its first step, if its inputs are on this machine."""
    from flows.config import registered_autoencoder, registered_initial_weights

    if config.training.stream_bytes is None and not (
        registered_autoencoder(config) or registered_initial_weights(config)
    ):
        from diffusion.training.train import check

        params = config.model, config.training, config.sampling
        check(config.dataset_folder, config.run_folder, *params, restart, *advice)


def _describe_training(result: "TrainResult") -> str:
    return f"{pluralize(result.images, 'image')} seen; {result.final}"


def _train(config: "Params", **options: Any) -> "TrainResult":
    from diffusion.training.train import train

    return train(config.dataset_folder, config.run_folder, config.model, config.training, config.sampling, **options)


@contextmanager
def _prepare_inputs(config: "Params", dry_run: bool = False) -> "Iterator[tuple[Params, RemoteShards | None]]":
    """Configuration with local files for registered models, and the shards' store if training streams them."""
    from flows.config import registered_autoencoder, registered_initial_weights

    from_registry = registered_autoencoder(config) is not None or registered_initial_weights(config) is not None
    streams = config.training.stream_bytes is not None
    if not from_registry and not streams:
        yield config, None
        return
    servers: tuple[Server, ...] = ("mlflow", "s3") if from_registry else ("s3",)
    with connect(*servers):
        from flows.datasets.dvc import RemoteShards
        from flows.environment import data_source

        store = RemoteShards(config.dataset_folder, data_source()) if streams else None
        if from_registry:
            from flows.registry.dependencies import resolve_params

            config = resolve_params(config, dry_run).params
        yield config, store


@pipeline
def evaluate(
    config: "Params",
    model: Annotated[str | None, Option(metavar="URI|FILE", callback=check_model, help=EVALUATED)] = None,
    local: options.Local = False,
) -> CommandOutput:
    """Evaluate the checkpoints, or any model of the images' size, against the held-out images.

    The report is logged to the MLflow run, that of a version to the version's. A model file needs no server.

    Example:  darkroom evaluate --dataset faces --set evaluation.samples=1000

    Example:  darkroom evaluate --dataset faces --model models:/faces/7
    """
    from flows.cli import checks

    if local and not (model is None or is_file(model)):
        raise UserError(f"--local works without a server, and {model} is in the registry: leave --local out")
    if model is None:
        checks.require_run(config)
    elif is_file(model):
        checks.require_shape(Path(model), model, config)
    if local or is_file(model):
        from diffusion.checkpoints import read_model_header
        from diffusion.common.files import sha256_file
        from diffusion.evaluation.evaluate import evaluate as evaluate_models
        from diffusion.evaluation.evaluator import CACHE
        from diffusion.training.ema import models_to_evaluate

        data, folder, losses = config.dataset_folder, config.report_folder, None
        cache = folder / CACHE
        if is_file(model):
            config, models = config.adapt_to_model(read_model_header(Path(model)).model), [Path(model)]
            folder = config.model_report_folder(sha256_file(Path(model)))
        else:
            losses = config.run_folder / "losses.csv"
            models = models_to_evaluate(config.run_folder, folder, config.evaluation.ema_stds)
        settings = config.evaluation, config.sampling
        with display_progress() as progress:
            evaluation = evaluate_models(data, models, *settings, folder, losses, progress, cache, config.gate)
    else:
        with connect("prefect", "mlflow", "s3"):
            if model is not None:
                checks.require_version(model)
                checks.require_shape(checks.fetch_weights(model), model, config)
            from flows.evaluate import evaluate

            evaluation = evaluate(config, model=model)
    metrics = [f"  {name}: {value:.4g}" for name, value in evaluation.metrics().items()]
    folder = config.report_folder if model is None else config.model_report_folder(evaluation.best.sha256)
    report = str(folder / "report.html")
    count = len(evaluation.checkpoints) + len(evaluation.preliminary)
    heading = [f"best of {count} checkpoints:" if model is None else f"{model}:"]
    sampling = evaluation.sampling
    options = f" ({sampling.guidance_options})" if sampling.is_guided else ""
    guidance = [f"guidance: {sampling.guidance_text}{options}"] if model is None else []
    lines = [*heading, *metrics, *guidance, f"report: {report}"]
    return CommandOutput(evaluation.model_dump(mode="json") | {"report": report}, lines)


@pipeline
def promote(
    config: "Params",
    model: Annotated[
        str | None,
        Option(metavar="URI", callback=check_model, help="Registered version, instead of a run's best."),
    ] = None,
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
        with connect("mlflow", "s3"):
            from flows.cli.checks import require_version

            require_version(f"models:/{config.model_name}/{version}")
            from flows.registry import champion

            return describe_champion_change(champion.promote(config.model_name, version, reason, taken_down))
    if reason is not None or taken_down:
        raise UserError("--reason and --taken-down are for a manual override of the gate: give --to VERSION as well")
    from diffusion.data.manifest import read_manifest
    from flows.cli.checks import fetch_weights, require_evaluation, require_run, require_version

    if is_file(model):
        raise UserError(f"{model} is no registered version: `darkroom model import {model} --name NAME` makes it one")
    read_manifest(config.dataset_folder)
    if model is None:
        require_run(config)
        require_evaluation(config.report_folder)
    with connect("prefect", "mlflow", "s3"):
        if model is not None:
            require_version(model)
            require_evaluation(config.model_report_folder(fetch_weights(model).stem), model)
        from flows.promote import promote

        return _describe_promotion(promote(config, model))


def _describe_promotion(result: "PromotionResult") -> CommandOutput:
    error = None if result.promoted else typer.Exit(3)
    return CommandOutput(result, [f"{result.version.uri} is {result.title}: {result.reason}"], error)


@pipeline
def sample(
    config: "Params",
    model: options.Model = None,
    count: Annotated[int | None, Option(min=1, help="Number; default: 64, or one per row of --requests.")] = None,
    requests: Annotated[
        str | None,
        Option(
            metavar="TABLE",
            help="Labels, prompts or sizes in a .csv, .jsonl or .parquet, local or on s3://.",
            callback=check_requests,
        ),
    ] = None,
    seed: options.Seed = 0,
    to: options.To = None,
    output: options.OutFolder = None,
    label: Labels = [],  # noqa: B006
    prompt: Prompts = [],  # noqa: B006
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
    if is_file(model):
        if to is not None:
            raise UserError("--to is where images of a registered model go, and this is a file: use --out FOLDER")
        if requests is not None:
            raise UserError(
                "--requests is for images of a registered model, and this is a file: give it --size, or --label or "
                "--prompt for a model with classes or captions, or register it by `darkroom model import`"
            )
        fields: dict[str, Any] = {"count": 64 if count is None else count, "seed": seed, "size": size}
        fields |= {"label": _unwrap_single(label), "prompt": _unwrap_single(prompt), "negative_prompt": negative_prompt}
        return generate_images(config, settings, "sample", fields, model, output)
    if output is not None:
        raise UserError("--out is where images of a model file go, and this is a registered model: use --to S3_URI")
    from diffusion.common.shapes import parse_size
    from diffusion.generation.config import Conditions
    from flows.cli.checks import require_batch, require_version

    sizes = () if size is None else (parse_size(size),)
    conditions = Conditions(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt, sizes=sizes)
    with connect("prefect", "mlflow", "s3"):
        require_version(model or config.champion, config, conditions)
        require_batch(config, model or config.champion, count, seed, to, conditions, requests, settings)
        from flows.sample import sample

        result = sample(config, model or config.champion, count, seed, to, conditions, requests)
    files = [f"manifest: {result.manifest}", f"contact sheet: {result.contact_sheet}"]
    return CommandOutput(
        result, [f"{pluralize(result.count, 'image')} of {result.model} in {result.uri}", *files, result.took.words]
    )


def _unwrap_single(texts: list[str]) -> str | list[str] | None:
    return texts[0] if len(texts) == 1 else texts or None


@command(app, panel="Pipeline", sets_source=True)
def retrain(
    config: "Params",
    source: Annotated[str | None, Argument(help="Source, as for `darkroom ingest`; default: ingest.source.")] = None,
    version: Annotated[str | None, Option(metavar="DIGEST", help="Data set version, instead of an ingest.")] = None,
    count: options.Count = 64,
    seed: options.Seed = 0,
    to: options.To = None,
    label: Labels = [],  # noqa: B006
    prompt: Prompts = [],  # noqa: B006
    negative_prompt: options.NegativePrompt = None,
    dry_run: DryRun = False,
) -> CommandOutput:
    """Run the whole pipeline: ingest, train, evaluate, promote and sample.

    Steps that are already done for the same inputs are skipped.

    Example:  darkroom retrain ~/faces --dataset faces --set ingest.size=32
    """
    if source is not None and version is not None:
        raise UserError("--version trains on what was ingested before: leave SOURCE out")
    if config.model.low_resolution is not None and (count, seed, to) != (64, 0, None):
        raise UserError("a model with model.low_resolution only upscales images: leave --count, --seed and --to out")
    from diffusion.generation.config import Conditions
    from diffusion.training.config import earlier_runs
    from flows.cli import checks

    conditions = Conditions(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt)
    if version is None:
        checks.require_source(config.ingest)
        checks.require_conditions_in_source(config, conditions)
    if dry_run:
        return _preview_retraining(config, version)
    require_writable(config.run_folder, "training.output")
    with connect("prefect", "mlflow", "s3"):
        if config.model.family != "diffusers":  # which has a tokenizer of its own
            checks.require_prompts(conditions)
        checks.require_destination(to)
        checks.require_extractor(config.evaluation)
        checks.require_models(config)
        if version is None:
            checks.require_enough_images(config, checks.require_ingestable(config))
            checks.require_network(config)
        else:
            from diffusion.evaluation.config import require_enough
            from flows.datasets.checkout import DatasetLocation
            from flows.environment import data_source

            require_enough(DatasetLocation(config.dataset_folder, data_source).choose(version))
        from flows.retrain import retrain

        result = retrain(config, count, seed, to, conditions, version).model_dump(mode="json")
    result["set_aside"] = list(map(str, earlier_runs(config.run_folder)))
    return CommandOutput(result, _describe_retraining(result), None if result["verdict"]["promoted"] else typer.Exit(3))


def _preview_retraining(config: "Params", version: str | None) -> CommandOutput:
    """What a retraining would do: its ingest, and its training if the data set exists."""
    value: dict[str, Any] = {"dry_run": True, "ingest": None, "training": None}
    lines: list[str] = []
    if version is None:
        preview = _preview(config, rebuild="never")
        value["ingest"], lines = preview.model_dump(mode="json"), preview.lines()
    if (config.dataset_folder / "manifest.json").is_file():
        training = _preflight({config.training.dataset: config})
        value["training"] = training.value
        lines += ["training, on the images that are there now:", *training.lines]
    else:
        lines.append("training   measured after `darkroom ingest`, by `darkroom train --dry-run`")
    return CommandOutput(value, lines)


def _describe_retraining(result: dict[str, Any]) -> Iterator[str]:
    from flows.environment import settings
    from flows.local_stack.stack import USER, servers_in_environment
    from flows.tracking.console import clock

    data = result["data"].get("result", result["data"])
    verdict, samples, version = result["verdict"], result["samples"], result["verdict"]["version"]
    title = "champion" if verdict["promoted"] else {"hold": "held", "reject": "rejected"}[verdict["verdict"]]
    if result["skipped"]:
        yield f"skipped    {result['skipped']}"
    elif result["seconds"]:
        times = ", ".join(f"{name} {clock(seconds)}" for name, seconds in result["seconds"].items())
        yield f"took       {clock(sum(result['seconds'].values()))}: {times}"
    duplicates = f", {pluralize(data['duplicates'], 'duplicate')} dropped" if data.get("duplicates") else ""
    yield f"data set   {pluralize(data['kept'], 'image')}{duplicates}, content {data['content_digest'][:12]}"
    if result["quality"]:
        yield f"quality    {result['quality']} (95 % interval; lower is better)"
    yield f"model      models:/{version['model']}/{version['number']} is {title}: {verdict['reason']}"
    if samples is not None:
        yield f"samples    {samples['contact_sheet']}, all in {samples['uri']}"
    elif verdict["champion"] is not None:
        yield "samples    none: this is a super-resolution model, see `darkroom edit upscale --help`"
    else:
        yield "samples    none: there is no champion yet; the report shows images of this version"
    if result["advice"]:
        yield f"advice     {result['advice']}"
    for folder in result["set_aside"] or ():
        yield f"set aside  {folder}: finished and never promoted; training with its settings takes it back"
    yield f"report     {result['report']}"
    yield f"explained  {', '.join(result['explained']['files'])}"
    yield f"MLflow     {result['mlflow_page'] or result['run_id']}"
    if result["prefect_page"]:
        yield f"Prefect    {result['prefect_page']}"
    if (passwords := settings().folder / "credentials.json").is_file():
        external_servers = servers_in_environment()
        if "mlflow" not in external_servers:
            yield f"log in     MLflow: user {USER}, password mlflow_password in {passwords}"
        if "prefect" not in external_servers:
            yield f"log in     Prefect: user:password together, as prefect_auth_string in {passwords}"


@pipeline
def distill(
    config: "Params",
    restart: Annotated[
        bool, Option("--restart", help="With --local: discard a student of other settings or of another teacher.")
    ] = False,
    dry_run: DryRun = False,
    local: options.Local = False,
) -> CommandOutput:
    """Train a student of the champion that generates in two evaluations or so, and promote it if it is as good.

    The same command resumes an interrupted distillation. With servers a student of other settings in the run folder
    makes way: it is in the registry, or else it is moved to runs/earlier.

    Example:  darkroom distill --dataset faces --set distillation.steps=2

    Example:  darkroom distill --dataset faces --local --set distillation.teacher=runs/faces/final.safetensors
    """
    from flows.cli.checks import require_evaluable

    require_evaluable(config)
    if local:
        from diffusion.common.model_files import read_header

        path = config.distillation.teacher
        if path == "champion" or path.startswith("models:/"):
            raise UserError(
                f"distillation.teacher = {path} is in the registry, and --local works without a server: give the path "
                "of its .safetensors, or leave --local out"
            )
        read_header(Path(path))
        from diffusion.checkpoints import read_model_header
        from diffusion.training.config import student_training

        header = read_model_header(Path(path))
        training = student_training(config.training, config.distillation, config.sampling, path, header)
        config = config.model_copy(update={"training": training})
        if dry_run:
            return _preflight({"student": config})
        with display_progress() as progress:
            result = _train(config, progress=progress, restart="if_different" if restart else "never")
        return CommandOutput(result, [_describe_training(result)])
    if restart:
        raise UserError("--restart is for --local: with servers a student of other settings replaces the one before")
    with connect("prefect", "mlflow", "s3"):
        from flows.cli.checks import require_version

        teacher = config.distillation.teacher
        require_version(config.champion if teacher == "champion" else teacher)
        if dry_run:
            from diffusion.training.config import student_training
            from flows.distill import find_teacher

            # The plain function, outside of Prefect.
            training = student_training(config.training, config.distillation, config.sampling, *find_teacher.fn(config))
            return _preflight({"student": config.model_copy(update={"training": training})})
        from flows.distill import distill

        return _describe_promotion(distill(config))


@pipeline
def sweep(
    config: "Params",
    over: Annotated[list[str], Option(metavar="KEY=V,V", help="Values of a field of model or training; repeatable.")],
    dry_run: DryRun = False,
    params_file: options.ParamsFile = Path("params.yaml"),
    settings: options.Set = [],  # noqa: B006
) -> CommandOutput:
    """Grid search: train and evaluate every combination of settings, and rank them in a report; resumable.

    The MLflow runs are children of one parent run. No model is registered; use `retrain` with the best settings.

    Example:  darkroom sweep --dataset faces --over training.learning_rate=1e-3,4e-3 --over model.width=48,64
    """
    from flows.config import SECTIONS, combinations, flatten_sections, format_settings, parse_over

    values = parse_over(over)
    for key in values:
        if key.partition(".")[0] not in SECTIONS:  # whose families have fields of their own, checked with the values
            require_known_key(key, "--over", flatten_sections(config.model_dump(mode="json")))
    points = combinations(config, values)
    from flows.cli.checks import require_evaluable

    require_evaluable(config)
    if dry_run:
        return _preflight({format_settings(point.settings): point.params for point in points})
    with connect("prefect", "mlflow", "s3"):
        from flows.sweep import sweep

        result = sweep(config, values, configuration_options(params_file, settings, values))
    lines = [
        f"{result.ranking.metric} {model.value:.4g} ± {model.error:.2g}  "
        + " ".join(f"{key}={value}" for key, value in model.settings.items())
        for model in result.ranking.models
    ]
    return CommandOutput(result, [*lines, f"report: {result.report}", f"MLflow run {result.run_id}"])


def configuration_options(params_file: Path, settings: list[str], over: "Mapping[str, Any]") -> list[str]:
    """Options by which another command gets the configuration of a sweep, but for the fields that it varies."""
    words = [] if params_file == Path("params.yaml") else ["--params", str(params_file)]
    fixed_settings = (setting for setting in settings if setting.partition("=")[0].strip() not in over)
    return words + [word for setting in fixed_settings for word in ("--set", setting)]


@pipeline
def compare(
    config: "Params",
    family: Annotated[list[str], Option(metavar="NAME", help="Model family; may be repeated.")] = ALL_FAMILIES,
    restart: Annotated[bool, Option("--restart", help="Discard runs of other settings in their folders.")] = False,
    dry_run: DryRun = False,
    local: options.Local = False,
) -> CommandOutput:
    """Train each model family on the same images with the same budget, and rank their samples.

    The same command resumes an interrupted comparison.

    Example:  darkroom compare --dataset faces --set training.minutes=10
    """
    from flows.config import family_variants

    variants = family_variants(config, family)
    from flows.cli.checks import require_evaluable

    require_evaluable(config)
    for variant in () if restart else variants.values():
        _check_training(variant, "never", OTHER_RUN)
    if dry_run:
        return _preflight(variants)
    if local:
        options.hide_prefect_log()
        from flows.sweep import rank_variants
        from flows.tracking.console import phase

        with display_progress() as progress:
            for name, variant in variants.items():
                with phase(name, {}):
                    _train(variant, progress=progress, restart="if_different" if restart else "never")
            result = rank_variants(variants, progress)
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.sweep import compare

            result = compare(config, family, restart)
    from diffusion.evaluation.reports.ranking_report import describe_ranking

    return CommandOutput(result, [*describe_ranking(result.ranking), f"report: {result.report}"])
