"""Commands to set up and look around: ``darkroom init``, ``config``, ``ls`` and ``open``."""

import json
import os
import sys
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls, python_literal
from flows.cli.command import CommandOutput, DatasetName, ParamsFile, Set, command, connect

if TYPE_CHECKING:
    from diffusion.data.sources.survey import Survey
    from flows.config import Params

app = typer.Typer()
config = typer.Typer(name="config", help="Configuration: show, schema, validate.", no_args_is_help=True)
PANEL = "Start and look around"
Kind = Literal["datasets", "runs", "models", "batches"]
LISTED = 1000
"""Most entries of a list from a server."""


@command(app, panel=PANEL)
def init(
    source: Annotated[str, Argument(metavar="FOLDER", help="Images: a folder, or any source of `darkroom ingest`.")],
    dataset: DatasetName = None,
    write_metadata: Annotated[
        bool, Option("--write-metadata", help="First write FOLDER/metadata.csv from a table with captions beside it.")
    ] = False,
) -> CommandOutput:
    """Look at images (sizes, channels, classes, captions), and write a commented params.yaml for them.

    An existing params.yaml is never changed. With it, --write-metadata writes the metadata.csv alone.

    Example:  darkroom init ~/faces
    """
    from tempfile import TemporaryDirectory

    from diffusion.common.config import plain_name
    from diffusion.common.files import write_bytes
    from diffusion.data.ingest.config import IngestConfig
    from diffusion.data.sources import survey as surveys

    path = Path("params.yaml")
    if (exists := path.exists()) and not write_metadata:
        raise UserError(f"{path} exists already: edit it, or run `darkroom init` in another folder")
    try:
        plain_name(dataset or "images")
    except ValueError as error:
        raise UserError(f"--dataset {dataset} {error}") from error
    if write_metadata:
        if (table := surveys.find_captions(Path(source))) is None:
            raise UserError(f"no table with captions in {source}: leave --write-metadata out")
        surveys.write_metadata(table)
    settings = IngestConfig(source=source)
    if source.startswith("s3://"):
        with connect("s3"), TemporaryDirectory() as scratch:
            from flows.storage.s3 import S3Objects

            survey = surveys.survey(settings, Path(scratch), S3Objects())
    else:
        with TemporaryDirectory() as scratch:
            survey = surveys.survey(settings, Path(scratch))
    if survey.shorter_sides is None:
        raise UserError(
            f"none of {survey.sampled} images of {source} can be read: give JPEG, PNG, WebP, GIF, BMP or TIFF"
        )
    lines = survey.lines()
    if exists:
        lines.append(f"kept       {path}: set `text: true` in its section `model` to learn the captions")
        return CommandOutput({"params": str(path), "survey": survey.model_dump(mode="json")}, lines)
    size, name = survey.proposed_size, dataset or survey.proposed_name
    write_bytes(path, _template(survey, name, size).encode())
    next_command = "darkroom up && darkroom retrain"
    lines += [f"wrote      {path}: {size}×{size} pixels, data set {name}", f"next       {next_command}"]
    value = {"params": str(path), "dataset": name, "size": size, "next": next_command}
    return CommandOutput(value | {"survey": survey.model_dump(mode="json")}, lines)


def _template(survey: "Survey", name: str, size: int) -> str:
    lines = "\n".join(f"#   {escape_controls(line)}" for line in survey.lines())
    model = ["  text: true  # learn the captions, for --prompt; needs the extra `text`"] if survey.captions else []
    small_images = survey.has_images_below(size)
    return "\n".join(
        [
            "# yaml-language-server: $schema=params.schema.json",
            "# Configuration of Darkroom. Fields that are left out have their defaults.",
            "#   darkroom config show                           all fields, and where each is from",
            "#   darkroom config schema > params.schema.json    completion and checks in an editor",
            lines,
            "ingest:",
            f"  source: {python_literal(survey.source)}",
            f"  size: {size}  # height and width of stored images; twice the size trains four times as long",
            "  # fit: crop  # of images that are not square: crop, pad, squash, or bucket to keep their shapes",
            *(["  # enlarge: true  # images below that size are quarantined otherwise"] if small_images else []),
            "",
            *(["model:", *model, ""] if model else []),
            "training:",
            f"  dataset: {json.dumps(name, ensure_ascii=False)}",
            "  minutes: 10  # or `images`, the number to see; quality grows for hours",
            "  # flip: true  # mirror half of the images: right for most photographs, wrong for text",
            "",
        ]
    )


@command(config, "show")
def show_config(
    params_file: ParamsFile = Path("params.yaml"),
    settings: Set = [],  # noqa: B006
    dataset: DatasetName = None,
) -> CommandOutput:
    """Show every field of the effective configuration, and where it is from: file, option, preset or default.

    Example:  darkroom config show --set training.images=8000
    """
    from flows.config import flatten_sections, load_with_origins

    options = {} if dataset is None else {"training.dataset": ("--dataset", dataset)}
    params, origins = load_with_origins(params_file, settings, options)
    values = flatten_sections(params.model_dump(mode="json"))
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    widths = max(map(len, texts)), min(max(map(len, texts.values())), 32)
    lines = [f"{key:<{widths[0]}}  {text:<{widths[1]}}  {origins[key]}" for key, text in texts.items()]
    return CommandOutput({"params": params.model_dump(mode="json"), "origin": origins}, lines)


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
    """List data sets and runs of this folder, registered models, and sampling batches on S3.

    Example:  darkroom ls models
    """
    listings: dict[str, list[dict[str, Any]]] = {}
    errors: dict[Kind, str] = {}
    lines: list[str] = []
    for section, (read, head) in LISTS.items():
        if kind not in (None, section):
            continue
        try:
            listings[section] = rows = read()
        except DarkroomError as error:
            if kind is not None:
                raise
            errors[section] = str(error)
            lines.append(f"{section}: {error}")
            continue
        table = [(section.upper(), *head), *(tuple(_cell(row.get(name)) for name in ("name", *head)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (table if rows else [])]
        lines += [] if rows else [f"no {section}"]
    return CommandOutput({**listings, "errors": errors}, lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _datasets() -> list[dict[str, Any]]:
    from diffusion.data.manifest import read_manifest

    rows = []
    for path in sorted(Path("data").glob("*/manifest.json")):
        version = read_manifest(path.parent)
        shape = f"{version.size}×{version.size}×{version.channels}"
        fields = {
            "images": version.kept,
            "shape": shape,
            "classes": len(version.labels),
            "version": version.digest[:12],
        }
        rows.append({"name": path.parent.name, **fields})
    return rows


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
    from flows.cli.checks import registered_models

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
        from flows.storage.s3 import MissingObjectError, Store, batch_places

        store, bucket, rows = Store(), settings().bucket, list[dict[str, Any]]()
        for place in islice(batch_places(store, bucket), LISTED):
            fields: dict[str, Any] = {}
            # Read without the class, whose module imports torch; it may be damaged.
            with suppress(MissingObjectError, ValueError, KeyError, TypeError):
                batch = parse_json(store.get(bucket, place.key("batch.json"), most=2**20))
                fields = {
                    "model": f"{batch['model']}/{batch['version']}",
                    "images": batch["count"],
                    "seed": batch["seed"],
                }
            state = "finished" if store.exists(bucket, place.key("_SUCCESS")) else "unfinished"
            rows.append({"name": f"{place}/", **fields, "state": state})
        return rows


LISTS: dict[Kind, tuple[Callable[[], list[dict[str, Any]]], tuple[str, ...]]] = {
    "datasets": (_datasets, ("images", "shape", "classes", "version")),
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
    pages = [config.report_folder / "report.html", *(config.report_folder / "dataset").glob("*.html")]
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
