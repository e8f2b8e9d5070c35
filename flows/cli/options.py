"""Options that several verbs share, and what they do before and after their work."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.escaping import escape_controls

if TYPE_CHECKING:
    from flows.environment import Server
    from flows.params import Params

Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of params.yaml, e.g. training.batch_size=64."),
]
ParamsFile = Annotated[Path, typer.Option("--params", help="The configuration file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
DatasetName = Annotated[
    str | None, typer.Option("--dataset", metavar="NAME", help="The data set; default: training.dataset.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="URI|FILE",
        help="models:/NAME@ALIAS or models:/NAME/NUMBER; default: champion. Or a final.safetensors, without servers.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Where to; default: a folder of its own in prints/.")
]
Count = Annotated[int, typer.Option("--count", min=1, help="How many pictures.")]
LARGEST_SEED = 2**63 - 1
"""As manifests hold it."""
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="Picture i of a seed is the same picture everywhere."),
]
DEFAULT_PARAMS = Path("params.yaml")
"""As in ``flows.params``, which loads too much for ``--help``."""


def follows() -> bool:
    """Whether torchrun started this process to compute with another, which keeps the record and says what is done."""
    return os.environ.get("RANK", "0") != "0"


def load(params: Path, overrides: list[str], dataset: str | None = None) -> "Params":
    """The validated configuration, the data set's name given on the command line included."""
    from flows.params import dataset_folder, load_params

    if dataset is not None:
        dataset_folder(dataset)
        overrides = [*overrides, f"training.dataset={json.dumps(dataset, ensure_ascii=False)}"]
    return load_params(params, overrides)


@contextmanager
def joined(*needs: "Server") -> Iterator[None]:
    """Inside, this process uses the servers in ``needs`` and shows progress on the console."""
    from flows.console import OURS, console
    from flows.environment import join, settings
    from flows.health import require

    if settings().log == "json":
        from flows.logs import VARIABLES

        os.environ.update(VARIABLES)
    else:
        # The console shows our own progress; the Prefect UI still gets every line of the log.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # What our packages say goes into the log of the run that it is said in, and nowhere if in none.
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(OURS))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    join(*needs)
    require(*needs)

    from flows.progress import CONSOLE

    with console() as progress:
        token = CONSOLE.set(progress)
        try:
            # Libraries talk on standard output, which belongs to the verb's result.
            with redirect_stdout(sys.stderr):
                yield
        finally:
            CONSOLE.reset(token)


def show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a verb's result: one JSON object, or ``lines`` for people."""
    # Labels, captions and names of files come from anybody, and a terminal obeys what stands in them.
    for line in [json.dumps(result, ensure_ascii=False)] if as_json else lines:
        print(escape_controls(line))
