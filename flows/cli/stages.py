"""``darkroom stage …``: the plain functions as dvc.yaml calls them. No Prefect, no MLflow, no S3."""

import typer

from flows.cli.comparison import ALL, Families
from flows.cli.options import DEFAULT_PARAMS, Json, ParamsFile, Set, follows, load, show

app = typer.Typer(
    name="stage",
    help="One step on this machine alone, without any server (as dvc.yaml calls it).",
    no_args_is_help=True,
)


@app.command()
def ingest(params: ParamsFile = DEFAULT_PARAMS, overrides: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Add what is new in ingest.source to the data set training.dataset; begins anew if it is stored in another way."""
    from diffusion.data.ahead import local_fan_out
    from flows.console import console

    config = load(params, overrides)
    fan_out = local_fan_out(config.ingest)
    # Takes as long as the start of worker processes, which goes on meanwhile.
    from diffusion.data.ingest import ingest

    with console() as progress:
        result = ingest(config.dataset_folder, config.ingest, progress, rebuild="if_different", fan_out=fan_out)
    from flows.cli.ingested import told

    show(result.model_dump(mode="json"), as_json, told(result, config.ingest.source))


@app.command()
def train(params: ParamsFile = DEFAULT_PARAMS, overrides: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Train on the data set; goes on where it was stopped, starts anew if its inputs changed."""
    from diffusion.training.train import train
    from flows.console import console

    config = load(params, overrides)
    parts = config.dataset_folder, config.run_folder, config.model, config.training, config.sampling
    with console() as progress:
        result = train(*parts, progress=progress, restart="if_different")
    if not follows():
        show(result.model_dump(mode="json"), as_json, [f"{result.images} images seen; {result.final}"])


@app.command()
def evaluate(params: ParamsFile = DEFAULT_PARAMS, overrides: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Judge the kept checkpoints against the held-out pictures."""
    from diffusion.evaluation.evaluate import evaluate
    from diffusion.training.candidates import candidates
    from flows.console import console

    config = load(params, overrides)
    with console() as progress:
        result = evaluate(
            config.dataset_folder,
            candidates(config.run_folder, config.report_folder, config.evaluation.ema_lengths),
            config.evaluation,
            config.sampling,
            config.report_folder,
            config.run_folder / "losses.csv",
            progress,
        )
    show(result.model_dump(mode="json"), as_json, [f"report: {config.report_folder / 'report.html'}"])


@app.command()
def compare(
    family: Families = ALL,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train each family for as long on the same pictures, and judge what they draw."""
    from diffusion.evaluation.comparison_page import PAGE, findings
    from diffusion.training.train import train
    from flows.console import console
    from flows.families import contestants, judged, report_folder

    entrants = contestants(load(params, overrides), family)
    with console() as progress:
        for each in entrants.values():
            train(each.dataset_folder, each.run_folder, each.model, each.training, each.sampling, progress=progress)
        result = judged(entrants, progress)
    report = report_folder(entrants) / PAGE
    show(result.model_dump(mode="json"), as_json, [*findings(result), f"report: {report}"])
