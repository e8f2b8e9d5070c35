"""Checks of options and arguments: what they name can be used, before configuration, servers and torch are loaded.

They are callbacks of typer, and every command with such an option has its check. What depends on the configuration or
the registry is in ``flows.checks``.
"""

import difflib
import functools
import re
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from diffusion.common.errors import UserError
from diffusion.common.files import is_model_file, require_writable

MAX_ROWS = 10_000
"""Rows of a table of requests that are read before servers are asked; all are, before the flow run."""
Value = TypeVar("Value")


def when_given(check: Callable[[Value], None]) -> Callable[[Value | None], Value | None]:
    """Make a callback of an option, which may be left out, from the check of its value."""

    @functools.wraps(check)  # typer passes the value under the name that the check gives it
    def callback(*values: Value | None, **named: Value | None) -> Value | None:
        [value] = (*values, *named.values())
        if value is not None:
            check(value)
        return value

    return callback


@when_given
def check_model(model: str) -> None:
    """Check the form of a model URI, or that a model file is one."""
    if is_model_file(model):
        from diffusion.common.model_files import read_header

        read_header(Path(model))
        return
    from flows.storage.tags import parse_model_uri

    parse_model_uri(model)


@when_given
def check_registered(model: str) -> None:
    """Check the form of the URI of a registered model, where no file is taken."""
    if is_model_file(model):
        raise UserError(
            f"--model {model} is a file, and only a registered model is taken here: give models:/NAME@ALIAS or "
            f"models:/NAME/NUMBER, or register it by `darkroom model import {model} --name NAME`"
        )
    check_model(model)


@when_given
def check_size(size: str) -> None:
    """Check the form of a size."""
    from diffusion.common.shapes import parse_size

    try:
        parse_size(size)
    except UserError as error:
        raise UserError(f"--size: {error}") from error


@when_given
def check_destination(uri: str) -> None:
    """Check that ``--to`` has the form of an address on S3."""
    if not uri.startswith("s3://"):
        raise UserError(
            f"--to {uri} is not an S3 address: write s3://BUCKET or s3://BUCKET/PREFIX; images of a model file, "
            "--model FILE.safetensors, go to a local folder by --out"
        )
    from flows.storage.s3 import Location

    Location.parse(uri)


@when_given
def check_requests(table: str) -> None:
    """Check a local table of requests, row by row."""
    if table.startswith("s3://"):
        return
    from flows.sampling.request_rows import read_request_rows

    path = Path(table)
    for _ in islice(read_request_rows(path, path.suffix.lower().removeprefix(".")), MAX_ROWS):
        pass


@when_given
def check_image(path: Path) -> None:
    """Check that an image can be opened."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels: give a smaller image") from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not an image, or damaged"
        raise UserError(f"{path} cannot be read ({reason}): give the path of a JPEG, PNG or WebP image") from error


def check_generated(address: str) -> str:
    """Check that a local image is there and was generated."""
    if address.startswith("s3://"):
        from flows.storage.s3 import Location

        if not Location.parse(address).prefix:
            raise UserError(f"{address} is a whole bucket: give the address of a batch in it, or of one of its images")
        return address
    if not Path(address).is_file():
        raise UserError(
            f"{address} is not a file: give an image of a batch, or its address, s3://BUCKET/…/00000007.png"
        )
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile

    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(address) as image:
        image.load()
        if isinstance(image, PngImageFile) and "darkroom:model" in image.text:
            return address
    raise UserError(
        f"{address} names no model that made it: it is not a generated image, or was saved again without its PNG "
        "metadata; give the address that it was sampled to"
    )


@when_given
def check_output(path: Path) -> None:
    """Check that a folder to write to exists and can be written to, or can be made."""
    require_writable(path, str(path))


@when_given
def check_export(path: Path) -> None:
    """Check that an output folder can be made, or is an earlier export, which the same command finds again."""
    if path.exists() and not (path / "README.md").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--out {path} exists already: give a new folder, or remove it first")
    check_output(path)


@when_given
def check_cron(schedule: str) -> None:
    """Check the form of a cron schedule."""
    if not re.fullmatch(r"(@[a-z]+|([0-9A-Za-z*/,#?-]+\s+){4,5}[0-9A-Za-z*/,#?-]+)", schedule.strip()):
        raise UserError(
            f"{schedule!r} is not a cron schedule: write minute, hour, day, month and weekday, as '0 2 * * *'"
        )


@when_given
def check_existing(path: Path) -> None:
    """Check that a file or folder exists."""
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path")


def require_free_port(host: str, port: int) -> None:
    """Raise UserError if nothing can listen at this address, before a model is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror}): give another --host or --port"
        ) from error


def require_params_file(file: Path, arguments: Mapping[str, Any], settings: list[str]) -> None:
    """Raise UserError without a params.yaml, unless the command line says by itself what to work on."""
    names = ("dataset", "named", "model", "images")
    is_named = any(arguments.get(name) for name in names) or arguments.get("page") in ("mlflow", "prefect")
    is_set = any(setting.partition("=")[0].strip() == "training.dataset" for setting in settings)
    if file == Path("params.yaml") and not file.exists() and not (is_named or is_set):
        raise UserError(
            "no params.yaml in this folder, so nothing says what to work on: run `darkroom init FOLDER` with a folder "
            "of images, go to the folder that has one, or name a data set by --dataset"
        )


def require_known_key(key: str, option: str, keys: Collection[str]) -> None:
    """Raise UserError, with the nearest of the dotted ``keys``, if ``key`` is neither one of them nor a section."""
    if any(f"{known}.".startswith(f"{key}.") for known in keys):
        return
    field = key.rpartition(".")[2]
    same_field = [known for known in keys if known.rpartition(".")[2] == field]
    nearest = same_field or difflib.get_close_matches(key, keys, 1)
    sections = ", ".join(dict.fromkeys(known.partition(".")[0] for known in keys))
    hint = f"did you mean {' or '.join(nearest[:3])}?" if nearest else f"the sections are {sections}"
    raise UserError(f"{option} {key}: there is no such key in params.yaml: {hint}")
