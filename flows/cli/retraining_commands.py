"""Top-level commands that train and judge models: ``retrain``, ``distill``, ``sweep`` and ``compare``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from flows.cli import command as options
from flows.cli.arguments import require_known_key
from flows.cli.command import CommandOutput, command, connect, display_progress
from flows.cli.pipeline_commands import describe_held, describe_promotion, describe_training

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer()
pipeline = command(app, panel="Pipeline")
OTHER_RUN = "give --restart to throw it away, or the settings of that run by --set, or move its folder away"
DryRun = Annotated[bool, Option("--dry-run", help="Only show what would be done, and the estimated time.")]
DiscardStudent = Annotated[
    bool, Option("--restart", help="With --local: discard a student of other settings or of another teacher.")
]


@command(app, panel="Pipeline", sets_source=True)
def retrain(
    config: "Params",
    source: Annotated[str | None, Argument(help="Source, as for `darkroom ingest`; default: ingest.source.")] = None,
    version: Annotated[str | None, Option(metavar="DIGEST", help="Data set version, instead of an ingest.")] = None,
    count: options.Count = 64,
    seed: options.Seed = 0,
    to: options.To = None,
    label: options.Labels = [],  # noqa: B006
    prompt: options.Prompts = [],  # noqa: B006
    negative_prompt: options.NegativePrompt = None,
    dry_run: DryRun = False,
) -> CommandOutput:
    """Run the whole pipeline: ingest, train, evaluate, promote and sample.

    Steps that are already done for the same inputs are skipped.

    Example:  darkroom retrain ~/faces --dataset faces --set ingest.size=32
    """
    if source is not None and version is not None:
        raise UserError("--version trains on what was ingested before: leave SOURCE out")
    from diffusion.training.config import earlier_runs
    from flows.checks import Request, check

    conditions = options.conditions(label, prompt, negative_prompt)
    request = Request(version=version, count=count, seed=seed, to=to, conditions=conditions)
    check("retrain", config, request)
    if dry_run:
        from flows.cli.dry_run import preview_retraining

        return preview_retraining(config, version)
    with connect("prefect", "mlflow", "s3"):
        check("retrain", config, request, connected=True)
        from flows.retrain import retrain

        result = retrain(config, count, seed, to, conditions, version).model_dump(mode="json")
    result["set_aside"] = list(map(str, earlier_runs(config.run_folder)))
    return CommandOutput(result, _describe_retraining(result), None if result["verdict"]["promoted"] else typer.Exit(3))


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
    if result["start"]:
        yield f"start      {result['start']}"
    if result["quality"]:
        yield f"quality    {result['quality']} (95 % interval; lower is better)"
    yield f"model      models:/{version['model']}/{version['number']} is {title}: {verdict['reason']}"
    if not verdict["promoted"]:
        yield f"look at    {describe_held(verdict.get('comparison_page'))}"
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
    config: "Params", restart: DiscardStudent = False, dry_run: DryRun = False, local: options.Local = False
) -> CommandOutput:
    """Train a student of the champion that generates in two evaluations or so, and promote it if it is as good.

    The same command resumes an interrupted distillation. With servers a student of other settings in the run folder
    makes way: it is in the registry, or else it is moved to runs/earlier.

    Example:  darkroom distill --dataset faces --set distillation.steps=2

    Example:  darkroom distill --dataset faces --local --set distillation.teacher=runs/faces/final.safetensors
    """
    from flows.checks import check
    from flows.cli.dry_run import preflight_trainings

    check("distill", config)
    if local:
        from diffusion.api import engine

        config = engine.distillation_config(config)
        if dry_run:
            return preflight_trainings({"student": config})
        with display_progress() as progress:
            result = engine.train(config, restart="if_different" if restart else "never", progress=progress)
        return CommandOutput(result, [describe_training(result)])
    if restart:
        raise UserError("--restart is for --local: with servers a student of other settings replaces the one before")
    with connect("prefect", "mlflow", "s3"):
        check("distill", config, connected=True)
        from flows.distill import configure_student, distill

        if dry_run:
            return preflight_trainings({"student": configure_student.fn(config)})
        return describe_promotion(distill(config))


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
    from flows.checks import check
    from flows.cli.dry_run import preflight_trainings
    from flows.config import SECTIONS, combinations, flatten_sections, format_settings, parse_over

    values = parse_over(over)
    for key in values:
        if key.partition(".")[0] not in SECTIONS:  # whose families have fields of their own, checked with the values
            require_known_key(key, "--over", flatten_sections(config.model_dump(mode="json")))
    points = combinations(config, values)
    check("sweep", config)
    if dry_run:
        return preflight_trainings({format_settings(point.settings): point.params for point in points})
    with connect("prefect", "mlflow", "s3"):
        from flows.sweep import sweep

        result = sweep(config, values, configuration_options(params_file, settings, values))
    lines = [
        f"{result.ranking.metric} {model.value:.4g} ± {model.error:.2g}  "
        + " ".join(f"{key}={value}" for key, value in model.settings.items())
        for model in result.ranking.models
    ]
    return CommandOutput(result, [*lines, f"report: {result.report}", f"MLflow run {result.run_id}"])


def configuration_options(params_file: Path, settings: list[str], over: Mapping[str, Any]) -> list[str]:
    """Options by which another command gets the configuration of a sweep, but for the fields that it varies."""
    words = [] if params_file == Path("params.yaml") else ["--params", str(params_file)]
    fixed_settings = (setting for setting in settings if setting.partition("=")[0].strip() not in over)
    return words + [word for setting in fixed_settings for word in ("--set", setting)]


@pipeline
def compare(
    config: "Params",
    family: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Model family; may be repeated; default: all that train from scratch."),
    ] = None,
    restart: Annotated[bool, Option("--restart", help="Discard runs of other settings in their folders.")] = False,
    dry_run: DryRun = False,
    local: options.Local = False,
) -> CommandOutput:
    """Train each model family on the same images with the same budget, and rank their samples.

    The same command resumes an interrupted comparison.

    Example:  darkroom compare --dataset faces --set training.minutes=10
    """
    from flows.checks import Request, check
    from flows.cli.dry_run import preflight_trainings
    from flows.config import family_variants

    variants = family_variants(config, family or ())
    request = Request(restart="if_different" if restart else "never", advice=(OTHER_RUN,))
    for variant in variants.values():
        check("compare", variant, request)
    if dry_run:
        return preflight_trainings(variants)
    if local:
        options.hide_prefect_log()
        from flows.sweep import compare_here

        with display_progress() as progress:
            result = compare_here(variants, restart, progress)
    else:
        with connect("prefect", "mlflow", "s3"):
            from flows.sweep import compare

            result = compare(config, [*variants], restart)
    from diffusion.evaluation.reports.ranking_report import describe_ranking

    return CommandOutput(result, [*describe_ranking(result.ranking), f"report: {result.report}"])
