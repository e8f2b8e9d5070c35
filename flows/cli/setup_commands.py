"""Commands to set up and look around: ``darkroom init``, ``config``, ``ls`` and ``open``."""

import json
import os
import re
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls, python_literal
from flows.cli.arguments import require_known_key
from flows.cli.command import CommandOutput, DatasetName, ParamsFile, Set, command, connect

if TYPE_CHECKING:
    from diffusion.data.sources.survey import Survey
    from flows.config import Params

app = typer.Typer()
config = typer.Typer(name="config", help="Configuration: show, schema, validate.", no_args_is_help=True)
PANEL = "Start and look around"
Kind = Literal["datasets", "runs", "models", "batches"]
MAX_LISTED = 1000
"""Maximum number of entries of a list from a server."""


@command(app, panel=PANEL)
def init(
    source: Annotated[str, Argument(metavar="FOLDER", help="Images: a folder, or any source of `darkroom ingest`.")],
    dataset: DatasetName = None,
    write_metadata: Annotated[
        bool | None,
        Option(
            "--write-metadata/--no-write-metadata",
            help="First write FOLDER/metadata.csv from a table with captions in it; default: asks in a terminal.",
            show_default=False,
        ),
    ] = None,
) -> CommandOutput:
    """Look at images (sizes, channels, classes, captions), and write a commented params.yaml for them.

    A params.yaml that was edited is never changed: --write-metadata then writes the metadata.csv alone.

    Example:  darkroom init ~/faces
    """
    from diffusion.data.sources import survey as surveys

    path, folder = Path("params.yaml"), Path(source)
    if (exists := path.exists()) and not write_metadata:
        raise UserError(f"{path} exists already: edit it, or run `darkroom init` in another folder")
    _require_dataset_name(dataset)
    source = _find_images(source)
    table = surveys.find_captions(folder) if folder.is_dir() else None
    if table is None and write_metadata:
        raise UserError(f"no table with captions in {source}: leave --write-metadata out")
    if table is not None and write_metadata is None and sys.stdin.isatty() and sys.stderr.isatty():
        write_metadata = _ask_for_metadata(surveys.describe_table(table), folder)
    text, name = path.read_text() if exists else None, dataset
    if text is not None:
        survey, own_name = _survey(source), _own_name(text)
        if text == _template(survey, own_name, survey.proposed_size):
            text, name = None, own_name  # as init wrote it
    written = []
    if write_metadata and table is not None:
        written = [f"wrote      {surveys.write_metadata(table)}: the captions of {table.path.name}"]
    return _write_params(_survey(source), written, path, text, name)


def _require_dataset_name(dataset: str | None) -> None:
    from diffusion.common.config import plain_name

    try:
        plain_name(dataset or "images")
    except ValueError as error:
        raise UserError(f"--dataset {dataset} {error}") from error


def _find_images(source: str) -> str:
    """Source of the images in a folder: the folder, or its IDX files."""
    from diffusion.data.sources.conventions import holds_images
    from diffusion.data.sources.known_sets import find_idx

    folder = Path(source)
    return (find_idx(folder) or source) if folder.is_dir() and not holds_images(folder) else source


def _ask_for_metadata(description: str, folder: Path) -> bool:
    guess = description.partition(", but")[0]
    return typer.confirm(f"{guess}. Write {folder}/metadata.csv, to learn them?", default=True, err=True)


def _write_params(
    survey: "Survey", written: list[str], path: Path, edited: str | None, name: str | None
) -> CommandOutput:
    """Write params.yaml, unless it is there and was ``edited``; output of ``init``."""
    from diffusion.common.files import write_bytes

    lines, value = [*survey.lines(), *written], {"params": str(path), "survey": survey.model_dump(mode="json")}
    if edited is not None:
        lines.append(f"kept       {path}, which was edited: {_how_to_learn_captions(edited)} to learn the captions")
        return CommandOutput(value, lines)
    name, size = name or survey.proposed_name, survey.proposed_size
    write_bytes(path, _template(survey, name, size).encode())
    next_command, notes = _advise(survey)
    lines += [*notes, f"wrote      {path}: {size}×{size} pixels, data set {name}", f"next       {next_command}"]
    return CommandOutput(value | {"dataset": name, "size": size, "next": next_command}, lines)


def _survey(source: str) -> "Survey":
    """Survey a source; raises UserError if none of its images can be read."""
    from tempfile import TemporaryDirectory

    from diffusion.data.ingest.config import IngestConfig
    from diffusion.data.sources import survey as surveys

    settings = IngestConfig(source=source)
    with connect("s3") if source.startswith("s3://") else nullcontext(), TemporaryDirectory() as scratch:
        objects = None
        if source.startswith("s3://"):
            from flows.storage.s3 import S3Objects

            objects = S3Objects()
        survey = surveys.survey(settings, Path(scratch), objects)
    if survey.shorter_sides is None:
        raise UserError(
            f"none of {survey.sampled} images of {source} can be read: give JPEG, PNG, WebP, GIF, BMP or TIFF"
        )
    return survey


def _own_name(text: str) -> str:
    """Name of the data set in the text of a params.yaml; "" if there is none."""
    from diffusion.common.parsing import parse_yaml

    with suppress(ValueError, KeyError, TypeError):
        return str(parse_yaml(text)["training"]["dataset"])
    return ""


def _how_to_learn_captions(text: str) -> str:
    has_section = re.search(r"^model:", text, re.MULTILINE)
    return "set `text: true` in its section `model`" if has_section else "add the lines `model:` and `  text: true`"


def _advise(survey: "Survey") -> tuple[str, list[str]]:
    """Next command for as many images as there are, and a note if they are too few to judge a model."""
    from diffusion.evaluation.config import choose_held_out

    if choose_held_out(survey.images) is not None:
        return "darkroom up && darkroom retrain", []
    return "darkroom up && darkroom ingest && darkroom train", [
        "           too few to train a model from nothing, or to judge it: fine-tune another on them "
        "(docs/how-to/fine-tune.md), and register it by `darkroom model import`"
    ]


def _template(survey: "Survey", name: str, size: int) -> str:
    from diffusion.data.ingest.config import IngestConfig
    from diffusion.evaluation.config import choose_held_out

    lines = "\n".join(f"#   {escape_controls(line)}" for line in survey.lines())
    model = ["  text: true  # learn the captions, for --prompt; needs the extra `text`"] if survey.captions else []
    small_images = survey.has_images_below(size)
    held_out, share = list[str](), choose_held_out(survey.images)
    if share not in (None, IngestConfig.model_fields["held_out"].default):
        held_out = [f"  held_out: {share:g}  # so that evaluation gets its 10 images or more, which are not trained on"]
    fit = "  # fit: crop  # of images that are not square: crop, pad, squash, or bucket to keep their shapes"
    if survey.proposed_fit == "bucket":
        fit = f"  fit: bucket  # keeps their shapes; crop would cut {survey.cropped:.0%} of the pixels; or pad, squash"
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
            fit,
            *held_out,
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
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (table if rows else [])]
        lines += [] if rows else [f"no {section}"]
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
