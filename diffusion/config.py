"""One configuration: ``params.yaml``, validated by the models that live beside the code they configure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


DeviceName = Literal["auto", "cpu", "cuda"]
"""What computes; auto: a GPU where there is one."""
