"""One configuration: ``params.yaml``, validated by the models that live beside the code they configure."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
