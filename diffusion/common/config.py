"""One configuration: ``params.yaml``, validated by the models that live beside the code they configure."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


LARGEST_EMA_STD = 0.28
"""Relative standard deviation of an average that weighs all of training alike."""
LARGEST_SIZE = 1024
"""Height and width of an image, in pixels, at most."""
LONGEST_NAME = 200
"""Characters of a name: file systems take 255 bytes, of which prefixes and suffixes need some."""


def plain_name(name: str) -> str:
    """Return ``name`` if it can be one part of a path, an S3 key and an MLflow name; raises ValueError otherwise."""
    # MLflow takes no slash or colon, and no quote in what it is asked to search for.
    if (
        not 0 < len(name) <= LONGEST_NAME
        or name.startswith(".")
        or not name.isprintable()
        or set(name) & set("/\\:'\"`")
    ):
        raise ValueError("must be a plain name: letters, digits, dashes, no slash, colon or quote")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]
"""Name of a data set or of a registered model: wherever it is read from, it stays inside its folder."""

DeviceName = Literal["auto", "cpu", "cuda"]
"""What computes; auto: a GPU where there is one."""


def unset(value: object) -> bool:
    """Whether a field that came later has its default (null, false or auto), and is then not written (``exclude_if``).

    So configurations from before it was there keep their digests, and all that goes by them.
    """
    return value is None or value is False or value == "auto"
