"""Commands to look around: ``darkroom config``, ``ls`` and ``open``."""

import json
import os
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument

from diffusion.common.errors import DarkroomError, UserError
from flows.cli.arguments import require_known_key
from flows.cli.command import CommandOutput, DatasetName, ParamsFile, Set, command, connect

if TYPE_CHECKING:
    from flows.config import Params

app = typer.Typer()
config = typer.Typer(name="config", help="Configuration: show, schema, validate.", no_args_is_help=True)
PANEL = "Start and look around"
Kind = Literal["datasets", "runs", "models", "batches"]
MAX_LISTED = 1000
"""Maximum number of entries of a list from a server."""


@command(config, "show")
def show_config(
    key: Annotated[str | None, Argument(metavar="KEY", help="Only a section or field, as training.minutes.")] = None,
    params_file: ParamsFile = Path("params.yaml"),
    settings: Set = [],  # noqa: B006
    dataset: DatasetName = None,
) -> CommandOutput:
    """Show every field of the effective configuration, and where it is from: file, option, preset or default.

    Example:  darkroom config show --set training.images=8000

    Example:  darkroom config show sampling
    """
    from flows.config import flatten_sections, load_with_origins

    options = {} if dataset is None else {"training.dataset": ("--dataset", dataset)}
    params, origins = load_with_origins(params_file, settings, options)
    tree: Any = params.model_dump(mode="json")
    values = flatten_sections(tree)
    if key is not None:
        require_known_key(key, "config show", values)
        values = {name: value for name, value in values.items() if f"{name}.".startswith(f"{key}.")}
        origins = {name: origins[name] for name in values}
        for name in key.split("."):
            tree = tree[name]
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    widths = max(map(len, texts)), min(max(map(len, texts.values())), 32)
    lines = [f"{key:<{widths[0]}}  {text:<{widths[1]}}  {origins[key]}" for key, text in texts.items()]
    return CommandOutput({"params" if key is None else key: tree, "origin": origins}, lines)


@command(config)
def schema() -> CommandOutput:
    """Print the JSON schema of params.yaml, by which editors complete and check it.

    Example:  darkroom config schema > params.schema.json
    """
    from flows.config import params_schema

    value = params_schema()
    return CommandOutput(value, json.dumps(value, indent=2, ensure_ascii=False).splitlines())


@command(config)
def validate(config: "Params", params_file: ParamsFile = Path("params.yaml")) -> CommandOutput:
    """Check params.yaml; exit code 2 with the field and the fix if it is invalid.

    Example:  darkroom config validate --params faces.yaml
    """
    return CommandOutput({"valid": True, "file": str(params_file)}, [f"{params_file} is valid"])


@command(app, panel=PANEL)
def ls(
    kind: Annotated[Kind | None, Argument(help="What to list; default: all.")] = None,
) -> CommandOutput:
    """List data sets, here and in the bucket, runs of this folder, registered models, and sampling batches on S3.

    Example:  darkroom ls models
    """
    from flows.tracking.console import align_columns

    listings: dict[str, list[dict[str, Any]]] = {}
    errors: dict[Kind, str] = {}
    lines: list[str] = []
    for section, (read, head) in LISTS.items():
        if kind not in (None, section):
            continue
        rows = list[dict[str, Any]]()
        try:
            for row in read():
                rows.append(row)
        except DarkroomError as error:
            # Data sets may be here without any server.
            if kind not in (None, "datasets"):
                raise
            errors[section] = str(error)
            lines.append(f"{section}{' in the bucket' if section == 'datasets' else ''}: {error}")
            if section != "datasets":
                continue
        listings[section] = rows
        table = [(section.upper(), *head), *(tuple(_cell(row.get(name)) for name in ("name", *head)) for row in rows)]
        lines += align_columns(table) if rows else [f"no {section}"]
    return CommandOutput({**listings, "errors": errors}, lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _datasets() -> Iterator[dict[str, Any]]:
    """Yield the data sets of this folder, then those that are in the bucket alone."""
    from diffusion.data.manifest import Manifest, read_manifest

    def row(name: str, version: Manifest, place: str) -> dict[str, Any]:
        return {
            "name": name,
            "images": version.kept,
            "shape": f"{version.size}×{version.size}×{version.channels}",
            "classes": len(version.labels),
            "version": version.digest[:12],
            "place": place,
        }

    folders = sorted(path.parent for path in Path("data").glob("*/manifest.json"))
    yield from (row(folder.name, read_manifest(folder), str(folder)) for folder in folders)
    from flows.local_stack.stack import knows_server

    if not knows_server("s3"):
        return
    with connect("s3"):
        from flows.datasets.catalog import Catalog, Heads
        from flows.environment import data_source

        source, local_names = data_source(), {folder.name for folder in folders}
        for name in islice(sorted({*Catalog.names(source)} - local_names), MAX_LISTED):
            catalog = Catalog.of(name, source)
            if (digest := Heads(catalog).newest()) and (version := catalog.version(digest)) is not None:
                yield row(name, version, f"bucket: darkroom data checkout --dataset {name}")


def _runs() -> list[dict[str, Any]]:
    from diffusion.common.model_files import read_header

    rows = []
    places = ("checkpoints", "interrupted")
    for folder in sorted({path.parent for place in places for path in Path("runs").glob(f"**/{place}")}):
        checkpoints = [path for place in places for path in folder.glob(f"{place}/*.safetensors")]
        files = [folder / "final.safetensors", *sorted(checkpoints, key=lambda path: path.name, reverse=True)]
        fields: dict[str, Any] = {"images": None, "family": None}
        for file in filter(Path.is_file, files):
            try:
                header = read_header(file)["model_header"]
                fields = {"images": header["images"], "family": header["model"].get("family", "ddpm")}
                break
            except (UserError, KeyError, TypeError, AttributeError):  # being written, or of another version
                continue
        state = "finished" if files[0].is_file() else "unfinished"
        rows.append({"name": str(folder), "state": state, **fields})
    return rows


def _models() -> list[dict[str, Any]]:
    from flows.checks.models import registered_models

    with connect("mlflow"):
        return [
            {
                "name": name,
                "versions": max((int(entry["version"]) for entry in model.get("latest_versions", ())), default=0),
                **{entry["alias"]: int(entry["version"]) for entry in model.get("aliases", ())},
            }
            for name, model in sorted(registered_models().items())
        ]


def _batches() -> list[dict[str, Any]]:
    with connect("s3"):
        from diffusion.common.parsing import parse_json
        from flows.environment import settings
        from flows.storage.s3 import Store, batch_places
        from flows.storage.s3_errors import MissingObjectError

        store, bucket, rows = Store(), settings().bucket, list[dict[str, Any]]()
        for place in islice(batch_places(store, bucket), MAX_LISTED):
            fields: dict[str, Any] = {}
            # Read without the class, whose module imports torch; it may be damaged.
            with suppress(MissingObjectError, ValueError, KeyError, TypeError):
                batch = parse_json(store.get(bucket, place.key("batch.json"), max_bytes=2**20))
                fields = {
                    "model": f"{batch['model']}/{batch['version']}",
                    "images": batch["count"],
                    "seed": batch["seed"],
                }
            state = "finished" if store.exists(bucket, place.key("_SUCCESS")) else "unfinished"
            rows.append({"name": f"{place}/", **fields, "state": state})
        return rows


LISTS: dict[Kind, tuple[Callable[[], Iterable[dict[str, Any]]], tuple[str, ...]]] = {
    "datasets": (_datasets, ("images", "shape", "classes", "version", "place")),
    "runs": (_runs, ("state", "images", "family")),
    "models": (_models, ("versions", "champion", "previous", "candidate")),
    "batches": (_batches, ("model", "images", "seed", "state")),
}
"""Function and columns of each list, besides the name."""


@command(app, "open", panel=PANEL)
def open_page(
    config: "Params",
    page: Annotated[Literal["mlflow", "prefect", "report"], Argument(help="Which page.")],
) -> CommandOutput:
    """Print the address of MLflow, Prefect or the newest report, with user and password, and open it in a browser.

    Example:  darkroom open mlflow
    """
    access = _report(config) if page == "report" else _server(page)
    lines = [access["url"], *(f"{name:<9} {access[name]}" for name in ("user", "password") if access.get(name))]
    if sys.stdin.isatty() and sys.stderr.isatty():
        try:
            webbrowser.get().open(access["url"])
        except webbrowser.Error:
            lines.append("no browser here: open the address in one")
    return CommandOutput(access, lines)


def _report(config: "Params") -> dict[str, str]:
    pages = [config.report_folder / "report.html", *(config.dataset_report_folder / "dataset").glob("*.html")]
    if not (reports := [page for page in pages if page.is_file()]):
        raise UserError(f"no report in {config.report_folder}: run `darkroom evaluate` or `darkroom ingest` first")
    # The evaluation, if there is one.
    report = reports[0] if reports[0] == pages[0] else max(reports, key=lambda page: page.stat().st_mtime)
    return {"url": report.resolve().as_uri()}


def _server(page: "Literal['mlflow', 'prefect']") -> dict[str, str]:
    from flows.environment import SECRET_VARIABLE, SERVER_VARIABLES, settings
    from flows.local_stack.http_api import split_login
    from flows.local_stack.stack import USER, join_servers, servers_in_environment

    is_external = page in servers_in_environment()
    join_servers(page)
    url, login = split_login(os.environ[SERVER_VARIABLES[page][0]])
    url = url.removesuffix("/")
    # MLflow's pages are about GenAI applications unless the address says otherwise.
    url = url.removesuffix("/api") if page == "prefect" else f"{url}/#/experiments?workflowType=machine_learning"
    if not is_external:
        field = "mlflow_password" if page == "mlflow" else "prefect_auth_string, which is user:password"
        return {"url": url, "user": USER, "password": f"in {settings().folder / 'credentials.json'}, {field}"}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "") if page == "mlflow" else ""
    return {"url": url, "user": user or login.partition(":")[0], "password": f"in the variable {SECRET_VARIABLE[page]}"}
