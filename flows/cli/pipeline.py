"""``darkroom ingest | train | evaluate | promote | sample | retrain | explain``: each is the flow of its name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.errors import UserError
from flows.cli.champion import Reason, show_changed
from flows.cli.options import (
    DEFAULT_PARAMS,
    Count,
    DatasetName,
    Json,
    Model,
    Output,
    ParamsFile,
    Seed,
    Set,
    follows,
    joined,
    load,
    show,
)
from flows.cli.requests import is_file, made, show_made

if TYPE_CHECKING:
    from flows.lineage import RemoteShards
    from flows.params import Params

ModelUri = Annotated[
    str | None,
    typer.Option("--model", metavar="URI", help="models:/NAME@ALIAS or models:/NAME/NUMBER; default: champion."),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="S3_URI",
        help="s3://BUCKET (then prints/MODEL/VERSION/BATCH/ in it) or s3://BUCKET/PREFIX; default: the stack's bucket.",
    ),
]
Labels = Annotated[
    list[str],
    typer.Option("--label", metavar="NAME", help="The class to show; given several times, one after the other."),
]
Prompts = Annotated[
    list[str],
    typer.Option("--prompt", metavar="TEXT", help="What to show, for a model told captions (model.text); as --label."),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", metavar="TEXT", help="What not to show; needs sampling.guidance, say 3."),
]


Requests = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="TABLE",
        help="A .csv, .jsonl or .parquet, here or on s3://, with a label or a prompt for each picture.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (ingest, train, evaluate, promote, sample, retrain, explain):
        app.command(rich_help_panel="From pictures to prints")(verb)


def ingest(
    source: Annotated[str, typer.Argument(help="Folder, tar, zip, Parquet, table of URLs, s3:// prefix, wds:, idx: …")],
    dataset: DatasetName = None,
    requeue: Annotated[bool, typer.Option("--requeue", help="Try again what was refused before.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Begin the data set anew, from this source alone.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Add what is new in a source of pictures to a data set of WebDataset shards; record it in DVC and push it.

    In a folder or archive: a sub-folder per class, or metadata.csv / metadata.jsonl with file_name, text, label.

    Example:  darkroom ingest ~/faces --dataset faces --set ingest.size=32
    """
    config = load(params, [*overrides, f"ingest.source={json.dumps(source, ensure_ascii=False)}"], dataset)
    with joined("prefect", "s3"):
        from flows.ingest import ingest

        done = ingest(config, requeue, "always" if rebuild else "never")
    from flows.cli.ingested import told

    result = done.result
    show(
        result.model_dump(mode="json") | {"dvc_digest": done.version.digest, "report": str(done.report)},
        as_json,
        [
            *told(result, config.ingest.source),
            f"content {result.content_digest}",
            f"DVC {done.version.digest} in {done.version.pointer}",
            f"report: {done.report}",
        ],
    )


def train(
    dataset: DatasetName = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what the run's folder holds and begin anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and how long it would take here; needs no server.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train on a data set, live in MLflow; the same command goes on where it was stopped.

    Several processes share each batch:  torchrun --standalone --nproc-per-node 2 --no-python darkroom train …

    Example:  darkroom train --dataset faces --set training.minutes=10
    """
    config = load(params, overrides, dataset)
    if dry_run and restart:
        raise UserError("--dry-run throws nothing away: leave --restart out")
    if dry_run:
        from diffusion.training.train import preflight

        config = _with_files(config, dry_run=True)
        with _shards(config) as store:
            about = preflight(config.dataset_folder, config.model, config.training, config.sampling, store)
        show(about.model_dump(mode="json"), as_json, [f"{name:10} {words}" for name, words in about.lines()])
        return
    if follows():
        from diffusion.training.train import train as train_along

        config = _with_files(config)
        parts = config.dataset_folder, config.run_folder, config.model, config.training, config.sampling
        with _shards(config) as store:
            train_along(*parts, store=store)
        return
    with joined("prefect", "mlflow", "s3"):
        from flows.train import train

        done = train(config, "always" if restart else "never")
    show(
        done.model_dump(mode="json"),
        as_json,
        [f"{done.result.images} images seen; {done.result.final}; MLflow run {done.run_id}"],
    )


def _with_files(config: "Params", dry_run: bool = False) -> "Params":
    """With files in place of registered models, if it names any."""
    from flows.params import registered, registered_start

    if registered(config) is None and registered_start(config) is None:
        return config
    with joined("mlflow", "s3"):
        from flows.dependencies import fetched

        return fetched(config, dry_run).params


@contextmanager
def _shards(config: "Params") -> "Iterator[RemoteShards | None]":
    """Where shards come from if training fetches them as it goes."""
    if config.training.stream_bytes is None:
        yield None
        return
    with joined("s3"):
        from flows.environment import data_source
        from flows.lineage import RemoteShards

        yield RemoteShards(config.dataset_folder, data_source())


def evaluate(
    dataset: DatasetName = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Judge the kept checkpoints against the held-out pictures; a report page goes onto the run.

    Example:  darkroom evaluate --dataset faces --set evaluation.samples=1000
    """
    config = load(params, overrides, dataset)
    with joined("prefect", "mlflow", "s3"):
        from flows.evaluate import evaluate

        done = evaluate(config)
    figures = [f"  {name}: {value:.4g}" for name, value in done.metrics().items()]
    report = config.report_folder / "report.html"
    show(
        done.model_dump(mode="json") | {"report": str(report)},
        as_json,
        [f"best of {len(done.checkpoints)} checkpoints:", *figures, f"report: {report}"],
    )


def promote(
    dataset: DatasetName = None,
    version: Annotated[
        int | None,
        typer.Option("--to", min=1, metavar="VERSION", help="Make this version champion, whatever the gate says."),
    ] = None,
    reason: Reason = None,
    taken_down: Annotated[
        bool, typer.Option("--taken-down", help="With --to: even if pictures that it learned from were taken down.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Register the best checkpoint; it becomes champion if it beats the one there, else challenger (exit 3).

    With --to, a version that is registered already becomes champion by your decision, and the ledger says so.

    Example:  darkroom promote --dataset faces

    Example:  darkroom promote --dataset faces --to 3 --reason "the hands are better"
    """
    config = load(params, overrides, dataset)
    if version is not None:
        with joined("mlflow", "s3"):
            from flows import champion

            changed = champion.promote(config.model_name, version, reason, taken_down)
        show_changed(changed, as_json)
        return
    if reason is not None or taken_down:
        raise UserError("--reason and --taken-down are for promotions by hand: give --to VERSION as well")
    with joined("prefect", "mlflow", "s3"):
        from flows.promote import promote

        done = promote(config)
    show(done.model_dump(mode="json"), as_json, [f"{done.version.uri} is {done.title}: {done.reason}"])
    if not done.promoted:
        raise typer.Exit(3)


def sample(
    model: Model = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many pictures; default: 64, or a table's rows.")
    ] = None,
    requests: Requests = None,
    seed: Seed = 0,
    to: To = None,
    output: Output = None,
    label: Labels = [],  # noqa: B006
    prompt: Prompts = [],  # noqa: B006
    negative_prompt: NegativePrompt = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Print pictures of a registered model to S3, with a manifest; killed and given again, it goes on.

    Those of a model file lie in a folder of this machine (--out), with their manifest, and no server is needed.

    Example:  darkroom sample --model models:/faces@champion --count 1000 --seed 7 --to s3://my-bucket

    Example:  darkroom sample --count 16 --prompt "a red bird" --set sampling.guidance=3

    Example:  darkroom sample --requests birds.csv --set prints.format=tar --set prints.runner=processes

    Example:  darkroom sample --model runs/faces/final.safetensors --out faces
    """
    if model is not None and is_file(model):
        if to is not None:
            raise UserError("--to is where prints of a registered model go, and this is a file: use --out FOLDER")
        if len(label) > 1 or len(prompt) > 1:
            raise UserError("several labels or prompts take turns in prints of a registered model: give a file one")
        if requests is not None:
            raise UserError("--requests is for prints of a registered model, and this is a file: give it --prompt")
        wanted = {"count": 64 if count is None else count, "seed": seed, "negative_prompt": negative_prompt}
        wanted |= {"label": next(iter(label), None), "prompt": next(iter(prompt), None)}
        show_made(made("sample", wanted, model, output, params, overrides), as_json)
        return
    if output is not None:
        raise UserError("--out is where pictures of a model file go, and prints go to S3: use --to s3://BUCKET/PREFIX")
    config = load(params, overrides)
    with joined("prefect", "mlflow", "s3"):
        from diffusion.config_sampling import Asked
        from flows.sample import sample

        asked = Asked(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt)
        done = sample(config, model or f"models:/{config.model_name}@champion", count, seed, to, asked, requests)
    show(
        done.model_dump(mode="json"),
        as_json,
        [
            f"{done.count} pictures of {done.model} in {done.uri}",
            f"manifest: {done.manifest}",
            f"contact sheet: {done.contact_sheet}",
            done.took.words,
        ],
    )


def retrain(
    source: Annotated[str | None, typer.Argument(help="A folder of pictures; default: ingest.source.")] = None,
    dataset: DatasetName = None,
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
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """From a folder of pictures to a judged model in the registry and prints on S3; skips what is done.

    Example:  darkroom retrain ~/faces --dataset faces --set ingest.size=32
    """
    if source is not None and version is not None:
        raise UserError("--version trains on what was ingested before: leave SOURCE out")
    given = [f"ingest.source={json.dumps(source, ensure_ascii=False)}"] if source is not None else []
    config = load(params, [*overrides, *given], dataset)
    with joined("prefect", "mlflow", "s3"):
        from diffusion.config_sampling import Asked
        from flows.retrain import Unchanged, retrain

        asked = Asked(labels=tuple(label), prompts=tuple(prompt), negative_prompt=negative_prompt)
        done = retrain(config, count, seed, to, asked, version)
    found = done.model_dump(mode="json")
    if isinstance(done, Unchanged):
        # What a script looks for stands where it does after a retraining that had something to do.
        found = found.pop("before") | found
    show(found, as_json, list(_retrained(found)))
    if not found["verdict"]["promoted"]:
        raise typer.Exit(3)


def _retrained(found: dict[str, Any]) -> Iterator[str]:
    """A retraining for people."""
    data = found["data"].get("result", found["data"])
    verdict, prints = found["verdict"], found["prints"]
    version = verdict["version"]
    title = "champion" if verdict["promoted"] else {"hold": "challenger", "reject": "rejected"}[verdict["verdict"]]
    if found["skipped"]:
        yield f"skipped    {found['skipped']}"
    yield f"data set   {data['kept']} pictures, content {data['content_digest'][:12]}"
    yield f"run        {found['run_id']}"
    yield f"report     {found['report']}"
    yield f"model      models:/{version['model']}/{version['number']}, {title}: {verdict['reason']}"
    if prints is not None:
        yield f"prints     {prints['uri']}"
        yield f"look at    {prints['contact_sheet']}"
    elif verdict["champion"] is not None:
        yield "prints     none: this model draws small pictures large, see `darkroom upscale --help`"
    else:
        yield "prints     none: there is no champion yet"
    yield from (f"           {file}" for file in found["explained"]["files"])


def explain(
    model: ModelUri = None,
    output: Annotated[Path | None, typer.Option("--out", help="Where to; default: reports/DATASET/explain.")] = None,
    seed: Seed = 0,
    dataset: DatasetName = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Draw the forward process, one training step and the reverse process of a registered model.

    Example:  darkroom explain --model models:/faces@champion --dataset faces
    """
    config = load(params, overrides, dataset)
    with joined("prefect", "mlflow", "s3"):
        from flows.explain import explain

        uri = model or f"models:/{config.model_name}@champion"
        done = explain(config, uri, output or config.report_folder / "explain", seed)
    show(done.model_dump(mode="json"), as_json, [str(file) for file in done.files])
