"""Errors shown to users: one line that says what is wrong, where, and how to fix it."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

MAX_QUOTED = 200
"""Maximum length of a value in an error."""


class DarkroomError(Exception):
    """Base class of errors shown without a traceback; the command line exits with ``exit_code``."""

    exit_code = 1


class UserError(DarkroomError):
    """Invalid request or configuration; the message says how to fix it."""

    exit_code = 2


class TransientError(DarkroomError):
    """Failure of a server that may soon be gone; a fan-out and Prefect try again what ends with it."""


class ConflictError(DarkroomError):
    """Conflict with what another process or a person wrote or decided first; nothing was overwritten."""

    exit_code = 3


def install_hint(extra: str) -> str:
    """Say how to install an ``extra`` of Darkroom."""
    return f"run `pip install 'darkroom-diffusion[{extra}]'`, or `pip install -e '.[{extra}]'` in a checkout"


def describe_validation_error(detail: Mapping[str, Any], key: str | None = None, known: Collection[str] = ()) -> str:
    """Describe one of pydantic's errors, and how to fix it.

    Args:
        detail: One entry of ``ValidationError.errors()``; without ``input`` the value is not quoted.
        key: Dotted key of the field, as users write it; None: as pydantic does; empty: the whole.
        known: Names of the fields that its section has.
    """
    key = ".".join(map(str, detail["loc"])) if key is None else key
    name = key.rpartition(".")[2]
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {key}: {hint}" if known else f"unknown key {key}"
    message, value = detail["msg"].removeprefix("Value error, "), ""
    if "input" in detail and detail["type"] not in ("value_error", "json_invalid", "missing"):
        value = f" (got {repr(detail['input'])[:MAX_QUOTED]})"
    if detail["type"] in ("tuple_type", "list_type"):
        message = "give a list, as [a, b]"
    elif detail["type"].startswith("model_") and key:
        message = f"this is a section: write its fields on lines of their own, indented below `{name}:`"
    return f"{key}: {message}{value}" if key else f"{message}{value}"
