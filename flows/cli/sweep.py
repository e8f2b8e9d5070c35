"""``darkroom sweep``: the same training with several values of some settings, compared."""

from typing import Annotated

import typer

from flows.cli.options import DEFAULT_PARAMS, DatasetName, Json, ParamsFile, Set, joined, load, show


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel="From pictures to prints")(sweep)


def sweep(
    over: Annotated[
        list[str],
        typer.Option("--over", metavar="KEY=V,V", help="Values to try of a field of model or training; several times."),
    ],
    dataset: DatasetName = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train and evaluate with every combination of some settings, and compare them on a page; skips what is done.

    In MLflow their runs are children of one. Nothing is registered: `retrain` with the best settings does that.

    Example:  darkroom sweep --dataset faces --over training.learning_rate=1e-3,4e-3 --over model.width=32,64
    """
    from flows.combinations import combinations, parse_over

    config = load(params, overrides, dataset)
    varied = parse_over(over)
    combinations(config, varied)
    with joined("prefect", "mlflow", "s3"):
        from flows.sweep import sweep

        done = sweep(config, varied)
    lines = [
        f"{each.merit} {each.value:.4g} ± {each.error:.2g}  "
        + " ".join(f"{key}={value}" for key, value in each.settings.items())
        for each in done.points
    ]
    show(done.model_dump(mode="json"), as_json, [*lines, f"page: {done.page}", f"MLflow run {done.run_id}"])
