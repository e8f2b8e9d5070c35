"""One configuration: ``params.yaml``, validated by the models that live beside the code they configure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


DeviceName = Literal["auto", "cpu", "cuda"]
"""What computes; auto: a GPU where there is one."""


def unset(value: object) -> bool:
    """Whether a field that came later has its default (null, false or auto), and is then not written (``exclude_if``).

    So configurations from before it was there keep their digests, and all that goes by them.
    """
    return value is None or value is False or value == "auto"
