"""Where a configuration sets a field: file and line, for errors that name the field."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffusion.common.errors import UserError

FIELD = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)+\b")


@contextmanager
def locate_fields(file: Path, overridden: set[str]) -> Iterator[None]:
    """Add file and line to a UserError that names a field which ``file`` sets, unless it is ``overridden``."""
    try:
        yield
    except UserError as error:
        error.args = (_locate(str(error), file, overridden),)
        raise


def _locate(message: str, file: Path, overridden: set[str]) -> str:
    """Of several fields the first one is located. A file that cannot be read adds nothing."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return message
    lines = _lines(root) if root is not None else {}
    names = [name for name in FIELD.findall(message) if name in lines and name not in overridden]
    if not names or str(file) in message:
        return message
    return f"{message} ({names[0]} is set in {file}, line {lines[names[0]]})"


def _lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Line of each key below a node of YAML, counted from 1, by its dotted name."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        lines |= {name: key.start_mark.line + 1} | _lines(value, f"{name}.")
    return lines
