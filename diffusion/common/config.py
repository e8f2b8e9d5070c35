"""Base class and shared types of the configuration models, which live beside the code they configure."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from diffusion.common.errors import UserError


class Config(BaseModel):
    """Base class of all configuration models: frozen, with unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


LARGEST_EMA_STD = 0.28
"""Relative standard deviation of a moving average with equal weights over all of training."""
LARGEST_SIZE = 1024
"""Largest height and width of a square image, in pixels."""
LARGEST_SIDE = 2 * LARGEST_SIZE
"""Largest height and width of any image, in pixels."""
LONGEST_NAME = 200
"""Most characters of a name: file systems allow 255 bytes, including prefixes and suffixes."""


def plain_name(name: str) -> str:
    """Return ``name`` if it is valid as a path component, in an S3 key and as an MLflow name; else raise ValueError."""
    # MLflow allows no slash or colon in names, and no quote in search filters.
    is_too_long, separators = not 0 < len(name) <= LONGEST_NAME, set(name) & set("/\\:'\"`")
    if is_too_long or separators or name.startswith(".") or not name.isprintable():
        raise ValueError("must be a plain name: letters, digits, dashes, no slash, colon or quote")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]
"""Name of a data set or of a registered model, safe as a path component."""


def dataset_folder(name: str) -> Path:
    """Folder of the data set ``name``; raises UserError for a name that is no plain folder name."""
    try:
        return Path("data") / plain_name(name)
    except ValueError as error:
        raise UserError(f"data set name {name[:LONGEST_NAME]!r} {error}") from error


DeviceName = Literal["auto", "cpu", "cuda"]
"""Device for computation; auto: a GPU if there is one."""


def is_unset(value: object) -> bool:
    """Whether an optional field has its default, and is not written: older configurations keep their digests."""
    return value is None or value is False or value == "auto"
