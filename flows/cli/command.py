"""Decorator that makes a function a command, the options that commands share, and the connection to the servers."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import typer
from typer import Argument, Option

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from flows.cli.arguments import (
    check_destination,
    check_model,
    check_output,
    check_registered,
    check_size,
    require_params_file,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from diffusion.common.progress import Progress
    from diffusion.generation.config import Conditions
    from flows.environment import Server

MAX_ERROR = 2000  # characters of an error; what is wrong stands first
MAX_SEED = 2**63 - 1  # as much as a manifest can hold
Set = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Override a field, as training.batch_size=64.")]
ParamsFile = Annotated[Path, Option("--params", help="Configuration file.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show results, warnings and errors alone, no progress.")]
Verbose = Annotated[
    bool, Option("--verbose", "-v", help="Show more: complete results, logs of the servers' clients, tracebacks.")
]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON object on standard output.")]
DatasetName = Annotated[str | None, Option("--dataset", metavar="NAME", help="Data set; default: training.dataset.")]
DatasetArgument = Annotated[str | None, Argument(metavar="DATASET", help="The same as --dataset.")]
Local = Annotated[bool, Option("--local", help="Work on files of this machine, without a server, as dvc.yaml does.")]


Model = Annotated[
    str | None,
    Option(
        metavar="URI|FILE",
        help="models:/NAME@ALIAS or models:/NAME/NUMBER; default: champion. Or a .safetensors.",
        callback=check_model,
    ),
]
ModelUri = Annotated[
    str | None,
    Option("--model", help="models:/NAME@ALIAS or models:/NAME/NUMBER; default champion.", callback=check_registered),
]
OutFolder = Annotated[
    Path | None,
    Option("--out", metavar="FOLDER", help="Output folder; default: one in samples/.", callback=check_output),
]
To = Annotated[
    str | None,
    Option(
        metavar="S3_URI", help="s3://BUCKET, or a prefix in it; default: DARKROOM_BUCKET.", callback=check_destination
    ),
]
Count = Annotated[int, Option("--count", min=1, help="Number of images.")]
Seed = Annotated[int, Option("--seed", min=0, max=MAX_SEED, help="Seed; its image i is the same everywhere.")]
NegativePrompt = Annotated[str | None, Option("--negative-prompt", help="What not to show; needs sampling.guidance.")]
Size = Annotated[
    str | None,
    Option(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="Width x height in pixels, as 96x64; default: most training images' shape.",
        callback=check_size,
    ),
]
Labels = Annotated[list[str], Option("--label", metavar="NAME", help="Class label; several are used in turn.")]
Prompts = Annotated[list[str], Option("--prompt", help="Text prompt; several are used in turn.")]
Reason = Annotated[str | None, Option("--reason", help="Reason, recorded in the ledger.")]
SigningKeyFile = Annotated[
    Path | None, Option("--key", metavar="FILE", help="Private key in PEM; default: DARKROOM_SIGNING_KEY.")
]
Certificates = Annotated[
    Path | None,
    Option(
        metavar="FILE", help="Its certificate, then the others up to a root; default: DARKROOM_SIGNING_CERTIFICATES."
    ),
]
Verbosity = Literal["quiet", "normal", "verbose"]
VERBOSITY: ContextVar[Verbosity] = ContextVar("verbosity", default="normal")


class CommandOutput(NamedTuple):
    """Result of a command: ``value`` for ``--json``, ``lines`` for people, and the ``error`` raised after printing."""

    value: "BaseModel | Mapping[str, Any]"
    lines: Iterable[str]
    error: Exception | None = None


Function = TypeVar("Function", bound=Callable[..., CommandOutput | None])


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    panel: str | None = None,
    dataset: bool = True,
    dataset_argument: bool = False,
    sets_source: bool = False,
    servers: "tuple[Server, ...]" = (),
) -> Callable[[Function], Function]:
    """Register a function as a command of ``app``.

    Every command has ``--json``, ``--quiet`` and ``--verbose``. One with a parameter ``config`` gets the validated
    configuration in it, and has ``--dataset``, ``--params`` and ``--set``. Standard output has the command's result and
    nothing else: what libraries print goes to standard error. ``panel`` is a heading in the help text; ``sets_source``
    says whether the parameter ``source`` sets ingest.source, ``dataset_argument`` whether an argument may name the data
    set as well; the command is connected to the ``servers``, see ``connect``.
    """

    def register(function: Function) -> Function:
        own_parameters = inspect.signature(function).parameters
        keywords = _add_common_options(own_parameters, dataset, dataset_argument)

        def run(**arguments: Any) -> None:
            as_json = arguments.pop("as_json")
            set_verbosity(arguments.pop("quiet"), arguments.pop("verbose"))
            located: AbstractContextManager[None] = nullcontext()
            # Libraries print to standard output, which belongs to the result.
            with redirect_stdout(sys.stderr):
                if "config" in own_parameters:
                    located = _load_config(arguments, own_parameters, dataset, sets_source)
                with located, connect(*servers) if servers else nullcontext():
                    output = function(**arguments)
                # Lines may still have to be computed.
                lines = [] if output is None else list(output.lines)
            if output is not None:
                _print(output, lines, as_json)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register


def _add_common_options(
    own_parameters: Mapping[str, inspect.Parameter], dataset: bool, dataset_argument: bool
) -> list[inspect.Parameter]:
    has_config = "config" in own_parameters
    common: dict[str, tuple[Any, Any]] = {"dataset": (DatasetName, None)} if has_config and dataset else {}
    common |= {"named": (DatasetArgument, None)} if dataset_argument else {}
    common |= {"params_file": (ParamsFile, Path("params.yaml")), "settings": (Set, [])} if has_config else {}
    common |= {"as_json": (Json, False), "quiet": (Quiet, False), "verbose": (Verbose, False)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = {name: parameter for name, parameter in own_parameters.items() if name != "config"} | {
        name: inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in common.items()
    }
    return [parameter.replace(kind=keyword) for parameter in parameters.values()]


def _load_config(
    arguments: dict[str, Any], own_parameters: Mapping[str, inspect.Parameter], dataset: bool, sets_source: bool
) -> AbstractContextManager[None]:
    """Replace the common options in ``arguments`` by ``config``; returns the context that locates fields in errors."""
    from flows.cli.origins import locate_fields
    from flows.config import load_params, override_keys

    names = [arguments.pop(option, None) for option in ("dataset", "named")]
    if None not in names and names[0] != names[1]:
        raise UserError(f"{names[1]} and --dataset {names[0]} are two data sets: name one")
    fields = {"training.dataset": ("--dataset", names[0] if names[1] is None else names[1])}
    if sets_source:
        fields["ingest.source"] = ("SOURCE", arguments["source"])
    options = {key: option for key, option in fields.items() if option[1] is not None}
    file, settings = (
        arguments[name] if name in own_parameters else arguments.pop(name) for name in ("params_file", "settings")
    )
    if dataset:
        require_params_file(file, arguments | {"dataset": any(names)}, settings)
    arguments["config"] = load_params(file, settings, options)
    return locate_fields(file, {*override_keys(settings), *options})


def _print(output: CommandOutput, lines: list[str], as_json: bool) -> None:
    """Print the result of a command, and raise its error."""
    if as_json:
        value = output.value if isinstance(output.value, Mapping) else output.value.model_dump(mode="json")
        lines = [json.dumps(value, ensure_ascii=False)]
    # Labels, captions and file names are untrusted and may hold terminal control characters.
    for line in lines:
        print(escape_controls(line))
    if isinstance(output.error, DarkroomError):
        # Standard output has its one object already.
        print_error(str(output.error))
        raise typer.Exit(output.error.exit_code)
    if output.error is not None:
        raise output.error


def conditions(
    labels: list[str], prompts: list[str], negative_prompt: str | None, size: str | None = None
) -> "Conditions":
    """Conditions of the images that the options ask for."""
    from diffusion.common.shapes import parse_size
    from diffusion.generation.config import Conditions

    sizes = () if size is None else (parse_size(size),)
    return Conditions(labels=tuple(labels), prompts=tuple(prompts), negative_prompt=negative_prompt, sizes=sizes)


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Set how much this process shows; without either option it stays as it is."""
    if quiet or verbose:
        VERBOSITY.set("verbose" if verbose else "quiet")


def print_error(message: str) -> None:
    """Print an error as one line on standard error."""
    print(escape_controls(f"darkroom: {' '.join(message.split())[:MAX_ERROR]}"), file=sys.stderr)


@contextmanager
def display_progress() -> "Iterator[Progress]":
    """Show progress and log lines on standard error; with ``--quiet`` warnings alone."""
    from diffusion.common.progress import ignore_progress
    from flows.tracking.console import console

    if VERBOSITY.get() == "quiet":
        yield ignore_progress
    else:
        with console() as progress:
            yield progress


def is_follower() -> bool:
    """Whether torchrun started this process beside the one of rank 0, which alone records and prints."""
    return os.environ.get("RANK", "0") != "0"


def hide_prefect_log() -> None:
    """Keep Prefect, before it is imported, from writing log lines to the console, which shows our own progress."""
    if VERBOSITY.get() != "verbose":
        # The Prefect UI still gets every log line.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


@contextmanager
def connect(*servers: "Server") -> Iterator[None]:
    """Use the ``servers`` in this process, and show progress on the console."""
    for name in ("prefect", "mlflow", "boto3"):
        # Before a server is looked for, which nothing could start without them.
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    from flows.environment import settings
    from flows.local_stack.http_api import require
    from flows.local_stack.stack import join_servers
    from flows.tracking.console import PACKAGES

    if settings().log == "json":
        from flows.tracking.json_logs import VARIABLES

        os.environ.update(VARIABLES)
    else:
        hide_prefect_log()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "INFO" if VERBOSITY.get() == "verbose" else "WARNING")
    # Log records of our packages go to the current Prefect run, if there is one.
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(PACKAGES))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    join_servers(*servers)
    require(*servers)
    with display_progress():
        yield
