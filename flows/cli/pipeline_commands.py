"""The pipeline's commands at the top level, from ``ingest`` to ``retrain``, each of which runs the flow of its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.common.errors import UserError
from flows.cli.command import (
    CommandOutput,
    Count,
    Local,
    Model,
    NegativePrompt,
    OutFolder,
    Reason,
    Seed,
    command,
    connect,
    is_file,
    is_follower,
)
from flows.cli.edit_commands import generate_images
from flows.cli.model_commands import new_champion

if TYPE_CHECKING:
    from diffusion.data.ingest.ingest import IngestResult
    from diffusion.training.train import Restart
    from flows.config import Params
    from flows.datasets.lineage import RemoteShards

app = typer.Typer()
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="S3_URI",
        help="s3://BUCKET (then samples/MODEL/VERSION/BATCH/ in it) or s3://BUCKET/PREFIX; default: our bucket.",
    ),
]
Labels = Annotated[
    list[str],
    typer.Option("--label", metavar="NAME", help="Class to show; given several times, one after the other."),
]
Prompts = Annotated[
    list[str],
    typer.Option("--prompt", metavar="TEXT", help="What to show, for a model trained on captions; as --label."),
]
RequestTable = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="TABLE",
        help="A .csv, .jsonl or .parquet, here or on s3://, with a label or a prompt for each image.",
    ),
]
ALL_FAMILIES = ["ddpm", "vae", "gan", "autoregressive"]
"""Those of ``diffusion.models.config``, which loads too much for ``--help``."""
QUARANTINED_SHOWN = 20
SIDECARS = {".json", ".cls", ".txt"}
"""Files beside the images of a WebDataset shard."""
pipeline = command(app, panel="Pipeline")


@command(app, panel="Pipeline", overrides={"source": "ingest.source"})
def ingest(
    config: "Params",
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder, tar, zip, Parquet, table of URLs, s3:// prefix, wds:, idx: …; default: ingest.source."
        ),
    ] = None,
    requeue: Annotated[bool, typer.Option("--requeue", help="Try again what was quarantined before.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the data set anew, from this source alone.")
    ] = False,
    rebuild_if_different: Annotated[
        bool, typer.Option("--rebuild-if-different", help="The same, but only if images are to be stored differently.")
    ] = False,
    local: Local = False,
) -> CommandOutput:
    """Add what is new in a source of images to a data set of WebDataset shards; record it in DVC and push it.

    In a folder or archive: a sub-folder per class, or metadata.csv / metadata.jsonl with file_name, text, label.

    Example:  darkroom ingest ~/faces --dataset faces --set ingest.size=32
    """
    when: Any = "always" if rebuild else "if_different" if rebuild_if_different else "never"
    if local:
        from diffusion.data.prefetch import local_fan_out
        from flows.tracking.console import console

        fan_out = local_fan_out(config.ingest)
        # Takes as long as the start of worker processes, which goes on meanwhile.
        from diffusion.data.ingest.ingest import ingest as ingest_images

        with console() as progress:
            result = ingest_images(
                config.dataset_folder, config.ingest, progress, requeue=requeue, rebuild=when, fan_out=fan_out
            )
        return CommandOutput(result, _ingested(result, config.ingest.source))
    with connect("prefect", "s3"):
        from flows.ingest import ingest

        done = ingest(config, requeue, when)
    return CommandOutput(
        done.result.model_dump(mode="json") | {"dvc_digest": done.version.digest, "report": str(done.report)},
        [
            *_ingested(done.result, config.ingest.source),
            f"content {done.result.content_digest}",
            f"DVC {done.version.digest} in {done.version.pointer}",
            f"report: {done.report}",
        ],
    )


def _ingested(result: "IngestResult", source: str) -> Iterator[str]:
    """Describe the data set after an ingest of ``source``, and what did not become part of it."""
    yield (
        f"{result.kept:,} images in {result.folder} ({result.added:,} new), {result.duplicates:,} duplicates, "
        f"{result.quarantined_count:,} quarantined"
    )
    shown = result.quarantined[:QUARANTINED_SHOWN]
    yield from (f"  quarantined: {each.source}: {each.reason}" for each in shown)
    if (more := result.quarantined_count - len(shown)) > 0:
        yield f"  … and {more:,} more: darkroom data show --dataset {result.dataset} --all"
    if result.removed:
        yield f"left out: {result.removed:,} that were taken down before"
    if result.relabelled:
        yield f"there already, with another label or caption, which stays: {result.relabelled:,}"
    if result.passed_over:
        ends = [f"{count:,} {end or 'without extension'}" for end, count in result.passed_over.items()]
        yield f"passed over, not named like images: {', '.join(ends[:5])}{' …' if len(ends) > 5 else ''}"
        if result.passed_over.keys() & SIDECARS and ".tar" in source and not source.startswith("wds:"):
            yield f"  if it is a WebDataset, wds:{source} reads labels and captions from them"


@pipeline
def train(
    config: "Params",
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what the run's folder holds and begin anew.")
    ] = False,
    restart_if_different: Annotated[
        bool, typer.Option("--restart-if-different", help="The same, but only if it is a run of other inputs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and how long it would take here; needs no server.")
    ] = False,
    local: Local = False,
) -> CommandOutput | None:
    """Train on a data set, live in MLflow; the same command goes on where it was stopped.

    Several processes share each batch:  torchrun --standalone --nproc-per-node 2 --no-python darkroom train …

    Example:  darkroom train --dataset faces --set training.minutes=10
    """
    if dry_run and (restart or restart_if_different):
        raise UserError("--dry-run discards nothing: leave --restart out")
    if dry_run:
        from diffusion.training.train import preflight

        config = _with_files(config, dry_run=True)
        with _shards(config) as store:
            about = preflight(config.dataset_folder, config.model, config.training, config.sampling, store)
        return CommandOutput(about, [f"{name:10} {words}" for name, words in about.lines()])
    otherwise: Restart = "if_different" if restart_if_different else "never"
    if local:
        from diffusion.training.train import discard
        from diffusion.training.train import train as train_model
        from flows.tracking.console import console

        if restart and not is_follower():
            discard(config.run_folder)
        parts = config.dataset_folder, config.run_folder, config.model, config.training, config.sampling
        with console() as progress:
            result = train_model(*parts, progress=progress, restart=otherwise)
        return None if is_follower() else CommandOutput(result, [f"{result.images} images seen; {result.final}"])
    if is_follower():
        from diffusion.training.train import train as train_along

        config = _with_files(config)
        parts = config.dataset_folder, config.run_folder, config.model, config.training, config.sampling
        with _shards(config) as store:
            train_along(*parts, store=store)
        return None
    with connect("prefect", "mlflow", "s3"):
        from flows.train import train

        done = train(config, "always" if restart else otherwise)
    return CommandOutput(done, [f"{done.result.images} images seen; {done.result.final}; MLflow run {done.run_id}"])


def _with_files(config: "Params", dry_run: bool = False) -> "Params":
    """Replace registered models in ``config``, if it names any, by files."""
    from flows.config import registered, registered_start

    if registered(config) is None and registered_start(config) is None:
        return config
    with connect("mlflow", "s3"):
        from flows.registry.dependencies import resolve_params

        return resolve_params(config, dry_run).params


@contextmanager
def _shards(config: "Params") -> "Iterator[RemoteShards | None]":
    """Open the store of shards if training fetches them as it goes."""
    if config.training.stream_bytes is None:
        yield None
        return
    with connect("s3"):
        from flows.datasets.lineage import RemoteShards
        from flows.environment import data_source

        yield RemoteShards(config.dataset_folder, data_source())


@pipeline
def evaluate(config: "Params", local: Local = False) -> CommandOutput:
    """Evaluate the kept checkpoints against the held-out images; a report page goes onto the run.

    Example:  darkroom evaluate --dataset faces --set evaluation.samples=1000
    """
    if local:
        from diffusion.evaluation.evaluate import evaluate as evaluate_checkpoints
        from diffusion.training.post_hoc_ema import models_to_evaluate
        from flows.tracking.console import console

        with console() as progress:
            done = evaluate_checkpoints(
                config.dataset_folder,
                models_to_evaluate(config.run_folder, config.report_folder, config.evaluation.ema_stds),
                config.evaluation,
                config.sampling,
                config.report_folder,
                config.run_folder / "losses.csv",
                progress,
            )
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.evaluate import evaluate

            done = evaluate(config)
    metrics = [f"  {name}: {value:.4g}" for name, value in done.metrics().items()]
    report = config.report_folder / "report.html"
    return CommandOutput(
        done.model_dump(mode="json") | {"report": str(report)},
        [f"best of {len(done.checkpoints)} checkpoints:", *metrics, f"report: {report}"],
    )


@pipeline
def promote(
    config: "Params",
    version: Annotated[
        int | None,
        typer.Option("--to", min=1, metavar="VERSION", help="Make this version champion, whatever the gate says."),
    ] = None,
    reason: Reason = None,
    taken_down: Annotated[
        bool, typer.Option("--taken-down", help="With --to: even if images that it learned from were taken down.")
    ] = False,
) -> CommandOutput:
    """Register the best checkpoint; it becomes champion if it beats the one there, else it is held (exit code 3).

    With --to, a version that is registered already becomes champion by your decision, and the ledger says so.

    Example:  darkroom promote --dataset faces

    Example:  darkroom promote --dataset faces --to 3 --reason "the hands are better"
    """
    if version is not None:
        with connect("mlflow", "s3"):
            from flows.registry import champion

            return new_champion(champion.promote(config.model_name, version, reason, taken_down))
    if reason is not None or taken_down:
        raise UserError("--reason and --taken-down are for a manual override of the gate: give --to VERSION as well")
    with connect("prefect", "mlflow", "s3"):
        from flows.promote import promote

        done = promote(config)
    error = None if done.promoted else typer.Exit(3)
    return CommandOutput(done, [f"{done.version.uri} is {done.title}: {done.reason}"], error)


@pipeline
def sample(
    config: "Params",
    model: Model = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Number of images; default: 64, or a table's rows.")
    ] = None,
    requests: RequestTable = None,
    seed: Seed = 0,
    to: To = None,
    output: OutFolder = None,
    label: Labels = [],  # noqa: B006
    prompt: Prompts = [],  # noqa: B006
    negative_prompt: NegativePrompt = None,
) -> CommandOutput:
    """Generate images with a registered model to S3, with a manifest; killed and given again, it goes on.

    Those of a model file lie in a folder of this machine (--out), with their manifest, and no server is needed.

    Example:  darkroom sample --model models:/faces@champion --count 1000 --seed 7 --to s3://my-bucket

    Example:  darkroom sample --count 16 --prompt "a red bird" --set sampling.guidance=3

    Example:  darkroom sample --requests birds.csv --set sampling_batch.format=tar --set sampling_batch.runner=processes

    Example:  darkroom sample --model runs/faces/final.safetensors --out faces
    """
    if is_file(model):
        if to is not None:
            raise UserError("--to is where images of a registered model go, and this is a file: use --out FOLDER")
        if len(label) > 1 or len(prompt) > 1:
            raise UserError("several labels or prompts take turns in images of a registered model: give a file one")
        if requests is not None:
            raise UserError("--requests is for images of a registered model, and this is a file: give it --prompt")
        wanted = {"count": 64 if count is None else count, "seed": seed, "negative_prompt": negative_prompt}
        wanted |= {"label": next(iter(label), None), "prompt": next(iter(prompt), None)}
        return generate_images(config, "sample", wanted, model, output)
    if output is not None:
        raise UserError(
            "--out is where images of a model file go, and those of a registered model go to S3: use "
            "--to s3://BUCKET/PREFIX"
        )
    with connect("prefect", "mlflow", "s3"):
        from diffusion.generation.config import Conditions
        from flows.sample import sample

        conditions = Conditions(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt)
        done = sample(config, model or f"models:/{config.model_name}@champion", count, seed, to, conditions, requests)
    return CommandOutput(
        done,
        [
            f"{done.count} images of {done.model} in {done.uri}",
            f"manifest: {done.manifest}",
            f"contact sheet: {done.contact_sheet}",
            done.took.words,
        ],
    )


@command(app, panel="Pipeline", overrides={"source": "ingest.source"})
def retrain(
    config: "Params",
    source: Annotated[
        str | None, typer.Argument(help="Source of images, as of ingest; default: ingest.source.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="DIGEST", help="Train on this version of the data set, and ingest nothing."),
    ] = None,
    count: Count = 64,
    seed: Seed = 0,
    to: To = None,
    label: Labels = [],  # noqa: B006
    prompt: Prompts = [],  # noqa: B006
    negative_prompt: NegativePrompt = None,
) -> CommandOutput:
    """Ingest, train, evaluate, promote and sample: from a folder of images to a champion's images on S3.

    Each step skips what is done already.

    Example:  darkroom retrain ~/faces --dataset faces --set ingest.size=32
    """
    if source is not None and version is not None:
        raise UserError("--version trains on what was ingested before: leave SOURCE out")
    with connect("prefect", "mlflow", "s3"):
        from diffusion.generation.config import Conditions
        from flows.retrain import Unchanged, retrain

        conditions = Conditions(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt)
        done = retrain(config, count, seed, to, conditions, version)
    found = done.model_dump(mode="json")
    if isinstance(done, Unchanged):
        # What a script looks for stands where it does after a retraining that had something to do.
        found = found.pop("before") | found
    error = None if found["verdict"]["promoted"] else typer.Exit(3)
    return CommandOutput(found, _retrained(found), error)


def _retrained(found: dict[str, Any]) -> Iterator[str]:
    """Describe a retraining for people."""
    data = found["data"].get("result", found["data"])
    verdict, samples = found["verdict"], found["samples"]
    version = verdict["version"]
    title = "champion" if verdict["promoted"] else {"hold": "challenger", "reject": "rejected"}[verdict["verdict"]]
    if found["skipped"]:
        yield f"skipped    {found['skipped']}"
    yield f"data set   {data['kept']} images, content {data['content_digest'][:12]}"
    yield f"run        {found['run_id']}"
    yield f"report     {found['report']}"
    yield f"model      models:/{version['model']}/{version['number']}, {title}: {verdict['reason']}"
    if samples is not None:
        yield f"samples    {samples['uri']}"
        yield f"look at    {samples['contact_sheet']}"
    elif verdict["champion"] is not None:
        yield "samples    none: this model enlarges images, see `darkroom edit upscale --help`"
    else:
        yield "samples    none: there is no champion yet"
    yield from (f"           {file}" for file in found["explained"]["files"])


@pipeline
def sweep(
    config: "Params",
    over: Annotated[
        list[str],
        typer.Option("--over", metavar="KEY=V,V", help="Values to try of a field of model or training; several times."),
    ],
) -> CommandOutput:
    """Train and evaluate with every combination of some settings, and compare them on a page; skips what is done.

    In MLflow their runs are children of one. Nothing is registered: `retrain` with the best settings does that.

    Example:  darkroom sweep --dataset faces --over training.learning_rate=1e-3,4e-3 --over model.width=32,64
    """
    from flows.variants import combinations, parse_over

    varied = parse_over(over)
    combinations(config, varied)
    with connect("prefect", "mlflow", "s3"):
        from flows.sweep import sweep

        done = sweep(config, varied)
    lines = [
        f"{done.ranking.metric} {each.value:.4g} ± {each.error:.2g}  "
        + " ".join(f"{key}={value}" for key, value in each.settings.items())
        for each in done.ranking.models
    ]
    return CommandOutput(done, [*lines, f"report: {done.report}", f"MLflow run {done.run_id}"])


@pipeline
def compare(
    config: "Params",
    family: Annotated[
        list[str],
        typer.Option("--family", metavar="NAME", help="ddpm, vae, gan or autoregressive; several times; default: all."),
    ] = ALL_FAMILIES,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard runs of other settings that lie in the families' folders.")
    ] = False,
    local: Local = False,
) -> CommandOutput:
    """Train each family of models for as long on the same images, and compare what they generate.

    Killed and given again, it goes on.

    Example:  darkroom compare --dataset faces --set training.minutes=10
    """
    from diffusion.evaluation.reports.ranking_report import findings
    from flows.variants import RankingResult, family_variants, rank_variants

    otherwise: Restart = "if_different" if restart else "never"
    if local:
        from diffusion.training.train import train
        from flows.tracking.console import console

        variants = family_variants(config, family)
        with console() as progress:
            for each in variants.values():
                parts = each.dataset_folder, each.run_folder, each.model, each.training, each.sampling
                train(*parts, progress=progress, restart=otherwise)
            ranking, report = rank_variants(variants, progress)
        done = RankingResult(ranking=ranking, report=report)
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.compare import compare

            done = compare(config, family, restart)
    return CommandOutput(done, [*findings(done.ranking), f"report: {done.report}"])
